"""SIGKILL at random moments of every phase, then --resume: the files must equal those of an undisturbed run.

    python -m tests.trust.kills --kills 50

Every run is a fork of a process that has imported the packages, which takes a second instead of ten. A phase starts
when its function is called; the signal comes after a random share of the phase's undisturbed time. After some kills the
last line of an append-only log is torn as well.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.support.flow import export_config, save_tiny, write_questions
from tests.support.runs import result_bytes

END = "end"


@dataclass(frozen=True)
class Job:
    """A command on a folder of its own.

    Attributes:
        name: Of the command and of its log file.
        run: Runs the command; the argument says whether to resume.
        out: Its output folder.
        phases: Phase -> ``module:function`` whose call starts the phase; a phase ends where the next one starts.
        pieces: ``module:function`` that does one piece of work.
    """

    name: str
    run: Callable[[bool], None]
    out: Path
    phases: Mapping[str, str]
    pieces: str = ""


@dataclass(frozen=True)
class Straight:
    """A run that nobody killed: seconds of each phase, pieces of work, files."""

    seconds: Mapping[str, float]
    pieces: int
    files: Mapping[str, bytes]


@dataclass
class Killed:
    """How the kills of one phase ended."""

    phase: str
    survived: int = 0
    torn: int = 0
    pieces_straight: int = 0
    pieces_saved: int = 0


def start(job: Job, *, resume: bool) -> tuple[int, int]:
    """Fork a run; returns its pid and a pipe that gets a line when a phase starts and when a piece of work is done."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    code = 1
    try:
        os.close(read)
        os.setsid()
        with (job.out.parent / f"{job.name}.stderr").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (pytest has its own)
        faulthandler.dump_traceback_later(300, exit=True, file=2)
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that is killed may hold it
        for phase, place in [*job.phases.items(), *([("+", job.pieces)] if job.pieces else [])]:
            announce(place, phase, write)
        job.run(resume)
        os.write(write, f"{END}\n".encode())
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def announce(place: str, phase: str, pipe: int) -> None:
    """Write a line to the pipe whenever the function is called."""
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def announced(*args: Any, **kwargs: Any) -> Any:
        os.write(pipe, f"{phase}\n".encode())
        return function(*args, **kwargs)

    setattr(owner, name, announced)


def events(pipe: int) -> Iterator[tuple[float, str]]:
    """Time and name of each line of the pipe, until the run ends or dies."""
    rest = b""
    while chunk := os.read(pipe, 4096):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield time.monotonic(), line.decode()


