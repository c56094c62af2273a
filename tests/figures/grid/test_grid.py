"""The grid: cells run in processes of their own, finished ones are skipped, and the results are two files."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet
import pytest

from figures.experiments.loglikelihood import LoglikelihoodConfig
from figures.experiments.loglikelihood import main as score
from figures.grid.__main__ import main
from figures.grid.collect import collect, control_temperature
from figures.grid.config import PRESETS, GridConfig
from figures.grid.evidence import COMMITTED, EvidenceConfig
from figures.grid.evidence import main as keep
from figures.grid.rescore import RescoreGridConfig
from figures.grid.rescore import main as rescore
from figures.grid.texts import format_check
from neurosig.runtime.arguments import parse_config
from neurosig.runtime.cli import command_words
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import output_folder
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support.exports import write_lines
from tests.support.flow import save_tiny, write_questions
from tests.support.paths import ROOT

TINY = {"num_generations": 3, "max_new_tokens": 4, "temperature": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    save_tiny(folder / "model")
    for name in ("red", "blue"):
        write_questions(folder / f"{name}.jsonl", domain=name)
    spaced = write_questions(folder / "red-test.jsonl", domain="red", answer_space=[f"GOLD{i}" for i in range(8)])
    *six, last, other = map(json.loads, spaced.read_text().splitlines())
    write_lines(spaced, [*six, last | {"answer_space": None}, other | {"answer_space": None}])
    return folder


def grid(folder: Path, **changes: Any) -> GridConfig:
    named = tuple(f"{name.removesuffix('-test')}={folder / name}.jsonl" for name in ("red", "red-test", "blue"))
    options: dict[str, Any] = {
        "methods": ("probe", "probe-random"),
        "sources": named[:1],
        "targets": named[1:],
        "dev": named[:1],
        "control_temperatures": (0.5,),
        "export": {**TINY, "set_size": 16, "question_filter": "all", "keep_truncated": True},
        "train": {"steps": 1, "questions_per_step": 2, "lora_r": 2, "keep_truncated": True},
        "evaluate": TINY,
        "quiet": True,
    }
    return GridConfig(out=folder / "grid", model=str(folder / "model"), **{**options, **changes})


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "grid" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_command_starts_its_processes_and_names_what_failed(tmp_path: Path) -> None:
    """Through ``python -m``, where `__main__` is no module that a process of its own could import."""
    questions = write_questions(tmp_path / "questions.jsonl")
    command = [sys.executable, "-m", "figures.grid", "--model", "none", "--sources", f"a={questions}", "--quiet"]
    command += ["--methods", "lmsi", "--out", str(tmp_path / "grid")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "base: distill.evaluate: error: model none" in run.stderr
    assert "2 cells failed (base, lmsi--a--seed0): see log.txt in each; fix it and run again" in run.stderr


def test_a_grid_runs_resumes_and_collects(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="figures")
    (folder / "model" / "config.json").rename(folder / "away")
    with pytest.raises(UserError, match=r"4 cells failed \(base, control-T0.5, .*probe-random--red--seed0\): see log"):
        main(grid(folder))
    assert "base: distill.evaluate: error: model" in caplog.text and "no config.json" in caplog.text
    (folder / "away").rename(folder / "model" / "config.json")

    capsys.readouterr()
    main(grid(folder))
    tables = capsys.readouterr().out
    assert "trained_on: 8 (probe--red--seed0 on red; of 8 questions)" in tables
    found = {(row["method"], row["source"], row["target"]) for row in rows(folder)}
    trained = {(method, "red", target) for method in ("probe", "probe-random") for target in ("red", "blue")}
    assert found == trained | {(method, "", target) for method in ("base", "control") for target in ("red", "blue")}
    assert {row["temperature"] for row in rows(folder) if row["method"] == "control"} == {"0.5"}

    cells = folder / "grid" / "cells"
    answers = pyarrow.parquet.read_table(folder / "grid" / "grid.parquet").to_pandas()
    for (method, target), run in answers[answers.method != "control"].groupby(["method", "target"]):
        cell = method if method == "base" else f"{method}--red--seed0"
        summary = json.loads((cells / cell / "eval" / target / "summary.json").read_text())["domains"][target]
        assert (run.n_correct / run.k).mean() == pytest.approx(summary["avg_at_k"]["estimate"])
        assert len(run) == summary["n"] == 8
    policies = {
        name: json.loads((folder / "grid" / "manifests" / "red" / name / "manifest.json").read_text())
        for name in ("probe", "probe-random")
    }
    assert policies["probe-random"]["options"]["context_policy"] == "random"
    files = [policy["files"]["rollouts.jsonl"]["sha256"] for policy in policies.values()]
    assert files[0] == files[1]

    for row in rows(folder):
        steps = cells / f"{row['method']}--red--seed0" / "train" / "metrics.jsonl"
        first = json.loads(steps.read_text().splitlines()[0]) if row["source"] else {"entropy_gap": math.nan}
        assert float(row["first_entropy_gap"] or "nan") == pytest.approx(first["entropy_gap"], rel=1e-5, nan_ok=True)

    with (folder / "grid" / "seconds.csv").open(newline="") as handle:
        spent = {row["method"]: float(row["seconds"]) for row in csv.DictReader(handle)}
    assert set(spent) == set(policies) and min(spent.values()) > 0
    check_loglikelihood(folder, caplog, capsys)
    check_kept(folder, len(answers), monkeypatch)
    check_seeds(folder, caplog, capsys)
    check_other_options_are_refused(folder)


def check_loglikelihood(folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Every trained cell in its own domain, on the six questions with an answer space; blue has none."""
    capsys.readouterr()
    score(LoglikelihoodConfig(grid=folder / "grid", quiet=True))
    assert "| N-OPSD with our probe | 1 | 6 |" in capsys.readouterr().out
    assert "blue: left out; no evaluated question of it has choices or an answer space" in caplog.text
    table = pandas.read_csv(folder / "grid" / "loglikelihood.csv", keep_default_na=False).set_index("method")
    assert set(table.index) == {"base", "probe", "probe-random"} and set(table.target) == {"red"}
    assert set(table.n) == {6} and set(table.skipped) == {2} and set(table.chance) == {1 / 8}
    for method, cell in (("base", "base--red"), ("probe", "probe--red--seed0--red")):
        summary = json.loads((folder / "grid" / "loglikelihood" / cell / "summary.json").read_text())
        adapter = summary["config"]["adapter"]
        assert adapter == (None if method == "base" else str(folder / "grid/cells/probe--red--seed0/train/adapter"))
        for name in ("accuracy", "accuracy_mutual_info"):
            assert table.loc[method, name] == pytest.approx(summary["domains"]["red"][name]["estimate"], abs=1e-5)
    changes = table.accuracy - table.accuracy["base"]
    assert table.accuracy_change[["probe", "probe-random"]].astype(float).tolist() == pytest.approx(
        changes[1:].tolist()
    )
    before = {path: path.stat().st_mtime_ns for path in (folder / "grid" / "loglikelihood").rglob("summary.json")}
    score(LoglikelihoodConfig(grid=folder / "grid", quiet=True))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def check_kept(folder: Path, n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed of a grid, and its tables from the texts alone."""
    keep(EvidenceConfig(grid=folder / "grid", out=folder / "kept"))
    signals = pandas.read_csv(folder / "kept" / "signals.csv")
    assert len(signals) == 8 and set(signals.source) == {"red"} and not signals.right.any()
    assert {"vote_share", "probe_score"} <= set(signals)
    kept = ("grid.parquet", "layout.json", "results.csv", "rollouts.parquet", "questions.jsonl", "reader.json")
    for name in (*kept, "evidence_plan.toml"):
        assert (folder / "kept" / name).read_bytes() == (folder / "grid" / name).read_bytes()

    texts = pyarrow.parquet.read_table(folder / "kept" / "rollouts.parquet").to_pylist()
    assert len(texts) == n_rows * 3 and {text["finish_reason"] for text in texts} <= {"stop", "length"}
    rescore(RescoreGridConfig(grid=folder / "kept", out=folder / "again"))
    for name in ("grid.parquet", "layout.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "grid" / name).read_bytes()
    (folder / "same_answer.py").write_text("def parse(text, question, *args, **options):\n    return 'gold0'\n")
    monkeypatch.syspath_prepend(folder)
    rescore(RescoreGridConfig(grid=folder / "kept", out=folder / "same", answer_parser="same_answer:parse"))
    same = pyarrow.parquet.read_table(folder / "same" / "grid.parquet").to_pylist()
    assert all((row["votes"], row["n_correct"]) == (3, 3 * (row["question_id"] == "q0")) for row in same)
    with pytest.raises(UserError, match="same: holds a grid"):
        rescore(RescoreGridConfig(grid=folder / "kept", out=folder / "same"))


def check_seeds(folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds are added to a grid without repeating anything."""
    cells = folder / "grid" / "cells"
    before = {path: path.stat().st_mtime_ns for path in cells.rglob("*") if path.is_file()}
    with (
        output_folder(folder / "grid", finished="results.csv", owned=(), resume=True, overwrite=False),
        pytest.raises(UserError, match=f"in use by pid {os.getpid()} "),
    ):
        main(grid(folder))
    caplog.clear()
    main(grid(folder, more_seeds=(1,), more_seeds_for=("probe",), jobs=2))
    assert "--jobs 1 before, 2 now; bits of the results may differ" in caplog.text
    after = {path: path.stat().st_mtime_ns for path in cells.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(cells).parts[0] for path in after.keys() - before.keys()} == {"probe--red--seed1"}
    assert {row["seed"] for row in rows(folder) if row["method"] == "probe"} == {"0", "1"}

    main(grid(folder, methods=("probe",), evaluation_seeds=(0, 1)))  # no cell is trained again
    new = {path.relative_to(cells) for path in cells.rglob("*") if path.is_file()} - {
        p.relative_to(cells) for p in after
    }
    assert {path.parts[1] for path in new} == {"eval"} and {path.parts[2].partition("--")[2] for path in new} == {
        "seed1"
    }
    pooled = pyarrow.parquet.read_table(folder / "grid" / "grid.parquet").to_pandas()
    assert set(pooled[pooled.method == "base"].evaluation_seed) == {0, 1}
    two = [row for row in rows(folder) if row["method"] == "base" and row["target"] == "red"]
    assert sorted(row["evaluation_seed"] for row in two) == ["0", "1"]
    capsys.readouterr()
    verify(VerifyConfig(folder=folder / "grid", quiet=True))
    assert "ok    .: base on red--seed1 as its cell says" in capsys.readouterr().out


def check_other_options_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="give the sampling seeds of the evaluations as --evaluation-seeds"):
        main(grid(folder, evaluate={**TINY, "seed": 3}))

    shutil.copy(folder / "blue.jsonl", folder / "kept.jsonl")
    moved = (f"red={folder / 'red-test'}.jsonl", f"blue={folder / 'kept'}.jsonl")
    with pytest.raises(
        UserError, match=r"other targets options: targets.blue .\S*blue.jsonl before, \S*kept.jsonl now"
    ):
        main(grid(folder, targets=moved))
    write_questions(folder / "blue.jsonl", domain="blue", question="Is it?")
    with pytest.raises(
        UserError, match=r"eval/blue: made from inputs that have changed since: questions .\S*blue.jsonl"
    ):
        main(grid(folder))
    shutil.move(folder / "kept.jsonl", folder / "blue.jsonl")

    with pytest.raises(
        UserError, match=r"its cells were made with other train options: train.keep.* train.steps .1 before, 2 now.;"
    ):
        main(grid(folder, train={"steps": 2}))


