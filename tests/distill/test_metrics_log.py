"""Metrics where people look at them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import TrainConfig
from distill.train import main
from neurosig.runtime.cli import untimed
from neurosig.runtime.errors import UserError
from tests.support.flow import interrupted_at, make_manifest
from tests.support.runs import metrics_of

METRICS = ("loss", "entropy_gap", "mean_length")


def config(manifest: Path, out: Path, **changes: object) -> TrainConfig:
    options = {"steps": 3, "questions_per_step": 2, "lora_r": 2, "keep_truncated": True, "quiet": True, "save_steps": 2}
    return TrainConfig(manifest=manifest, out=out, **{**options, **changes})


def test_tensorboard_shows_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    main(config(make_manifest(tmp_path), tmp_path / "run", report_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in METRICS:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(step["step"], pytest.approx(step[name], rel=1e-6)) for step in steps]


def test_wandb_goes_on_with_the_run_that_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    manifest = make_manifest(tmp_path)
    with interrupted_at(3), pytest.raises(KeyboardInterrupt):
        main(config(manifest, tmp_path / "run", report_to=("wandb",)))
    main(config(manifest, tmp_path / "run", report_to=("wandb",), resume=True))
    run_id = (tmp_path / "run" / "wandb" / "run_id").read_text()
    stored = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert stored and {path.name for path in stored} == {f"run-{run_id}.wandb"}
    assert all(b"entropy_gap" in path.read_bytes() for path in stored)
    assert json.loads((tmp_path / "run" / "train.json").read_text())["wandb_id"] == run_id
    main(config(manifest, tmp_path / "run", report_to=("wandb",), overwrite=True))
    assert (tmp_path / "run" / "wandb" / "run_id").read_text() != run_id


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):  # step 3 is measured, but in no checkpoint
        main(config(manifest, tmp_path / "run", steps=5, report_to=("tensorboard",)))
    main(config(manifest, tmp_path / "run", steps=5, report_to=("tensorboard",), resume=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_wandb_without_login_ends_before_training(tmp_path: Path) -> None:
    """The real command, with an empty home; nothing is written."""
    manifest = make_manifest(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc")}
    command = [sys.executable, "-m", "distill.train", "--manifest", str(manifest), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--report-to", "wandb", "--quiet"], env=environment, capture_output=True, text=True, check=False
    )
    expected = "error: --report-to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline\n"
    assert (done.returncode, done.stderr) == (2, expected)
    assert not (tmp_path / "run").exists()


def test_each_line_has_its_times_rates_and_memory(tmp_path: Path) -> None:
    """The times are within the run's; two runs differ in nothing else."""
    manifest = make_manifest(tmp_path)
    dev = {"dev_questions": str(tmp_path / "questions.jsonl"), "dev_limit": 2, "dev_generations": 1}
    start = time.perf_counter()
    main(config(manifest, tmp_path / "run", **dev))
    whole = time.perf_counter() - start
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    spent = [name for name in lines[0] if name not in untimed(lines[0])]
    phases = ("sample", "teacher", "student", "optimizer")
    assert {f"seconds_{phase}" for phase in phases} < {*spent}
    assert {"tokens_per_second_sample", "tokens_per_second_learn", "peak_memory_gb"} < {*spent}
    assert ["seconds_development" in line for line in lines] == [True, True, True]  # before training, and two saves
    assert 0 < sum(value for line in lines for name, value in line.items() if "seconds_" in name[:8]) < whole
    for line in lines:
        seconds = sum(line[f"seconds_{phase}"] for phase in phases[1:])
        assert line["tokens_per_second_learn"] == pytest.approx(line["tokens_in_loss"] / seconds, rel=0.05)
        assert line["tokens_per_second_sample"] == pytest.approx(
            line["generated_tokens"] / line["seconds_sample"], rel=0.05
        )
    assert lines[0]["peak_memory_gb"] <= lines[-1]["peak_memory_gb"]
    assert 0.1 < lines[-1]["peak_memory_gb"] < 24
    main(config(manifest, tmp_path / "again", **dev))
    assert metrics_of(tmp_path / "again") == metrics_of(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record["first"] == untimed(lines[0]) and record["last"] == untimed(lines[-1])


def test_a_missing_tracker_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(tmp_path)
    monkeypatch.setattr("neurosig.runtime.extras.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--report-to wandb: wandb is not installed; run `pip install 'neurosig\[trackers\]'`"
    ):
        main(config(manifest, tmp_path / "run", report_to=("wandb",)))
    assert not (tmp_path / "run").exists()
