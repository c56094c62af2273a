"""The one file that imports nnsight: what neurosig reads from a model's forward pass.

nnsight leaves an inert dispatcher in the ``forward`` slot of the model's modules. It registers no hooks, and the
model's outputs outside a trace stay the same to the bit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import nnsight
from torch import Tensor
from transformers import PreTrainedModel

from neurosig.sites import FFNSites

T = TypeVar("T")


class FFNEnvoy:
    """A model seen at its FFN sites; build it once for a model."""

    def __init__(self, model: PreTrainedModel, sites: FFNSites) -> None:
        self._envoy = nnsight.NNsight(model)
        self._layers = [
            (self._envoy.get(act), self._envoy.get(down), self._envoy.get(block))
            for act, down, block in zip(sites.acts, sites.layers, sites.blocks, strict=True)
        ]

    def read(
        self,
        inputs: Mapping[str, Any],
        reduce: Callable[[int, Tensor, Tensor | None], T],
        pool: Callable[[Tensor], Tensor],
        *,
        value: Literal["gated", "act"],
        with_output: bool,
        hidden_layer: int,
    ) -> tuple[list[T], Tensor]:
        """One forward pass that ends after the last FFN: the language-model head is never computed.

        Args:
            inputs: Keyword arguments of the model's forward pass.
            reduce: ``(layer, neuron values, FFN output)`` -> what is kept of a layer; called inside the trace, so that
                no ``[batch, seq, d_mlp]`` tensor outlives its layer.
            pool: Residual stream after block ``hidden_layer`` -> what is kept of it.
            value: ``gated`` reads the down projection's input, ``act`` the activation's output.
            with_output: Whether ``reduce`` gets the down projection's output or ``None``.
            hidden_layer: The block whose output is pooled.

        Returns:
            What ``reduce`` kept of each layer, and what ``pool`` kept.
        """
        gated = value == "gated"
        with self._envoy.trace(**inputs) as tracer:
            kept = nnsight.save([])
            pooled = nnsight.save([])
            for layer, (act, down, block) in enumerate(self._layers):
                # no name for the value: it would keep the layer's values alive until the next layer's arrive
                kept.append(reduce(layer, down.input if gated else act.output, down.output if with_output else None))
                if layer == hidden_layer:
                    pooled.append(pool(_residual(block.output)))
            tracer.stop()
        gc.collect(1)  # stopping leaves a reference cycle that holds the last layer's activations
        return kept, pooled[0]


def _residual(block_output: Any) -> Tensor:
    return block_output[0] if isinstance(block_output, tuple) else block_output
