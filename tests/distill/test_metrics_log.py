"""Metrics where people look at them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import TrainConfig
from distill.train import main
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest

METRICS = ("loss", "entropy_gap", "mean_length")


def config(manifest: Path, out: Path, **changes: object) -> TrainConfig:
    options = {"steps": 3, "questions_per_step": 2, "lora_r": 2, "keep_truncated": True, "quiet": True}
    return TrainConfig(manifest=manifest, out=out, **{**options, **changes})


def test_tensorboard_shows_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    main(config(make_manifest(tmp_path), tmp_path / "run", report_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in METRICS:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(step["step"], pytest.approx(step[name], rel=1e-6)) for step in steps]


def test_wandb_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(config(make_manifest(tmp_path), tmp_path / "run", report_to=("wandb",)))
    (stored,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"entropy_gap" in stored.read_bytes()


def test_a_missing_tracker_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(tmp_path)
    monkeypatch.setattr("distill.config.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--report-to wandb: not installed; run `pip install 'neurosig\[trackers\]'`"):
        main(config(manifest, tmp_path / "run", report_to=("wandb",)))
    assert not (tmp_path / "run").exists()
