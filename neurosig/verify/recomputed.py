"""The votes of a manifest and the numbers of an evaluation, computed again from their rows, for `neurosig.verify`.

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

from neurosig.manifest import Manifest
from neurosig.questions.answers import is_correct, normalise
from neurosig.questions.answers.spaces import members
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.questions.thoughts import thought_of
from neurosig.questions.vote import majority_vote
from neurosig.registry import MissingFunction
from neurosig.sampling.rollouts import Rollout, parse_rollout
from neurosig.statistics import metrics
from neurosig.verify import SKIPPED

Row = Mapping[str, Any]


def votes_problem(manifest: Manifest) -> str:
    """The first question whose answers or vote do not follow from its rollouts, or an empty string."""
    try:
        reader = manifest.header.answer_reader()
    except MissingFunction as error:
        return f"{SKIPPED}{error}"
    if not reader.is_of(manifest.header.answers):
        return f"{SKIPPED}another version of the parser read them"
    for row in manifest.rows:
        problem = f'question "{row.question_id}": its answers are not those of its rollouts'
        if row.vote is None:
            if row.answers or row.pseudo_label is not None:
                return problem
            continue
        group = [manifest.rollouts[row.question_id, place] for place in range(len(row.answers))]
        reading = reader.read(group, row.as_question())
        if (row.raw_answers, row.answers) != (reading.raw_answers, reading.answers):
            return problem
        vote = reading.vote
        kept = (row.vote.count, row.vote.n, row.vote.n_tied, row.pseudo_label)
        if kept != (vote.count, vote.n, vote.n_tied, vote.winner):
            return f'question "{row.question_id}": its vote is not that of its answers'
    return ""


def lengths_problem(manifest: Manifest) -> str:
    """The first of the header's lengths that does not follow from the rollouts, or an empty string."""
    found = manifest.header.lengths
    if not found:
        return f"{SKIPPED}an earlier version kept none"
    opens = bool(manifest.header.answers["prompt_opens_thought"])
    rows = [asdict(rollout) for rollout in manifest.rollouts.values()]
    cut = sum(rollout["finish_reason"] == "length" for rollout in rows) / len(rows)
    return difference(_lengths(rows, opens) | {"truncated_rate": cut}, found)


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
    if "unclosed" in row:  # not in evaluations of earlier versions
        lengths = _lengths(rollouts, reader.prompt_opens_thought)
        expected["unclosed"] = round(lengths.pop("unclosed_rate") * len(rollouts))
        expected |= lengths
    if len(rollouts) != len(answers):
        return f"{len(answers)} answers of {len(rollouts)} rollouts"
    if question is not None:
        expected |= _graded([parse_rollout(rollout) for rollout in rollouts], question, reader)
    return difference(expected, {name: row.get(name) for name in expected})


def _lengths(rollouts: Sequence[Mapping[str, Any]], prompt_opens_thought: bool) -> dict[str, float]:
    """Share of rollouts that end inside a thought, and the tokens per thought and answer."""
    thoughts = []
    for rollout in rollouts:
        is_open = thought_of(rollout["text"], prompt_opens_thought=prompt_opens_thought).opened is not None
        thoughts.append((is_open, len(rollout["completion_ids"]) if is_open else rollout.get("answer_start", 0)))
    total, n = sum(len(rollout["completion_ids"]) for rollout in rollouts), max(1, len(rollouts))
    thought = sum(length for _, length in thoughts)
    return {
        "unclosed_rate": sum(is_open for is_open, _ in thoughts) / n,
        "mean_thought_length": thought / n,
        "mean_answer_length": (total - thought) / n,
    }


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
    """n, parse rate, and Avg@K, maj@K and ECE under both gradings, of an evaluation's rows."""
    k = int(rows[0]["k"])
    votes, n_tied = (np.array([int(row[name]) for row in rows]) for name in ("votes", "n_tied"))
    found = {"n": float(len(rows)), "parse_rate": 1 - sum(int(row["unparsed"]) for row in rows) / (len(rows) * k)}
    for suffix in ("", "_lenient"):
        majority = metrics.maj_at_k(np.array([int(row[f"n_tied_right{suffix}"]) for row in rows]), n_tied)
        found[f"avg_at_k{suffix}"] = sum(int(row[f"n_correct{suffix}"]) for row in rows) / (len(rows) * k)
        found[f"maj_at_k{suffix}"] = float(majority.mean())
        found[f"ece{suffix}"] = metrics.ece(votes, k, majority)
    return found


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
    if "unclosed" in ordered[0]:
        block["unclosed_rate"] = sum(int(row["unclosed"]) for row in ordered) / (n * k)
        for name in ("mean_thought_length", "mean_answer_length"):
            block[name] = sum(float(row[name]) for row in ordered) / n
    if n > 1:
        block["avg_at_k"] = asdict(metrics.paired_mean_interval(accuracy, np.zeros(n), seed=seed))
        block["maj_at_k"] = asdict(metrics.paired_mean_interval(majority, np.zeros(n), seed=seed))
        block["ece"] = asdict(
            metrics.bootstrap_interval(
                lambda index: metrics.ece(votes[index], k, majority[index]), n, seed=seed, resamples=2000
            )
        )
    for name, value in estimates(ordered).items():
        if name != "n":
            block.setdefault(name, value if name == "parse_rate" else {"estimate": value})
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
    n = int(row["choices"])
    suffixes = {"": 0, "_mutual_info": n} if "scores_mutual_info" in row else {"": 0}
    if len(rollouts) != n * len(suffixes) or not n:
        return f"{n} choices of {len(rollouts)} rollouts"
    spaced = question is not None and question.choices is None
    sums = choice_form == "letter" and not spaced
    logps = [rollout["mean_logprob"] * (len(rollout["completion_ids"]) if sums else 1) for rollout in rollouts]
    for suffix, prior in suffixes.items():
        scores = [logps[place] - (logps[prior + place] if prior else 0.0) for place in range(n)]
        if question is None and not np.allclose(scores, row[f"scores{suffix}"]):
            continue  # members of an answer space have means, and only the question says that it has one
        best = scores.index(max(scores))
        expected: dict[str, Any] = {f"confidence{suffix}": float(special.softmax(scores)[best])}
        if question is not None:
            names = members(question)[best] if spaced else (ascii_uppercase[best],)
            expected[f"winner{suffix}"] = normalise(names[0])
            expected[f"correct{suffix}"] = int(any(is_correct(normalise(name), question) for name in names))
            expected["choices"] = len(members(question) if spaced else question.choices or ())
        problem = difference(expected, {name: row.get(name) for name in expected})
        found = {str(place): value for place, value in enumerate(row[f"scores{suffix}"])}
        problem = problem or difference({str(place): value for place, value in enumerate(scores)}, found, "scores")
        if problem:
            return problem
    return ""


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
