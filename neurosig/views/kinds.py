"""The views of an export; `neurosig.views.explorer.Explorer` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from neurosig.views.html import View, bounds, short


def token_label(text: str) -> str:
    """A token for display: a leading space as ``·``, line ends as ``⏎``, a token of nothing as ``∅``."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "·" + shown[1:] if shown.startswith(" ") else shown or "∅"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens coloured by one number each; the scale runs over ``low`` to ``high``."""

    texts: Sequence[str]
    values: Float[np.ndarray, " tokens"]
    low: float
    high: float

    @classmethod
    def of(cls, texts: Sequence[str], values: Float[Tensor, " tokens"]) -> Tokens:
        return cls(texts, values.numpy(), *bounds(values.numpy()))

    @property
    def pairs(self) -> list[tuple[str, float]]:
        return [(token_label(text), float(value)) for text, value in zip(self.texts, self.values, strict=True)]


@dataclass(frozen=True, repr=False)
class TokenLayerMap(View):
    """Heat map of one rollout: one row per layer, the last on top, one column per token.

    Attributes:
        question: Its text.
        tokens: Text of each completion token.
        values: One number per layer and token.
        quantity: Name of the number.
        note: How to read it.
    """

    question: str
    tokens: Sequence[str]
    values: Float[Tensor, "layer token"]
    quantity: str
    note: str = ""
    macro: ClassVar[str] = "token_layer_map"

    @property
    def labels(self) -> list[str]:
        return [token_label(text) for text in self.tokens]

    @property
    def rows(self) -> list[tuple[int, list[float]]]:
        return [(layer, row.tolist()) for layer, row in reversed(list(enumerate(self.values)))]

    @property
    def scale(self) -> tuple[float, float]:
        return bounds(self.values.numpy())

    def text(self) -> str:
        low, high = self.scale
        marks = "▁▂▃▄▅▆▇█"
        lines = [
            short(self.question, 100),
            f"{self.quantity}, {low:.3g} to {high:.3g}; tokens: {short(' '.join(self.labels), 200)}",
        ]
        for layer, row in self.rows:
            levels = [min(7, int(8 * (value - low) / ((high - low) or 1.0))) for value in row]
            lines.append(f"{layer:>3} " + "".join(marks[level] for level in levels))
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class LayerNeurons(View):
    """One layer of one rollout: each token's largest contributors.

    Attributes:
        question: Its text.
        layer: The layer.
        tokens: Text of each completion token.
        neurons: Index of each token's largest contributors, largest first.
        contributions: Their contributions.
        weights: Weight in the probe of the layer's neurons that have one, by index.
    """

    question: str
    layer: int
    tokens: Sequence[str]
    neurons: Sequence[Sequence[int]]
    contributions: Sequence[Sequence[float]]
    weights: Mapping[int, float]
    macro: ClassVar[str] = "layer_neurons"

    @property
    def rows(self) -> list[tuple[str, list[tuple[int, float, float | None]]]]:
        return [
            (token_label(text), [(j, c, self.weights.get(j)) for j, c in zip(row, values, strict=True)])
            for text, row, values in zip(self.tokens, self.neurons, self.contributions, strict=True)
        ]

    @property
    def scale(self) -> tuple[float, float]:
        return bounds([value for row in self.contributions for value in row])

    def text(self) -> str:
        lines = [f"{short(self.question, 100)}\nlayer {self.layer}: each token's largest contributors"]
        for label, row in self.rows:
            lines.append(f"{short(label, 16):>16}  " + "  ".join(f"{j} {value:.3f}" for j, value, _ in row))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class NeuronExample:
    """A rollout in which the neuron contributes much: its tokens coloured by the neuron's contribution there."""

    question: str
    answer: str | None
    mean: float
    tokens: Tokens


