"""One rollout, neuron by neuron and token by token: the scores that `neurosig.neurons.tracer` reduces to an active set.

For inspecting single rollouts; 24 tokens of a 135M model are 4 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.models.prefix import run_prompts
from neurosig.neurons.config import neuron_name
from neurosig.neurons.reduction import layer_scores
from neurosig.neurons.sites import w_out, w_out_norms
from neurosig.neurons.tracer import NeuronTracer
from neurosig.runtime.errors import UserError


class TokenTrace(NamedTuple):
    """Every neuron at every completion token; the positions are those of `neurosig.neurons.tracer`.

    Attributes:
        values: What each neuron's value is (``TraceConfig.value``).
        contributions: Its score (``TraceConfig.score``); their mean over the tokens is what active sets are made of.
    """

    values: Float[Tensor, "layer token neuron"]
    contributions: Float[Tensor, "layer token neuron"]


@torch.no_grad()
def trace_tokens(tracer: NeuronTracer, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> TokenTrace:
    """Trace one rollout and keep every token, on the CPU in fp32.

    Args:
        tracer: A tracer that runs here; a remote one would send every activation over the network.
        prompt_ids: Token ids of the prompt.
        completion_ids: Token ids of the completion.

    Raises:
        UserError: The tracer is remote or reads whole sequences only, or a bad rollout
            (`NeuronTracer.trace_batches`).
    """
    if tracer.reader.whole:
        raise UserError("token by token: this tracer reads whole sequences; use NeuronTracer without remote")
    tracer.trace_batches([prompt_ids], [completion_ids])  # checks its arguments at once
    norms = w_out_norms(tracer.model, tracer.sites)
    about_next = tracer.about_next
    shown = [*prompt_ids[-1:], *completion_ids[:-1]] if about_next else list(completion_ids)
    prefix = run_prompts(tracer.model, [prompt_ids[:-1] if about_next else prompt_ids])
    following = torch.tensor([list(completion_ids)], device=tracer.model.device)

    def keep(layer: int, value: Tensor, output: Tensor | None, weight: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        value, norm = value.reshape(1, len(shown), -1), norms[layer].to(value.device)
        score = layer_scores(tracer.contribution, value, output, weight, head, norm, following if about_next else None)
        return value.float().cpu(), score.cpu()

    def stack(layers: Sequence[tuple[Tensor, Tensor]], _hidden: Tensor) -> tuple[Tensor, Tensor]:
        values, scores = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return values, scores

    values, scores = tracer.reader.read(
        prefix.inputs([shown]),
        keep,
        lambda hidden: hidden.mean(),
        stack,
        value=tracer.config.value,
        with_output=tracer.with_output,
        hidden_layer=tracer.hidden_layer,
    )
    return TokenTrace(
        rearrange(values, "layer 1 token neuron -> layer token neuron"),
        rearrange(scores, "layer 1 token neuron -> layer token neuron"),
    )


@torch.no_grad()
def vocabulary_effect(tracer: NeuronTracer, layer: int, index: int) -> Float[Tensor, " vocab"]:
    """What a value of 1 of this neuron adds directly to each token's logit: its output direction through the head.

    Without the final norm, as the score ``unembed`` (author's NeuFS code).

    Raises:
        UserError: There is no such neuron, or the head reads another width than the residual stream's.
    """
    sites = tracer.sites
    if not (0 <= layer < sites.n_layers and 0 <= index < sites.d_mlp):
        raise UserError(
            f"neuron {neuron_name(layer, index)}: the model has layers 0 to {sites.n_layers - 1} of neurons 0 to "
            f"{sites.d_mlp - 1}"
        )
    head = tracer.model.get_output_embeddings().weight
    if head.shape[1] != sites.d_model:
        raise UserError(
            f"neuron {neuron_name(layer, index)}: the head reads {head.shape[1]} dimensions, the residual stream has "
            f"{sites.d_model}; its direct effect on the vocabulary is not defined"
        )
    return (head @ w_out(tracer.model, sites.layers[layer])[index].to(head)).float().cpu()


def largest_neurons(
    trace: TokenTrace, layer: int, count: int
) -> tuple[Int[Tensor, "token kept"], Float[Tensor, "token kept"]]:
    """Indices and contributions of each token's ``count`` largest contributors in one layer, largest first."""
    values, order = trace.contributions[layer].sort(dim=-1, descending=True, stable=True)
    return order[:, :count], values[:, :count]


def active_contribution(trace: TokenTrace, active: Bool[Tensor, "layer neuron"]) -> Float[Tensor, "layer token"]:
    """Mean contribution of the active neurons at each layer and token; 0 in a layer without any."""
    total = trace.contributions.masked_fill(rearrange(~active, "layer neuron -> layer 1 neuron"), 0).sum(dim=-1)
    return total / active.sum(dim=1, keepdim=True).clamp(min=1)


def weighted_evidence(trace: TokenTrace, weights: Float[Tensor, "layer neuron"]) -> Float[Tensor, "layer token"]:
    """Sum of the neurons' contributions at each layer and token, each times its weight."""
    ignored = rearrange(weights == 0, "layer neuron -> layer 1 neuron")
    return torch.einsum("ltn,ln->lt", trace.contributions.masked_fill(ignored, 0), weights)
