"""A forward pass reduced to active sets while it runs: layer by layer, then once over all layers.

Plain functions of tensors and numbers: for a remote trace they travel by source to the machine that runs the model,
which need not have neurosig.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from neurosig.neurons.contributions import (
    cett,
    largest,
    largest_entries,
    largest_per_token,
    magnitude,
    masked_mean,
    pack_sets,
    unembed,
)


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
    active: str,
    set_size: int,
    share: int,
    positive_only: bool,
) -> tuple[Bool[Tensor, "batch d_mlp"], Float[Tensor, "batch d_mlp"]]:
    """Which neurons of one layer belong to each rollout's set, and every neuron's mean score.

    Args:
        layer: Index of the layer.
        value: Neuron values, ``[batch, seq, d_mlp]``; in OPT, whose FFN runs on flat tokens, ``[batch*seq, d_mlp]``.
        ffn_out: The down projection's output, for the score ``cett``.
        w_out: The down projection, one row per neuron.
        head: The language-model head, one row per token; the score ``unembed`` reads it.
        mask: Which positions count.
        norms: Norms of ``w_out`` by layer; None to take them here.
        next_ids: The token that follows each position, for the score ``unembed``; None for the others.
        active: As in `neurosig.neurons.tracer.TraceConfig`; ``global`` is left to `finish`.
        set_size: As in `neurosig.neurons.tracer.TraceConfig`.
        share: Neurons of one layer in a set that is spread evenly.
        positive_only: As in `neurosig.neurons.tracer.TraceConfig`.
    """
    mask = mask.to(value.device)
    value = value.reshape(*mask.shape, -1)
    if next_ids is not None:
        score = unembed(value, w_out, head[next_ids.to(head.device)].to(w_out))
    else:
        norm = w_out.norm(dim=1, dtype=torch.float32) if norms is None else norms[layer]
        score = magnitude(value, norm) if ffn_out is None else cett(value, norm, ffn_out.reshape(*mask.shape, -1))
    mean = masked_mean(score, mask)
    match active:
        case "layer_mean":
            member = largest(mean, share)
        case "per_token":
            member = largest_per_token(score, mask, share)
        case "entries":
            member = largest_entries(score, mask, set_size)
        case "global":
            member = torch.ones_like(mean, dtype=torch.bool)
        case _:
            raise ValueError(f"active is {active!r}; choose one of layer_mean, global, per_token, entries")
    return (member & (mean > 0) if positive_only else member), mean


def pool(
    hidden: Float[Tensor, "batch seq d_model"], *, mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch d_model"]:
    """Mean of the residual stream over the positions that count, in fp32."""
    return masked_mean(hidden.float(), mask.to(hidden.device))


def finish(
    layers: Sequence[tuple[Bool[Tensor, "n d_mlp"], Float[Tensor, "n d_mlp"]]],
    hidden: Float[Tensor, "n d_model"],
    *,
    active: str,
    set_size: int,
) -> tuple[Int32[Tensor, "n size"], Float[Tensor, "n size"], Float[Tensor, "n d_model"], Bool[Tensor, "n n_layers"]]:
    """The fields of `neurosig.neurons.contributions.ActiveSets`, and whether each layer's scores are finite."""
    member, mean = (torch.stack([part.cpu() for part in parts], dim=1) for parts in zip(*layers, strict=True))
    finite = mean.isfinite().all(dim=-1)
    member, mean = (rearrange(part, "n layer neuron -> n (layer neuron)") for part in (member, mean))
    if active == "global":
        member &= largest(mean, set_size)
    return *pack_sets(member, mean), hidden.cpu(), finite
