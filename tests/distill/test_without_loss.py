"""What is not learned from is not counted: questions of weight 0, and steps in which every rollout is masked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import distill.baselines.rewards
import distill.metrics_log
from distill.config import TrainConfig
from distill.step import learn
from distill.student import StudentSampler
from distill.tasks import Task
from distill.teacher import Teacher
from distill.train import main
from figures.draw import training_curves
from figures.grid.collect import training_row
from neurosig.models.load import load_model
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import sample
from neurosig.verify.__main__ import Found, check_training
from tests.support.flow import make_manifest
from tests.support.manifests import edit_row
from tests.support.parsers import UNCUT
from tests.support.processes import run_training, train_arguments
from tests.support.runs import metrics_of, train_config

OF_THE_LOSS = ("loss", "divergence", "teacher_entropy", "student_entropy", "entropy_gap", "clip_fraction", "grad_norm")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


def weigh(folder: Path, *weights: float) -> Path:
    manifest = make_manifest(folder, answer_parser=UNCUT)
    for line, weight in enumerate(weights, start=1):
        edit_row(manifest, line, lambda row, weight=weight: row.update(weight=weight))
    return manifest


@pytest.mark.parametrize("method", ["nopsd", "ttrl"])
def test_a_question_of_weight_0_is_neither_sampled_nor_counted(tmp_path: Path, method: str) -> None:
    manifest = weigh(tmp_path, 0.0, 0.0)
    options = {"questions_per_step": 8, "steps": 1, "method": method}
    main(train_config(tmp_path, manifest, **options))
    (step,) = metrics_of(tmp_path / "run")
    assert step["rollouts"] == step["rollouts_in_loss"] == 12
    assert json.loads((tmp_path / "run" / "train.json").read_text())["questions_seen"] == 6


def test_a_weight_of_0_given_to_a_step_leaves_the_question_out(manifest: Path) -> None:
    """The same metrics as without the question, though its rollouts are twice as long."""
    loaded = load_model(manifest.parent / "model")
    config = TrainConfig(manifest=manifest, out=manifest, full=True, keep_truncated=True)
    heavy = (Task("a", (5, 6), (7, 5, 6)), Rollout("a", 0, "", (8, 9), "stop"))
    light = (Task("b", (5, 7), (9, 5, 7), weight=0.0), Rollout("b", 0, "", (8, 9, 8, 9), "stop"))
    seen = []
    for pairs in ([heavy], [heavy, light]):
        model = load_model(manifest.parent / "model").model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen.append(learn(config, model, Teacher("base", model, None), optimizer, pairs))
    assert seen[0] == seen[1]
    with pytest.raises(ValueError, match="every question of the step has weight 0"):
        learn(config, loaded.model, Teacher("live", loaded.model, None), optimizer, [light])


def test_nothing_but_weights_of_0_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = weigh(tmp_path, *[0.0] * 8)
    for method in ("nopsd", "lmsi"):
        assert run_training(train_arguments(manifest, tmp_path / "run", method=method)) == 2
        assert "all 8 selected questions have weight 0; export again" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps in which the sampler says that no rollout was finished; in all others, that all were."""
    steps: set[int] = set()
    sampled = StudentSampler.rollouts

    def cut(self: StudentSampler, tasks: Any, sampling: Any, step: int) -> list[Rollout]:
        reason: Any = "length" if step in steps else "stop"
        return [replace(rollout, finish_reason=reason) for rollout in sampled(self, tasks, sampling, step)]

    monkeypatch.setattr(StudentSampler, "rollouts", cut)
    return steps


def run(folder: Path, manifest: Path, **changes: Any) -> Path:
    options = {"steps": 3, "save_steps": 1, "keep_checkpoints": 9, "keep_truncated": False}
    main(train_config(folder, manifest, **{**options, **changes}))
    return folder / "run"


