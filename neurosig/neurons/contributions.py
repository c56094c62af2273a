"""From neuron values to contribution scores and active sets: pure tensor functions.

A score says what one neuron does at one position; an active set is what one rollout's scores leave of a layer: which
neurons belong, and each neuron's mean score over the rollout's positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int32
from torch import Tensor

PAD = -1
"""Fills the rows of active sets that are smaller than the largest."""


class ActiveSets(NamedTuple):
    """Active set, contributions and mean hidden state of each rollout.

    Attributes:
        neuron_ids: Its active set as flat ids, ``layer * d_mlp + index``, ascending; shorter rows end in -1.
        contributions: Mean score of each of these neurons over the rollout's positions; 0 where the id is -1.
        hidden_states: Residual stream two thirds up the layers, mean over the same positions.
    """

    neuron_ids: Int32[Tensor, "n size"]
    contributions: Float[Tensor, "n size"]
    hidden_states: Float[Tensor, "n d_model"]


def magnitude(
    value: Float[Tensor, "batch seq d_mlp"], w_out_norm: Float[Tensor, " d_mlp"]
) -> Float[Tensor, "batch seq d_mlp"]:
    """L2 norm of what each neuron adds to the FFN output: ``|a_j| * ||W_down[:, j]||``, in fp32.

    Source: algebra of the FFN, whose output is the sum of ``a_j * W_down[:, j]`` (plus a bias, if any).
    """
    return value.abs().float().mul_(w_out_norm)


def cett(
    value: Float[Tensor, "batch seq d_mlp"],
    w_out_norm: Float[Tensor, " d_mlp"],
    ffn_out: Float[Tensor, "batch seq d_model"],
) -> Float[Tensor, "batch seq d_mlp"]:
    """Magnitude relative to the FFN output: ``|a_j| * ||W_down[:, j]|| / ||FFN output||``, in fp32.

    ``ffn_out`` is the down projection's output, bias included, before any post-norm. Where it is exactly zero
    the score is infinite, or NaN for a silent neuron.

    Source: the contribution score of H-Neurons, after CETT; its use here is a reconstruction.
    """
    return magnitude(value, w_out_norm).div_(ffn_out.float().norm(dim=-1, keepdim=True))


def unembed(
    value: Float[Tensor, "batch seq d_mlp"],
    w_out: Float[Tensor, "d_mlp d_model"],
    next_embedding: Float[Tensor, "batch seq d_model"],
) -> Float[Tensor, "batch seq d_mlp"]:
    """What each neuron adds directly to the next token's logit: ``a_j * (W_down[:, j] . E[y_next])``, signed, in fp32.

    ``next_embedding`` is the head's row of the token that follows each position. The final norm between the residual
    stream and the head is left out, as in the source.

    Source: the author's published NeuFS code.
    """
    return torch.einsum("bsm,jm->bsj", next_embedding, w_out).float().mul_(value)


def masked_mean(x: Float[Tensor, "batch seq d"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch d"]:
    """Mean over the positions where ``mask`` holds, whatever the others hold; NaN for a row without any."""
    kept = x.masked_fill(rearrange(~mask, "batch seq -> batch seq 1"), 0)
    return torch.einsum("bs,bsd->bd", mask.to(x.dtype), kept) / mask.sum(dim=1, keepdim=True)


CONTRIBUTIONS: Mapping[str, Callable[..., Tensor]] = {"cett": cett, "magnitude": magnitude, "unembed": unembed}
"""The scores of a neuron at a position; each is called with those tensors of `SCORED` that its parameters name."""
SCORED = ("value", "w_out", "w_out_norm", "ffn_out", "next_embedding")
CUT = ("score", "mask", "mean", "share", "set_size", "positive_only")
"""What the function of an active set may name; see `ACTIVE_SETS`."""


def largest(mean: Float[Tensor, "batch d"], share: int) -> Bool[Tensor, "batch d"]:
    """The ``share`` largest entries of each row; of equal values the lower index belongs. NaN counts as largest.

    A stable sort: ``torch.topk`` leaves the choice among equal values open. Source: measured default.
    """
    order = mean.sort(dim=-1, descending=True, stable=True).indices[:, :share]
    return torch.zeros_like(mean, dtype=torch.bool).scatter_(1, order, True)


def largest_per_token(
    score: Float[Tensor, "batch seq d_mlp"], mask: Bool[Tensor, "batch seq"], share: int
) -> Bool[Tensor, "batch d_mlp"]:
    """Union over the masked positions of the ``share`` largest neurons at each (per-token top-k; reconstruction)."""
    return (_of_each_token(score, share) & rearrange(mask, "batch seq -> batch seq 1")).any(dim=1)


def _of_each_token(score: Float[Tensor, "batch seq d_mlp"], k: int) -> Bool[Tensor, "batch seq d_mlp"]:
    top = score.topk(min(k, score.shape[-1]), dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, True)


def largest_entries(
    score: Float[Tensor, "batch seq d_mlp"], mask: Bool[Tensor, "batch seq"], set_size: int
) -> Bool[Tensor, "batch d_mlp"]:
    """Neurons among the ``set_size`` largest (position, neuron) pairs of the masked positions (author's NeuFS code)."""
    d_mlp = score.shape[-1]
    masked = score.masked_fill(rearrange(~mask, "batch seq -> batch seq 1"), -torch.inf)
    flat = rearrange(masked, "batch seq d_mlp -> batch (seq d_mlp)")
    top = flat.topk(min(set_size, flat.shape[1]), dim=1)
    hits = torch.zeros(len(score), d_mlp, dtype=torch.int32, device=score.device)
    return hits.scatter_add_(1, top.indices % d_mlp, (top.values > -torch.inf).int()) > 0


def everything(mean: Float[Tensor, "batch d_mlp"]) -> Bool[Tensor, "batch d_mlp"]:
    """All neurons, of which `over_layers` keeps the largest means."""
    return torch.ones_like(mean, dtype=torch.bool)


def over_layers(
    member: Bool[Tensor, "n d"], mean: Float[Tensor, "n d"], carried: Sequence[Tensor], set_size: int
) -> Bool[Tensor, "n d"]:
    """The members among the ``set_size`` largest means of all layers (global top-k; reconstruction)."""
    return member & largest(mean, set_size)


def token_entries(
    score: Float[Tensor, "batch seq d_mlp"],
    mask: Bool[Tensor, "batch seq"],
    share: int,
    set_size: int,
    positive_only: bool,
) -> tuple[Bool[Tensor, "batch d_mlp"], Float[Tensor, "batch best_and_entries"]]:
    """The first of two cuts: the ``share`` largest of the layer at each token, with their scores for the second.

    Returns:
        The neurons that survive at one token at least; and each neuron's best surviving score, ``-inf`` without one,
        before the layer's ``set_size`` best surviving (position, neuron) scores.

    Source: the reading of N-OPSD in INFLOW's appendix D, token-level and global top-k attribution; it states neither k
    nor that the global one counts entries, without which every set would have the same size (reconstruction).
    """
    kept = _of_each_token(score, share) & rearrange(mask, "batch seq -> batch seq 1")
    entries = score.masked_fill(~(kept & (score > 0) if positive_only else kept), -torch.inf)
    flat = rearrange(entries, "batch seq d_mlp -> batch (seq d_mlp)")
    best = entries.amax(dim=1)
    return best > -torch.inf, torch.cat([best, flat.topk(min(set_size, flat.shape[1]), dim=1).values], dim=1)


def entries_over_layers(
    member: Bool[Tensor, "n d"], mean: Float[Tensor, "n d"], carried: Sequence[Tensor], set_size: int
) -> Bool[Tensor, "n d"]:
    """The second cut of `token_entries`: neurons with one of the ``set_size`` best entries of all layers."""
    width = member.shape[1] // len(carried)
    best = torch.cat([part[:, :width] for part in carried], dim=1)
    entries = torch.cat([part[:, width:] for part in carried], dim=1)
    least = entries.topk(min(set_size, entries.shape[1]), dim=1).values[:, -1:]
    return member & (best >= least)


setattr(everything, "over_layers", over_layers)  # noqa: B010
setattr(token_entries, "over_layers", entries_over_layers)  # noqa: B010

ACTIVE_SETS: Mapping[str, Callable[..., Any]] = {
    "layer_mean": largest,
    "global": everything,
    "per_token": largest_per_token,
    "entries": largest_entries,
    "token_entries": token_entries,
}
"""Which neurons of a layer are in a rollout's set; each is called with those of `CUT` that its parameters name.

It returns the members, or the members and a tensor to keep, ``[batch, any]``. Its attribute ``over_layers``, if it has
one, then cuts the set over all layers, called as the function of that name here."""


def pack_sets(
    member: Bool[Tensor, "n n_neurons"], mean: Float[Tensor, "n n_neurons"]
) -> tuple[Int32[Tensor, "n size"], Float[Tensor, "n size"]]:
    """Members of each row in ascending order and their means; shorter rows end in `PAD` with value 0."""
    counts = member.sum(dim=1)
    width = int(counts.max())
    filled = torch.arange(width, device=member.device) < rearrange(counts, "n -> n 1")
    rows, columns = member.nonzero(as_tuple=True)
    ids = torch.full(filled.shape, PAD, dtype=torch.int32, device=member.device).masked_scatter_(filled, columns.int())
    return ids, mean.new_zeros(filled.shape).masked_scatter_(filled, mean[rows, columns])


def neurons_per_layer(n_layers: int, d_mlp: int, set_size: int | float) -> int:
    """Each layer's part of a set of about ``set_size`` neurons, or below 1 of this share of all; rounded up."""
    if isinstance(set_size, float):
        return math.ceil(round(set_size * d_mlp, 6))  # .07 * 100 is a little above 7
    return min(-(-set_size // n_layers), d_mlp)


def concat_sets(parts: Sequence[ActiveSets]) -> ActiveSets:
    """The rollouts of all parts, in order, padded to the widest set among them."""
    width = max(part.neuron_ids.shape[1] for part in parts)

    def widened(tensor: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)

    return ActiveSets(
        torch.cat([widened(part.neuron_ids, PAD) for part in parts]),
        torch.cat([widened(part.contributions, 0) for part in parts]),
        torch.cat([part.hidden_states for part in parts]),
    )
