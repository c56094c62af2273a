"""Views of neurons and of several rollouts; `neurosig.views.explorer.Explorer` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from neurosig.neurons.config import neuron_name
from neurosig.views.html import View, short
from neurosig.views.tokens import Tokens, token_label


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
        top_tokens: The tokens of the examples, not of all rollouts, at which it contributes most: token, contribution,
            value.
        raised: Tokens whose logit a value of 1 raises most, and by how much; a value below 0 does the reverse.
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
        return neuron_name(self.layer, self.index)

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
    def effects(self) -> list[tuple[str, int, list[tuple[str, float]], list[tuple[str, float]]]]:
        """For either sign of its value: the sign, its count among ``top_tokens``, what it raises, what it lowers."""
        raised, lowered = (
            [(token_label(text), effect) for text, effect in side] for side in (self.raised, self.lowered)
        )
        below = sum(value < 0 for _, _, value in self.top_tokens)
        reverse = [[(text, -effect) for text, effect in side] for side in (lowered, raised)]
        rows = [
            ("above 0", len(self.top_tokens) - below, raised, lowered),
            ("below 0", below, reverse[0], reverse[1]),
        ]
        return sorted(rows, key=lambda row: -row[1])

    def frame(self) -> pd.DataFrame:
        """The tokens at which it contributes most: ``token``, ``contribution``, ``value``."""
        return pd.DataFrame(self.top_tokens, columns=["token", "contribution", "value"])

    def text(self) -> str:
        lines = [f"neuron {self.name}. {self.sentence}"]
        lines.append(f"active in {self.active} of {self.rollouts} rollouts, mean contribution {self.mean:.4f}")
        lines += [f"{name.replace('_', ' ')}: {value:.4g}" for name, value in self.facts.items()]
        tops = ", ".join(f"{short(token, 16)} {c:.3f} (value {value:+.3g})" for token, c, value in self.labelled_tokens)
        lines.append(f"in {len(self.examples)} rollouts largest at: {tops or 'nowhere'}")
        for sign, count, *sides in self.effects:
            effects = [", ".join(f"{short(text, 16)} {effect:+.3f}" for text, effect in pairs) for pairs in sides]
            lines.append(f"value {sign} ({count} of these): raises {effects[0]}; lowers {effects[1]}")
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
        larger: The neurons whose mean contribution is larger here, largest difference first: name, mean contribution
            here and in the other rollout, probe weight.
    """

    verdict: str
    answer: str | None
    tokens: Tokens
    numbers: Mapping[str, float]
    larger: Sequence[tuple[str, float, float, float | None]]


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

    def frame(self) -> pd.DataFrame:
        """``side``, ``neuron``, its mean contribution ``here`` and ``there``, its ``weight`` in the probe."""
        rows = [(side.verdict, *neuron) for side in self.sides for neuron in side.larger]
        return pd.DataFrame(rows, columns=["side", "neuron", "here", "there", "weight"])

    def text(self) -> str:
        lines = [short(self.question, 100)]
        for side in self.sides:
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in side.numbers.items())
            lines.append(f"{side.verdict:>9}: {short(''.join(side.tokens.texts), 80)}  ({numbers})")
        lines.append(f"Jaccard {self.similarity:.3f}, {self.shared} neurons shared")
        for side in self.sides:
            larger = ", ".join(f"{name} {here:.3f} against {there:.3f}" for name, here, there, _ in side.larger)
            lines.append(f"larger in {side.verdict}: {larger or 'none'}")
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

    def frame(self) -> pd.DataFrame:
        """The fields of `Neighbour`, its shared neurons as one text."""
        names = ["rank", "used", "similarity", "shared", "kind", "question", "response"]
        rows = [[getattr(one, name) for name in names] for one in self.neighbours]
        table = pd.DataFrame(rows, columns=names)
        return table.assign(reasons=[", ".join(name for name, _ in one.reasons) for one in self.neighbours])

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
