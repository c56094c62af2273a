"""Reasoning patterns: how alike two rollouts are in the neurons they rely on.

A rollout's signature is its active set; two signatures are compared by Jaccard similarity (reconstruction, after
the neuron agreement of NeuFS and the nearest-neighbour contexts of the first author's earlier code).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.contributions import PAD


def jaccard(a: Int[Tensor, "n size_a"], b: Int[Tensor, "m size_b"], *, block: int = 512) -> Float[Tensor, "n m"]:
    """Jaccard similarity ``|a & b| / |a | b|`` of every pair of active sets: exact counts, one rounding each.

    Two empty sets share nothing: their similarity is 0.

    Args:
        a: Flat neuron ids of each set, unique in a row; `PAD` where a set is smaller than the widest.
        b: The sets to compare with.
        block: Sets of each side compared at a time; memory only.
    """
    used, columns = torch.cat([a.flatten(), b.flatten()]).unique(return_inverse=True)
    pads = int(len(used) > 0 and used[0] == PAD)  # unique sorts, so pads are column 0
    left = columns[: a.numel()].view(a.shape).split(block)
    right = columns[a.numel() :].view(b.shape).split(block)
    shared = torch.empty(len(a), len(b))
    for stripe, sets in zip(shared.split(block, dim=1), right, strict=True):
        hot = _multi_hot(sets, len(used))[:, pads:].T
        for cell, rows in zip(stripe.split(block), left, strict=True):
            torch.matmul(_multi_hot(rows, len(used))[:, pads:], hot, out=cell)
    union = (a != PAD).sum(dim=1)[:, None] + (b != PAD).sum(dim=1) - shared
    return shared.div_(union.clamp_(min=1))


def mean_pairwise_jaccard(sets: Int[Tensor, "k size"]) -> float:
    """Agreement of one question's K rollouts: mean Jaccard over its pairs; 1 for a single rollout."""
    k = len(sets)
    if k == 1:
        return 1.0
    similarity = jaccard(sets, sets).double()
    return float((similarity.sum() - similarity.trace()) / (k * (k - 1)))


def rank_neighbours(
    similarity: Float[Tensor, "n m"], forbidden: Bool[Tensor, "n m"], m: int
) -> tuple[Int[Tensor, "n m_kept"], Float[Tensor, "n m_kept"]]:
    """The ``m`` most similar columns of each row, most similar first, ties by column order.

    Forbidden columns come last with similarity ``-inf``.
    """
    values, order = similarity.masked_fill(forbidden, -torch.inf).sort(dim=1, descending=True, stable=True)
    return order[:, :m], values[:, :m]


def _multi_hot(columns: Int[Tensor, "n size"], width: int) -> Float[Tensor, "n width"]:
    # float32 counts are exact up to 2**24 shared neurons, and its product is the fastest on every device
    return torch.zeros(len(columns), width).scatter_(1, columns, 1.0)
