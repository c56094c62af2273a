"""Completions with a reading to compare ours with: noted by eye, or found by a benchmark's own expressions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurosig.questions.answers import extract_answer, is_correct, normalise
from neurosig.questions.answers.spaces import canonical
from neurosig.questions.load import Question, load_questions
from tests.support.paths import REAL_CASES, TESTS

EYE_READ = ("read_by_eye.jsonl", "read_by_eye_later.jsonl")
MMLU_PRO = REAL_CASES / "mmlu_pro_outputs.jsonl"


@dataclass(frozen=True)
class EyeReading:
    """A rollout of the bundled questions: our answer, and those that the eye accepts (``None``: no answer)."""

    kind: str
    text: str
    answer: str | None
    accepted: frozenset[str | None]
    regraded: bool
    """Whether our answer is right and the eye's wrong, or the other way round."""

    @property
    def differs(self) -> bool:
        return self.answer not in self.accepted


@dataclass(frozen=True)
class OfficialReading:
    """An output on MMLU-Pro: the letters that we and the first expression that matches read, "" without one."""

    model: str
    question_id: str
    text: str
    ours: str
    official: str
    gold: str
    stated: frozenset[str]
    """Letters that the benchmark's first expression finds anywhere."""


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def eye_readings(name: str) -> Iterator[EyeReading]:
    """The lines of a table in tests/data."""
    sources = ["world-facts", "language", "chemistry", "procedures", "organism-facts"]
    questions = {one.id: one for one in load_questions(sources, split="all")}
    for case in records(TESTS / "data" / name):
        question = questions[case["question_id"]]
        answer = extract_answer(case["text"], question, finish_reason="length" if case["cut_off"] else "stop")
        accepted = [None if text is None else normalise(text) for text in case["accept"]]
        grades = {is_correct(text, question) for text in accepted}
        readings = frozenset(None if text is None else canonical(text, question) for text in accepted)
        yield EyeReading(case["kind"], case["text"], answer, readings, is_correct(answer, question) not in grades)


def official_readings() -> Iterator[OfficialReading]:
    """Real five-shot outputs of seven models."""
    for row in records(MMLU_PRO):
        question = Question("q", "d", row["question"], tuple(row["choices"]))
        yield OfficialReading(
            row["model"],
            row["question_id"],
            row["text"],
            (extract_answer(row["text"], question) or "").upper(),
            next(filter(None, row["official"].values()), ""),
            row["gold"],
            frozenset(re.findall(r"answer is \(?([A-J])\)?", row["text"])),
        )
