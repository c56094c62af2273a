"""Processes that start quickly, forked from a server that has imported what a training run needs."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from neurosig.runtime.cli import command_words

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "distill.evaluate",
        "distill.step",
        "distill.train",
        "distill.output",
        "neurosig.export",
        "peft",
        "tests.support.tiny",
        "torch._dynamo",
    ]
)

TRAIN: dict[str, Any] = {
    "steps": 4,
    "questions_per_step": 3,
    "num_generations": 2,
    "lora_r": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "keep_truncated": True,
    "save_steps": 2,
}


def train_arguments(manifest: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a quick training run."""
    return command_words({"manifest": manifest, "out": out, **TRAIN, **changes})


def run_training(arguments: Sequence[str]) -> int:
    """Run the train command in this process; returns its exit code."""
    from distill.config import PRESETS, TrainConfig
    from distill.train import main
    from neurosig.runtime.cli import run_command

    return run_command(TrainConfig, main, presets=PRESETS, prog="train", argv=arguments)


def run_export(arguments: Sequence[str]) -> int:
    """Run the export command in this process; returns its exit code."""
    from neurosig.export import PRESETS, ExportConfig, main
    from neurosig.runtime.cli import run_command

    return run_command(ExportConfig, main, presets=PRESETS, prog="export", argv=arguments)


def run_evaluate(arguments: Sequence[str]) -> int:
    """Run the evaluate command in this process; returns its exit code."""
    from distill.evaluate import PRESETS, EvaluateConfig, main
    from neurosig.runtime.cli import run_command

    return run_command(EvaluateConfig, main, presets=PRESETS, prog="evaluate", argv=arguments)


def start(log: Path, environment: Mapping[str, str], work: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """Call ``work`` in a new process with one thread; its output goes to ``log``, an int result is the exit code."""
    process = _CONTEXT.Process(target=_child, args=(log, dict(environment), work, arguments))
    process.start()
    return process


def start_ranks(
    folder: Path, world: int, work: Callable[..., Any], *arguments: Any, fsdp: bool = False
) -> list[ForkServerProcess]:
    """Call ``work`` in ``world`` processes, started as by accelerate's launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if fsdp:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    folder.mkdir(parents=True, exist_ok=True)
    return [
        start(folder / f"rank{r}.log", {**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, work, *arguments)
        for r in range(world)
    ]


def exit_codes(processes: Sequence[ForkServerProcess], timeout: float = 120) -> list[int | None]:
    """Wait for the processes; one that exceeds ``timeout`` seconds is killed and has code ``None``."""
    codes: list[int | None] = []
    for process in processes:
        process.join(timeout)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def _child(log: Path, environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = work(*arguments)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)
