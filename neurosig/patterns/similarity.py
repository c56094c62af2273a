"""Reasoning patterns: how alike two rollouts are in the neurons they rely on.

A rollout's signature is its active set; two signatures are compared by Jaccard similarity (reconstruction, after
the neuron agreement of NeuFS and the nearest-neighbour contexts of the first author's earlier code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from neurosig.neurons.contributions import PAD
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import check_installed
from neurosig.runtime.shapes import check_choice

NeighbourSearch = Literal["exact", "usearch"]

DENSE_SHARE = 0.1
"""`nearest_sets` counts neurons that are in more than this share of the sets by a dense product, the others by a
sparse one: where the two cost the same, on two CPU cores. Speed only."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The most similar sets of each query, most similar first.

    Attributes:
        indices: Rows of the searched sets; `PAD` where fewer than m were allowed.
        similarity: Their Jaccard similarities; ``-inf`` at a `PAD`.
    """

    indices: Int[Tensor, "n m_kept"]
    similarity: Float[Tensor, "n m_kept"]


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


def largest(similarity: Float[Tensor, "q n"], m: int) -> tuple[Int[Tensor, "q m_kept"], Float[Tensor, "q m_kept"]]:
    """The columns of the ``m`` largest values of each row, and the values; ties by lower column.

    ``-inf`` forbids a column: `PAD` stands where fewer than ``m`` are allowed.
    """
    m = min(m, similarity.shape[1])
    least = similarity.topk(m).values[:, -1:] if m else similarity[:, :0]  # topk leaves the choice among ties open
    rows, columns = (x.numpy() for x in (similarity >= least).nonzero(as_tuple=True))
    values = similarity.numpy()[rows, columns]
    order = np.lexsort((columns, -values, rows))
    first = np.searchsorted(rows, np.arange(len(similarity)))
    chosen = torch.from_numpy(order[first[:, None] + np.arange(m)])
    kept = torch.from_numpy(values)[chosen]
    return torch.from_numpy(columns)[chosen].masked_fill(kept == -torch.inf, PAD), kept


def nearest_sets(
    sets: Int[Tensor, "n size"],
    m: int,
    *,
    queries: Int[Tensor, "q size_q"] | None = None,
    groups: Int[Tensor, " n"] | None = None,
    query_groups: Int[Tensor, " q"] | None = None,
    block: int = 128,
    backend: NeighbourSearch = "exact",
) -> Neighbours:
    """The ``m`` sets most similar to each query by Jaccard similarity, in memory linear in the number of sets.

    ``exact`` equals `jaccard` and `largest` on the full matrix, ties by lower index, but holds only
    ``block`` rows of it. Frequent neurons are counted by a dense product and rare ones by a sparse product: in
    real sets 2,200 of 46,000 neurons make up 98% of what pairs share.
    ``usearch`` searches a graph index over bit vectors (the extra ``neighbours``): approximate, for 50,000 sets
    and more. Its similarities are exact, but it may miss a neighbour, and not always the same one.

    Args:
        sets: Flat neuron ids of the sets searched, unique in a row; `PAD` where a set is smaller than the widest.
        m: Number of neighbours; all sets, if there are fewer.
        queries: Sets to find neighbours for; ``sets`` themselves by default.
        groups: Sets of the query's group are never its neighbours (the same question, or its duplicates). Without
            ``queries``, each set is a group of its own by default: only the set itself is left out.
        query_groups: The group of each query; with ``queries``, ``groups`` and this must be given together.
        block: Queries compared at a time; memory only.

    Raises:
        UserError: ``m`` is below 1, groups are missing on one side, there is no such backend, or usearch is not
            installed.
    """
    check_choice("backend", backend, NeighbourSearch)
    if m < 1:
        raise UserError(f"nearest_sets: m is {m}; ask for at least 1 neighbour")
    if queries is None:
        queries = sets
        groups = torch.arange(len(sets)) if groups is None else groups
        query_groups = groups
    if (groups is None) != (query_groups is None):
        raise UserError("nearest_sets: groups on one side only; give groups and query_groups")
    width = 1 + max(int(x.max()) if x.numel() else PAD for x in (sets, queries))
    right = _membership(sets, width)
    left = right if queries is sets else _membership(queries, width)
    search = _usearch_neighbours if backend == "usearch" and len(sets) else _exact_neighbours
    return search(left, right, min(m, len(sets)), query_groups, groups, block)


def _exact_neighbours(
    left: sparse.csr_array,
    right: sparse.csr_array,
    m: int,
    left_groups: Int[Tensor, " q"] | None,
    right_groups: Int[Tensor, " n"] | None,
    block: int,
) -> Neighbours:
    frequent = right.count_nonzero(axis=0) > DENSE_SHARE * right.shape[0]
    hot = torch.from_numpy(right[:, frequent].toarray()).float().T
    rare = right[:, ~frequent].T.tocsr().astype(np.float32)  # counts beyond 127
    sizes = torch.from_numpy(right.count_nonzero(axis=1))
    found = _empty_neighbours(left.shape[0], m)
    for start in range(0, left.shape[0], block):
        rows = left[start : start + block]
        shared = torch.from_numpy(rows[:, frequent].toarray()).float() @ hot
        shared += torch.from_numpy((rows[:, ~frequent] @ rare).toarray())
        union = torch.from_numpy(rows.count_nonzero(axis=1))[:, None] + sizes - shared
        similarity = shared.div_(union.clamp_(min=1))
        if left_groups is not None and right_groups is not None:
            similarity[left_groups[start : start + block, None] == right_groups] = -torch.inf
        found.indices[start : start + block], found.similarity[start : start + block] = largest(similarity, m)
    return found


def _usearch_neighbours(
    left: sparse.csr_array,
    right: sparse.csr_array,
    m: int,
    left_groups: Int[Tensor, " q"] | None,
    right_groups: Int[Tensor, " n"] | None,
    block: int,
) -> Neighbours:
    check_installed("nearest_sets", "usearch")
    from usearch.index import Index

    n = right.shape[0]
    # most neurons are in no intersection of two sets
    shared = np.flatnonzero(right.count_nonzero(axis=0) > (1 if left is right else 0))
    if not len(shared):
        return _exact_neighbours(left, right, m, left_groups, right_groups, block)
    ndim = -(-len(shared) // 8) * 8
    index = Index(ndim=ndim, metric="tanimoto", dtype="b1", connectivity=16, expansion_search=128)
    for start in range(0, n, block):
        bits = np.packbits(right[start : start + block][:, shared].toarray() > 0, axis=1)
        index.add(np.arange(start, start + len(bits)), bits)
    group_size = 0 if right_groups is None else int(right_groups.unique(return_counts=True)[1].max())
    candidates = min(m + group_size, n)
    found = _empty_neighbours(left.shape[0], m)
    for start in range(0, left.shape[0], block):
        rows = left[start : start + block]
        bits = np.packbits(rows[:, shared].toarray() > 0, axis=1)
        # two queries at least: a single one is answered in another form
        matches: Any = index.search(np.vstack([bits, bits[:1]]), candidates)
        missed = np.arange(candidates) >= matches.counts[:-1, None]
        keys = np.sort(np.where(missed, n, matches.keys[:-1]).astype(np.int64), axis=1)
        similarity = _paired_jaccard(rows, right, keys % n).masked_fill_(torch.from_numpy(keys == n), -torch.inf)
        if left_groups is not None and right_groups is not None:
            similarity[left_groups[start : start + block, None] == right_groups[keys % n]] = -torch.inf
        order, found.similarity[start : start + block] = largest(similarity, m)
        of_order = torch.from_numpy(keys).gather(1, order.clamp(min=0))
        found.indices[start : start + block] = of_order.masked_fill(order == PAD, PAD)
    return found


def _paired_jaccard(
    rows: sparse.csr_array, sets: sparse.csr_array, keys: Int[np.ndarray, "q c"]
) -> Float[Tensor, "q c"]:
    """Jaccard similarity of each row with its own candidate sets."""
    flat, repeated = keys.ravel(), np.repeat(np.arange(len(keys)), keys.shape[1])
    shared = rows[repeated].multiply(sets[flat]).sum(axis=1)
    union = rows.count_nonzero(axis=1)[repeated] + sets.count_nonzero(axis=1)[flat] - shared
    return torch.from_numpy((shared / np.maximum(union, 1)).astype(np.float32).reshape(keys.shape))


def _empty_neighbours(n: int, m: int) -> Neighbours:
    """To be filled in place: small results kept from every block would pin the memory freed between them."""
    return Neighbours(torch.full((n, m), PAD), torch.full((n, m), -torch.inf))


def _membership(sets: Int[Tensor, "n size"], width: int) -> sparse.csr_array:
    """Sets as rows of a 0/1 matrix [n, width]."""
    ids = sets.numpy()
    kept = ids != PAD
    pointers = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    if pointers[-1] < 2**31:
        pointers = pointers.astype(np.int32)  # scipy then keeps the columns in 32 bits too
    return sparse.csr_array((np.ones(pointers[-1], np.int8), ids[kept], pointers), shape=(len(ids), width))


def _multi_hot(columns: Int[Tensor, "n size"], width: int) -> Float[Tensor, "n width"]:
    # float32 counts are exact up to 2**24 shared neurons, and its product is the fastest on every device
    return torch.zeros(len(columns), width).scatter_(1, columns, 1.0)
