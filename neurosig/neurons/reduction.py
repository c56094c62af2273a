"""A forward pass reduced to active sets while it runs: layer by layer, then once over all layers.

Plain functions of tensors and numbers: for a remote trace they travel by source to the machine that runs the model,
which need not have neurosig.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from neurosig.neurons.contributions import masked_mean, pack_sets

Reduced = tuple[Bool[Tensor, "batch d_mlp"], Float[Tensor, "batch d_mlp"], Tensor | None]
"""A layer's members of each set, every neuron's mean score, and what its `ACTIVE_SETS` function keeps."""


def reduce_layer(
    layer: int,
    value: Float[Tensor, "*positions d_mlp"],
    ffn_out: Float[Tensor, "*positions d_model"] | None,
    w_out: Float[Tensor, "d_mlp d_model"],
    head: Float[Tensor, "vocab d_head"],
    *,
    mask: Bool[Tensor, "batch seq"],
    norms: Sequence[Float[Tensor, " d_mlp"]] | None,
    next_ids: Int[Tensor, "batch seq"] | None,
    contribution: tuple[Callable[..., Tensor], Sequence[str]],
    active: tuple[Callable[..., Any], Sequence[str]],
    set_size: int,
    share: int,
    positive_only: bool,
) -> Reduced:
    """Which neurons of one layer belong to each rollout's set, and every neuron's mean score.

    Args:
        layer: Index of the layer.
        value: Neuron values, ``[batch, seq, d_mlp]``; in OPT, whose FFN runs on flat tokens, ``[batch*seq, d_mlp]``.
        ffn_out: The down projection's output, for a score that names it.
        w_out: The down projection, one row per neuron.
        head: The language-model head, one row per token, for a score that names ``next_embedding``.
        mask: Which positions count.
        norms: Norms of ``w_out`` by layer; None to take them here.
        next_ids: The token that follows each position, for a score that names ``next_embedding``; None for the others.
        contribution: The score, and what it is called with (`neurosig.neurons.contributions.CONTRIBUTIONS`).
        active: The set's function, and what it is called with (`neurosig.neurons.contributions.ACTIVE_SETS`).
        set_size: As in `neurosig.neurons.config.TraceConfig`.
        share: Neurons of one layer in a set that is spread evenly.
        positive_only: As in `neurosig.neurons.config.TraceConfig`.
    """
    mask = mask.to(value.device)
    norm = None if norms is None else norms[layer]
    score = layer_scores(contribution, value.reshape(*mask.shape, -1), ffn_out, w_out, head, norm, next_ids)
    mean = masked_mean(score, mask)
    cut = {"score": score, "mask": mask, "mean": mean, "share": share, "set_size": set_size}
    cut["positive_only"] = positive_only
    member_of, names = active
    found = member_of(**{name: cut[name] for name in names})
    member, kept = found if isinstance(found, tuple) else (found, None)
    return (member & (mean > 0) if positive_only else member), mean, kept


def layer_scores(
    contribution: tuple[Callable[..., Tensor], Sequence[str]],
    value: Float[Tensor, "batch seq d_mlp"],
    ffn_out: Float[Tensor, "*positions d_model"] | None,
    w_out: Float[Tensor, "d_mlp d_model"],
    head: Float[Tensor, "vocab d_head"],
    norm: Float[Tensor, " d_mlp"] | None,
    next_ids: Int[Tensor, "batch seq"] | None,
) -> Float[Tensor, "batch seq d_mlp"]:
    """The contribution of one layer's neurons at each position; the arguments are those of `reduce_layer`."""
    function, names = contribution
    given: dict[str, Any] = {"value": value, "w_out": w_out}
    if "w_out_norm" in names:
        given["w_out_norm"] = w_out.norm(dim=1, dtype=torch.float32) if norm is None else norm
    if ffn_out is not None:
        given["ffn_out"] = ffn_out.reshape(*value.shape[:2], -1)
    if next_ids is not None:
        given["next_embedding"] = head[next_ids.to(head.device)].to(w_out)
    return function(**{name: given[name] for name in names})


def pool(
    hidden: Float[Tensor, "batch seq d_model"], *, mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch d_model"]:
    """Mean of the residual stream over the positions that count, in fp32."""
    return masked_mean(hidden.float(), mask.to(hidden.device))


def finish(
    layers: Sequence[Reduced],
    hidden: Float[Tensor, "n d_model"],
    *,
    over_layers: Callable[..., Any] | None,
    set_size: int,
) -> tuple[Int32[Tensor, "n size"], Float[Tensor, "n size"], Float[Tensor, "n d_model"], Bool[Tensor, "n n_layers"]]:
    """The fields of `neurosig.neurons.contributions.ActiveSets`, and whether each layer's scores are finite."""
    member = torch.stack([part[0].cpu() for part in layers], dim=1)
    mean = torch.stack([part[1].cpu() for part in layers], dim=1)
    finite = mean.isfinite().all(dim=-1)
    member, mean = (rearrange(part, "n layer neuron -> n (layer neuron)") for part in (member, mean))
    if over_layers is not None:
        kept = [part.cpu() for _, _, part in layers if part is not None]
        member = over_layers(member, mean, kept, set_size)
    return *pack_sets(member, mean), hidden.cpu(), finite
