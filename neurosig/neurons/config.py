"""Options of tracing; the flags of ``neurosig.export`` take their defaults from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal, SupportsInt, get_args

from neurosig.registry import ActiveSet, Contribution, Open
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

NeuronValue = Literal["gated", "act"]
NamedPositions = Literal["answer", "thought", "all", "statement", "answer_words", "answer_start", "prompt_end"]
PARSED = ("statement", "answer_words")
"""Positions that depend on how answers are read."""
CHOSEN_TOKENS = re.compile(r"(?P<at>-?\d+)|(?P<start>-?\d+)?:(?P<stop>-?\d+)?")
"""A token of the completion, or a range of them."""


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """Options of tracing: what is measured, and the size of a batch."""

    value: NeuronValue = "gated"
    """A neuron's value: ``gated`` is the down projection's input, act(gate) * up; ``act`` is act(gate) alone.
    The two are the same in a model without a gate."""
    score: Annotated[Contribution | str, Open("contribution")] = "cett"
    """A neuron's contribution at one position; see `neurosig.neurons.contributions`."""
    active: Annotated[ActiveSet | str, Open("active_set")] = "layer_mean"
    """Which neurons belong to a rollout's active set: those with the largest mean score over its positions, within
    each layer or over all layers; the union of each position's largest; the neurons among the largest
    (position, neuron) entries of each layer; or among the largest entries of all layers of those that are their
    position's largest; see `neurosig.neurons.contributions.ACTIVE_SETS`."""
    set_size: int | float = 0.0217
    """Neurons in a set (``layer_mean``, ``global``), neurons per token (``per_token``; both spread evenly over the
    layers, save ``global``), entries per layer (``entries``), or the size of both cuts (``token_entries``): a number,
    or below 1 a share of the model's neurons (`sized`)."""
    positive_only: bool = False
    """Leave out neurons whose mean score is not above zero; for the signed ``unembed``."""
    batch_tokens: int = 4096
    """Tokens in one batch, padding included. A rollout longer than this makes a batch of its own."""

    def __post_init__(self) -> None:
        check_config(self)
        check_set_size("TraceConfig.set_size", self.set_size)
        if self.batch_tokens < 1:
            raise UserError(f"TraceConfig.batch_tokens is {self.batch_tokens}; it must be at least 1")

    def sized(self, n_layers: int, d_mlp: int) -> TraceConfig:
        """These options with the set size as a number for a model of this shape.

        Where every layer has the same part of a set, that part is rounded up.
        """
        from neurosig.neurons.contributions import neurons_per_layer

        if self.active in ("global", "entries", "token_entries"):
            share = isinstance(self.set_size, float)
            return replace(self, set_size=max(1, round(self.set_size * n_layers * d_mlp))) if share else self
        return replace(self, set_size=n_layers * neurons_per_layer(n_layers, d_mlp, self.set_size))


def check_positions(positions: str) -> None:
    """Refuse positions that are neither a name nor numbers and ranges.

    Raises:
        UserError: Listing what is accepted.
    """
    names = get_args(NamedPositions)
    if positions not in names and not all(CHOSEN_TOKENS.fullmatch(part) for part in positions.split(",")):
        raise UserError(
            f"--positions: expected {', '.join(names)}, or tokens of the completion such as 0, -1, 0:3 or 0,-1, "
            f"got {positions!r}"
        )


def neuron_name(layer: SupportsInt, index: SupportsInt) -> str:
    """A neuron as readers see it: ``L19/696`` is neuron 696 of layer 19, both counted from 0."""
    return f"L{int(layer)}/{int(index)}"


def check_set_size(option: str, value: int | float) -> None:
    """Refuse a set size that is neither a number of neurons nor a share of them.

    Args:
        option: What the value is called.
        value: The value.

    Raises:
        UserError: It is 0 or less, or a fraction above 1.
    """
    if not (0 < value < 1 if isinstance(value, float) else value >= 1):
        raise UserError(
            f"{option} is {value}; it must be at least 1, a whole number of neurons, or a share of them below 1"
        )
