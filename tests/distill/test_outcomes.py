"""What a preset, a divergence and a clip are for: the student comes closer to the teacher that has the context."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import BASIS, PRESETS, TrainConfig
from distill.distributed import ALONE
from distill.losses import Divergence, chunked_divergence
from distill.step import learn
from distill.student import StudentSampler, make_student
from distill.tasks import Task, load_student, manifest_tasks, sampling_config
from distill.teacher import Teacher
from distill.train import main
from neurosig.export import PRESETS as EXPORT_PRESETS
from neurosig.export import ExportConfig
from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.models.completion_hidden import completion_hidden
from neurosig.models.load import LoadedModel
from neurosig.runtime.arguments import parse_config
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import make_manifest
from tests.support.parsers import UNCUT
from tests.support.processes import run_training, train_arguments
from tests.support.runs import metrics_of, train_config

LOSSES = [
    *itertools.product(("forward_kl", "reverse_kl", "jsd"), ("none", "token", "entry")),
    ("sampled_token", "none"),
]
QUESTIONS, STEPS = 4, 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("tiny"), answer_parser=UNCUT, max_new_tokens=6)


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("organism") / "manifest"
    options: dict[str, Any] = {**EXPORT_PRESETS["organism"], "limit": 24, "num_generations": 4, "quiet": True}
    export(ExportConfig(**{**options, "out": out}))
    return out


def mean_divergence(
    name: str, loaded: LoadedModel, teacher: Teacher, tasks: Mapping[str, Task], rollouts: list[Rollout]
) -> float:
    """Unclipped, over the whole vocabulary, in nats per token."""
    completions = [rollout.completion_ids for rollout in rollouts]
    own = [tasks[rollout.question_id] for rollout in rollouts]
    head = loaded.model.get_output_embeddings().weight
    with torch.no_grad():
        with teacher.active() as model:
            wanted = completion_hidden(model, [task.teacher_prompt for task in own], completions)
        hidden = completion_hidden(loaded.model, [task.student_prompt for task in own], completions)
        full = Divergence("reverse_kl" if name == "sampled_token" else name)  # type: ignore[arg-type]
        return float(chunked_divergence(hidden, wanted, head, head, full).unclipped.mean())


def change(manifest: Path, **options: Any) -> tuple[float, float]:
    """Divergence from the teacher, on the student's rollouts before and after training.

    A live teacher is measured as it is then, the others as the model before training.
    """
    config = TrainConfig(manifest=manifest, out=manifest, quiet=True, **{"keep_truncated": True, **options})
    contents = read_manifest(manifest)
    loaded = load_student(config, contents, None)
    few = loaded.info.id == "organism"
    sampling = sampling_config(replace(config, num_generations=2 if few else 4), contents)
    tasks = {task.id: task for task in manifest_tasks(contents, loaded, max_new_tokens=sampling.max_new_tokens)}
    tasks = dict(list(tasks.items())[:QUESTIONS])
    torch.manual_seed(config.seed)
    model, adapter = make_student(config, loaded)
    teacher = Teacher(config.teacher, model, adapter, config.ema_decay)
    target = teacher if config.teacher == "live" else Teacher("base", model, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    sampler = StudentSampler(config, loaded, model, adapter, ALONE, 0)
    measured = []
    for step in range(STEPS + 1):
        rollouts = sampler.rollouts(tasks.values(), sampling, step)
        if step in (0, STEPS):
            measured.append(mean_divergence(config.divergence, loaded, target, tasks, rollouts))
        learn(config, model, teacher, optimizer, [(tasks[rollout.question_id], rollout) for rollout in rollouts])
    return measured[0], measured[1]


def every_loss() -> Iterator[Any]:
    """Divergence, clip, mean and teacher; most combinations of the last two are slow tests."""
    for (divergence, clip), mean, teacher in itertools.product(LOSSES, ("token", "sequence"), ("base", "live", "ema")):
        quick = (mean, teacher) == ("token", "base") or (divergence, clip) == ("forward_kl", "none")
        yield pytest.param(divergence, clip, mean, teacher, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("divergence", "clip", "mean", "teacher"), every_loss())
def test_the_divergence_falls_by_half(tiny: Path, divergence: str, clip: str, mean: str, teacher: str) -> None:
    options = {"divergence": divergence, "clip": clip, "loss_mean": mean, "teacher": teacher, "learning_rate": 5e-3}
    before, after = change(tiny, **options)
    assert before > 0.005 and after < before / 2


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "clip"), LOSSES)
def test_the_divergence_falls_by_half_on_the_organism(organism: Path, divergence: str, clip: str) -> None:
    before, after = change(organism, divergence=divergence, clip=clip, learning_rate=1e-3)
    assert before > 0.005 and after < before / 2


@pytest.mark.parametrize("preset", ["qwen3-4b", "published", "canon", "opsa"])
def test_a_preset_says_what_it_rests_on(
    tmp_path: Path, tiny: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"preset": preset, "steps": 1, "max_new_tokens": 4}
    assert run_training(train_arguments(tiny, tmp_path / "run", **options)) == 0
    assert f"preset {preset}: {BASIS[preset]}" in capsys.readouterr().err


def test_every_preset_of_a_published_recipe_is_listed_with_its_basis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = {*PRESETS} - {"cpu", "organism"}
    assert BASIS.keys() == recipes
    assert all("run at full size" in text for text in BASIS.values())
    for preset in recipes:
        words = ["--preset", preset, "--manifest", str(tmp_path), "--out", str(tmp_path)]
        config = parse_config(TrainConfig, presets=PRESETS, prog="train", argv=words)
        assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert run_training(["--help"]) == 0
    page = capsys.readouterr().out
    assert "inflow, published, consistency, redundancy, mutual, full  steps = 250" in page
    assert all(f"\n  {name} " in page for name in ("canon", "u-opsd", "opsa"))


SLOW_PRESETS = ("organism", "qwen3-4b", "canon", "u-opsd")
"""Presets whose loss and teacher another preset or test has."""


def presets_with_a_teacher() -> Iterator[Any]:
    """One of those that are equal."""
    seen: list[Mapping[str, object]] = []
    for name, values in PRESETS.items():
        if values not in seen and values.get("method") != "opsa":
            yield pytest.param(name, marks=pytest.mark.slow if name in SLOW_PRESETS else ())
        seen.append(values)


@pytest.mark.parametrize("preset", presets_with_a_teacher())
def test_a_preset_lowers_the_divergence(organism: Path, preset: str) -> None:
    """Its loss, teacher and adapter, at a learning rate for the organism and its length: larger models need smaller
    rates, as do larger adapters with clipped gradients."""
    rate = 5e-4 if preset == "u-opsd" else PRESETS["organism"]["learning_rate"]
    before, after = change(organism, **{**PRESETS[preset], "learning_rate": rate, "max_new_tokens": None})
    assert before > 0.005 and after < before / 2


@pytest.mark.slow
def test_the_preset_without_a_teacher_moves_mass_to_the_head(tiny: Path, tmp_path: Path) -> None:
    """At a rate for a small model, fresh samples have less entropy and are likelier. The organism's are too sure."""
    own = {"learning_rate": 5e-3, "max_new_tokens": None, "steps": 16, "questions_per_step": 8, "num_generations": 4}
    main(train_config(tmp_path, tiny, **{**PRESETS["opsa"], **own}))
    metrics = metrics_of(tmp_path / "run")
    assert metrics[-1]["student_entropy"] < 0.8 * metrics[0]["student_entropy"]
    assert metrics[-1]["student_logprob"] > 0.8 * metrics[0]["student_logprob"]