def finish(pid: int) -> int:
    """Wait for a run and for the processes it started; returns its exit code, minus the signal that ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        while True:  # a killed grid leaves the command it ran, which ends by itself
            os.killpg(pid, 0)
            time.sleep(0.01)
    return code


def undisturbed(job: Job) -> Straight:
    """A run that nobody kills."""
    shutil.rmtree(job.out, ignore_errors=True)
    pid, pipe = start(job, resume=False)
    announced = list(events(pipe))
    code = finish(pid)
    os.close(pipe)
    if code:
        raise AssertionError(f"{job.name}: exit code {code}: {tail(job)}")
    marks = [(at, name) for at, name in announced if name != "+"]
    first = {name: at for at, name in reversed(marks)}
    order = sorted(first, key=lambda name: first[name])
    seconds = {name: first[after] - first[name] for name, after in itertools.pairwise(order)}
    straight = Straight(seconds, sum(name == "+" for _, name in announced), outcome(job.out))
    shutil.rmtree(job.out)
    return straight


def outcome(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of a run without logs, checkpoints, command line, machine and times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "checkpoints/" in name or path.name in ("log.txt", "run.json", "seconds.csv"):
            continue
        data = result_bytes(path)
        if path.name in ("train.json", "summary.json"):
            record = json.loads(data)
            record["config"].pop("resume", None)
            record.pop("run")
            data = json.dumps(record).encode()
        files[name] = data
    return files


def kill(job: Job, phase: str, seconds: float, generator: random.Random) -> bool:
    """Kill a run after a random share of a phase; whether it was still running."""
    pid, pipe = start(job, resume=False)
    for _, name in events(pipe):
        if name == phase:
            break
    time.sleep(generator.random() * seconds)
    os.kill(pid, signal.SIGKILL)
    code = finish(pid)
    os.close(pipe)
    return code == -signal.SIGKILL


def tear(out: Path, generator: random.Random) -> bool:
    """Cut an append-only log inside its last line, as a power cut can."""
    logs = [path for pattern in ("**/rollouts.log", "**/.rollouts.log") for path in out.glob(pattern)]
    for log in logs:
        data = log.read_bytes()
        if data.count(b"\n") > 1 and data.endswith(b"\n"):
            last = len(data) - data[:-1].rindex(b"\n") - 1
            log.write_bytes(data[: len(data) - generator.randint(1, last)])
            return True
    return False


def check(job: Job, straight: Straight, kills: int, seed: int) -> list[Killed]:
    """Kill, resume and compare; raises AssertionError naming phase, seed and file where the outcome differs."""
    results = []
    for phase in job.phases:
        result = Killed(phase)
        generator = random.Random(f"{seed} {job.name} {phase}")
        attempts = 0
        while result.survived < kills:
            attempts += 1
            if attempts > 4 * kills + 20:
                raise AssertionError(f"{job.name}, {phase}: the run ends before the signal too often")
            if not kill(job, phase, straight.seconds[phase], generator):
                shutil.rmtree(job.out, ignore_errors=True)
                continue
            result.torn += generator.random() < 0.3 and tear(job.out, generator)
            again = resume(job)
            result.pieces_straight += straight.pieces
            result.pieces_saved += straight.pieces - again
            where = f"{job.name}, {phase}, seed {seed}, kill {result.survived}"
            files, pieces = outcome(job.out), straight.pieces
            changed = sorted(name for name in {*files, *straight.files} if files.get(name) != straight.files.get(name))
            if changed or again > pieces:
                raise AssertionError(f"{where}: other bytes in {', '.join(changed)}; {again} of {pieces} pieces redone")
            shutil.rmtree(job.out)
            result.survived += 1
        results.append(result)
    return results


def resume(job: Job) -> int:
    """Resume to the end; returns the pieces of work it did."""
    pid, pipe = start(job, resume=True)
    pieces = sum(name == "+" for _, name in events(pipe))
    code = finish(pid)
    os.close(pipe)
    if code:
        raise AssertionError(f"{job.name}: the resumed run ends with exit code {code}: {tail(job)}")
    return pieces


def tail(job: Job) -> str:
    return (job.out.parent / f"{job.name}.stderr").read_text(errors="replace")[-1500:]


def jobs(folder: Path) -> dict[str, Job]:
    """Export, training, evaluation and grid on a tiny model; the manifest that training reads is made here."""
    import distill.evaluate
    import distill.train
    import figures.grid.__main__
    import neurosig.export
    import neurosig.neurons.signals_file
    from distill.config import TrainConfig
    from distill.evaluate import EvaluateConfig
    from figures.grid.__main__ import GridConfig

    neurosig.neurons.signals_file.CHUNK = 4
    model = save_tiny(folder / "model")
    questions = write_questions(folder / "questions.jsonl")
    quick = {"num_generations": 3, "max_new_tokens": 6, "temperature": 1.0}

    def export(resume: bool, out: str = "export") -> None:
        neurosig.export.main(export_config(folder, model, questions, out, batch_rows=6, resume=resume, **quick))

    def train(resume: bool) -> None:
        distill.train.main(
            TrainConfig(
                manifest=folder / "manifest", out=folder / "train", steps=5, save_steps=1, questions_per_step=3,
                lora_r=4, keep_truncated=True, quiet=True, resume=resume,
            )
        )  # fmt: skip

    def evaluate(resume: bool) -> None:
        distill.evaluate.main(
            EvaluateConfig(
                model=str(model), questions=(str(questions),), out=folder / "evaluate", batch_rows=6, quiet=True,
                resume=resume, **quick,
            )
        )  # fmt: skip

    def grid(resume: bool) -> None:
        import concurrent.futures.thread
        import multiprocessing

        # a fork made by a thread of the grid's pool would wait for that thread, itself, before it ends
        os.register_at_fork(after_in_child=concurrent.futures.thread._threads_queues.clear)
        figures.grid.__main__.forkserver = lambda: multiprocessing.get_context("fork")  # the imports are here already
        figures.grid.__main__.main(
            GridConfig(
                out=folder / "grid", model=str(model), methods=("probe", "probe-random"), jobs=2,
                sources=(f"a={questions}",), targets=(f"a={questions}",), control_temperatures=(),
                export={**quick, "set_size": 16, "question_filter": "all", "keep_truncated": True},
                train={"steps": 2, "questions_per_step": 2, "lora_r": 2, "keep_truncated": True, "save_steps": 1},
                evaluate=quick, quiet=True,
            )
        )  # fmt: skip

    started, pipe = start(
        Job("manifest", lambda resume: export(resume, "manifest"), folder / "manifest", {}), resume=False
    )
    code = finish(started)
    os.close(pipe)
    if code:
        raise AssertionError((folder / "manifest.stderr").read_text())
    exporting = {
        "sampling": "neurosig.export:_rollouts",
        "tracing": "neurosig.export:_trace",
        "selection": "neurosig.stages.first:_signals",
    }
    return {
        "export": Job("export", export, folder / "export", exporting, "neurosig.sampling.rollouts:RolloutLog.append"),
        "train": Job(
            "train", train, folder / "train", {"training": "distill.metrics_log:reopen_metrics"}, "distill.step:learn"
        ),
        "evaluate": Job(
            "evaluate", evaluate, folder / "evaluate", {"evaluation": "distill.evaluate:_rollouts"},
            "neurosig.sampling.rollouts:RolloutLog.append",
        ),
        "grid": Job(
            "grid", grid, folder / "grid", {"grid": "figures.grid.__main__:run_cells"},
            "figures.grid.processes:_Runner._call",
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="*", default=["export", "train", "evaluate", "grid"])
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        every = jobs(Path(folder))
        for job in (every[name] for name in options.jobs):
            for result in check(job, undisturbed(job), options.kills, options.seed):
                saved = result.pieces_saved / max(1, result.pieces_straight)
                print(
                    f"{result.phase:<10} {result.survived} of {options.kills} kills survived, {result.torn} with a "
                    f"torn line, {saved:.0%} of the work kept",
                    flush=True,
                )
                total += result.survived
    print(f"kills survived: {total} (seed {options.seed})")


if __name__ == "__main__":
    main()
