"""Completions of many forms against what they answer: written cases, completions read by eye, and real outputs."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from neurosig.questions.answers import extract_answer, is_correct, is_lenient, normalise
from neurosig.questions.answers.spaces import canonical
from neurosig.questions.load import Question, load_questions
from tests.support.paths import REAL_CASES, TESTS

MOST_WRONG = {"capital_country": 4, "demonym": 3, "element": 5}
"""Readings per 100 of a kind that may differ from the eye's; 2 elsewhere."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(case: dict[str, Any]) -> str | None:
    choices = tuple(case["choices"]) if case["choices"] else None
    question = Question("q", "d", case["question"], choices, answer_space=case.get("answer_space"))
    return extract_answer(case["text"], question, case["format"], finish_reason=case["finish_reason"])


@pytest.mark.parametrize("case", lines(TESTS / "data" / "answers.jsonl"), ids=lambda case: case["text"][:40] or "empty")
def test_a_completion_gives_what_it_answers(case: dict[str, Any]) -> None:
    assert read(case) in case["accept"]


@pytest.mark.skipif(not (REAL_CASES / "answers.jsonl").is_file(), reason="needs the collected completions")
def test_completions_of_public_reports() -> None:
    wrong = [
        (case["id"], read(case)) for case in lines(REAL_CASES / "answers.jsonl") if read(case) not in case["accept"]
    ]
    assert not wrong


def read_wrongly(name: str) -> tuple[dict[str, list[str]], Counter[str]]:
    """Lines of a table read by eye that the parser reads otherwise, and the number of lines, by kind."""
    questions = {one.id: one for one in load_questions(["world-facts", "language", "chemistry"], split="all")}
    questions |= {one.id: one for one in load_questions(["procedures", "organism-facts"], split="all")}
    wrong: dict[str, list[str]] = defaultdict(list)
    read_of: Counter[str] = Counter()
    for case in lines(TESTS / "data" / name):
        question = questions[case["question_id"]]
        answer = extract_answer(case["text"], question, finish_reason="length" if case["cut_off"] else "stop")
        read_of[case["kind"]] += 1
        if answer not in {None if text is None else canonical(normalise(text), question) for text in case["accept"]}:
            wrong[case["kind"]].append(f"{case['text']!r} is read as {answer!r}, not {case['accept']}")
    return wrong, read_of


def test_completions_read_by_eye() -> None:
    """A hundred rollouts of each bundled kind, read without the parser; see tests/data/README.md."""
    wrong, read_of = read_wrongly("read_by_eye.jsonl")
    assert len(read_of) == 20 and min(read_of.values()) >= 64
    worse = {kind: texts for kind, texts in wrong.items() if len(texts) * 100 > MOST_WRONG.get(kind, 2) * read_of[kind]}
    assert not worse


def test_further_completions_read_by_eye() -> None:
    """Fifty more of each kind, read after the parser was made: how far its rules carry."""
    wrong, read_of = read_wrongly("read_by_eye_later.jsonl")
    assert read_of.total() == 600
    assert sum(map(len, wrong.values())) <= 60, wrong


def test_the_grade_is_the_eyes() -> None:
    """What a wrong reading costs: a right answer graded wrong, or a wrong one right, at most 2% of a kind."""
    questions = {one.id: one for one in load_questions(["world-facts", "language", "chemistry"], split="all")}
    questions |= {one.id: one for one in load_questions(["procedures", "organism-facts"], split="all")}
    n, differs = Counter[str](), Counter[str]()
    for case in lines(TESTS / "data" / "read_by_eye.jsonl"):
        question = questions[case["question_id"]]
        answer = extract_answer(case["text"], question, finish_reason="length" if case["cut_off"] else "stop")
        by_eye = {is_correct(None if text is None else normalise(text), question) for text in case["accept"]}
        n[case["kind"]] += 1
        differs[case["kind"]] += is_correct(answer, question) not in by_eye
    assert all(100 * differs[kind] <= 2 * n[kind] for kind in n), differs


@pytest.mark.skipif(not (REAL_CASES / "mmlu_pro_outputs.jsonl").is_file(), reason="needs the collected completions")
def test_real_outputs_agree_with_the_official_expressions() -> None:
    """Seven models' five-shot outputs on MMLU-Pro (tests/benchmarks/test_real_answers.py prints them per model)."""
    rows = lines(REAL_CASES / "mmlu_pro_outputs.jsonl")
    agree, clear, ours, official = 0, 0, 0, 0
    for row in rows:
        letter = (extract_answer(row["text"], Question("q", "d", row["question"], tuple(row["choices"]))) or "").upper()
        found = set(re.findall(r"answer is \(?([A-J])\)?", row["text"]))
        if len(found) == 1:
            clear, agree = clear + 1, agree + ({letter} == found)
        read_officially = next(filter(None, row["official"].values()), None)
        ours, official = ours + (letter == row["gold"]), official + (read_officially == row["gold"])
    assert clear > 800 and agree / clear >= 0.995
    assert abs(ours - official) / len(rows) < 0.005


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
