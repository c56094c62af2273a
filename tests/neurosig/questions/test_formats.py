"""The shapes of question records, and where they come from besides JSONL."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neurosig.questions.load import Question, load_questions
from tests.support.question_files import GOOD, fails, one, write

# ---- shapes ----


def test_native_answers_and_stand_ins_for_kind(tmp_path: Path) -> None:
    record = {**GOOD, "answer": "one", "answers": ["one", "one season"], "category": "tv", "extra": {"x": 1}}
    question = one(tmp_path, record)
    assert (question.answer, question.aliases, question.kind) == ("one", ("one season",), "tv")
    del record["answer"]
    assert one(tmp_path, record).answer == "one"
    assert one(tmp_path, {**record, "kind": "capital"}).kind == "capital"
    assert one(tmp_path, {"id": "a", "question": "q?"}) == Question("a", "set", "q?", line=1)


def test_instruction_goes_before_a_question_without_choices_only(tmp_path: Path) -> None:
    record = {**GOOD, "answer": "Yes", "type": "true_or_false", "instruction": 'Answer "Yes" or "No".'}
    question = one(tmp_path, record)
    assert question.question == 'Answer "Yes" or "No".\n\nWhat is it?'
    assert question.aliases == ("True",)
    chosen = one(tmp_path, {**record, "choices": ["x", "y"], "answer": "A", "type": "mcq-2-choices"})
    assert chosen.question == "What is it?"
    empty = write(tmp_path / "empty.jsonl", {**record, "question": ""})
    assert 'field "question": expected text' in fails(empty)


def released(**change: Any) -> dict[str, Any]:
    record = {
        "prompt": {"default": "Pick one."},
        "question": "Which one?",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "B",
        "answer": "",
        "type": "mcq-4-choices",
        "domain": "Biology",
        "details": {"level": "L1", "task": "protein QA", "subtask": "place", "source": "web"},
    }
    return {**record, **change}


def test_sciknoweval_as_released(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing: dict[str, list[str]] = {"text": [], "label": []}
    path = write(
        tmp_path / "set.jsonl",
        released(),
        released(question="Open?", type="open-ended-qa", choices=nothing, answerKey="", answer="a long text"),
        released(question="True?", type="true_or_false", choices=nothing, answerKey="", answer="No"),
        released(question="Balance it", type="filling", choices=nothing, answerKey="", answer="2H2 + O2 = 2H2O"),
    )
    with caplog.at_level(logging.WARNING):
        mcq, judged, filled = load_questions(path)
    assert mcq == Question(
        "biology-L1-protein-QA-place-1", "biology", "Which one?", ("x", "y", "z"), "B", (), "protein QA", 1
    )
    assert (judged.id, judged.answer, judged.aliases) == ("biology-L1-protein-QA-place-3", "No", ("False",))
    assert (judged.question, judged.choices) == ("Pick one.\n\nTrue?", None)
    assert filled.answer == "2H2 + O2 = 2H2O"
    assert "skipped 1 open-ended records" in caplog.text


def test_only_open_ended_records_are_0_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", released(type="open-ended-qa", choices=None, answerKey=""))
    assert fails(path) == f"dataset {path}: 0 questions"


def test_sciknoweval_gold_not_among_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", released(answerKey="D"))
    assert fails(path) == f"{path}:1: field \"answerKey\": expected a letter of A-C, got 'D' (str)"
    path = write(tmp_path / "set.jsonl", released(choices={"text": ["x", "y"], "label": ["A"]}))
    assert '"choices": 2 texts but 1 labels' in fails(path)


def test_arc_as_released_has_numeric_labels(tmp_path: Path) -> None:
    choices = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
    question = one(tmp_path, {"id": "Mercury_7", "question": "Which?", "choices": choices, "answerKey": "3"})
    assert question == Question("Mercury_7", "set", "Which?", ("x", "y", "z"), "C", line=1)


def test_mmlu_pro_as_released_drops_na_options_and_moves_the_letter(tmp_path: Path) -> None:
    record = {
        "question_id": 70, "question": "Which?", "options": ["x", "N/A", "y", "N/A", "z"],
        "answer": "E", "answer_index": 4, "cot_content": "", "category": "law", "src": "s",
    }  # fmt: skip
    assert one(tmp_path, record) == Question("mmlu_pro-70", "mmlu_pro", "Which?", ("x", "y", "z"), "C", (), "law", 1)
    for change, message in (
        ({"answer": "B", "answer_index": 1}, 'field "answer": not a letter of one of the 3 options'),
        ({"answer": "F"}, 'field "answer": not a letter'),
        ({"answer_index": 2}, 'field "answer_index": contradicts answer E, got 2 (int)'),
    ):
        assert message in fails(write(tmp_path / "bad.jsonl", {**record, **change}))


# ---- Parquet and data sets ----


def test_parquet_rows_equal_jsonl_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    records = [
        {**GOOD, "choices": ["x", "y"], "answer": "A", "aliases": []},
        {**GOOD, "id": "b", "question": "b?", "choices": None, "answer": None, "aliases": ["c"]},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "set.parquet")
    assert load_questions(tmp_path / "set.parquet") == load_questions(write(tmp_path / "set.jsonl", *records))


def test_parquet_faults(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "set.parquet"
    path.write_bytes(b"PAR1 not really")
    assert fails(path).startswith(f"{path}: unreadable Parquet after row 0")
    pq.write_table(pa.table({"id": ["a", "b"], "question": ["q?", None]}), path)
    assert fails(path) == f'{path}:2: field "question": expected text, got null'


def test_saved_dataset_folder_and_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{**GOOD, "choices": ["x", "y"], "answer": "B"}])
    test = datasets.Dataset.from_list([{**GOOD, "id": "t"}])
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(train=train).save_to_disk(tmp_path / "single")
    expected = [Question("a", "d", "What is it?", ("x", "y"), "B", line=1)]
    assert load_questions(tmp_path / "both" / "train") == load_questions(tmp_path / "single") == expected
    assert "has the splits train, test; name one" in fails(tmp_path / "both")


def test_a_set_of_several_on_the_hub_is_named_after_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads a folder ORG/NAME here as it reads a repository of that name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lab" / "quiz"
    folder.mkdir(parents=True)
    sets = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("hard", "easy"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{sets}---\n")
    for name in ("hard", "easy"):
        write(folder / f"{name}.jsonl", {"question": f"Is it {name}?"})
    (question,) = load_questions("hf:lab/quiz/easy:train")
    assert (question.question, question.domain) == ("Is it easy?", "quiz-easy")
    assert fails("hf:lab/quiz") == (
        "dataset hf:lab/quiz: holds several sets, 'hard', 'easy'; name one, as in hf:lab/quiz/SET:SPLIT"
    )
    assert "BuilderConfig 'odd' not found" in fails("hf:lab/quiz/odd")
    assert "expected hf:ORG/NAME, hf:ORG/NAME/SET" in fails("hf:lab/quiz/easy/more")


def test_hub_dataset_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = fails("hf:no-such-org/no-such-set:test")
    assert message.startswith("dataset hf:no-such-org/no-such-set:test: not found, or no connection")


def test_reader_imports_neither_datasets_nor_pyarrow() -> None:
    code = (
        "import sys, neurosig.questions.load as q; q.load_questions('world-facts');"
        "sys.exit(','.join({'datasets', 'pyarrow', 'torch', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
