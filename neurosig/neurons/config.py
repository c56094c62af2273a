"""Options of tracing; the flags of ``neurosig.export`` take their defaults from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

NeuronValue = Literal["gated", "act"]
Contribution = Literal["cett", "magnitude", "unembed"]
ActiveSet = Literal["layer_mean", "global", "per_token", "entries"]


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """Options of tracing: what is measured, and the size of a batch."""

    value: NeuronValue = "gated"
    """A neuron's value: ``gated`` is the down projection's input, act(gate) * up; ``act`` is act(gate) alone.
    The two are the same in a model without a gate."""
    score: Contribution = "cett"
    """A neuron's contribution at one position; see `neurosig.neurons.contributions`."""
    active: ActiveSet = "layer_mean"
    """Which neurons belong to a rollout's active set: those with the largest mean score over its positions, within
    each layer or over all layers; the union of each position's largest; or the neurons among the largest
    (position, neuron) entries of each layer."""
    set_size: int = 1000
    """Neurons in a set (``layer_mean``, ``global``), neurons per token (``per_token``; both spread evenly over the
    layers, save ``global``), or entries per layer (``entries``)."""
    positive_only: bool = False
    """Leave out neurons whose mean score is not above zero; for the signed ``unembed``."""
    batch_tokens: int = 4096
    """Tokens in one batch, padding included. A rollout longer than this makes a batch of its own."""

    def __post_init__(self) -> None:
        check_config(self)
        for name in ("set_size", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"TraceConfig.{name} is {getattr(self, name)}; it must be at least 1")
