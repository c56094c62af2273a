"""A stranger's first file, in the shapes of public sets, from the command line alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from neurosig.export import PRESETS, ExportConfig
from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.questions.load import load_questions
from neurosig.runtime.cli import run_command
from tests.support.flow import save_tiny
from tests.support.released_files import NUMBERS, Released, write_released

SHAPES = ("SciKnowEval", "MMLU-Pro", "MMLU", "GPQA", "OpenBookQA", "CommonsenseQA", "ARC", "ARC by AllenAI",
          "columns of other names", "GSM8K", "prompts", "messages")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    save_tiny(made / "model")
    return made


@pytest.fixture(scope="module")
def released(folder: Path) -> dict[str, Released]:
    files = write_released(folder)
    assert (*files,) == SHAPES
    return files


@pytest.mark.parametrize("shape", SHAPES)
def test_a_released_shape_is_read_as_it_is(released: dict[str, Released], shape: str) -> None:
    file = released[shape]
    questions = load_questions(file.path, fields=file.fields)
    assert len(questions) == len({question.id for question in questions}) == len(NUMBERS)
    first = questions[0]
    assert (first.question, first.choices, first.answer) == (file.question, file.choices, file.answer)


def exported(folder: Path, file: Released, out: Path) -> None:
    """Export a file by its command line."""
    words = ["--model", str(folder / "model"), "--questions", str(file.path), "--out", str(out), "--quiet"]
    words += ["--num-generations", "2", "--max-new-tokens", "4", "--set-size", "16", "--question-filter", "all"]
    words += ["--fields", *file.fields] if file.fields else []
    assert run_command(ExportConfig, export, presets=PRESETS, prog="export", argv=words) == 0
    manifest = read_manifest(out)
    assert len(manifest.rows) == len(NUMBERS)
    assert {row.reason for row in manifest.rows} <= {"selected", "no_context"}  # a random model solves nothing
    assert manifest.header.options["fields"] == list(file.fields)
    questions = load_questions(file.path, fields=file.fields)
    assert [row.text_sha256 for row in manifest.rows] == [question.text_sha256 for question in questions]
    assert "answer" not in json.loads((out / "questions.jsonl").read_text().splitlines()[0])


def test_files_of_other_shapes_are_exported_by_the_command_line_alone(
    folder: Path, released: dict[str, Released], tmp_path: Path
) -> None:
    exported(folder, released["GPQA"], tmp_path / "gpqa")
    exported(folder, released["messages"], tmp_path / "messages")
    rows = read_manifest(tmp_path / "gpqa").rows
    assert [(row.selected, row.context, row.privileged_context) for row in rows] == [
        (True, (), f"In week {number} there was none of the others.") for number in NUMBERS
    ]
    (row, *_) = read_manifest(tmp_path / "messages").rows
    assert (row.system, row.earlier_turns) == ("You keep a mill's books.", (("user", "Ready?"), ("assistant", "Yes.")))
    assert row.as_is and row.privileged_context is None


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_exported_by_the_command_line_alone(
    folder: Path, released: dict[str, Released], tmp_path: Path, shape: str
) -> None:
    exported(folder, released[shape], tmp_path / "out")


def test_the_right_choice_of_gpqa_is_no_letter_more_often_than_by_chance(tmp_path: Path) -> None:
    """The order depends on the question alone: other answers, or another place in the file, leave it as it is."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    records = [{"Question": f"What is {n}?", **{name: f"{name} {n}" for name in names}} for n in range(400)]
    other = [{**record, **{name: f"x{name}" for name in names}} for record in reversed(records)]
    for file, rows in (("a", records), ("b", other)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, others = load_questions(tmp_path / "a.jsonl"), load_questions(tmp_path / "b.jsonl")
    letters = [question.answer for question in questions]
    assert letters == [question.answer for question in reversed(others)]
    assert all(70 <= Counter(letters)[letter] <= 130 for letter in "ABCD")
    for question in questions:
        assert (question.choices or ())["ABCD".index(str(question.answer))].startswith("Correct")
