"""Trace neurons in one call, with the library of your choice.

    from neurosig import load_model
    from neurosig.neurons.backends import trace_neurons

    loaded = load_model("smollm2-135m")
    prompt = loaded.tokenizer("The capital of France is").input_ids
    answer = loaded.tokenizer(" Paris.", add_special_tokens=False).input_ids
    sets = trace_neurons(loaded, [prompt], [answer], backend="transformer_lens")

Only the chosen library is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from neurosig.runtime.extras import check_installed
from neurosig.runtime.shapes import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from neurosig.models.load import LoadedModel
    from neurosig.neurons.config import TraceConfig
    from neurosig.neurons.contributions import ActiveSets
    from neurosig.neurons.tracer import NeuronTracer

Backend = Literal["nnsight", "transformer_lens"]

_HOME = {
    "nnsight": ("neurosig.neurons.tracer", "NeuronTracer"),
    "transformer_lens": ("neurosig.neurons.lens_reader", "LensTracer"),
}


def trace_neurons(
    model: PreTrainedModel | LoadedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    config: TraceConfig | None = None,
    *,
    backend: Backend = "nnsight",
    remote: bool | str = False,
    progress: bool = False,
) -> ActiveSets:
    """Active sets of rollouts, in input order, on the CPU; both backends give the same up to rounding.

    Args:
        model: The model, or what `neurosig.load_model` gave.
        prompt_ids: Token ids of each rollout's prompt.
        completion_ids: Token ids of each completion.
        config: What is measured; the defaults of `neurosig.neurons.tracer.TraceConfig` if None.
        backend: The library that reads the activations.
        remote: Run on NDIF; see `neurosig.neurons.tracer.NeuronTracer`. nnsight only.
        progress: Show a bar on stderr.

    Raises:
        UserError: The library is not installed, or cannot read the architecture; or bad rollouts, see
            `neurosig.neurons.tracer.NeuronTracer.trace_batches`.
    """
    from neurosig.models.load import LoadedModel
    from neurosig.neurons.config import TraceConfig

    live = model.model if isinstance(model, LoadedModel) else model
    tracer = tracer_class(backend)(live, config or TraceConfig(), remote=remote)
    return tracer.trace(prompt_ids, completion_ids, progress=progress)


def tracer_class(backend: Backend) -> type[NeuronTracer]:
    """The tracer that works through ``backend``.

    Raises:
        UserError: There is no such backend, or its library is not installed.
    """
    check_choice("backend", backend, Backend)
    module, name = _HOME[backend]
    check_installed(f"backend {backend}", backend)
    tracer: type[NeuronTracer] = getattr(importlib.import_module(module), name)
    return tracer
