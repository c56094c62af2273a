"""Completions of many forms against what they answer: written cases, completions read by eye, and real outputs."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

from neurosig.questions.answers import extract_answer, is_correct, is_lenient
from neurosig.questions.load import Question
from tests.support.paths import REAL_CASES, TESTS
from tests.support.real_answers import MMLU_PRO, EyeReading, eye_readings, official_readings, records

MOST_WRONG = {"capital_country": 4, "demonym": 3, "element": 4}
"""Readings per 100 of a kind that may differ from the eye's; 2 elsewhere."""


def read(case: dict[str, Any]) -> str | None:
    choices = tuple(case["choices"]) if case["choices"] else None
    question = Question("q", "d", case["question"], choices, answer_space=case.get("answer_space"))
    return extract_answer(case["text"], question, case["format"], finish_reason=case["finish_reason"])


@pytest.mark.parametrize(
    "case", records(TESTS / "data" / "answers.jsonl"), ids=lambda case: case["text"][:40] or "empty"
)
def test_a_completion_gives_what_it_answers(case: dict[str, Any]) -> None:
    assert read(case) in case["accept"]


@pytest.mark.skipif(not (REAL_CASES / "answers.jsonl").is_file(), reason="needs the collected completions")
def test_completions_of_public_reports() -> None:
    wrong = [
        (case["id"], read(case)) for case in records(REAL_CASES / "answers.jsonl") if read(case) not in case["accept"]
    ]
    assert not wrong


def test_completions_read_by_eye() -> None:
    """A hundred rollouts of each bundled kind, read without the parser; see tests/data/README.md."""
    n, differ, regraded = Counter[str](), defaultdict[str, list[EyeReading]](list), Counter[str]()
    for one in eye_readings("read_by_eye.jsonl"):
        n[one.kind] += 1
        regraded[one.kind] += one.regraded
        if one.differs:
            differ[one.kind].append(one)
    assert len(n) == 20 and min(n.values()) >= 64
    worse = {kind: found for kind, found in differ.items() if 100 * len(found) > MOST_WRONG.get(kind, 2) * n[kind]}
    assert not worse
    assert all(100 * regraded[kind] <= 2 * n[kind] for kind in n), regraded


def test_further_completions_read_by_eye() -> None:
    """Fifty more of each kind, read after the parser was made: how far its rules carry."""
    readings = list(eye_readings("read_by_eye_later.jsonl"))
    assert len(readings) == 600
    assert sum(one.differs for one in readings) <= 60, [one for one in readings if one.differs]


@pytest.mark.skipif(not MMLU_PRO.is_file(), reason="needs the collected completions")
def test_real_outputs_agree_with_the_official_expressions() -> None:
    """Seven models' five-shot outputs on MMLU-Pro (tests/benchmarks/test_real_answers.py prints them per model)."""
    outputs = list(official_readings())
    clear = [{one.ours} == one.stated for one in outputs if len(one.stated) == 1]
    assert len(clear) > 800 and sum(clear) / len(clear) >= 0.995
    right = [(one.ours == one.gold) - (one.official == one.gold) for one in outputs]
    assert abs(sum(right)) / len(outputs) < 0.005


CAPITAL = Question(
    "q", "d", "What is the capital of Chad?", answer="N'Djamena", aliases=("Ndjamena",), answer_space="capitals"
)


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("The capital of Chad is N'Djamena.", True, True),
        ("Ndjamena", True, True),
        ("The capital of Chad is Ndjamena, not Lagos.", True, True),
        ("The big city of Ndjamena is Chad's seat of government, they say.", False, True),
        ("The capital of Chad is either Ndjamena or Abuja.", False, False),
        ("The capital of Chad is Abuja.", False, False),
        ("<think>It is Ndjamena", False, False),
    ],
)
def test_the_two_gradings(text: str, strict: bool, lenient: bool) -> None:
    assert is_correct(extract_answer(text, CAPITAL), CAPITAL) == strict
    assert is_lenient(text, CAPITAL) == lenient


def test_lenient_grading_needs_more_than_an_echo() -> None:
    question = Question("q", "d", 'What is the past tense of "cost"?', answer="cost")
    assert is_lenient('The past tense of "cost" is "cost".', question)
    assert not is_lenient('The past tense of "cost" is "costed".', question)


@pytest.mark.parametrize(
    ("text", "lenient"), [("B (Berlin)", True), ("B. Not A or C.", True), ("A or B", False), ("A", False)]
)
def test_lenient_letters(text: str, lenient: bool) -> None:
    question = Question("q", "d", "Which?", ("Paris", "Berlin", "Rome"), answer="B")
    assert is_lenient(text, question) == lenient


def test_latex_that_arithmetic_does_not_read() -> None:
    pytest.importorskip("math_verify")
    question = Question("q", "d", "Find x.", answer=r"2\sqrt{3}")
    for text in (r"\boxed{2\sqrt{3}}", r"So $x = \boxed{\sqrt{12}}$."):
        assert is_correct(extract_answer(text, question, "number"), question)
    assert extract_answer(r"\boxed{\sqrt{16}}", question, "number") == "4"
    assert extract_answer(r"\boxed{9^{9^{9}}\pi}", question, "number") is None


@pytest.mark.parametrize(
    ("answers", "merged"),
    [
        (["west africa", "africa", None, "east africa"], ["africa", "africa", None, "africa"]),
        (["paris france", "paris", "paris"], ["paris", "paris", "paris"]),
        (["guatemala city", "guatemala city", "guatemala"], ["guatemala city"] * 3),
        (["sodium", "sodium chloride", "sodium nitrate"], ["sodium", "sodium chloride", "sodium nitrate"]),
        (["red and blue", "red", "blue"], ["red and blue", "red", "blue"]),
        (["york", "yorkshire"], ["york", "yorkshire"]),
    ],
)
def test_votes_of_one_meaning(answers: list[str | None], merged: list[str | None]) -> None:
    from neurosig.questions.vote import majority_vote, merge_answers

    question = Question("q", "d", "Where?")
    assert merge_answers(answers, question, "containment") == merged
    assert merge_answers(answers, question, "exact") == answers
    assert merge_answers(answers[::-1], question, "containment") == merged[::-1]
    assert majority_vote(merge_answers(answers, question, "containment"), "q").n == len(answers)


def test_members_of_an_answer_space_never_merge() -> None:
    from neurosig.questions.vote import merge_answers

    question = Question("q", "d", "Which country?", answer_space="countries")
    answers = ["guinea", "equatorial guinea", "usa", "america", "republic of colombia", "colombia"]
    merged = ["guinea", "equatorial guinea", "united states", "united states", "colombia", "colombia"]
    assert merge_answers(answers, question, "containment") == merged
