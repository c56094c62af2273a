"""Two gloo processes, data parallel and FSDP2, against one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill.step
import distill.student
from distill.config import TrainConfig
from distill.distributed import launched, whole_tensor
from distill.student import TrainingForward
from distill.tasks import Task
from distill.teacher import Teacher
from neurosig.models.load import LoadedModel
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import make_manifest
from tests.support.processes import exit_codes, run_training, start_ranks, train_arguments
from tests.support.runs import metrics_of
from tests.support.tiny import tiny_model

TASKS = {
    "a": Task("a", (5, 6, 7), (9, 8, 5, 6, 7)),
    "b": Task("b", (11, 12), (3, 4, 10, 11, 12), 3.0),
    "c": Task("c", (13, 14, 15, 16), (4, 13, 14, 15, 16), 0.5),
}
Rows = list[tuple[str, tuple[int, ...], str]]
RAGGED: Rows = [
    *(("a", tuple(range(20 + i, 24 + 2 * i)), "stop") for i in range(5)),
    ("b", (40, 41, 2), "stop"),
    ("c", (50, 51, 52, 53, 54, 55, 56), "length"),
]
CASES: dict[str, tuple[Rows, dict[str, Any]]] = {
    "token mean": (RAGGED, {"keep_truncated": True}),
    "sequence mean, first tokens skipped": (RAGGED, {"keep_truncated": True, "loss_mean": "sequence", "skip_first": 2}),
    "one rank keeps nothing": ([*RAGGED[:5], *(("b", (40, 41, 42), "length"),) * 2], {}),
    "one-token completions on one rank": ([("b", (40,), "stop"), *RAGGED[:3]], {}),
    "clipped": (RAGGED, {"clip": "entry", "clip_value": 0.01}),
    "batches of two": (RAGGED, {"keep_truncated": True, "micro_batch_size": 2}),
    "opsa": (RAGGED, {"keep_truncated": True, "method": "opsa", "opsa_share": 0.4}),
    "opsa, one rank keeps nothing": ([*RAGGED[:5], *(("b", (40, 41, 42), "length"),) * 2], {"method": "opsa"}),
    "nothing kept": ([("a", (20, 21), "length"), ("b", (40, 41), "length")], {}),
}


def gradients(folder: Path, full: bool, gradient_checkpointing: bool) -> None:
    """Metrics and whole gradients of every case, as this rank's process comes to them."""
    config = TrainConfig(manifest=Path(), out=Path(), lora_r=4, full=full, max_grad_norm=1e9)
    ranks = launched(config)
    model = tiny_model("qwen3")
    torch.manual_seed(0)
    model, adapter = distill.student.make_student(config, LoadedModel(model, None, None))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    teacher = Teacher("base", model, adapter)
    if full:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    ranks.shard(model)
    teacher.shard(ranks)
    forward = TrainingForward(model, gradient_checkpointing=gradient_checkpointing)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    for case, (rows, changes) in CASES.items():
        changed = TrainConfig(manifest=Path(), out=Path(), **{"micro_batch_size": 1, "max_grad_norm": 1e9, **changes})
        pairs = [(TASKS[t], Rollout(t, i, "", ids, reason)) for i, (t, ids, reason) in enumerate(rows)]  # type: ignore[arg-type]
        metrics = distill.step.learn(changed, model, teacher, optimizer, pairs, forward, None, ranks)
        found = {name: whole_tensor(p.grad) for name, p in trained.items() if p.grad is not None}
        (folder / f"{case}.{ranks.rank}.json").write_text(json.dumps(metrics))
        if ranks.main:
            save_file({name: gradient.contiguous() for name, gradient in found.items()}, folder / f"{case}.safetensors")
    ranks.close()


