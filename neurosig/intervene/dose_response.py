"""What scaling neurons does to a model's answers: measures of each question, and their change with the factor.

The unit is the question with all its K samples. Every cell (a neuron set at a factor) samples the same questions with
the same random numbers, so changes are paired over questions; a control of several random draws is resampled over
draws as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from einops import einsum
from jaxtyping import Float

from neurosig.intervene.interventions import NeuronSet
from neurosig.questions.answers import is_refusal
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.questions.vote import vote_accuracy
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from neurosig.statistics.resampling import resample_weights

MEASURES: Mapping[str, str] = {
    "avg_at_k": "share of right samples",
    "maj_at_k": "the majority's answer is right, in expectation over ties",
    "agreement": "the majority's share of all K samples",
    "unparsed": "share of samples without an answer that can be parsed",
    "refusal": "share of samples that decline (see neurosig.questions.answers.is_refusal)",
    "no_answer": "share of samples that decline or cannot be parsed",
    "nll": "nats per token of the unscaled model's own samples, teacher-forced; perplexity is its exponential",
    "entropy": "mean entropy of the next-token distribution while sampling, in nats",
    "length": "tokens of a sample",
    "truncated": "share of samples cut off at the token limit",
    "repetition": "share of a sample's token trigrams that occur earlier in it",
}
"""Measures of each question."""

RESAMPLES = 10_000
BROKEN_NO_ANSWER, BROKEN_PERPLEXITY = 0.5, 10.0
"""Generation counts as broken where this share of the samples holds no answer, or where the perplexity of the unscaled
model's own samples has grown by this factor."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One neuron set at one factor, measured on every question.

    Attributes:
        neurons: The set; ``None`` for the model as it is, at factor 1.
        factor: Factor on its neurons' values.
        values: Measure -> one value per question, in the same order in every cell.
    """

    neurons: NeuronSet | None
    factor: float
    values: Mapping[str, Float[np.ndarray, " questions"]]


def measure(
    question: Question, group: Sequence[Rollout], nll: float, reader: AnswerReader | None = None
) -> dict[str, float]:
    """The `MEASURES` of one labelled question and its K samples.

    Args:
        reader: How they are parsed; default: `AnswerReader`'s defaults.
        nll: Nats per token of the reference completions (`neurosig.intervene.interventions.completion_nll`).
    """
    reader = reader or AnswerReader()
    reading = reader.read(group, question)
    answers, vote = reading.answers, reading.vote
    refused = [is_refusal(rollout.text) for rollout in group]
    return {
        "avg_at_k": _mean(reader.grade(reading, group, question).strict),
        "maj_at_k": vote_accuracy(vote, question),
        "agreement": vote.share,
        "unparsed": _mean(answer is None for answer in answers),
        "refusal": _mean(refused),
        "no_answer": _mean(answer is None or declined for answer, declined in zip(answers, refused, strict=True)),
        "nll": nll,
        "entropy": _mean(rollout.mean_entropy or 0.0 for rollout in group),
        "length": _mean(len(rollout.completion_ids) for rollout in group),
        "truncated": _mean(rollout.finish_reason == "length" for rollout in group),
        "repetition": _mean(repetition(rollout.completion_ids) for rollout in group),
    }


def repetition(token_ids: Sequence[int]) -> float:
    """Share of the trigrams that occurred before in the same sequence; 0 for fewer than three tokens."""
    trigrams = list(zip(token_ids, token_ids[1:], token_ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def dose_response(
    cells: Sequence[Cell], *, seed: int, measures: Iterable[str] = tuple(MEASURES)
) -> list[dict[str, Any]]:
    """A row for each group of neuron sets, factor and measure.

    Args:
        cells: With the unscaled model's among them.
        seed: Seed of the bootstrap.
        measures: Those of `MEASURES` that the cells have.

    Returns:
        ``group``, ``draws``, ``factor``, ``measure``, ``n`` (questions), ``value``; ``change`` against the unscaled
        model with its 95% interval ``change_low``, ``change_high``; and, in the rows of every group but ``located``,
        ``difference`` (located neurons minus this group, at this factor) with ``difference_low`` and
        ``difference_high``. At factor 1 there is nothing to compare.

    Raises:
        UserError: No unscaled cell, or fewer than two questions.
    """
    base = next((cell for cell in cells if cell.neurons is None), None)
    if base is None:
        raise UserError("dose response: no cell of the unscaled model to compare with")
    if len(next(iter(base.values.values()))) < 2:
        raise UserError("dose response: one question; an interval needs at least 2")
    rows = []
    groups = dict.fromkeys(cell.neurons.group for cell in cells if cell.neurons is not None)
    factors = sorted({cell.factor for cell in cells})
    for group, factor, name in product(groups, factors, tuple(measures)):
        group_cells = _draws(cells, group, factor) or [base]
        reference = _draws(cells, "located", factor) if group != "located" else []
        stacked = np.stack([cell.values[name] for cell in group_cells])
        row: dict[str, Any] = {
            "group": group,
            "draws": len(group_cells),
            "factor": factor,
            "measure": name,
            "n": stacked.shape[1],
            "value": float(stacked.mean()),
        }
        if group_cells != [base]:
            row |= _interval("change", stacked - base.values[name], seed)
            if reference:
                row |= _interval("difference", reference[0].values[name] - stacked, seed)
        rows.append(row)
    return rows


def broken(no_answer: float, nats_more: float) -> bool:
    """Whether the generation is broken: see `BROKEN_NO_ANSWER` and, in nats per token, `BROKEN_PERPLEXITY`."""
    return no_answer >= BROKEN_NO_ANSWER or not nats_more < math.log(BROKEN_PERPLEXITY)


def milestones(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each group of neuron sets in words: the first dose at which accuracy moves, and at which generation breaks.

    Accuracy has moved where the 95% interval of its change leaves zero out; see `broken` for the generation.
    Doses are ordered by their distance from 1.
    """
    nll = {row["group"]: row["value"] for row in rows if row["measure"] == "nll" and "change" not in row}
    sentences = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = {(row["factor"], row["measure"]): row for row in rows if row["group"] == group and "change" in row}
        factors = sorted({factor for factor, _ in own}, key=lambda factor: abs(factor - 1))
        moved = [f for f in factors if not own[f, "avg_at_k"]["change_low"] <= 0 <= own[f, "avg_at_k"]["change_high"]]
        unusable = [f for f in factors if broken(own[f, "no_answer"]["value"], own[f, "nll"]["value"] - nll[group])]
        sentences.append(
            f"{group}: accuracy {f'moves from x{moved[0]:g}' if moved else 'moves at no dose'}, generation "
            f"{f'breaks from x{unusable[0]:g}' if unusable else 'breaks at none'} (x{min(factors):g} to "
            f"x{max(factors):g})"
        )
    return sentences


def _draws(cells: Sequence[Cell], group: str, factor: float) -> list[Cell]:
    return [
        cell for cell in cells if cell.neurons is not None and cell.neurons.group == group and cell.factor == factor
    ]


def _interval(name: str, delta: Float[np.ndarray, "draws questions"], seed: int) -> dict[str, float]:
    """Mean of paired differences with its 95% percentile bootstrap interval, over draws and questions.

    A resample is how often each draw and each question is drawn.
    """
    draws, questions = delta.shape
    rng = np.random.default_rng(seed)
    by_draw, by_question = (resample_weights(n, RESAMPLES, rng) for n in (draws, questions))
    means = einsum(by_draw, delta, by_question, "resample draw, draw question, resample question -> resample")
    low, high = np.quantile(means, [0.025, 0.975])
    return {name: float(delta.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
