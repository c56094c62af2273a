"""Direct effects on a logit: what embedding, attention, FFN and single neurons add to it without any later layer.

The residual stream is a sum, and with the final norm's scale frozen at its value in the pass the logit is linear in
it (direct logit attribution). So the logit of a token is the sum of the parts' effects, up to rounding. Effects are in
units of a logit before the softcap, if the model has one (Gemma 2): the softcap is monotone and keeps their order, but
not their sum. What a part does through later layers is not in its direct effect. A model that scales what its sublayers
add (Granite), or adds the stream inside its FFN (BLOOM), is refused with a `UserError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from neurosig.explore.forward import Stream
from neurosig.models.completion_hidden import logit_scale
from neurosig.neurons.sites import FFNSites, w_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PartEffects:
    """Direct effects on one token's logit at each position.

    Attributes:
        embedding: Of the embedding (positions included, where they are added).
        attention: Of each layer's attention.
        ffn: Of each layer's FFN.
        bias: Of the biases of final norm and head: the rest, the same whatever the model read.
        logit: The logit itself, by the head, before a softcap.
    """

    embedding: Float64[Tensor, " token"]
    attention: Float64[Tensor, "layer token"]
    ffn: Float64[Tensor, "layer token"]
    bias: Float64[Tensor, " token"]
    logit: Float64[Tensor, " token"]


class Directions:
    """The direction of the residual stream along which a token's logit grows, at each position.

    Args:
        model: The model.
        sites: Where its neurons are.
        stream: What was read at the positions.
        tokens: At each position, the id of the token whose logit is meant.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, sites: FFNSites, stream: Stream, tokens: Int[Tensor, " token"]) -> None:
        head, scale = model.get_output_embeddings(), logit_scale(model)
        tokens = tokens.to(head.weight.device)
        read = head.weight[tokens].double().to(stream.hidden.device) * scale
        added = torch.zeros(len(read), dtype=torch.float64, device=read.device)
        if head.bias is not None:
            added += head.bias[tokens].double().to(read.device) * scale
        self.logit = (stream.hidden.double() * read).sum(-1) + added
        if stream.final_norm is not None:
            added = added + read @ stream.final_norm.bias
            read = stream.final_norm.before(read)
        self.bias, self.residual = added, read
        self._model, self._sites, self._stream = model, sites, stream

    def parts(self) -> PartEffects:
        """Direct effects of the sublayers; together they are the logit."""
        stream, along = self._stream, self.residual
        return PartEffects(
            (stream.embedding.double() * along).sum(-1),
            torch.einsum("ltd,td->lt", stream.attention.double(), along),
            torch.einsum("ltd,td->lt", stream.ffn.double(), along),
            self.bias,
            self.logit,
        )

    @torch.no_grad()
    def neurons(
        self, layer: int, values: Float[Tensor, "token kept"], kept: Sequence[int] | slice = slice(None)
    ) -> Float64[Tensor, "token kept"]:
        """Direct effects of a layer's neurons: value times output direction, through the norm after the FFN if any.

        With the down projection's bias and that norm's, which are no neuron's, they add up to the FFN's effect.

        Args:
            layer: The layer.
            values: Values of its neurons, act(gate) * up.
            kept: Which neurons these are; all by default.
        """
        norm = self._stream.post_norms[layer]
        along = self.residual if norm is None else norm.before(self.residual)
        weight = w_out(self._model, self._sites.layers[layer])[kept].double().to(along.device)
        return values.double().to(along.device) * (along @ weight.T)
