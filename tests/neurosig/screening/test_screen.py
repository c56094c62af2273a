"""The command on a tiny model whose answers agree on some questions only: rankings, resuming, records and faults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neurosig.screening.prompt_features
from neurosig import screen
from neurosig.export import ExportConfig
from neurosig.export import main as export
from neurosig.exported import join_gold
from neurosig.manifest import read_manifest
from neurosig.questions.load import load_questions
from neurosig.runtime.cli import run_command
from neurosig.runtime.errors import UserError
from neurosig.screen import QUESTIONS, RESULTS, ScreenConfig
from neurosig.screening.ranked import ranked_lines
from tests.support.exports import write_lines
from tests.support.flow import export_config, file_bytes, save_tiny
from tests.support.tiny import tiny_tokenizer

N, K, POOL = 48, 4, 24


def question(index: int) -> dict[str, Any]:
    """Every other question is an easy one."""
    how = "easy" if index % 2 == 0 else "obscure"
    record = {"id": f"q{index}", "domain": "made up", "kind": f"k{index % 4}", "answer": f"gold{index}"}
    return {**record, "question": f"Number {index} is {how}?"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pilot whose answers to easy questions agree and to others split, and a pool that shares 4 of its questions."""
    folder = tmp_path_factory.mktemp("screen")
    save_tiny(folder / "model")
    write_lines(folder / "pilot.jsonl", [question(index) for index in range(N)])
    write_lines(folder / "pool.jsonl", [question(index) for index in range(N - 4, N + POOL)])
    rng = np.random.default_rng(0)
    rollouts = [
        {
            "question_id": f"q{i}",
            "text": f"Answer: {'yes' if rng.random() < (0.95 if i % 2 == 0 else 0.2) else f'no{k}'}",
        }
        for i in range(N)
        for k in range(K)
    ]
    write_lines(folder / "rollouts.jsonl", rollouts)
    options = {"rollouts": folder / "rollouts.jsonl", "num_generations": K}
    export(export_config(folder, folder / "model", folder / "pilot.jsonl", "pilot", **options))
    return folder


def config(world: Path, out: Path, **changes: Any) -> ScreenConfig:
    options = {"run": world / "pilot", "questions": (str(world / "pool.jsonl"),), "out": out, "quiet": True}
    return ScreenConfig(**{**options, **changes})


