"""Synthetic contributions whose label-bearing neurons are known: ground truth for what the probe locates.

The log contribution of a neuron is a base value plus effects of the question's topic, the question and the rollout;
a rollout's active set is each layer's largest. The spreads below were fitted by eye to 1,888 rollouts of
SmolLM2-135M-Instruct on geography questions (30 x 1,536 neurons, 34 per layer). Real against synthetic (100 x 8
rollouts): neurons active in more than 50%, 10% and 2% of the rollouts 594, 2,194 and 4,899 against 615, 2,170 and
5,025; mean Jaccard similarity within a question .45 against .47, between questions .29 against .33, to the nearest
other question .46 against .45; coefficient of variation of an always active neuron .26 against .27.

Beside the planted neurons there may be decoys, which predict the label although it does not act on them: neurons that
correlate with a planted one, or that follow something on which the label depends too (length, the kind of question).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from neurosig.hallucination.probe import contribution_matrix
from neurosig.neurons.contributions import neurons_per_layer
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

BASE, TOPIC, QUESTION, ROLLOUT = 0.35, 0.2, 0.12, 0.2
"""Spreads of the log contribution: between neurons (Student t, 4 degrees of freedom), topics, questions, rollouts."""

Decoy = Literal["none", "correlated", "length", "kind"]
CORRELATION = 0.8
"""Of the log contributions of a planted neuron and its correlated decoy, over the rollouts of one label."""
NEURON_SPREAD = 0.3
"""How much neurons differ in the last three (log-normal)."""


@dataclass(frozen=True, slots=True)
class PlantedConfig:
    """Size of the data and of what is planted.

    Attributes:
        n_questions: Questions; half of them, drawn by the seed, carry label 1.
        num_generations: Rollouts per question.
        n_planted: Neurons whose contribution depends on the label, half of them growing with it and half shrinking.
        effect: Shift of a planted neuron's log contribution between the labels, in its standard deviations over
            all rollouts of one label (Cohen's d).
        n_topics: Topics, which are the kinds of question; independent of the label unless the decoys are of the kind.
        decoy: What the decoys, at most one in the layer of each planted neuron, follow: ``correlated``, the planted
            neuron of the layer; ``length``, the length of the rollout; ``kind``, whether the question is of a hard
            kind. ``none``: there are no decoys.
        n_decoys: Decoys; the more of them follow the same thing, the less each of them is needed.
        decoy_effect: Shift of a decoy's log contribution per standard deviation of the length or of the hardness, in
            the decoy's standard deviations.
        confounding: Correlation of the label's propensity with the length or with the hardness of the kind; 0 makes
            the decoys harmless.
        hard_kinds: The first this many topics are hard.
        guessed_share: Share of the questions with label 1.
        n_layers: Layers.
        d_mlp: Neurons per layer.
        set_size: Size of an active set, rounded up to the same share in each layer.
        seed: Everything random.
    """

    n_questions: int = 200
    num_generations: int = 4
    n_planted: int = 20
    effect: float = 1.0
    n_topics: int = 8
    decoy: Decoy = "none"
    n_decoys: int = 10
    decoy_effect: float = 1.0
    confounding: float = 0.7
    hard_kinds: int = 1
    guessed_share: float = 0.5
    n_layers: int = 30
    d_mlp: int = 1536
    set_size: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_config(self)
        for name, valid, expected in (
            ("n_questions", self.n_questions >= 2, "at least 2"),
            ("num_generations", self.num_generations >= 1, "at least 1"),
            ("n_planted", 0 <= self.n_planted <= self.n_layers, "0 to n_layers, at most one per layer"),
            ("n_topics", self.n_topics >= 1, "at least 1"),
            ("effect", self.effect >= 0, "0 or more"),
            ("n_decoys", self.n_decoys >= 0, "0 or more"),
            ("decoy_effect", self.decoy_effect >= 0, "0 or more"),
            ("confounding", 0 <= self.confounding <= 1, "0 to 1"),
            ("hard_kinds", self.decoy != "kind" or 1 <= self.hard_kinds < self.n_topics, "1 to n_topics - 1"),
            ("guessed_share", 0 < self.guessed_share < 1, "above 0 and below 1"),
        ):
            if not valid:
                raise UserError(f"planted {name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class PlantedData:
    """Active sets with labels, and the neurons that carry them.

    Attributes:
        ids: Flat neuron ids ``layer * d_mlp + index`` of each rollout's active set, by question.
        values: Their contributions.
        labels: 0 or 1, the same for all rollouts of a question.
        question_ids: The question of each rollout.
        topics: The topic of each rollout.
        planted: Flat ids of the planted neurons, ascending.
        decoys: Flat ids of the decoys, ascending.
        n_neurons: ``n_layers * d_mlp``.
    """

    ids: Int[np.ndarray, "rollouts size"]
    values: Float[np.ndarray, "rollouts size"]
    labels: Int[np.ndarray, " rollouts"]
    question_ids: list[str]
    topics: Int[np.ndarray, " rollouts"]
    planted: Int[np.ndarray, " planted"]
    decoys: Int[np.ndarray, " decoys"]
    n_neurons: int

    def contributions(self) -> sparse.csr_array:
        """The rollouts as a matrix for the probe."""
        return contribution_matrix(self.ids, self.values, self.n_neurons)


def plant(config: PlantedConfig) -> PlantedData:
    """Draw active sets in which ``n_planted`` neurons, each in a layer of its own, depend on the label."""
    rng = np.random.default_rng(config.seed)
    n, k = config.n_questions, config.num_generations
    order = rng.permutation(n)
    guessed = order % 2 if config.guessed_share == 0.5 else (order < round(config.guessed_share * n)).astype(np.int64)
    topics = rng.integers(config.n_topics, size=n)
    other = np.random.default_rng([config.seed, 1])  # decoys leave the other draws as they are
    followed = np.zeros(n * k)
    if config.decoy in ("length", "kind"):
        guessed, followed = _confounded(config, topics, other)
    carriers = set(rng.permutation(config.n_layers)[: config.n_planted].tolist())
    size = neurons_per_layer(config.n_layers, config.d_mlp, config.set_size)
    ids, values = [], []
    planted: list[int] = []
    decoys: list[int] = []
    for layer in range(config.n_layers):
        base = BASE * rng.standard_t(4, config.d_mlp)
        sd = np.exp(rng.normal(0, NEURON_SPREAD, config.d_mlp)) * np.sqrt(TOPIC**2 + QUESTION**2 + ROLLOUT**2)
        leading = np.argsort(-base)[:size]
        in_play = np.flatnonzero(base + 3.5 * sd >= base[leading[-1]])  # the others reach no active set
        log = TOPIC * _normal(rng, config.n_topics, len(in_play))[topics] + QUESTION * _normal(rng, n, len(in_play))
        log = np.repeat(log, k, axis=0) + ROLLOUT * _normal(rng, n * k, len(in_play))
        log *= (sd[in_play] / np.sqrt(TOPIC**2 + QUESTION**2 + ROLLOUT**2)).astype(np.float32)
        log += base[in_play].astype(np.float32)
        if layer in carriers:
            neuron = rng.choice(leading)
            shift = config.effect * sd[neuron] * (1 if len(planted) % 2 == 0 else -1)
            log[:, in_play == neuron] += (shift * np.repeat(guessed, k))[:, None].astype(np.float32)
            planted.append(layer * config.d_mlp + neuron)
            if config.decoy != "none" and len(decoys) < config.n_decoys:
                decoy = other.choice(leading[leading != neuron])
                own = log[:, in_play == decoy] - base[decoy]
                if config.decoy == "correlated":
                    like = (log[:, in_play == neuron] - base[neuron]) * (sd[decoy] / sd[neuron])
                    own = CORRELATION * like + np.sqrt(1 - CORRELATION**2) * own
                own = own + (config.decoy_effect * sd[decoy] * followed)[:, None]
                log[:, in_play == decoy] = (base[decoy] + own).astype(np.float32)
                decoys.append(layer * config.d_mlp + decoy)
        active = np.argpartition(-log, size - 1, axis=1)[:, :size]
        ids.append((layer * config.d_mlp + in_play[active]).astype(np.int32))
        values.append(np.exp(np.take_along_axis(log, active, axis=1)))
    return PlantedData(
        np.concatenate(ids, axis=1),
        np.concatenate(values, axis=1),
        np.repeat(guessed, k),
        [f"q{question}" for question in range(n) for _ in range(k)],
        np.repeat(topics, k),
        np.array(planted, dtype=np.int64),
        np.array(decoys, dtype=np.int64),
        config.n_layers * config.d_mlp,
    )


def _confounded(
    config: PlantedConfig, topics: Int[np.ndarray, " questions"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " questions"], Float[np.ndarray, " rollouts"]]:
    """Labels that depend on what the decoys follow, and that of each rollout, in its standard deviations.

    The questions of the largest propensity carry label 1. A rollout's length is mostly its question's (variance .8).
    """
    n, k = config.n_questions, config.num_generations
    if config.decoy == "kind":
        hard = topics < config.hard_kinds
        by_question = (hard - hard.mean()) / max(float(hard.std()), 1e-9)
        followed = np.repeat(by_question, k)
    else:
        by_question = rng.standard_normal(n)
        followed = np.sqrt(0.8) * np.repeat(by_question, k) + np.sqrt(0.2) * rng.standard_normal(n * k)
    propensity = config.confounding * by_question + np.sqrt(1 - config.confounding**2) * rng.standard_normal(n)
    guessed = np.zeros(n, dtype=np.int64)
    guessed[np.argsort(-propensity, kind="stable")[: round(config.guessed_share * n)]] = 1
    return guessed, followed


def _normal(rng: np.random.Generator, rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
    return rng.standard_normal((rows, columns), dtype=np.float32)
