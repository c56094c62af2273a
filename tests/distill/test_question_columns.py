"""A question file with columns of its own, one of them for the teacher, from export to evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.evaluate import main as evaluate
from distill.rescore import RescoreConfig
from distill.rescore import main as rescore
from distill.tasks import manifest_tasks, replay_tasks
from neurosig.export import main as export
from neurosig.intervene.__main__ import InterveneConfig
from neurosig.intervene.__main__ import _questions as intervene_questions
from neurosig.manifest import Manifest, read_manifest
from neurosig.models.load import load_model
from neurosig.report.__main__ import ReportConfig
from neurosig.report.__main__ import main as report
from neurosig.runtime.errors import UserError
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support.flow import WORDS, export_config, save_tiny
from tests.support.manifests import edit_header, edit_row
from tests.support.runs import evaluate_config, train, train_baseline
from tests.support.tiny import CONTEXT

FIELDS = ("question=item.stem", "answer=gold", "privileged_context=note")
WORDING = "Read {privileged_context} first.\n{question}"


def write_items(path: Path, **change: Any) -> Path:
    """Eight questions without ids in columns of other names; every second one brings a note."""
    records = [
        {"item": {"stem": f"Is {word} nice?"}, "gold": f"GOLD{n}", "note": f"NOTE{n}" if n % 2 else None, **change}
        for n, word in enumerate(WORDS[:8])
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    items = write_items(folder / "items.jsonl")
    export(export_config(folder, folder / "model", items, fields=FIELDS, privileged_wording=WORDING))
    return folder


@pytest.fixture(scope="module")
def manifest(world: Path) -> Manifest:
    return read_manifest(world / "manifest")


def test_a_note_replaces_the_demonstrations(manifest: Manifest) -> None:
    """Also where the question would have none, and the manifest says so; no gold answer is in it."""
    noted = manifest.rows[1::2]
    assert [row.privileged_context for row in noted] == [f"NOTE{n}" for n in (1, 3, 5, 7)]
    assert all(row.selected and row.reason == "selected" and not row.context for row in noted)
    others = manifest.rows[0::2]
    assert all(row.privileged_context is None for row in others) and any(row.context for row in others)
    assert {item.question_id for row in others for item in row.context} & {row.question_id for row in noted}
    assert manifest.header.notes[-1] == "4 of 8 questions bring the privileged_context that their teacher sees"
    assert manifest.header.options["fields"] == list(FIELDS) and manifest.header.schema_version == "1.4"
    assert "GOLD" not in (manifest.folder / "questions.jsonl").read_text()


def test_only_the_teacher_sees_the_note(world: Path, manifest: Manifest) -> None:
    loaded = load_model(world / "model")
    tasks = {task.id: task for task in manifest_tasks(manifest, loaded, max_new_tokens=4)}
    for number, row in enumerate(manifest.rows):
        if row.question_id not in tasks:
            continue
        task = tasks[row.question_id]
        student, teacher = (loaded.tokenizer.decode(ids) for ids in (task.student_prompt, task.teacher_prompt))
        assert "NOTE" not in student
        if number % 2:
            assert teacher == student.replace(row.question, f"Read NOTE{number} first.\n{row.question}")
        else:
            assert "NOTE" not in teacher and teacher.endswith(student) and len(teacher) > len(student)


def test_training_learns_from_the_notes(world: Path, manifest: Manifest, tmp_path: Path) -> None:
    metrics, _ = train(tmp_path, manifest.folder, steps=1, keep_truncated=True, questions_per_step=8)
    assert metrics[0]["loss"] > 0
    export(export_config(world, world / "model", world / "items.jsonl", "default", fields=FIELDS))
    other, _ = train(tmp_path, world / "default", "default", steps=1, keep_truncated=True, questions_per_step=8)
    assert other[0]["generated_tokens"] == metrics[0]["generated_tokens"]
    assert other[0]["loss"] != metrics[0]["loss"]  # the same rollouts under another wording
    with pytest.raises(UserError, match="but the contexts are a privileged_context from the question file"):
        train_baseline(tmp_path, manifest.folder, "own", method="u-opsd")


def test_replayed_and_development_questions_have_such_columns(world: Path, manifest: Manifest, tmp_path: Path) -> None:
    items = str(world / "items.jsonl")
    with pytest.raises(UserError, match='no column "stem"'):
        train(tmp_path, manifest.folder, "bad", dev_questions=items, fields=("question=stem",))
    train(tmp_path, manifest.folder, steps=1, keep_truncated=True, dev_questions=items, replay=items, fields=FIELDS)
    assert "0.0" in (tmp_path / "run" / "development.jsonl").read_text()
    loaded = load_model(world / "model")
    (task, *_) = replay_tasks(items, manifest.header, loaded, weight=1.0, max_new_tokens=4, fields=FIELDS)
    assert task.teacher_prompt == task.student_prompt


def test_every_reader_of_gold_answers_finds_them_again(
    world: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the recorded columns: evaluation, its rescoring, verification and the report."""
    items = world / "items.jsonl"
    evaluate(evaluate_config(world, questions=(str(items),), fields=FIELDS))
    rescore(RescoreConfig(folders=(world / "eval",), out=world / "again", quiet=True))
    summaries = [json.loads((world / name / "summary.json").read_text()) for name in ("eval", "again/eval")]
    assert summaries[0]["questions_sha256"] == summaries[1]["questions_sha256"]
    assert summaries[0]["config"]["fields"] == list(FIELDS)
    report(ReportConfig(manifest=world / "manifest", out=world / "report", permutations=0, quiet=True))
    page = (world / "report" / "report.html").read_text()
    assert "GOLD1" in page and "What the teacher sees with it, from the question file" in page and "NOTE1" in page
    capsys.readouterr()
    verify(VerifyConfig(folder=world))
    printed = capsys.readouterr().out
    assert "8 questions and their contexts, 4 of them privileged_context of the question file" in printed
    assert "8 rows follow from the rollouts and the gold answers" in printed
    options: dict[str, Any] = {"manifest": world / "manifest", "out": world / "intervene", "fields": FIELDS}
    read = intervene_questions(InterveneConfig(questions=(str(items),), **options))
    assert [question.answer for question in read] == [f"GOLD{n}" for n in range(8)]