def stored(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = sorted((run / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("changes", [{}, {"teacher": "ema"}, {"full": True}], ids=str)
def test_a_masked_step_moves_nothing_and_has_no_loss(
    tmp_path: Path, manifest: Path, masked: set[int], changes: dict[str, Any]
) -> None:
    """Neither weights, nor AdamW's moments, nor the teacher's average; the warm-up goes on with the steps."""
    masked |= {2, 3}
    folder = run(tmp_path, manifest, warmup_steps=10, **changes)
    first, *others = metrics_of(folder)
    assert all(math.isfinite(first[name]) for name in OF_THE_LOSS)
    for step in others:
        assert [step[name] for name in OF_THE_LOSS] == [None] * len(OF_THE_LOSS)
        assert step["mean_length"] > 0 and step["rollouts"] in (4, 6) and step["tokens_in_loss"] == 0
    assert [step["learning_rate"] for step in (first, *others)] == pytest.approx([1e-3, 2e-3, 3e-3])
    one, three = stored(folder, 1), stored(folder, 3)
    assert one.keys() == three.keys() and all(one[name].equal(three[name]) for name in one)


def test_a_masked_step_of_grpo_moves_nothing(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's momentum would move the weights though every gradient is 0."""
    calls: list[int] = []

    def cut_later(*args: Any, **kwargs: Any) -> list[list[Rollout]]:
        calls.append(1)
        reason: Any = "stop" if len(calls) == 1 else "length"
        return [[replace(rollout, finish_reason=reason) for rollout in group] for group in sample(*args, **kwargs)]

    monkeypatch.setattr(distill.baselines.rewards, "sample", cut_later)
    folder = run(tmp_path, manifest, method="intuitor")
    first, *others = metrics_of(folder)
    assert first["loss"] is not None and first["grad_norm"] > 0
    for step in others:
        assert step["loss"] is None and step["grad_norm"] is None and step["reward"] > 0
    one, three = stored(folder, 1), stored(folder, 3)
    assert one.keys() == three.keys() and all(one[name].equal(three[name]) for name in one)


def test_only_replayed_prompts_in_the_loss(tmp_path: Path, manifest: Path) -> None:
    """Divergence and entropies are of the manifest's questions: without one of their rollouts there is none."""
    loaded = load_model(manifest.parent / "model")
    config = TrainConfig(manifest=manifest, out=manifest, full=True)
    pairs = [
        (Task("a", (5, 6), (7, 5, 6)), Rollout("a", 0, "", (8, 9), "length")),
        (Task("r", (5, 7), (5, 7), replay=True), Rollout("r", 0, "", (8, 9), "stop")),
    ]
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.0)
    teacher = Teacher("base", loaded.model, None)
    one, other = (learn(config, loaded.model, teacher, optimizer, part) for part in (pairs, pairs[:1]))
    assert one["loss"] == one["replay_divergence"] == pytest.approx(0, abs=1e-6)
    assert [one[name] for name in ("divergence", "teacher_entropy", "student_entropy", "entropy_gap")] == [None] * 4
    assert other["loss"] is None and "replay_divergence" not in other


def test_masked_steps_reach_every_reader(tmp_path: Path, manifest: Path, masked: set[int]) -> None:
    """Tracker, card, record, figure, table of the grid and verification, with masked steps first and last."""
    masked |= {1, 4}
    folder = run(tmp_path, manifest, steps=4, report_to=("tensorboard",))
    record = json.loads((folder / "train.json").read_text())
    assert (record["updates"], record["first"]["loss"], record["last"]["loss"]) == (2, None, None)
    card = (folder / "adapter" / "README.md").read_text()
    assert "| entropy_gap | not measured | not measured |" in card and "4 steps with 2 updates" in card
    steps = metrics_of(folder)
    assert training_row(folder)["first_entropy_gap"] == steps[1]["entropy_gap"]
    assert {text for text, problem in check_training(folder, Found()) if problem} == set()
    folder.rename(tmp_path / "nopsd")
    training_curves.draw(tmp_path, tmp_path)
    drawn = pd.read_csv(tmp_path / "training_curves.csv")
    assert drawn["divergence"].isna().tolist() == [True, False, False, True]


def test_a_run_without_any_update_says_so(
    tmp_path: Path, manifest: Path, masked: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    masked |= {1, 2, 3}
    caplog.set_level("INFO", logger="distill")
    folder = run(tmp_path, manifest)
    assert "3 steps, 0 updates" in caplog.text and "every rollout was masked" in caplog.text
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    folder.rename(tmp_path / "nopsd")
    with pytest.raises(ValueError, match="every rollout of every step was masked"):
        training_curves.draw(tmp_path, tmp_path)


def test_masked_steps_are_in_no_window_of_the_stop_rules(
    tmp_path: Path, manifest: Path, masked: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trigrams look repeated in steps 3 and 4, which are masked, and from step 6 on: windows 1-2 and 6-7 differ."""
    seen: list[int] = []
    monkeypatch.setattr(
        distill.metrics_log, "distinct_3", lambda ids: 0.1 if (seen.append(1) or len(seen)) in (3, 4, 6, 7, 8) else 0.9
    )
    masked |= {3, 4}
    folder = run(tmp_path, manifest, steps=8, collapse_window=2, learning_rate=1e-6)
    record = json.loads((folder / "train.json").read_text())
    assert record["stopped"]["step"] == 7 and record["stopped"]["weights_of_step"] == 5
    assert record["last"] == metrics_of(folder)[4] and record["updates"] == 3
    card = (folder / "adapter" / "README.md").read_text()
    assert "5 steps with 3 updates" in card and f"{record['last']['entropy_gap']:.4f}" in card
    assert {text for text, problem in check_training(folder, Found()) if problem} == set()


def test_the_record_counts_the_questions_of_the_kept_steps(
    tmp_path: Path, manifest: Path, masked: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight questions, two per step: those of the steps after the kept one were asked, but are not in the weights."""
    seen: list[int] = []
    monkeypatch.setattr(
        distill.metrics_log, "distinct_3", lambda ids: 0.1 if (seen.append(1) or len(seen)) > 2 else 1.0
    )
    folder = run(tmp_path, manifest, steps=4, collapse_window=1, questions_per_step=2, learning_rate=1e-6)
    record = json.loads((folder / "train.json").read_text())
    assert record["stopped"]["step"] == 3 and record["stopped"]["weights_of_step"] == 2
    assert (record["questions_seen"], record["updates"], record["budget"]["rollouts"]) == (4, 2, 12)
