"""Training runs killed by SIGKILL in processes of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.flow import make_manifest
from tests.support.processes import exit_codes, run_training, start, train_arguments
from tests.support.runs import result_bytes

STEPS = 40


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Six kills, two while a checkpoint is written; the first run is the real command, the others are forks."""
    manifest = make_manifest(tmp_path)
    arguments = {
        name: train_arguments(manifest, tmp_path / name, steps=STEPS, save_steps=2, quiet=True)
        for name in ("straight", "killed")
    }
    log, run = tmp_path / "log", tmp_path / "killed"
    straight = start(log, {}, run_training, arguments["straight"])
    command = [sys.executable, "-m", "distill.train", *arguments["killed"]]
    first = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    assert exit_codes([straight]) == [0], log.read_text()

    def lines() -> int:
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    moments = random.Random(0)
    process, wait = first.pid, first.wait
    before = 0
    for kill in range(6):
        wait_until(lambda: lines() > before)  # noqa: B023
        if kill in (2, 4):
            wait_until(lambda: any((run / "checkpoints").glob(".step-*")))
        else:
            time.sleep(moments.uniform(0.0, 0.4))
        os.kill(process, signal.SIGKILL)
        assert wait() in (-signal.SIGKILL, None)
        assert lines() < STEPS
        assert not (run / "train.json").exists()
        before = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
        resumed = start(log, {}, run_training, [*arguments["killed"], "--resume"])
        assert resumed.pid is not None
        process, wait = resumed.pid, resumed.join
    assert exit_codes([resumed]) == [0], log.read_text()
    for name in (
        "metrics.jsonl",
        "adapter/adapter_model.safetensors",
        f"checkpoints/step-{STEPS:06d}/optimizer.safetensors",
        *(f"rollouts/step-{step:06d}.parquet" for step in range(1, STEPS + 1)),
    ):
        assert result_bytes(run / name) == result_bytes(tmp_path / "straight" / name), name