def test_a_grid_without_texts_says_so(tmp_path: Path) -> None:
    """The committed grid was run before texts were kept."""
    with pytest.raises(UserError, match=r"no rollouts\.parquet; this grid was collected before texts were kept"):
        rescore(RescoreGridConfig(grid=COMMITTED, out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_format_check_pairs_questions() -> None:
    """Of 4 samples, the base answers 1 in a form that is read, though 3 name the gold answer."""
    known = {"source": "", "seed": 0, "target": "red", "k": 4, "n_correct": 1, "n_correct_lenient": 3, "unparsed": 3}
    known |= {"votes": 1, "n_tied": 1, "n_tied_right": 1, "n_tied_right_lenient": 1}
    rows = [{**known, "method": "base", "question_id": f"q{index}"} for index in range(5)]
    for seed in (0, 1):
        learned = {"method": "lmsi", "source": "red", "seed": seed, "n_correct": 3, "unparsed": seed}
        rows += [{**row, **learned} for row in rows[:5]]
    text = format_check(rows)
    assert "| base |  | 0.250 |  | -0.500 |  |" in text
    assert "| LMSI | in | 0.875 | +0.625 [+0.625, +0.625] | 0.000 | +0.500 [+0.500, +0.500] |" in text
    assert "Training changed the wording of the answers: LMSI (in)" in text
    same = [{**row, "n_correct": 1, "unparsed": 3} for row in rows]
    assert "changed the wording" not in format_check(same)


def test_the_control_is_the_temperature_that_the_development_questions_prefer(tmp_path: Path) -> None:
    scores = {"control-T0.1": (0.2, 0.6), "control-T0.5": (0.5, 0.4), "control-T1": (0.6, 0.1), "base": ()}
    for cell, values in scores.items():
        for domain, value in zip("ab", values, strict=False):
            folder = tmp_path / cell / "eval" / f"dev-{domain}"
            folder.mkdir(parents=True)
            block = {domain: {"n": 9, "avg_at_k": {"estimate": value}}}
            (folder / "summary.json").write_text(json.dumps({"domains": block}))
    assert control_temperature([tmp_path / cell for cell in scores]) == "control-T0.5"
    assert control_temperature([tmp_path / "base"]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("nopds",)}, "method nopds: expected one of nopsd, "),
        ({"sources": ("a=x.jsonl", "a=y.jsonl")}, "--sources a=y.jsonl: expected NAME=QUESTIONS"),
        ({"targets": ("../up=x.jsonl",)}, "--targets ../up=x.jsonl: expected NAME=QUESTIONS"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = grid(folder, **changes)
    config.out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        main(config)
    assert not config.out.exists()


def test_tables_of_a_config_file_reach_the_commands(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('preset = "cpu"\nseeds = [0, 1]\n[train]\nsteps = 3\n[methods_train.lmsi]\nlearning_rate = 1e-4\n')
    config = parse_config(GridConfig, presets=PRESETS, prog="grid", argv=["--config", str(file), "--out", "x"])
    assert config.seeds == (0, 1) and config.train == {"steps": 3} and config.model == "smollm2-135m"
    assert config.methods_train == {"lmsi": {"learning_rate": 1e-4}}
    assert command_words({"lora_r": 8, "full": True, "tail": False, "questions": ["a", "b"]}) == [
        *("--lora-r", "8", "--full", "--no-tail", "--questions", "a", "b")
    ]  # fmt: skip


def test_cells_that_are_unlike_the_base_are_not_put_into_one_table(folder: Path, tmp_path: Path) -> None:
    """As when training had a wording that the base was not asked with."""
    cells = tmp_path / "cells"
    for cell in ("base", "probe--red--seed0"):
        shutil.copytree(folder / "grid" / "cells" / "base" / "eval" / "red", cells / cell / "eval" / "red")
    path = cells / "probe--red--seed0" / "eval" / "red" / "summary.json"
    summary = json.loads(path.read_text())
    summary["config"] |= {"instruction": "Guess.", "temperature": 0.1, "adapter": "x"}
    path.write_text(json.dumps(summary))
    with pytest.raises(
        UserError, match=r"these differ: instruction \(.* for base, Guess. for probe--red--seed0 on red\)"
    ):
        collect(tmp_path, ["red"])
    assert "Allowed differences: instruction (" in collect(tmp_path, ["red"], ["instruction"])
