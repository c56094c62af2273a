"""The numbers of an evaluation, computed again from its rows, for `neurosig.verify`.

Written independently of `distill.evaluate`, on the same metrics: an error in either shows as a difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from string import ascii_uppercase
from typing import Any

import numpy as np
from scipy import special

from neurosig.questions.answers import is_correct, normalise
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.questions.vote import majority_vote
from neurosig.sampling.rollouts import Rollout, parse_rollout
from neurosig.statistics import metrics

Row = Mapping[str, Any]


def row_problem(
    row: Row, rollouts: Sequence[Mapping[str, Any]], question: Question | None, reader: AnswerReader
) -> str:
    """The first inconsistency between a result row and its rollouts, or an empty string.

    Args:
        row: A row of ``results.parquet``.
        rollouts: The question's lines of ``rollouts.jsonl``.
        question: The question with its gold answer, if available.
        reader: How the evaluation parsed them.
    """
    answers = list(row["answers"])
    vote = majority_vote(answers, row["question_id"])
    counts = Counter(answer for answer in answers if answer is not None)
    expected: dict[str, Any] = {
        "k": len(answers),
        "winner": vote.winner,
        "votes": vote.count,
        "n_tied": vote.n_tied,
        "unparsed": answers.count(None),
        "distinct": len(counts),
        "truncated": sum(rollout["finish_reason"] == "length" for rollout in rollouts),
        "mean_length": sum(len(rollout["completion_ids"]) for rollout in rollouts) / max(1, len(rollouts)),
        "mean_logprob": sum(rollout["mean_logprob"] or 0.0 for rollout in rollouts) / max(1, len(rollouts)),
    }
    if len(rollouts) != len(answers):
        return f"{len(answers)} answers of {len(rollouts)} rollouts"
    if question is not None:
        expected |= _graded([parse_rollout(rollout) for rollout in rollouts], question, reader)
    return difference(expected, {name: row.get(name) for name in expected})


def _graded(group: Sequence[Rollout], question: Question, reader: AnswerReader) -> dict[str, Any]:
    """The fields of a row that need the texts and the gold answer."""
    reading = reader.read(group, question)
    grades = reader.grade(reading, group, question)
    right = Counter(answer for answer, good in zip(reading.answers, grades.lenient, strict=True) if good)
    tied = reading.vote.tied_answers
    return {
        "raw_answers": list(reading.raw_answers),
        "answers": list(reading.answers),
        "strict": [is_correct(answer, question) for answer in reading.raw_answers],
        "lenient": list(grades.lenient),
        "n_correct": sum(is_correct(answer, question) for answer in reading.raw_answers),
        "n_correct_lenient": sum(right.values()),
        "n_tied_right": sum(is_correct(answer, question) for answer in tied),
        "n_tied_right_lenient": sum(right[answer] > reading.vote.count / 2 for answer in tied),
    }


def estimates(rows: Sequence[Row]) -> dict[str, float]:
    """n, Avg@K, maj@K and ECE of an evaluation's rows."""
    k = int(rows[0]["k"])
    votes, n_tied, right = (np.array([int(row[name]) for row in rows]) for name in ("votes", "n_tied", "n_tied_right"))
    majority = metrics.maj_at_k(right, n_tied)
    return {
        "n": float(len(rows)),
        "avg_at_k": sum(int(row["n_correct"]) for row in rows) / (len(rows) * k),
        "maj_at_k": float(majority.mean()),
        "ece": metrics.ece(votes, k, majority),
    }