@dataclass(frozen=True, repr=False)
class NeuronCard(View):
    """One neuron: its part in the probe, where it is active, and its effect on the vocabulary.

    Attributes:
        layer: Its layer.
        index: Its index there.
        facts: Its row in the table of neurons, by column; a neuron outside the table has weight 0.
        active: Rollouts whose active set holds it.
        rollouts: All rollouts.
        mean: Its mean contribution in the rollouts that hold it; 0 without any.
        top_tokens: The tokens of the examples at which it contributes most: token, contribution, value.
        raised: Tokens whose logit its positive value raises most, and by how much per unit.
        lowered: Tokens whose logit it lowers most.
        examples: Rollouts with its largest mean contributions, one per question.
    """

    layer: int
    index: int
    facts: Mapping[str, float | bool]
    active: int
    rollouts: int
    mean: float
    top_tokens: Sequence[tuple[str, float, float]]
    raised: Sequence[tuple[str, float]]
    lowered: Sequence[tuple[str, float]]
    examples: Sequence[NeuronExample]
    macro: ClassVar[str] = "neuron_card"

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.index}"

    @property
    def sentence(self) -> str:
        weight = float(self.facts["weight"])
        if not weight:
            return "Not in the probe."
        return f"The probe weighs it {weight:+.3f}: it points to {'guessing' if weight > 0 else 'knowing'}."

    @property
    def labelled_tokens(self) -> list[tuple[str, float, float]]:
        return [(token_label(text), contribution, value) for text, contribution, value in self.top_tokens]

    @property
    def effects(self) -> list[tuple[str, list[tuple[str, float]]]]:
        return [
            (title, [(token_label(text), effect) for text, effect in pairs])
            for title, pairs in (("raises", self.raised), ("lowers", self.lowered))
        ]

    def text(self) -> str:
        lines = [f"neuron {self.name}. {self.sentence}"]
        lines.append(f"active in {self.active} of {self.rollouts} rollouts, mean contribution {self.mean:.4f}")
        lines += [f"{name.replace('_', ' ')}: {value:.4g}" for name, value in self.facts.items()]
        tops = ", ".join(f"{short(token, 16)} {value:.3f}" for token, value, _ in self.labelled_tokens)
        lines.append(f"largest at: {tops or 'nowhere'}")
        for title, pairs in self.effects:
            lines.append(f"{title}: " + ", ".join(f"{short(token, 16)} {effect:+.3f}" for token, effect in pairs))
        lines += [
            f"{example.mean:.4f}  {short(example.question, 60)} -> {short(''.join(example.tokens.texts), 60)}"
            for example in self.examples
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Side:
    """One rollout of a comparison.

    Attributes:
        verdict: ``right``, ``wrong``, ``majority`` or ``minority``.
        answer: Its parsed answer.
        tokens: Its tokens, coloured by the probe's evidence.
        numbers: Scores of the rollout, by name.
        own: Its neurons that the other lacks, largest contribution first: name, contribution, probe weight.
    """

    verdict: str
    answer: str | None
    tokens: Tokens
    numbers: Mapping[str, float]
    own: Sequence[tuple[str, float, float | None]]


@dataclass(frozen=True, repr=False)
class RolloutComparison(View):
    """Two rollouts of one question side by side, a trusted and a doubtful one.

    Attributes:
        question: Its text.
        gold: The gold answer, if known.
        sides: The two rollouts.
        similarity: Jaccard similarity of their active sets.
        shared: Neurons in both.
        by_layer: The same similarity layer by layer.
    """

    question: str
    gold: str | None
    sides: tuple[Side, Side]
    similarity: float
    shared: int
    by_layer: Float[np.ndarray, " layer"]
    macro: ClassVar[str] = "rollout_comparison"

    @property
    def layers(self) -> list[float]:
        return self.by_layer.tolist()

    def text(self) -> str:
        lines = [short(self.question, 100)]
        for side in self.sides:
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in side.numbers.items())
            lines.append(f"{side.verdict:>9}: {short(''.join(side.tokens.texts), 80)}  ({numbers})")
        lines.append(f"Jaccard {self.similarity:.3f}, {self.shared} neurons shared")
        for side in self.sides:
            own = ", ".join(f"{name} {value:.3f}" for name, value, _ in side.own)
            lines.append(f"only {side.verdict}: {own or 'none'}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A solved question that is similar to another.

    Attributes:
        question: Its text.
        response: Its representative rollout.
        kind: Its kind.
        rank: Its rank among the selected questions by similarity, from 1.
        used: Whether it is in the teacher's context.
        similarity: Jaccard similarity of the representatives' active sets.
        shared: Neurons in both.
        reasons: The shared neurons that are rarest among all questions: name, share of the questions that rely on it.
    """

    question: str
    response: str
    kind: str
    rank: int
    used: bool
    similarity: float
    shared: int
    reasons: Sequence[tuple[str, float]]


@dataclass(frozen=True, repr=False)
class NeighbourBrowser(View):
    """A question, the teacher's context for it, and why these examples were chosen.

    Attributes:
        question: Its text.
        answer: Its pseudo-label.
        kind: Its kind.
        decision: Why it was selected, or why not.
        policy: How contexts were picked.
        context: Questions of the context in prompt order, by index in ``neighbours``.
        neighbours: Nearest selected questions, nearest first, then further questions of the context.
        typical: Mean similarity of two questions, for comparison.
    """

    question: str
    answer: str | None
    kind: str
    decision: str
    policy: str
    context: Sequence[int]
    neighbours: Sequence[Neighbour]
    typical: float
    macro: ClassVar[str] = "neighbour_browser"
    ranked: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranked", bounds([neighbour.similarity for neighbour in self.neighbours]))

    def text(self) -> str:
        decided = f"{short(self.decision, 40)}; policy {short(self.policy, 40)}"
        lines = [f"{short(self.question, 100)} -> {short(str(self.answer), 40)} ({decided})"]
        for neighbour in self.neighbours:
            mark = "*" if neighbour.used else " "
            why = ", ".join(name for name, _ in neighbour.reasons)
            lines.append(
                f"{mark} {neighbour.rank:>3}  {neighbour.similarity:.3f}  {neighbour.shared} shared "
                f"({why})  {short(neighbour.question, 60)}"
            )
        lines.append(f"* in the teacher's context; two questions have {self.typical:.3f} on average")
        return "\n".join(lines)