def test_gold_answers_of_a_file_with_our_columns_are_joined_by_the_made_ids(world: Path, tmp_path: Path) -> None:
    """The ids do not depend on a file's name."""
    labelled = tmp_path / "labelled.jsonl"
    records = [{"question": f"Is {word} nice?", "answer": f"MINE{n}"} for n, word in enumerate(WORDS[:8])]
    labelled.write_text("".join(json.dumps(record) + "\n" for record in records))
    options: dict[str, Any] = {"questions": (str(labelled),), "permutations": 0, "quiet": True}
    with pytest.raises(UserError, match=r'no column "item\.stem"'):
        report(ReportConfig(manifest=world / "manifest", out=tmp_path / "report", **options))
    given = ReportConfig(manifest=world / "manifest", out=tmp_path / "report", fields=("question=question",), **options)
    report(given)
    assert "MINE1" in (tmp_path / "report" / "report.html").read_text()


def test_another_note_is_another_data_set(world: Path, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", note="Another.")
    with pytest.raises(UserError, match="these differ: dataset"):
        export(export_config(tmp_path, world / "model", items, fields=FIELDS, reuse=world / "manifest"))


def test_a_note_that_does_not_fit_leaves_its_question_out(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = write_items(tmp_path / "items.jsonl")
    items.write_text(items.read_text().replace("NOTE3", "x" * CONTEXT))
    export(export_config(tmp_path, world / "model", items, fields=FIELDS))
    assert [row.reason for row in read_manifest(tmp_path / "manifest").rows][3] == "too_long"
    assert "1 of 8 questions are too long" in caplog.text


@pytest.mark.parametrize(
    "wording", ["{question}", "{privileged_context}", "{question} {question} {privileged_context}"]
)
def test_a_wording_without_its_places_is_refused(world: Path, tmp_path: Path, wording: str) -> None:
    with pytest.raises(UserError, match=r"--privileged-wording: expected \{\w+\} once in it, found it [02] times"):
        export_config(tmp_path, world / "model", world / "items.jsonl", privileged_wording=wording)


def test_manifests_with_and_without_notes_are_checked(world: Path, tmp_path: Path) -> None:
    """One of the schema before notes is read; one with a note and demonstrations is not."""
    shutil.copytree(world / "manifest", tmp_path / "old")
    shutil.copytree(world / "manifest", tmp_path / "both")
    names = ("system", "earlier_turns", "as_is", "privileged_context")
    for line in range(1, 9):
        edit_row(tmp_path / "old", line, lambda row: [row.pop(name) for name in names])
    edit_header(tmp_path / "old", lambda header: (header.update(schema_version="1.2"), header["options"].pop("fields")))
    old = read_manifest(tmp_path / "old")
    assert all(row.privileged_context is None and not row.as_is for row in old.rows)
    assert [row.answers for row in old.rows] == [row.answers for row in read_manifest(world / "manifest").rows]
    place = next(n for n, row in enumerate(old.rows, start=1) if row.context)
    edit_row(tmp_path / "both", place, lambda row: row.update(privileged_context="x"))
    with pytest.raises(UserError, match=rf"questions\.jsonl:{place}: \$\.context: demonstrations beside a privileged"):
        read_manifest(tmp_path / "both")