def aggregates(rows: Sequence[Row], *, seed: int) -> dict[str, Any]:
    """The block of one domain in ``summary.json``, from its rows."""
    ordered = sorted(rows, key=lambda row: str(row["question_id"]))
    k, n = int(ordered[0]["k"]), len(ordered)
    correct, votes, unparsed, truncated = (
        np.array([int(row[name]) for row in ordered]) for name in ("n_correct", "votes", "unparsed", "truncated")
    )
    n_tied, right = (np.array([int(row[name]) for row in ordered]) for name in ("n_tied", "n_tied_right"))
    accuracy, majority = correct / k, metrics.maj_at_k(right, n_tied)
    block: dict[str, Any] = {
        "n": n,
        "k": k,
        "pass_at_k": float(np.mean(correct > 0)),
        "ece_floor": metrics.ece_floor(k, n, seed=seed),
        "smooth_ece": metrics.smooth_ece(votes, k, majority),
        "brier": metrics.brier(votes, k, majority),
        "mean_confidence": float(np.mean(votes)) / k,
        "signed_gap": float(np.mean(votes / k) - np.mean(majority)),
        "tie_rate": float(np.mean(n_tied > 1)),
        "unparsed_rate": float(unparsed.sum()) / (n * k),
        "truncated_rate": float(truncated.sum()) / (n * k),
    }
    for name, column in (("distinct_answers", "distinct"), ("mean_length",) * 2, ("mean_entropy",) * 2):
        block[name] = sum(float(row[column]) for row in ordered) / n
    if n > 1:
        block["avg_at_k"] = asdict(metrics.paired_mean_interval(accuracy, np.zeros(n), seed=seed))
        block["maj_at_k"] = asdict(metrics.paired_mean_interval(majority, np.zeros(n), seed=seed))
        block["ece"] = asdict(
            metrics.bootstrap_interval(
                lambda index: metrics.ece(votes[index], k, majority[index]), n, seed=seed, resamples=2000
            )
        )
    else:
        single = estimates(ordered)
        block |= {name: {"estimate": single[name]} for name in ("avg_at_k", "maj_at_k", "ece")}
    kinds = dict.fromkeys(row["kind"] for row in ordered if row["kind"] is not None)
    block["by_kind"] = {
        kind: {
            "n": len(index),
            "avg_at_k": float(accuracy[index].mean()),
            "maj_at_k": float(majority[index].mean()),
        }
        for kind in kinds
        for index in [[place for place, row in enumerate(ordered) if row["kind"] == kind]]
    }
    return block


def choice_row_problem(
    row: Row, rollouts: Sequence[Mapping[str, Any]], question: Question | None, choice_form: str
) -> str:
    """`row_problem` of an evaluation that scored the choices, each a line of ``rollouts.jsonl``, by log-likelihood."""
    sums = choice_form == "letter"
    scores = [rollout["mean_logprob"] * (len(rollout["completion_ids"]) if sums else 1) for rollout in rollouts]
    if not scores:
        return "no scored choices"
    best = scores.index(max(scores))
    expected: dict[str, Any] = {
        "choices": len(scores),
        "winner": normalise(ascii_uppercase[best]),
        "confidence": float(special.softmax(scores)[best]),
    }
    if question is not None:
        expected["choices"] = len(question.choices or ())
        expected["correct"] = int(is_correct(expected["winner"], question))
    pairs = {str(place): value for place, value in enumerate(scores)}
    found = {str(place): value for place, value in enumerate(row["scores"])}
    return difference({**expected, "scores": pairs}, {**{name: row.get(name) for name in expected}, "scores": found})


def choice_aggregates(rows: Sequence[Row], *, seed: int) -> dict[str, Any]:
    """`aggregates` of an evaluation that scored choices; its calibration metrics count confidence in thousandths."""
    ordered = sorted(rows, key=lambda row: str(row["question_id"]))
    n, k = len(ordered), 1000
    correct = np.array([float(row["correct"]) for row in ordered])
    parts = np.array([round(row["confidence"] * k) for row in ordered])
    block: dict[str, Any] = {
        "n": n,
        "accuracy": {"estimate": float(correct.mean())},
        "ece": {"estimate": metrics.ece(parts, k, correct)},
        "smooth_ece": metrics.smooth_ece(parts, k, correct),
        "brier": metrics.brier(parts, k, correct),
        "mean_confidence": sum(row["confidence"] for row in ordered) / n,
        "signed_gap": sum(row["confidence"] - row["correct"] for row in ordered) / n,
        "chance": sum(1 / row["choices"] for row in ordered) / n,
    }
    if n > 1:
        block["accuracy"] = asdict(metrics.paired_mean_interval(correct, np.zeros(n), seed=seed))
    return block


def difference(expected: Any, found: Any, path: str = "") -> str:
    """The first difference between ``expected`` and ``found``, floats to a millionth; empty if there is none."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{path}: nothing there"
        parts = (difference(value, found.get(name), f"{path}.{name}".lstrip(".")) for name, value in expected.items())
        return next((part for part in parts if part), "")
    if isinstance(expected, float) and isinstance(found, (int, float)) and not isinstance(found, bool):
        return "" if np.isclose(expected, found, rtol=1e-6, atol=1e-9) else f"{path} is {found}, not {expected:.6g}"
    return "" if expected == found else f"{path} is {found!r}, not {expected!r}"
