"""The one file that imports nnsight: what neurosig reads from a model's forward pass, and what it changes there.

nnsight leaves an inert dispatcher in the ``forward`` slot of the model's modules. It registers no hooks, and the
model's outputs outside a trace stay the same to the bit.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import nnsight
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neurosig.neurons.config import NeuronValue
from neurosig.neurons.sites import FFNSites, has_adapter, w_out
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice

T = TypeVar("T")
R = TypeVar("R")


class FFNEnvoy:
    """A model seen at its FFN sites; build it once for a model.

    Attributes:
        whole: Whether it reads whole sequences only, since no prompt's cache is at hand where the model runs.
    """

    def __init__(self, model: PreTrainedModel, sites: FFNSites, *, remote: bool | str = False) -> None:
        """Wrap ``model``; ``remote`` as in `neurosig.neurons.tracer.NeuronTracer`."""
        self.whole = bool(remote)
        self._options = {"remote": remote} if remote else {}
        root = _remote_model(model) if remote else nnsight.NNsight(model)
        self._root = root
        self._layers = [
            (root.get(act), root.get(down), root.get(block))
            for act, down, block in zip(sites.acts, sites.layers, sites.blocks, strict=True)
        ]
        self._head = root.get(sites.head)
        self._neuron_rows = isinstance(model.get_submodule(sites.layers[0]), Conv1D)
        self._effective: list[Callable[[], Tensor]] | None = None
        if has_adapter(model):  # a projection's own weight lacks the adapter's change
            self._effective = [functools.partial(w_out, model, path) for path in sites.layers]

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
        """One forward pass that ends after the last FFN: the language-model head is never computed.

        The functions run inside the trace, so that no ``[batch, seq, d_mlp]`` tensor outlives its layer. For a remote
        model they and what they hold are sent to it: they must be plain functions or partials of plain functions.

        Args:
            inputs: Keyword arguments of the model's forward pass.
            reduce: ``(layer, neuron values, FFN output, down projection with one row per neuron, head)`` -> the
                layer's reduction.
            pool: Residual stream after block ``hidden_layer`` -> its reduction.
            finish: Reductions of all layers and of the residual stream -> the result.
            value: ``gated`` reads the down projection's input, ``act`` the activation's output.
            with_output: Whether ``reduce`` gets the down projection's output or ``None``.
            hidden_layer: The block whose output is pooled.
        """
        check_choice("value", value, NeuronValue)
        layers, head, neuron_rows, gated = self._layers, self._head, self._neuron_rows, value == "gated"
        effective = self._effective
        with self._root.trace(**inputs, **self._options) as tracer:
            kept = []
            pooled = []
            for layer, (act, down, block) in enumerate(layers):
                # no name for the value: it would keep the layer's values alive until the next layer's arrive
                kept.append(
                    reduce(
                        layer,
                        down.input if gated else act.output,
                        down.output if with_output else None,
                        effective[layer]() if effective else down.weight if neuron_rows else down.weight.T,
                        head.weight,
                    )
                )
                if layer == hidden_layer:
                    pooled.append(pool(_residual(block.output)))
            result = nnsight.save(finish(kept, pooled[0]))
            tracer.stop()
        gc.collect(1)  # stopping leaves a reference cycle that holds the last layer's activations
        return result

    def read_layers(
        self,
        inputs: Mapping[str, Any],
        layers: Sequence[int],
        keep: Callable[[Tensor, Tensor], T],
        *,
        value: NeuronValue,
    ) -> list[T]:
        """What ``keep`` makes of some layers, from one forward pass that ends after the last of them.

        Args:
            inputs: Keyword arguments of the model's forward pass.
            layers: Indices of layers, ascending.
            keep: ``(neuron values, residual stream after the block)`` of a layer -> its reduction, inside the trace.
            value: See `read`.
        """
        check_choice("value", value, NeuronValue)
        modules, gated = [self._layers[layer] for layer in layers], value == "gated"
        with self._root.trace(**inputs, **self._options) as tracer:
            kept = []
            for act, down, block in modules:
                kept.append(keep(down.input if gated else act.output, _residual(block.output)))
            result = nnsight.save(kept)
            tracer.stop()
        gc.collect(1)
        return result


class NeuronScaler:
    """Makes stand-ins for a model in which some neurons are scaled; build it once for a model.

    The scaling is an nnsight edit: recorded once, replayed on every forward pass through the stand-in, so that a
    sampler that calls a model step by step needs no change. Measured cost: 1-2 % of decoding.
    """

    def __init__(self, model: PreTrainedModel, sites: FFNSites) -> None:
        self.model = model
        self.sites = sites
        self._envoy = nnsight.NNsight(model)

    def scaled(self, columns: Mapping[int, Sequence[int]], factor: float) -> ScaledModel:
        """The model with the values of the neurons ``columns`` (layer -> indices) multiplied by ``factor``."""
        scaling = [
            (path, torch.tensor(indices, device=w_out(self.model, path).device))
            for path, indices in ((self.sites.layers[layer], columns[layer]) for layer in sorted(columns))
        ]
        with self._envoy.edit() as (_tracer, edited):
            for path, indices in scaling:
                edited.get(path).input[..., indices] *= factor
        return ScaledModel(self.model, edited)


class ScaledModel:
    """A model whose every call runs through nnsight with an edit in place; the model itself stays as it is.

    It offers what decoding needs and no more: reaching a submodule through it would go around the edit.
    """

    def __init__(self, model: PreTrainedModel, edited: nnsight.NNsight) -> None:
        self.config = model.config
        self.generation_config = model.generation_config
        self.device = model.device
        self._model, self._edited = model, edited

    def modules(self) -> Iterator[nn.Module]:
        """The model's own modules, for `neurosig.sampling.packed_weights`: those that the edit runs through."""
        return self._model.modules()

    def __call__(self, **inputs: Any) -> Any:
        """The output of the model's forward pass, for the same keyword arguments."""
        return self._edited.trace(trace=False, **inputs)


def _residual(block_output: Any) -> Tensor:
    return block_output[0] if isinstance(block_output, tuple) else block_output


def _remote_model(model: PreTrainedModel) -> nnsight.TransformersModel:
    """The wrapper by whose key a server knows the model: its hub id. Its weights stay here unused.

    Raises:
        UserError: The model carries no name to find it by, or there is no tokenizer of that name.
    """
    if not model.name_or_path:
        raise UserError("a remote trace names the model by its hub id; load it with load_model or from_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model {model.name_or_path}: no tokenizer found; a remote trace needs one") from error
    nnsight.register("neurosig")  # its functions travel by source, also where it is an installed package
    return nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation", device=model.device)
