"""--answer-parser through every command, votes of merged answers, and gold answers that no completion can give."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pyarrow.parquet import read_table

import distill.baselines.rewards
from distill.baselines.rewards import vote_rewards
from distill.evaluate import main as evaluate
from neurosig.manifest import read_manifest
from neurosig.questions.reader import Reading
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support.flow import make_manifest, write_questions
from tests.support.runs import evaluate_config, train, train_baseline

PARSER = "my_parser:parse"
CODE = """\
SAID = {said}

def parse(text, question, answer_format, *, finish_reason="stop", prompt_opens_thought=False):
    assert question.answer is None and finish_reason in ("stop", "length") and not prompt_opens_thought
    return SAID[len(text.encode()) % len(SAID)]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a parser that reads the parity of a text's length."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parser.py").write_text(CODE.format(said=["Odd!", "even"]))
    return tmp_path


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return json.loads((folder / "summary.json").read_text()), read_table(folder / "results.parquet").to_pylist()


def test_export_evaluate_and_verify_use_the_parser(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_manifest(here, answer_parser=PARSER)
    write_questions(here / "questions.jsonl", answer="odd")
    evaluate(evaluate_config(here, answer_parser=PARSER))
    manifest, (summary, rows) = read_manifest(folder), results(here / "eval")
    assert {answer for row in manifest.rows for answer in row.answers} == {"odd", "even"}
    assert manifest.header.answers == summary["answers"]
    assert summary["answers"]["answer_parser_sha256"] == sha256_file(here / "my_parser.py")
    assert all(row["n_correct"] == row["answers"].count("odd") and row["unparsed"] == 0 for row in rows)
    verify(VerifyConfig(folder=here))
    (here / "my_parser.py").unlink()
    verify(VerifyConfig(folder=here))
    assert capsys.readouterr().out.count("skip ") == 2
    (here / "my_parser.py").write_text(CODE.format(said=["even", "odd"]))
    with pytest.raises(UserError, match="2 of"):
        verify(VerifyConfig(folder=here))
    assert capsys.readouterr().out.count("restore that file") == 2


def test_training_takes_the_manifests_parser_and_no_other(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "other.py").write_text(CODE.format(said=["b"]))
    folder = make_manifest(here, answer_parser=PARSER)
    read: list[Reading] = []

    def recorded(reading: Reading) -> list[float]:
        read.append(reading)
        return vote_rewards(reading)

    monkeypatch.setattr(distill.baselines.rewards, "vote_rewards", recorded)
    for changes in ({}, {"answer_parser": PARSER}):
        train_baseline(here, folder, f"run{len(changes)}", steps=1, num_generations=8, **changes)
        assert {answer for reading in read for answer in reading.answers} == {"odd", "even"}
        read.clear()
    write_questions(here / "dev.jsonl", answer="odd")
    train(here, folder, "dev", steps=1, dev_questions=str(here / "dev.jsonl"), dev_generations=3)
    [first, *_] = [json.loads(line) for line in (here / "dev" / "development.jsonl").read_text().splitlines()]
    assert 0 < first["maj_at_k"] < 1
    for method in ("nopsd", "ttrl", "lmsi"):
        with pytest.raises(
            UserError, match=r"--answer-parser other:parse: the recorded answers were read by my_parser"
        ):
            train_baseline(here, folder, "refused", method=method, answer_parser="other:parse")
    (here / "my_parser.py").write_text(CODE.format(said=["a"]))
    with pytest.raises(UserError, match=r"its source file has the SHA-256 [0-9a-f]{64}, on record is [0-9a-f]{64}"):
        train_baseline(here, folder, "changed", steps=1)


@pytest.mark.parametrize(("parser", "message"), [("gone:parse", "no module gone"), ("my_parser:x", "no function x")])
def test_a_parser_that_is_not_there_is_named_before_the_model_loads(here: Path, parser: str, message: str) -> None:
    (here / "model").mkdir()  # no model in it
    with pytest.raises(UserError, match=message):
        make_manifest(here, answer_parser=parser)
    with pytest.raises(UserError, match=message):
        evaluate(evaluate_config(here, answer_parser=parser))


def test_a_parser_that_fails_names_the_question(here: Path) -> None:
    (here / "my_parser.py").write_text("def parse(text, *_, **__):\n    return 3\n")
    with pytest.raises(UserError, match=r'question "q\d", rollout 0: expected a text or None, got 3 \(int\)'):
        evaluate(evaluate_config(here, answer_parser=PARSER))
    assert not (here / "eval" / "summary.json").exists()


def test_ttrl_rewards_the_answers_that_vote_for_the_winner() -> None:
    """The rollout that said "west africa" voted for "africa"."""
    merged = ("africa", "africa", "asia", None)
    from neurosig.questions.vote import majority_vote

    assert vote_rewards(Reading(("africa", "west africa", "asia", None), merged, majority_vote(merged, "q"))) == [
        1,
        1,
        0,
        0,
    ]


def test_a_row_of_the_manifest_parses_again_as_it_did(here: Path) -> None:
    """Its answer space included: a name as its name, a list in full."""
    spaces: list[Any] = ["continents", ["odd", "even"], [["odd", "strange"], ["even"]], None]
    records = [
        json.loads(line) for line in write_questions(here / "questions.jsonl", answer=None).read_text().splitlines()
    ]
    records = [{**record, "answer_space": spaces[n % 4]} for n, record in enumerate(records)]
    (here / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = read_manifest(make_manifest(here))
    rows = [
        json.loads(line)["answer_space"] for line in (here / "manifest" / "questions.jsonl").read_text().splitlines()
    ]
    assert rows[:4] == ["continents", [["odd"], ["even"]], [["odd", "strange"], ["even"]], None]
    reader = manifest.header.answer_reader()
    for row in manifest.rows:
        group = [manifest.rollouts[row.question_id, k] for k in range(len(row.answers))]
        reading = reader.read(group, row.as_question())
        assert (reading.raw_answers, reading.answers) == (row.raw_answers, row.answers)


@pytest.mark.parametrize(
    ("options", "answer", "lost"),
    [
        ({}, "one two three four five six seven eight nine", True),
        ({}, "?!", True),
        ({"answer_format": "number"}, "five", True),
        ({"answer_format": "letter"}, "Paris", True),
        ({}, "Paris", False),
        ({}, "3 + 2 = 5 #### 5", False),
        ({"answer_format": "number"}, "3 + 2 = 5 #### 5", False),
    ],
)
def test_gold_answers_that_no_completion_can_give_are_counted(
    here: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], answer: str, lost: bool
) -> None:
    lines = write_questions(here / "good.jsonl", 2, answer="7").read_text().splitlines()
    if options.get("answer_format") == "letter":
        lines = [line.replace('"7"', '"B"') for line in lines]
    bad = json.dumps({"id": "bad", "question": "Which one?", "answer": answer})
    (here / "questions.jsonl").write_text("\n".join([*lines, bad]))
    with caplog.at_level(logging.WARNING):
        evaluate(evaluate_config(here, **options))
    [*warned] = [record.getMessage() for record in caplog.records if "gold answers" in record.getMessage()]
    assert len(warned) == lost
    if lost:
        assert warned[0].startswith("1 of 3 gold answers") and f'"{answer}" of question "bad"' in warned[0]


def test_a_worked_solution_counts_as_its_result(here: Path) -> None:
    """Today's parser gives the result; as released, GSM8K's gold answers were never equal to any answer."""
    (here / "my_parser.py").write_text("def parse(*_, **__):\n    return '5'\n")
    write_questions(here / "questions.jsonl", answer="3 + 2 = <<3+2=5>>5\n#### 5")
    evaluate(evaluate_config(here, answer_parser=PARSER))
    assert results(here / "eval")[0]["domains"]["colour"]["avg_at_k"]["estimate"] == 1
