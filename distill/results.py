"""Rows of an evaluation and their aggregates per domain, with 95% bootstrap intervals over questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from neurosig.questions.answers import is_correct, normalise
from neurosig.questions.answers.spaces import members
from neurosig.questions.reader import AnswerReader
from neurosig.questions.vote import n_tied_right, n_tied_right_lenient
from neurosig.sampling.lengths import completion_lengths
from neurosig.statistics import metrics
from neurosig.statistics.vote_table import GRADINGS, VoteTable, graded

if TYPE_CHECKING:
    from neurosig.questions.load import Question
    from neurosig.sampling.choice_scoring import ChoiceForm
    from neurosig.sampling.rollouts import Rollout

Row = Mapping[str, Any]

MUTUAL = "_mutual_info"
PARTS = 1000
"""Confidences count in thousandths where `neurosig.statistics.metrics` bins them, as it bins votes."""


def sampled_row(question: Question, group: Sequence[Rollout], reader: AnswerReader) -> dict[str, Any]:
    """One question's result: the answers of its K samples, their vote, and which of them are right.

    ``strict`` and ``lenient`` grade each rollout (`neurosig.questions.reader.Grades`); ``n_correct`` and
    ``n_tied_right`` count strictly.
    """
    reading = reader.read(group, question)
    grades, vote, answers = reader.grade(reading, group, question), reading.vote, reading.answers
    lengths = completion_lengths(group, prompt_opens_thought=reader.prompt_opens_thought)
    return {
        "question_id": question.id,
        "domain": question.domain,
        "kind": question.kind,
        "k": len(group),
        "raw_answers": list(reading.raw_answers),
        "answers": list(answers),
        "strict": list(grades.strict),
        "lenient": list(grades.lenient),
        "winner": vote.winner,
        "votes": vote.count,
        "n_tied": vote.n_tied,
        "n_tied_right": n_tied_right(vote, question),
        "n_tied_right_lenient": n_tied_right_lenient(vote, answers, grades.lenient),
        "n_correct": sum(grades.strict),
        "n_correct_lenient": sum(grades.lenient),
        "unparsed": sum(answer is None for answer in answers),
        "distinct": len({answer for answer in answers if answer is not None}),
        "truncated": round(lengths["truncated_rate"] * len(group)),
        "unclosed": round(lengths["unclosed_rate"] * len(group)),
        "mean_length": sum(len(rollout.completion_ids) for rollout in group) / len(group),
        **{name: lengths[name] for name in ("mean_thought_length", "mean_answer_length")},
        "mean_entropy": _mean([rollout.mean_entropy for rollout in group]),
        "mean_logprob": _mean([rollout.mean_logprob for rollout in group]),
    }


def choice_row(
    question: Question, group: Sequence[Rollout], form: ChoiceForm, *, mutual_info: bool = False
) -> dict[str, Any]:
    """One question's result: a score for each choice or member of the answer space, the best, and whether it is right.

    ``scores`` are in nats: sums over the tokens for ``letter``, means for ``text`` and for members. With
    ``mutual_info`` the second half of the group are the priors (`neurosig.sampling.choice_scoring.score_choices`), and
    the columns that end in ``_mutual_info`` come from the scores minus the priors.
    """
    means = np.array([rollout.mean_logprob or 0.0 for rollout in group])
    lengths = [len(rollout.completion_ids) for rollout in group]
    scores = means * lengths if form == "letter" and question.choices else means
    n = len(group) // 2 if mutual_info else len(group)
    row = {"question_id": question.id, "domain": question.domain, "kind": question.kind, "choices": n}
    row |= _best_choice(question, scores[:n])
    if mutual_info:
        row |= {f"{name}{MUTUAL}": value for name, value in _best_choice(question, scores[:n] - scores[n:]).items()}
    return row


def _best_choice(question: Question, scores: Float[np.ndarray, " choices"]) -> dict[str, Any]:
    best = int(np.argmax(scores))
    names = (ascii_uppercase[best],) if question.choices else members(question)[best]
    return {
        "scores": scores.tolist(),
        "winner": normalise(names[0]),
        "confidence": float(1 / np.exp(scores - scores[best]).sum()),
        "correct": int(any(is_correct(normalise(name), question) for name in names)),
    }


def summarise(rows: Sequence[Row], *, seed: int) -> dict[str, dict[str, Any]]:
    """Aggregates of `sampled_row` by domain."""
    return {domain: _summary(part, seed) for domain, part in _by_domain(rows).items()}


def summarise_choices(rows: Sequence[Row], *, seed: int) -> dict[str, dict[str, Any]]:
    """Aggregates of `choice_row` by domain; ``chance`` is the expected accuracy of guessing."""
    return {domain: _choice_summary(part, seed) for domain, part in _by_domain(rows).items()}


def _summary(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    table, n = VoteTable.from_rows(rows), len(rows)
    k, votes, avg, maj = table.k, table.votes, table["avg_at_k"], table["maj_at_k"]
    lengths = ("mean_length", "mean_thought_length", "mean_answer_length")
    names = ("n_correct", "n_tied", "unparsed", "distinct", "truncated", "unclosed", *lengths)
    column = {name: np.array([row[name] for row in rows]) for name in names}
    return {
        "n": n,
        "k": k,
        **{
            name: _interval(table, name, seed)
            for grading in GRADINGS
            for name in (graded(metric, grading) for metric in ("avg_at_k", "maj_at_k", "ece"))
        },
        "pass_at_k": float(metrics.pass_at_k(k, column["n_correct"], k).mean()),
        "ece_floor": metrics.ece_floor(k, n, seed=seed),
        "smooth_ece": metrics.smooth_ece(votes, k, maj),
        "brier": metrics.brier(votes, k, maj),
        "mean_confidence": float((votes / k).mean()),
        "signed_gap": metrics.signed_gap(votes, k, maj),
        "tie_rate": float((column["n_tied"] > 1).mean()),
        "parse_rate": float(table["parse_rate"].mean()),
        "unparsed_rate": float(column["unparsed"].sum() / (n * k)),
        "truncated_rate": float(column["truncated"].sum() / (n * k)),
        "unclosed_rate": float(column["unclosed"].sum() / (n * k)),
        "distinct_answers": float(column["distinct"].mean()),
        **{name: float(column[name].mean()) for name in lengths},
        "mean_entropy": _mean([row["mean_entropy"] for row in rows]),
        "by_kind": _by_kind(rows, avg_at_k=avg, maj_at_k=maj),
    }


def _choice_summary(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    suffixes = [suffix for suffix in ("", MUTUAL) if f"correct{suffix}" in rows[0]]
    block: dict[str, Any] = {"n": len(rows), "chance": float(np.mean([1 / row["choices"] for row in rows]))}
    accuracies = {}
    for suffix in suffixes:
        correct = np.array([float(row[f"correct{suffix}"]) for row in rows])
        confidence = np.array([row[f"confidence{suffix}"] for row in rows])
        parts = np.rint(confidence * PARTS).astype(np.int64)
        table = VoteTable(PARTS, parts, {"maj_at_k": correct})
        measured = {
            "accuracy": _interval(table, "maj_at_k", seed),
            "ece": _interval(table, "ece", seed),
            "smooth_ece": metrics.smooth_ece(parts, PARTS, correct),
            "brier": metrics.brier(parts, PARTS, correct),
            "mean_confidence": float(confidence.mean()),
            "signed_gap": float((confidence - correct).mean()),
        }
        block |= {f"{name}{suffix}": value for name, value in measured.items()}
        accuracies[f"accuracy{suffix}"] = correct
    return {**block, "by_kind": _by_kind(rows, **accuracies)}


def _by_domain(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each domain in id order, so that resamples repeat exactly."""
    domains = dict.fromkeys(row["domain"] for row in rows)
    return {d: sorted((row for row in rows if row["domain"] == d), key=lambda row: row["question_id"]) for d in domains}


def _by_kind(rows: Sequence[Row], **columns: Float[np.ndarray, " questions"]) -> dict[str, dict[str, Any]]:
    blocks = {}
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] is not None):
        mask = np.array([row["kind"] == kind for row in rows])
        means = {name: float(values[mask].mean()) for name, values in columns.items()}
        blocks[kind] = {"n": int(mask.sum()), **means}
    return blocks


def _interval(table: VoteTable, metric: str, seed: int) -> dict[str, Any]:
    """A metric of `VoteTable` with its interval; a single question has none."""
    if len(table) < 2:
        return {"estimate": table.estimate(metric), "low": None, "high": None}
    return asdict(table.interval(metric, seed=seed, resamples=10_000 if metric in table.columns else 2000))


def _mean(values: Sequence[float | None]) -> float | None:
    """``None`` when one is unknown: a server gives no entropies."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
