"""The report's section on the second stage: what the contexts did to the teacher, judged by gold answers.

Fix: the student's majority answer is wrong, the teacher's is right; break: the reverse (INFLOW, appendix C.2). Ties are
decided as in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from neurosig.exported import Exported
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader, Reading
from neurosig.questions.vote import n_tied_right_lenient
from neurosig.registry import ContextScore
from neurosig.sampling.rollouts import Rollout
from neurosig.statistics.auroc import AnalysisConfig
from neurosig.statistics.metrics import format_interval, paired_mean_interval
from neurosig.statistics.vote_table import GRADINGS, Grading

OUTCOMES = {(False, True): "fix", (True, False): "break", (True, True): "right", (False, False): "wrong"}
"""(student right, teacher right) -> what the context did."""


@dataclass(frozen=True, slots=True)
class Effects:
    """What the contexts did.

    Attributes:
        questions: One row per question that the teacher was asked: ids, answers, outcome under either grading, scores.
        summary: One row per group and grading: selected and all of these questions, as text with intervals.
        sentence: The finding in words.
    """

    questions: list[dict[str, Any]]
    summary: list[dict[str, str]]
    sentence: str


def effects(exported: Exported, gold: Mapping[str, Question], analysis: AnalysisConfig) -> Effects | None:
    """Judge the teacher's rollouts; ``None`` without a second stage or without gold answers."""
    groups: dict[str, list[Rollout]] = {}
    for (name, _), rollout in exported.manifest.teacher_rollouts.items():
        groups.setdefault(name, []).append(rollout)
    groups = {name: group for name, group in groups.items() if name in gold}
    if not groups:
        return None
    reader, rows = exported.manifest.header.answer_reader(), []
    for name, group in groups.items():
        row, question = exported.rows[name], gold[name]
        sides = []
        for rollouts in (exported.rollouts[name], group):
            reading = reader.read(rollouts, question)
            sides.append((reading, right_majority(reader, reading, rollouts, question)))
        (student, before), (teacher, after) = sides
        outcome = {f"outcome_{grading}": OUTCOMES[before[grading], after[grading]] for grading in GRADINGS}
        answers = {"student": student.vote.winner, "teacher": teacher.vote.winner}
        scores = {score: row.scores.get(score) for score in get_args(ContextScore)}
        rows.append({"question_id": name, "selected": row.selected, **answers, **outcome, **scores})
    summary = [_summary(rows, which, grading, analysis) for which in ("selected", "all") for grading in GRADINGS]
    return Effects(rows, [line for line in summary if line], _sentence(rows))


def right_majority(
    reader: AnswerReader, reading: Reading, rollouts: Sequence[Rollout], question: Question
) -> dict[Grading, bool]:
    """Whether the majority answer of these rollouts is right, under either grading."""
    vote = reading.vote
    if vote.winner is None:
        return dict.fromkeys(GRADINGS, False)
    alone = type(vote)(vote.winner, vote.count, (vote.winner,), vote.n)
    grades = reader.grade(reading, rollouts, question)
    right = {"strict": grades.strict, "lenient": grades.lenient}
    return {grading: bool(n_tied_right_lenient(alone, reading.answers, right[grading])) for grading in GRADINGS}


def _summary(
    rows: Sequence[Mapping[str, Any]], which: str, grading: Grading, analysis: AnalysisConfig
) -> dict[str, str]:
    chosen = [row for row in rows if which == "all" or row["selected"]]
    if len(chosen) < 2:
        return {}
    outcomes = np.array([row[f"outcome_{grading}"] for row in chosen])
    line = {"questions": f"{which} ({len(chosen)})", "grading": grading}
    columns = {
        "student right": np.isin(outcomes, ["right", "break"]),
        "teacher right": np.isin(outcomes, ["right", "fix"]),
        "fix": outcomes == "fix",
        "break": outcomes == "break",
        **{name.replace("_", " "): np.array([row[name] for row in chosen]) for name in ("entropy_gap", "belief_shift")},
    }
    for name, values in columns.items():
        values = values.astype(float)
        found = paired_mean_interval(values, np.zeros(len(values)), seed=analysis.seed, resamples=analysis.resamples)
        line[name] = format_interval(found.estimate, found.low, found.high, ".3f")
    return line


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    chosen = [row for row in rows if row["selected"]]
    parts = []
    for grading in GRADINGS:
        fixed, broken = (sum(row[f"outcome_{grading}"] == name for row in chosen) for name in ("fix", "break"))
        parts.append(f"{fixed} and {broken} ({grading})")
    return (
        f"With its context the teacher answered {len(rows)} questions; of the {len(chosen)} selected it fixed and "
        f"broke {' or '.join(parts)}."
    )