def ranked(out: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (out / QUESTIONS).read_text().splitlines()]
    assert [row["screen_rank"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["id"]: row["expected_vote_share"] for row in rows}


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    screen.main(config(world, world / "done"))
    return world / "done"


def test_questions_on_which_the_pilot_agrees_come_first(world: Path, done: Path) -> None:
    scores = ranked(done)
    assert len(scores) == POOL + 4 and list(scores.values()) == sorted(scores.values(), reverse=True)
    new = [name for name in scores if int(name[1:]) >= N]
    easy = [int(name[1:]) % 2 == 0 for name in new]
    assert sum(easy[: POOL // 2]) >= POOL // 2 - 1
    record = json.loads((done / RESULTS).read_text())
    assert record["pilot"]["sha256"] == read_manifest(world / "pilot").header.content_sha256
    assert record["cross_fitted"]["r2"] > 0.4 and record["cross_fitted"]["auroc"]["estimate"] > 0.75
    assert record["pool"] == {"questions": POOL + 4, "ranked": POOL + 4, "in_pilot": 4, "too_long": 0}
    assert record["prefill"]["prompts_per_second"] > 0 and record["prefill"]["tokens_per_second"] > 0
    assert (done / "calibration.svg").read_text().count("<circle") == len(record["cross_fitted"]["calibration"]) == 10
    assert not (done / ".work").exists()


def test_a_question_of_the_pilot_is_predicted_by_a_probe_that_did_not_see_it(
    world: Path, done: Path, tmp_path: Path
) -> None:
    """Another vote share of that question changes the predictions of the others, and not its own."""
    rollouts = [json.loads(line) for line in (world / "rollouts.jsonl").read_text().splitlines()]
    mine = f"q{N - 2}"
    changed = [
        {**one, "text": "Answer: " + "abcd"[i % K]} if one["question_id"] == mine else one
        for i, one in enumerate(rollouts)
    ]
    write_lines(tmp_path / "rollouts.jsonl", changed)
    options = {"rollouts": tmp_path / "rollouts.jsonl", "num_generations": K}
    export(export_config(tmp_path, world / "model", world / "pilot.jsonl", "pilot", **options))
    screen.main(config(world, tmp_path / "out", run=tmp_path / "pilot"))
    before, after = ranked(done), ranked(tmp_path / "out")
    assert after[mine] == pytest.approx(before[mine], abs=1e-6)
    assert sum(abs(after[name] - before[name]) > 1e-4 for name in before) > POOL / 2


def test_batches_and_interruptions_change_no_score(
    world: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen.main(config(world, tmp_path / "singly", batch_tokens=1))
    one, many = ranked(tmp_path / "singly"), ranked(done)
    assert all(one[name] == pytest.approx(many[name], abs=1e-4) for name in many)
    screen.main(config(world, tmp_path / "whole", batch_tokens=200))
    read = neurosig.screening.prompt_features.read_prompts

    def killed(*args: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(read(*args, **options)):
            if len(args[2]) == 1 and number == 2:
                raise KeyboardInterrupt
            yield batch

    resumed = config(world, tmp_path / "killed", batch_tokens=200)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(neurosig.screening.prompt_features, "read_prompts", killed)
        screen.main(resumed)
    logged = (tmp_path / "killed" / ".work" / "scores.log").read_text().splitlines()
    assert len(logged) == 3
    with pytest.raises(UserError, match="holds an earlier run; give --resume"):
        screen.main(resumed)
    with pytest.raises(UserError, match=r"cannot resume, these differ from the interrupted run: features \("):
        screen.main(replace(resumed, features="residual", resume=True))
    screen.main(replace(resumed, resume=True))
    whole, again = file_bytes(tmp_path / "whole"), file_bytes(tmp_path / "killed")
    assert whole[QUESTIONS] == again[QUESTIONS] and whole["calibration.svg"] == again["calibration.svg"]
    screen.main(replace(resumed, resume=True))  # finished: left alone
    assert file_bytes(tmp_path / "killed") == again


def test_gold_answers_change_nothing_but_are_kept(world: Path, done: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "pool.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "other.jsonl", [{**row, "answer": f"other{i}"} for i, row in enumerate(rows)])
    screen.main(config(world, tmp_path / "out", questions=(str(tmp_path / "other.jsonl"),)))
    assert ranked(tmp_path / "out") == ranked(done)
    read = {q.id: replace(q, line=0) for q in load_questions(done)}
    assert read == {q.id: replace(q, line=0) for q in load_questions(world / "pool.jsonl")}


def test_the_ranked_questions_are_exported_and_reported_by_their_gold_answers(world: Path, done: Path) -> None:
    words = ["--model", str(world / "model"), "--questions", str(done), "--limit", "6", "--out", str(world / "next")]
    words += ["--num-generations", "2", "--max-new-tokens", "4", "--set-size", "16", "--quiet"]
    assert run_command(ExportConfig, export, presets={}, prog="export", argv=words) == 0
    manifest = read_manifest(world / "next")
    assert [row.question_id for row in manifest.rows] == list(ranked(done))[:6]
    gold, lacking = join_gold(manifest)
    assert lacking is None and {name: one.answer for name, one in gold.items()} == {
        row.question_id: f"gold{row.question_id[1:]}" for row in manifest.rows
    }


def test_the_pool_is_prompted_as_the_pilot_was(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"rollouts": world / "rollouts.jsonl", "num_generations": K}
    wording = {"instruction": "Say it.", "student_thinking": False, "system": "Be brief."}
    export(export_config(tmp_path, world / "model", world / "pilot.jsonl", "pilot", **options, **wording))
    read, asked = neurosig.screening.prompt_features.read_prompts, []

    def seen(model: Any, prompts: Any, *args: Any, **options: Any) -> Iterator[Any]:
        asked.append(prompts)
        return read(model, prompts, *args, **options)

    monkeypatch.setattr(neurosig.screening.prompt_features, "read_prompts", seen)
    screen.main(config(world, tmp_path / "out", run=tmp_path / "pilot"))
    texts = [tiny_tokenizer().decode(one[name]) for one, name in zip(asked, ("q0", f"q{N}"), strict=True)]
    for text, index in zip(texts, (0, N), strict=True):
        assert text == (
            f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nNumber {index} is easy?\nSay it.<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )


RECORDS = [
    {"question": "Which?", "choices": ["one", "two"], "answer": 1, "domain": "x"},
    {"question": "How many?", "answer": "3 + 4 = 7 #### 7", "aliases": ["seven"], "kind": "sum"},
    {"prompt": "Say it.", "answer": "it", "id": 12},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "b"}, {"role": "user", "content": "Third: \u2028 \"<|im_end|>\"?"}]},
    {"question": "Where?", "answer": "Rome", "answer_space": [["Rome", "Roma"], "Oslo"], "privileged_context": "Rome."},
    {"question": "Capital?", "answer": "Paris", "answer_space": "capitals", "unknown": 1},
]  # fmt: skip


def test_every_field_that_is_read_is_written_as_it_was_read(tmp_path: Path) -> None:
    sources = [str(write_lines(tmp_path / "in.jsonl", RECORDS)), "language", "procedures"]
    pool = load_questions(sources)
    scores = {one.id: float(len(pool) - place) for place, one in enumerate(pool) if place != 1}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / QUESTIONS).write_text(ranked_lines(pool, scores))
    assert [replace(one, line=0) for one in load_questions(tmp_path / "out")] == [
        replace(one, line=0) for place, one in enumerate(pool) if place != 1
    ]


def test_prompts_that_do_not_fit_are_left_out_and_counted(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"id": "long", "question": "x" * 600}, question(N), {"id": "tight", "question": "x" * 420}]
    write_lines(tmp_path / "some.jsonl", rows)
    screen.main(config(world, tmp_path / "out", questions=(str(tmp_path / "some.jsonl"),), quiet=False))
    assert "1 of 3 questions are too long and are left out" in caplog.text
    assert set(ranked(tmp_path / "out")) == {f"q{N}", "tight"}
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["pool"]["too_long"] == 1


def spoiled(world: Path, folder: Path, case: str) -> Mapping[str, str]:
    """Options of a run that cannot be done."""
    if case == "all too long":
        return {"questions": str(write_lines(folder / "long.jsonl", [{"question": "x" * 600}]))}
    if case == "another model":
        return {"model": str(save_tiny(folder / "model", seed=1))}
    if case in ("few", "equal"):
        n = 8 if case == "few" else 24
        write_lines(folder / "few.jsonl", [question(index) for index in range(n)])
        texts = [{"question_id": f"q{i}", "text": f"Answer: {i % 2 and k}"} for i in range(n) for k in range(2)]
        if case == "equal":
            texts = [{**one, "text": "Answer: yes"} for one in texts]
        options = {"rollouts": write_lines(folder / "r.jsonl", texts), "num_generations": 2}
        export(export_config(folder, world / "model", folder / "few.jsonl", "pilot", **options))
        return {"run": str(folder / "pilot")}
    return {
        "one domain": {"groups": "domain"},
        "no such column": {"groups": "colour"},
        "no pilot": {"run": str(folder / "gone")},
        "no pool": {"questions": str(folder / "gone.jsonl")},
        "folds": {"folds": "1"},
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("few", "8 questions with rollouts are too few for a probe; export at least 20"),
        ("equal", "every question has the same vote share, 1, so there is nothing to predict"),
        ("all too long", "every question is too long: the shortest prompt has"),
        ("another model", "was made by"),
        ("one domain", "--groups domain: all 48 questions have the same domain"),
        ("no such column", "--groups colour: no such column of the questions; have question, kind"),
        ("no pilot", "gone: no such folder"),
        ("no pool", "gone.jsonl: no such file"),
        ("folds", "--folds: expected at least 2, got 1"),
    ],
)
def test_what_cannot_be_screened_is_one_sentence(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, message: str
) -> None:
    given = {"run": str(world / "pilot"), "questions": str(world / "pool.jsonl"), "out": str(tmp_path / "out")}
    words = [word for k, v in {**given, **spoiled(world, tmp_path, case)}.items() for word in (f"--{k}", v)]
    assert run_command(ScreenConfig, screen.main, presets={}, prog="screen", argv=[*words, "--quiet"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_pilot_that_predicts_nothing_is_warned_of(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The vote shares are drawn at random, so a kind that was not seen cannot be predicted."""
    rng = np.random.default_rng(3)
    texts = [{"question_id": f"q{i}", "text": f"Answer: {rng.integers(3)}"} for i in range(N) for _ in range(K)]
    options = {"rollouts": write_lines(tmp_path / "r.jsonl", texts), "num_generations": K}
    export(export_config(tmp_path, world / "model", world / "pilot.jsonl", "pilot", **options))
    screen.main(config(world, tmp_path / "out", run=tmp_path / "pilot", groups="kind"))
    record = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert (record["cross_fitted"]["r2"] <= 0) == ("the ranking is no better than chance" in caplog.text)
    assert record["cross_fitted"]["r2"] < 0.2 and record["probe"]["groups"] == "kind"
