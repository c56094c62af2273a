"""Killed and interrupted runs resume to the same bytes; `tests.trust.kills` does it many times."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable

import pytest

import neurosig.export
from distill.config import TrainConfig
from figures.grid.__main__ import GridConfig
from neurosig.runtime.cli import run_command
from tests.trust import kills

pytestmark = pytest.mark.forks


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kills.Job]:
    import neurosig.neurons.signals_file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            neurosig.neurons.signals_file, "CHUNK", neurosig.neurons.signals_file.CHUNK
        )  # jobs() makes shards small
        yield kills.jobs(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def straight(jobs: dict[str, kills.Job]) -> Callable[[str], kills.Straight]:
    """Each job's undisturbed run, made once."""
    return functools.cache(lambda name: kills.undisturbed(jobs[name]))


@pytest.mark.parametrize("name", ["export", "train", "evaluate", "grid"])
def test_killed_runs_resume_to_the_same_bytes(
    jobs: dict[str, kills.Job], straight: Callable[[str], kills.Straight], name: str
) -> None:
    """One kill in each phase."""
    for result in kills.check(jobs[name], straight(name), 1, seed=1):
        assert result.survived == 1
        assert result.pieces_saved >= 0


@pytest.mark.parametrize(
    ("name", "number"), [("export", signal.SIGINT), ("train", signal.SIGTERM), ("grid", signal.SIGINT)]
)
def test_ctrl_c_saves_and_says_how_to_go_on(
    jobs: dict[str, kills.Job], straight: Callable[[str], kills.Straight], name: str, number: int
) -> None:
    job, expected = jobs[name], straight(name)
    words = {
        "export": ["--model", "m", "--questions", "q"],
        "train": ["--manifest", "m"],
        "grid": ["--model", "m", "--sources", "s"],
    }[name]
    config = {"export": neurosig.export.ExportConfig, "train": TrainConfig, "grid": GridConfig}[name]

    def command(resume: bool) -> None:
        code = run_command(
            config, lambda _: job.run(resume), presets={}, prog=name, argv=[*words, "--out", "o", "--quiet"]
        )
        os._exit(code)

    interrupted = kills.Job(f"{name}-interrupted", command, job.out, job.phases, job.pieces)
    pid, pipe = kills.start(interrupted, resume=False)
    done = 0
    for _, event in kills.events(pipe):
        done += event == "+"
        if done == 3:  # the third piece begins: two are done
            os.kill(pid, number)
            break
    code = kills.finish(pid)
    assert code == 130, kills.tail(interrupted)
    os.close(pipe)
    how = "the same command continues from here" if name == "grid" else "rerun with --resume"
    assert kills.tail(interrupted).splitlines()[-1] == f"interrupted; {how}"
    assert kills.resume(job) < expected.pieces
    assert kills.outcome(job.out) == expected.files
    shutil.rmtree(job.out)
