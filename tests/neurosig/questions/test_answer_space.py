"""Answer spaces in question files, and gold answers that are worked solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neurosig.questions.load import load_questions, without_answers
from tests.support.question_files import GOOD, fails, one, write

ASIA = {**GOOD, "question": "Which continent?", "answer": "Asia"}


@pytest.mark.parametrize(
    ("space", "read"),
    [
        ("continents", "continents"),
        (["Asia", "Europe"], (("Asia",), ("Europe",))),
        ([["Asia"], ["Europe", "Old World"]], (("Asia",), ("Europe", "Old World"))),
        (["Europe", ["The Far East", "ASIA"]], (("Europe",), ("The Far East", "ASIA"))),
        (None, None),
    ],
)
def test_an_answer_space_is_a_name_or_a_list_and_outlives_the_gold_answer(
    tmp_path: Path, space: Any, read: Any
) -> None:
    question = one(tmp_path, {**ASIA, "answer_space": space})
    assert question.answer_space == read
    [unlabelled] = without_answers([question])
    assert unlabelled.answer_space == read and unlabelled.answer is None
    assert question.text_sha256 == one(tmp_path, ASIA).text_sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_space": 7}, 'field "answer_space": expected the name of a space, a list of texts or'),
        ({"answer_space": {"Asia": []}}, 'field "answer_space": expected the name of a space'),
        ({"answer_space": ["Asia", 3]}, 'field "answer_space": expected the name of a space'),
        ({"answer_space": [["Asia", None]]}, 'field "answer_space": expected the name of a space'),
        (
            {"answer_space": "planets"},
            "field \"answer_space\": no such space, got 'planets' (str); the bundled ones are",
        ),
        ({"answer_space": []}, 'field "answer_space": expected at least one member, got an empty list'),
        ({"answer_space": ["Asia", []]}, 'field "answer_space": a member without a letter or digit, got []'),
        ({"answer_space": ["Asia", " "]}, 'field "answer_space": expected text'),
        ({"answer_space": ["Asia", "?!"]}, 'field "answer_space": a member without a letter or digit'),
        ({"answer_space": ["Asia", "the asia"]}, 'field "answer_space": "asia" is in two members'),
        ({"answer_space": [["Asia"], ["Orient", "asia"]]}, 'field "answer_space": "asia" is in two members'),
        ({"answer_space": [["Asia", "Asia"]]}, 'field "answer_space": a member has the same name twice'),
        ({"answer_space": ["Europe", "Africa"]}, 'field "answer": not a member of field "answer_space", got \'Asia\''),
        ({"answer_space": "capitals"}, 'field "answer": not a member of field "answer_space"'),
        ({"answer_space": ["Asia"], "choices": ["x", "y"], "answer": "A"}, 'field "answer_space": the choices are all'),
    ],
)
def test_a_malformed_answer_space_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "set.jsonl", ASIA, {**ASIA, "id": "b", "question": "Why?", **change})
    assert fails(path).startswith(f"{path}:2: {message}")


def test_a_bundled_question_lies_in_its_space() -> None:
    assert {q.answer_space for q in load_questions("geography")} == {"continents", "countries", "capitals"}


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"answer": "She sells 16 - 7 = <<16-7=9>>9 eggs.\n#### 18"}, "18"),
        ({"answer": "#### 1,234"}, "1234"),
        ({"answer": "so $x=5$ and \\boxed{5}"}, "5"),
        ({"answer": "by rule B. #### B", "choices": ["x", "y"]}, "B"),
        ({"answer": "#### Asia", "answer_space": ["Asia", "Europe"]}, "asia"),
        ({"answer": "Answer of no mark: 18"}, "Answer of no mark: 18"),
    ],
)
def test_a_worked_solution_as_gold_answer_is_parsed(tmp_path: Path, record: dict[str, Any], answer: str) -> None:
    assert one(tmp_path, {**GOOD, "question": "How much is it?", **record}).answer == answer


def test_aliases_are_parsed_too(tmp_path: Path) -> None:
    question = one(tmp_path, {**GOOD, "answer": "nine", "aliases": ["16 - 7 #### 9"]})
    assert (question.answer, question.aliases) == ("nine", ("9",))
