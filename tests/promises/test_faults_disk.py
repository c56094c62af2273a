"""Faults of the machine: a full disk, a read-only folder, too little memory, a closed pipe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import distill.checkpoints
import distill.evaluate
import distill.train
import neurosig.export
import neurosig.models.gguf
import neurosig.models.load
from distill.checkpoints import save_checkpoint
from neurosig.runtime.cli import run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import append_line, csv_cell, write_atomic
from neurosig.sampling.rollouts import RolloutLog
from tests.support.flow import export_config, file_bytes, make_manifest, save_tiny, write_questions
from tests.support.runs import evaluate_config, result_bytes, train_config

pytestmark = pytest.mark.forks
MAIN = {"export": neurosig.export.main, "train": distill.train.main, "evaluate": distill.evaluate.main}


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A mount for the block; skips the test where this user may not mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", *options, str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def in_child(run: Callable[[], None]) -> tuple[int, str]:
    """Exit code and stderr of a command in a fork, so that its memory limit ends with it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(write, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            code = run_command(type(CONFIG[0]), lambda config: run(), presets={}, prog="command", argv=CONFIG[1])
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        stderr = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_manifest(folder)
    return folder


def configured(name: str, world: Path, out: Path, **changes: Any) -> Any:
    if name == "export":
        config = export_config(world, world / "model", world / "questions.jsonl", batch_rows=3, **changes)
    elif name == "train":
        config = train_config(world, world / "manifest", **{"save_steps": 1, **changes})
    else:
        config = evaluate_config(world, batch_rows=4, **changes)
    config.out = out
    return config


CONFIG: list[Any] = []


def code_of(name: str, config: Any, before: Callable[[], object] = lambda: None) -> tuple[int, str]:
    def run() -> None:
        before()
        MAIN[name](config)

    CONFIG[:] = [config, required(name)]
    return in_child(run)


def required(name: str) -> list[str]:
    """A command line that parses; the command then runs its given configuration instead."""
    words = {
        "export": ["--model", "m", "--questions", "q", "--out", "o"],
        "train": ["--manifest", "m", "--out", "o"],
        "evaluate": ["--model", "m", "--questions", "q", "--out", "o"],
    }
    return [*words[name], "--quiet"]


def error_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


@pytest.mark.parametrize("name", ["export", "train", "evaluate"])
def test_a_full_disk_costs_nothing_that_was_done(world: Path, tmp_path: Path, name: str) -> None:
    """The error says how many bytes are missing; with room again, --resume gives the bytes of an undisturbed run."""
    MAIN[name](configured(name, world, tmp_path / "straight"))
    size = sum(path.stat().st_size for path in (tmp_path / "straight").rglob("*") if path.is_file())
    room = tmp_path / "room"
    with mounted(room, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        ballast = room / "ballast"
        fill(ballast, room, leaving=max(8192, size // 3))
        code, stderr = code_of(name, configured(name, world, room / "out"))
        assert code == 2, stderr
        line = error_line(stderr)
        assert "No space left on device" in line, line
        assert re.search(r"\([\d,]+ bytes to write, [\d,]+ free\)", line) and "make room, then run again" in line, line
        assert not [path for pattern in ("**/.*.tmp", "**/.step-*", ".final") for path in (room / "out").glob(pattern)]
        ballast.unlink()
        MAIN[name](configured(name, world, room / "out", resume=True))
        assert same_results(room / "out", tmp_path / "straight")


@pytest.mark.parametrize(
    ("written", "kept"), [("step-000002", "step-000001 is kept"), ("adapter", "the checkpoints are kept")]
)
def test_weights_that_do_not_fit_leave_the_last_good_ones(world: Path, tmp_path: Path, written: str, kept: str) -> None:
    """The disk is full at a checkpoint, or at the final adapter."""
    straight, room = tmp_path / "straight", tmp_path / "room"
    options = {"steps": 3, "keep_checkpoints": 9}
    distill.train.main(configured("train", world, straight, **options))
    with mounted(room, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        ballast = room / "ballast"

        def fill_in_time() -> None:
            place, name = (distill.train, "write_final") if written == "adapter" else (distill.checkpoints, "_write")
            write = getattr(place, name)

            def filled(*args: Any, **options: Any) -> None:
                if written == "adapter" or f"step-{args[1]:06d}" == written:
                    fill(ballast, room, leaving=8192)
                write(*args, **options)

            setattr(place, name, filled)  # in the fork only

        code, stderr = code_of("train", configured("train", world, room / "out", **options), fill_in_time)
        assert code == 2, stderr
        line = error_line(stderr)
        match = re.search(r"([\w-]+): No space left on device \(([\d,]+) bytes to write, ([\d,]+) free\); (.*);", line)
        assert match is not None and (match[1], match[4]) == (written, kept), line
        needed, free = (int(number.replace(",", "")) for number in match.groups()[1:3])
        assert needed > free > 0
        checkpoints = sorted(path.name for path in (room / "out" / "checkpoints").glob("step-*"))
        assert checkpoints == [f"step-{step:06d}" for step in range(1, 4 if written == "adapter" else 2)]
        assert not list((room / "out").glob(".final"))
        ballast.unlink()
        distill.train.main(configured("train", world, room / "out", resume=True, **options))
        assert same_results(room / "out", straight)


def test_a_first_checkpoint_that_does_not_fit_is_removed(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(100_000))
    optimizer = torch.optim.AdamW([weight])
    with mounted(tmp_path / "room", "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        with pytest.raises(
            UserError, match=r"step-000001: No space .* \(400,000 bytes .* free\); no checkpoint yet; make"
        ):
            save_checkpoint(tmp_path / "room" / "run", 1, {"weight": weight}, optimizer, {}, keep=1)
        assert not list((tmp_path / "room" / "run").iterdir())


def fill(ballast: Path, room: Path, leaving: int) -> None:
    free = os.statvfs(room).f_bavail * os.statvfs(room).f_frsize
    ballast.write_bytes(b"x" * (free - leaving))


def same_results(one: Path, other: Path) -> bool:
    """All final files alike, except checkpoints and the records of the run (times, paths)."""
    records = {"run.json", "train.json", "summary.json", "README.md"}
    folders = [
        {
            str(path.relative_to(folder)): result_bytes(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in records and "checkpoints" not in path.parts
        }
        for folder in (one, other)
    ]
    return folders[0] == folders[1]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    room = tmp_path / "room"
    with mounted(room, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        append_line(room / "log", "first")
        write_atomic(room / "whole", "kept")
        with pytest.raises(UserError, match=r"log: No space left on device \(100,001 bytes to write, [\d,]+ free\)"):
            append_line(room / "log", "x" * 100_000)
        with pytest.raises(UserError, match=r"whole: No space left on device .*; make room, then run again"):
            write_atomic(room / "whole", "x" * 100_000)
        assert (room / "log").read_text() == "first\n"
        assert (room / "whole").read_text() == "kept"
        assert sorted(path.name for path in room.iterdir()) == ["log", "whole"]


@pytest.mark.parametrize("name", ["export", "train", "evaluate"])
def test_a_read_only_folder_is_named_before_the_model_loads(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    monkeypatch.setattr(neurosig.models.load, "load_model", lambda *args, **kwargs: loads.append(args))
    folder = tmp_path / "fixed"
    with mounted(folder, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        with pytest.raises(UserError, match=rf"--out {folder}: cannot write there \(Read-only file system\)"):
            MAIN[name](configured(name, world, folder))
        with pytest.raises(UserError, match=r"out: cannot write there \(Read-only file system\)"):
            MAIN[name](configured(name, world, folder / "out"))
    assert not loads


def test_a_read_only_cache_is_named_before_the_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in a read-only cache loads; one that is not there is not dequantised in vain."""
    loads: list[Any] = []
    monkeypatch.setattr(neurosig.models.gguf, "_dequantise", lambda gguf: loads.append(gguf))
    monkeypatch.setenv("NEUROSIG_CACHE", str(tmp_path / "fixed" / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    with mounted(tmp_path / "fixed", "-t", "tmpfs", "-o", "ro", "tmpfs"):
        config = configured("evaluate", tmp_path, tmp_path / "out")
        config.model = str(gguf)
        code, stderr = code_of("evaluate", config)
    assert code == 2
    cache = tmp_path / "fixed" / "cache" / "gguf"
    assert error_line(stderr) == (
        f"error: cache {cache}: cannot write there (Read-only file system); set NEUROSIG_CACHE to a writable folder"
    )
    assert not loads and not (tmp_path / "out").exists()
    kept = tmp_path / "kept" / "gguf" / f"{'0' * 16}-transformers-{transformers.__version__}"
    kept.mkdir(parents=True)
    monkeypatch.setenv("NEUROSIG_CACHE", str(tmp_path / "kept"))
    subprocess.run(["mount", "--bind", "-o", "ro", str(tmp_path / "kept"), str(tmp_path / "kept")], check=True)
    try:
        assert neurosig.models.gguf.dequantised(gguf, "0" * 64) == kept
    finally:
        subprocess.run(["umount", str(tmp_path / "kept")], check=True)


def test_out_of_memory_is_one_sentence_and_keeps_the_state(world: Path, tmp_path: Path) -> None:
    """The memory limit is set while the second batch is sampled."""
    straight = configured("export", world, tmp_path / "straight")
    neurosig.export.main(straight)
    append = RolloutLog.append

    def starve() -> None:
        def starved(self: RolloutLog, group: Any) -> None:
            append(self, group)
            if len(self.groups) == 2:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                bytearray(2**26)

        RolloutLog.append = starved  # type: ignore[method-assign]  # in the fork only

    code, stderr = code_of("export", configured("export", world, tmp_path / "out"), starve)
    assert code == 2, stderr
    assert "out of memory" in error_line(stderr) and "then continue with --resume" in stderr
    assert len((tmp_path / "out" / ".work" / "rollouts.log").read_text().splitlines()) == 1 + 2
    neurosig.export.main(configured("export", world, tmp_path / "out", resume=True))
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")


SHOW = """
import sys
from neurosig.runtime.cli import CommonConfig, printable, run_command
def main(config):
    for line in range(20000):
        print(printable("na\\xefve \\u4f60\\u597d \\x1b[31m"), line)
sys.exit(run_command(CommonConfig, main, presets={}, prog="show", argv=[]))
"""


def test_a_closed_pipe_and_a_terminal_without_unicode() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", SHOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"na\\xefve \\u4f60\\u597d \\x1b[31m 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_odd_names_and_a_clock_that_moves_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders with spaces, Unicode and quotes work; for a name that is too long the error is the system's."""
    folder = tmp_path / 'a b\'c "d" 你好 \u202e-x'
    folder.mkdir()
    model = save_tiny(folder / "model")
    questions = write_questions(folder / "my questions.jsonl")
    now = iter(range(10**6, 0, -60))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    neurosig.export.main(export_config(folder, model, questions, "out put"))
    monkeypatch.undo()
    train = train_config(folder, folder / "out put", "run", steps=1)
    distill.train.main(train)
    assert json.loads((folder / "run" / "train.json").read_text())["last"]["step"] == 1
    with pytest.raises(UserError, match="cannot write there \\(File name too long\\)"):
        neurosig.export.main(export_config(folder, model, questions, "x" * 300))


def test_text_that_a_spreadsheet_would_run_is_marked() -> None:
    for text in ("=1+1", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"):
        assert csv_cell(text) == f"'{text}"
    assert [csv_cell(value) for value in ("a=1", "", 3, -3, None)] == ["a=1", "", 3, -3, None]