@pytest.mark.parametrize(
    ("fsdp", "full", "gradient_checkpointing"),
    [(False, False, False), (True, False, False), (True, False, True), (True, True, False)],
    ids=["data parallel", "fsdp2", "fsdp2 with checkpointing", "fsdp2 full"],
)
def test_two_processes_have_the_loss_and_gradient_of_one(
    tmp_path: Path, fsdp: bool, full: bool, gradient_checkpointing: bool
) -> None:
    """To 1e-6 of a tensor's largest entry; to 1e-5 where ranks put other rows into one batch, which moves last bits."""
    folders = {world: tmp_path / str(world) for world in (1, 2)}
    for folder in folders.values():
        folder.mkdir()
    running = [
        *start_ranks(folders[1], 1, gradients, folders[1], full, gradient_checkpointing),
        *start_ranks(folders[2], 2, gradients, folders[2], full, gradient_checkpointing, fsdp=fsdp),
    ]
    assert exit_codes(running) == [0, 0, 0], (folders[2] / "rank0.log").read_text()
    for case in CASES:
        tolerance = 1e-5 if case == "batches of two" else 1e-6
        files = folders[1] / f"{case}.0.json", folders[2] / f"{case}.0.json", folders[2] / f"{case}.1.json"
        metrics = [json.loads(file.read_text()) for file in files]
        assert metrics[1] == metrics[2], case
        one, two = ({name: value for name, value in found.items() if value is not None} for found in metrics[:2])
        assert metrics[0].keys() == metrics[1].keys() and two == pytest.approx(one, rel=tolerance, abs=tolerance), case
        one, two = (load_file(folders[world] / f"{case}.safetensors") for world in (1, 2))
        if metrics[0]["rollouts_in_loss"]:
            assert set(one) == set(two) and one and abs(metrics[0]["loss"]) > 0.01
        for name, gradient in one.items():
            assert (two[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), (case, name)
        assert (metrics[0]["rollouts_in_loss"] == 0) == (case == "nothing kept")


def interrupted_training(arguments: list[str], step: int) -> int:
    """The train command, interrupted as ``step`` begins to learn."""
    learn, calls = distill.step.learn, []

    def interrupted(*args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return learn(*args)

    distill.step.learn = interrupted
    return run_training(arguments)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, manifest: Path) -> Path:
    """A run of one process, and one that broke off in step 3."""
    folder = tmp_path_factory.mktemp("single")
    running = [
        *start_ranks(folder / "log1", 1, run_training, train_arguments(manifest, folder / "straight")),
        *start_ranks(folder / "log2", 1, interrupted_training, train_arguments(manifest, folder / "broken"), 3),
    ]
    assert exit_codes(running) == [0, 130]
    return folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_near(run: Path, other: Path, tolerance: float) -> None:
    for step, expected in zip(metrics_of(run), metrics_of(other), strict=True):
        assert step == pytest.approx(expected, rel=tolerance, abs=tolerance)
    one, two = weights_of(run), weights_of(other)
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "fsdp2"])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, manifest: Path, single: Path, fsdp: bool
) -> None:
    def two(name: str, **changes: Any) -> list[int | None]:
        arguments = train_arguments(manifest, tmp_path / name, **changes)
        return exit_codes(start_ranks(tmp_path / f"log-{name}", 2, run_training, arguments, fsdp=fsdp))

    arguments = train_arguments(manifest, tmp_path / "broken")
    ranks = start_ranks(tmp_path / "log-broken", 2, interrupted_training, arguments, 3, fsdp=fsdp)
    assert exit_codes(ranks) == [130, 130]
    shutil.copytree(tmp_path / "broken", tmp_path / "to-one")
    shutil.copytree(single / "broken", tmp_path / "from-one")
    assert two("straight") == two("broken", resume=True) == two("from-one", resume=True) == [0, 0]
    arguments = train_arguments(manifest, tmp_path / "to-one", resume=True)
    assert exit_codes(start_ranks(tmp_path / "log-one", 1, run_training, arguments)) == [0]

    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "straight")
    same, straight = weights_of(tmp_path / "broken"), weights_of(tmp_path / "straight")
    assert all(torch.equal(tensor, same[name]) for name, tensor in straight.items())
    for run in ("straight", "from-one", "to-one"):
        assert_near(tmp_path / run, single / "straight", 1e-5)
    assert sorted(path.name for path in (tmp_path / "straight").iterdir()) == [
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "rollouts",
        "run.json",
        "train.json",
    ]


