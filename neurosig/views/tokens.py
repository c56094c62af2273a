"""Views of one rollout, token by token; `neurosig.views.explorer.Explorer` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from neurosig.neurons.config import neuron_name
from neurosig.views.html import View, bounds, short

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 64
"""Tokens per page of a heat map, and tokens that a layer's table shows at most."""
MOST_PAGES = 32
"""Pages that a heat map shows at most, those with the largest values."""


def token_label(text: str) -> str:
    """A token for display: a leading space as ``·``, line ends as ``⏎``, a token of nothing as ``∅``."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "·" + shown[1:] if shown.startswith(" ") else shown or "∅"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens coloured by one number each; the scale runs over ``low`` to ``high``, and ``values_below`` marks those at
    which a neuron's value is below 0."""

    texts: Sequence[str]
    values: Float[np.ndarray, " tokens"]
    low: float
    high: float
    values_below: Sequence[bool] = ()

    @classmethod
    def of(cls, texts: Sequence[str], values: Float[Tensor, " tokens"], values_below: Sequence[bool] = ()) -> Tokens:
        return cls(texts, values.numpy(), *bounds(values.numpy()), values_below)

    @property
    def marked(self) -> list[tuple[str, float, bool]]:
        below = self.values_below or [False] * len(self.texts)
        rows = zip(self.texts, self.values, below, strict=True)
        return [(token_label(text), float(value), is_below) for text, value, is_below in rows]


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive tokens of a heat map: ``rows`` holds each token's label and its number in every layer."""

    first: int
    last: int
    mean: float
    is_open: bool
    rows: Sequence[tuple[str, Sequence[float]]]

    @property
    def beginning(self) -> str:
        return "".join(label for label, _ in self.rows[:12])


@dataclass(frozen=True, repr=False)
class TokenLayerMap(View):
    """Heat map of one rollout: one row per token, one column per layer, in pages of `PAGE` tokens.

    The page with the largest values is open, the others are closed.

    Attributes:
        question: Its text.
        tokens: Text of each completion token.
        values: One number per layer and token.
        quantity: Name of the number.
        note: How to read it.
        which: The rollout in words.
    """

    question: str
    tokens: Sequence[str]
    values: Float[Tensor, "layer token"]
    quantity: str
    note: str = ""
    which: str = ""
    macro: ClassVar[str] = "token_layer_map"

    @property
    def labels(self) -> list[str]:
        return [token_label(text) for text in self.tokens]

    @property
    def layers(self) -> list[str]:
        return [f"L{layer}" for layer in range(len(self.values))]

    @property
    def ticks(self) -> list[str]:
        """Name of each column, where there is room for one."""
        return [name if len(self.values) <= 16 or int(name[1:]) % 5 == 0 else "" for name in self.layers]

    @property
    def scale(self) -> tuple[float, float]:
        return bounds(self.values.numpy())

    @property
    def pages(self) -> list[Page]:
        values, labels = self.values.numpy().T, self.labels
        starts = range(0, max(1, len(labels)), PAGE)
        weight = {start: float(np.abs(values[start : start + PAGE]).sum()) for start in starts}
        kept = sorted(sorted(starts, key=lambda start: -weight[start])[:MOST_PAGES])
        most = max(kept, key=weight.__getitem__)
        return [
            Page(
                first=start + 1,
                last=min(start + PAGE, len(labels)),
                mean=float(values[start : start + PAGE].mean()) if len(labels) else 0.0,
                is_open=start == most,
                rows=list(
                    zip(labels[start : start + PAGE], values[start : start + PAGE].astype(float).tolist(), strict=True)
                ),
            )
            for start in kept
        ]

    @property
    def left_out(self) -> int:
        """Tokens on no page."""
        return len(self.tokens) - sum(len(page.rows) for page in self.pages)

    def frame(self) -> pd.DataFrame:
        index = pd.MultiIndex.from_arrays([range(len(self.tokens)), list(self.tokens)], names=["position", "token"])
        return pd.DataFrame(self.values.numpy().T, index=index, columns=self.layers)

    def text(self) -> str:
        low, high = self.scale
        marks = "▁▂▃▄▅▆▇█"
        (page,) = [page for page in self.pages if page.is_open]
        shown = "".join(label for label, _ in page.rows)
        lines = [
            short(f"{self.question} {self.which}", 140),
            f"{self.quantity}, {low:.3g} to {high:.3g}; "
            f"tokens {page.first} to {page.last} of {len(self.tokens)}: {short(shown, 200)}",
        ]
        for layer in reversed(range(len(self.values))):
            levels = [min(7, max(0, int(8 * (row[layer] - low) / ((high - low) or 1.0)))) for _, row in page.rows]
            lines.append(f"{layer:>3} " + "".join(marks[level] for level in levels))
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class LayerNeurons(View):
    """One layer of one rollout: each token's largest contributors, of a long one at the `PAGE` tokens with the largest.

    Attributes:
        question: Its text.
        layer: The layer.
        tokens: Text of each completion token.
        neurons: Index of each token's largest contributors, largest first.
        contributions: Their contributions.
        weights: Weight in the probe of the layer's neurons that have one, by index.
        which: The rollout in words.
    """

    question: str
    layer: int
    tokens: Sequence[str]
    neurons: Sequence[Sequence[int]]
    contributions: Sequence[Sequence[float]]
    weights: Mapping[int, float]
    which: str = ""
    macro: ClassVar[str] = "layer_neurons"

    @property
    def rows(self) -> list[tuple[str, list[tuple[str, float, float | None]]]]:
        order = sorted(range(len(self.tokens)), key=lambda i: -max(self.contributions[i], default=0.0))
        return [
            (
                token_label(self.tokens[i]),
                [
                    (neuron_name(self.layer, index), value, self.weights.get(index))
                    for index, value in zip(self.neurons[i], self.contributions[i], strict=True)
                ],
            )
            for i in sorted(order[:PAGE])
        ]

    @property
    def scale(self) -> tuple[float, float]:
        return bounds([value for row in self.contributions for value in row])

    def frame(self) -> pd.DataFrame:
        """``position``, ``token``, ``rank`` from 1, ``neuron``, ``contribution``, ``weight``."""
        rows = [
            (position, text, rank, neuron_name(self.layer, index), value, self.weights.get(index))
            for position, text in enumerate(self.tokens)
            for rank, (index, value) in enumerate(
                zip(self.neurons[position], self.contributions[position], strict=True), start=1
            )
        ]
        return pd.DataFrame(rows, columns=["position", "token", "rank", "neuron", "contribution", "weight"])

    def text(self) -> str:
        lines = [f"{short(self.question, 100)}\nlayer {self.layer}: each token's largest contributors"]
        for label, row in self.rows:
            lines.append(f"{short(label, 16):>16}  " + "  ".join(f"{name} {value:.3f}" for name, value, _ in row))
        return "\n".join(lines)
