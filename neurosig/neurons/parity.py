"""How closely two ways of reading neurons agree, and a plain reference implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from neurosig.neurons.contributions import largest
from neurosig.neurons.sites import FFNSites, w_out_norms


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean contributions of the same rollouts, read in two ways.

    Attributes:
        max_abs: Largest absolute difference, over all rollouts and neurons.
        max_rel: Largest relative difference, over the neurons of the expected sets.
        same_sets: Share of the rollouts whose active sets are identical.
        overlap: Mean Jaccard similarity of the two sets of a rollout.
    """

    max_abs: float
    max_rel: float
    same_sets: float
    overlap: float


@torch.no_grad()
def hooked_means(
    model: PreTrainedModel,
    sites: FFNSites,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> Float[Tensor, "n n_layers d_mlp"]:
    """Each neuron's mean `neurosig.neurons.contributions.cett` over the completion, by PyTorch forward hooks alone.

    One forward pass per rollout, whole and unpadded, without a cache: slow, and with no code of the tracers.
    """
    norms = w_out_norms(model, sites)
    means = torch.empty(len(prompts), sites.n_layers, sites.d_mlp)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = [*prompt, *completion]
        handles = []
        for layer, path in enumerate(sites.layers):

            def on_down(
                module: nn.Module, args: Any, out: Tensor, layer: int = layer, row: int = row, first: int = len(prompt)
            ) -> None:
                value, out = (rearrange(part, "... d -> (...) d")[first:].float().cpu() for part in (args[0], out))
                means[row, layer] = (value.abs() * norms[layer] / out.norm(dim=-1, keepdim=True)).mean(dim=0)

            handles.append(model.get_submodule(path).register_forward_hook(on_down))
        try:
            model(torch.tensor([ids], device=model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return means


def agreement(
    means: Float[Tensor, "n n_layers d_mlp"], expected: Float[Tensor, "n n_layers d_mlp"], share: int
) -> Agreement:
    """Compare mean contributions; a rollout's set holds the ``share`` largest of each layer."""
    member, wanted = (
        rearrange(
            largest(rearrange(part, "n layer neuron -> (n layer) neuron"), share),
            "(n layer) neuron -> n (layer neuron)",
            n=len(part),
        )
        for part in (means, expected)
    )
    difference = rearrange((means - expected).abs(), "n layer neuron -> n (layer neuron)")
    relative = difference / rearrange(expected, "n layer neuron -> n (layer neuron)").clamp_min(1e-30)
    shared, either = (member & wanted).sum(dim=1), (member | wanted).sum(dim=1)
    return Agreement(
        max_abs=difference.max().item(),
        max_rel=relative[wanted].max().item(),
        same_sets=(shared == either).float().mean().item(),
        overlap=(shared / either).mean().item(),
    )