@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "fsdp2"])
def test_more_processes_than_questions_full_fine_tuning_and_a_development_split(
    tmp_path: Path, manifest: Path, fsdp: bool
) -> None:
    options = {"full": True, "learning_rate": 1e-3, "questions_per_step": 1, "steps": 2}
    options["dev_questions"] = str(manifest.parent / "questions.jsonl")
    options["dev_generations"] = 2
    one, two = (train_arguments(manifest, tmp_path / name, **options) for name in ("one", "two"))
    running = [
        *start_ranks(tmp_path / "log1", 1, run_training, one),
        *start_ranks(tmp_path / "log2", 2, run_training, two, fsdp=fsdp),
    ]
    assert exit_codes(running) == [0, 0, 0], (tmp_path / "log2" / "rank0.log").read_text()
    assert metrics_of(tmp_path / "two")[0] == pytest.approx(metrics_of(tmp_path / "one")[0], rel=1e-5, abs=1e-6)
    assert metrics_of(tmp_path / "two")[1] == pytest.approx(metrics_of(tmp_path / "one")[1], rel=1e-3, abs=1e-4)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert set(a) == set(b)
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in a)
    measured = [(tmp_path / name / "development.jsonl").read_text() for name in ("one", "two")]
    assert measured[0] == measured[1]


def training_with_a_fault(arguments: list[str]) -> int:
    """The train command; the second rank's sampler finds a fault."""
    from neurosig.runtime.errors import UserError

    sample = distill.student.sample

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise UserError("the second rank has a fault")
        return sample(*args, **kwargs)

    distill.student.sample = faulty
    return run_training(arguments)


@pytest.mark.parametrize(
    ("work", "changes", "environment", "message"),
    [
        (training_with_a_fault, {}, False, "error: the second rank has a fault"),
        (training_with_a_fault, {}, True, "error: the second rank has a fault"),
        (run_training, {"steps": 0}, False, "error: --steps: expected at least 1, got 0"),
        (run_training, {"model": "/nowhere"}, False, "error: model /nowhere: no such file or folder"),
        (run_training, {"teacher": "ema"}, True, "error: --teacher ema averages whole weights"),
        (run_training, {"device": "cuda:0"}, False, "error: --device cuda:0: leave it out under several processes"),
    ],
    ids=["one rank", "one rank, fsdp2", "options", "model", "fsdp2 with ema", "device"],
)
def test_all_ranks_fail_together_with_one_message(
    tmp_path: Path, manifest: Path, work: Any, changes: dict[str, Any], environment: bool, message: str
) -> None:
    arguments = train_arguments(manifest, tmp_path / "run", quiet=True, **changes)
    assert exit_codes(start_ranks(tmp_path / "log", 2, work, arguments, fsdp=environment), timeout=60) == [2, 2]
    logs = "".join((tmp_path / "log" / f"rank{rank}.log").read_text() for rank in range(2))
    assert [line.startswith(message) for line in logs.splitlines() if line.startswith("error")] == [True]
    assert not (tmp_path / "run" / "train.json").exists()


@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --standalone --nproc-per-node 2",
        "accelerate.commands.launch --multi_gpu --num_processes 2 --mixed_precision no",
        "accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --mixed_precision no",
    ],
    ids=["torchrun", "accelerate", "accelerate fsdp2"],
)
def test_the_launchers_of_the_readme(tmp_path: Path, manifest: Path, single: Path, launcher: str) -> None:
    """As on GPUs; where there is none, accelerate starts the processes all the same."""
    arguments = train_arguments(manifest, tmp_path / "run", quiet=True)
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), "-m", "distill.train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "train.json").read_text())["run"]["processes"] == 2
    assert_near(tmp_path / "run", single / "straight", 1e-5)
