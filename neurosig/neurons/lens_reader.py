"""The same neurons read by TransformerLens: for exploration, and as a second opinion on nnsight.

The one file that imports transformer_lens. Its TransformerBridge runs attention and norms by its own code, so what it
reads differs from `neurosig.neurons.nnsight_reader` by rounding. Whole sequences run; no prompt is shared between
rollouts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel

from neurosig.neurons.config import NeuronValue
from neurosig.neurons.sites import FFNSites, has_adapter, w_out
from neurosig.neurons.tracer import NeuronTracer, Reader
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice

T = TypeVar("T")
R = TypeVar("R")


class LensReader:
    """A model behind TransformerBridge's hooks; ``bridge`` has all of them for exploration."""

    whole = True

    def __init__(self, model: PreTrainedModel, sites: FFNSites) -> None:
        """Build the bridge over a copy of the modules that shares the weights: it replaces modules in place.

        Raises:
            UserError: TransformerLens has no adapter for the architecture, or its adapter fails; or the model has a
                LoRA adapter beside its weights.
        """
        if has_adapter(model):
            raise UserError(
                "TransformerLens cannot read a model with a LoRA adapter beside its weights; load it with --dtype "
                "float32, which merges the adapter"
            )
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        try:
            self.bridge: Any = build_bridge_from_module(twin, type(model).__name__, hf_config=twin.config)
        except Exception as error:  # its adapters raise many kinds, assertions among them
            raise UserError(f"TransformerLens cannot read {type(model).__name__}: {error}") from error
        self._sites = sites
        self._activations = [twin.get_submodule(path) for path in sites.acts]
        self._w_out = [w_out(model, path) for path in sites.layers]
        self._head = model.get_output_embeddings().weight

    def read(
        self,
        inputs: Mapping[str, Any],
        reduce: Callable[[int, Tensor, Tensor | None, Tensor, Tensor], T],
        pool: Callable[[Tensor], Tensor],
        finish: Callable[[list[T], Tensor], R],
        *,
        value: NeuronValue,
        with_output: bool,
        hidden_layer: int,
    ) -> R:
        """As `neurosig.neurons.nnsight_reader.FFNEnvoy.read`; the head runs for the last position only."""
        check_choice("value", value, NeuronValue)
        pre_activation = value == "act" and self._sites.gated
        kept: list[T] = []
        pooled: list[Tensor] = []
        pending: dict[str, Tensor] = {}  # values of the layer that is running

        def on_value(tensor: Tensor, hook: Any) -> None:
            pending["value"] = tensor

        def on_output(tensor: Tensor, hook: Any) -> None:
            layer = len(kept)
            values = pending.pop("value")
            if pre_activation:
                values = self._activations[layer](values)
            kept.append(reduce(layer, values, tensor if with_output else None, self._w_out[layer], self._head))

        def on_block(tensor: Tensor, hook: Any) -> None:
            pooled.append(pool(tensor))

        source = "gate.hook_out" if pre_activation else "out.hook_in"
        hooks: list[tuple[str, Callable[[Tensor, Any], None]]] = [(f"blocks.{hidden_layer}.hook_out", on_block)]
        for layer in range(self._sites.n_layers):
            hooks += [
                (f"blocks.{layer}.mlp.{source}", on_value),
                (f"blocks.{layer}.mlp.out.hook_out", on_output),
            ]
        ids, mask = (inputs[name].to(self._head.device) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            self.bridge.run_with_hooks(
                ids, fwd_hooks=hooks, return_type=None, attention_mask=mask, use_cache=False, logits_to_keep=1
            )
        return finish(kept, pooled[0])


class LensTracer(NeuronTracer):
    """`NeuronTracer` with TransformerLens instead of nnsight: the same arguments, the same sets up to rounding."""

    def _open(self, remote: bool | str) -> Reader:
        if remote:
            raise UserError("TransformerLens runs here only; a remote trace needs the nnsight backend")
        return LensReader(self.model, self.sites)
