"""Every method on every source domain, judged on every target domain: the runs behind the paper's tables.

    python -m figures.grid --preset cpu --out runs/grid
    python -m figures.grid --config grid.toml

A cell is a method, a source and a seed. Export, training and evaluation are the commands of the same names, each in a
process of its own: a finished one is skipped, an interrupted one goes on where it was, one that fails is reported and
the rest goes on. ``results.csv`` has a row a cell and target, ``grid.parquet`` a row a question; the tables of both are
printed in the paper's form, and drawn by ``python -m figures paper_tables --results OUT``.

Two controls are part of every grid: the untrained model at the temperature with the best Avg@K on the development
splits, and context that is random within the question's kind (method ``nopsd-kind``).
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Fixed

from neurosig.runtime.cli import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    CommonConfig,
    command_words,
    config_record,
    printable,
    progress,
    run_command,
)
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.runtime.folder import output_folder

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext
    from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)

Options = Mapping[str, Any]
SETTINGS, LOG = "grid.json", "log.txt"
FIRST = "manifests/{source}/nopsd"
"""The export of a source that all others take their rollouts from."""
BASE, CONTROL = "base", "control"
COMMANDS = {"neurosig.export": "ExportConfig", "distill.train": "TrainConfig", "distill.evaluate": "EvaluateConfig"}


@dataclass(frozen=True)
class Method:
    """How a method differs from N-OPSD: options of its export and of its training."""

    export: Options = field(default_factory=dict)
    train: Options = field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    "nopsd": Method(),
    "nopsd-random": Method(export={"context_policy": "random"}),
    "nopsd-kind": Method(export={"context_policy": "random_within_kind"}),
    "vote-only": Method(export={"clean_filter": "vote_only"}),
    "vote-only-random": Method(export={"clean_filter": "vote_only", "context_policy": "random"}),
    "u-opsd": Method(export={"context_policy": "majority_solution"}, train={"method": "u-opsd"}),
    "lmsi": Method(train={"method": "lmsi"}),
    "ttrl": Method(train={"method": "ttrl"}),
    "intuitor": Method(train={"method": "intuitor"}),
}
"""The paper's rows, and the 2 x 2 of filter and context."""


@dataclass(kw_only=True)
class GridConfig(CommonConfig):
    """Train and evaluate methods x source domains x seeds; run it again to go on.

    A --config file may also hold the tables [export], [train] and [evaluate], options of those commands for all cells,
    and [methods_train.NAME], options of one method's training.
    """

    out: Path
    """Folder of the cells and their results."""
    model: str
    """Hub id, folder, GGUF file, or a model that comes along: smollm2-135m, organism."""
    methods: tuple[str, ...] = (
        "nopsd",
        "nopsd-random",
        "nopsd-kind",
        "vote-only",
        "u-opsd",
        "lmsi",
        "ttrl",
        "intuitor",
    )
    """Rows of the tables; vote-only-random completes the 2 x 2 of filter and context."""
    sources: tuple[str, ...]
    """Training questions of each domain: a bundled set, or NAME=QUESTIONS."""
    targets: tuple[str, ...] = ()
    """Test questions of each domain, written alike; default: the sources (bundled sets are split)."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds. All cells of a source share its rollouts, all evaluations their sampling seed."""
    more_seeds: tuple[int, ...] = ()
    """Further training seeds of the methods in --more-seeds-for."""
    more_seeds_for: tuple[str, ...] = ("nopsd", "nopsd-random", "lmsi")
    """Methods that --more-seeds are run for."""
    jobs: int = 1
    """Cells at work at a time. They share the CPU's threads; as the last bits depend on those, keep it in a grid."""
    control_temperatures: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Candidates of the temperature control."""
    dev: tuple[str, ...] = ()
    """Labelled development questions that choose among them, written like the sources; default: the bundled targets."""
    export: Fixed[dict[str, Any]] = field(default_factory=dict)
    train: Fixed[dict[str, Any]] = field(default_factory=dict)
    evaluate: Fixed[dict[str, Any]] = field(default_factory=dict)
    methods_train: Fixed[dict[str, dict[str, Any]]] = field(default_factory=dict)


PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {
        "model": "smollm2-135m",
        "sources": ("geography", "language", "chemistry"),
        "evaluate": {"limit": 70},
        "methods_train": {
            "ttrl": {"learning_rate": 2e-4, "num_generations": 4, "questions_per_step": 4, "vote_generations": 8},
            "intuitor": {"learning_rate": 5e-5, "num_generations": 4, "questions_per_step": 4},
        },
    },
    "paper": {
        "model": "Qwen/Qwen3-4B",
        "control_temperatures": (0.3, 0.6, 0.8),
        "export": {"preset": "qwen3-4b"},
        "train": {"preset": "qwen3-4b"},
        "evaluate": {"preset": "qwen3-4b"},
        "methods_train": {
            "ttrl": {"num_generations": 8, "questions_per_step": 4, "vote_generations": 16, "learning_rate": 5e-7},
            "intuitor": {"num_generations": 8, "questions_per_step": 4, "learning_rate": 3e-6},
        },
    },
}


@dataclass(frozen=True)
class Command:
    """One call of another command of this project; the file ``done`` in ``out`` says that it is finished."""

    module: str
    out: Path
    done: str
    options: Options


@dataclass(frozen=True)
class Cell:
    """A model, trained or not, and the commands that make and judge it."""

    name: str
    commands: Sequence[Command]


def main(config: GridConfig) -> None:
    """Run what is missing of the grid, then collect its results."""
    from figures.grid.collect import RESULTS, collect

    sources = _named(config.sources, "--sources")
    targets = _named(config.targets or config.sources, "--targets")
    _check(config)
    with output_folder(config.out, finished=RESULTS, owned=(), resume=True, overwrite=False):
        _keep_settings(config)
        context = _forkserver()
        failed = _run(untrained_cells(config, targets), config, context)
        failed += _run(trained_cells(config, sources, targets), config, context)
        print(collect(config.out, list(targets)))
    if failed:
        raise UserError(f"{len(failed)} cells failed ({', '.join(failed)}): see {LOG} in each; mend it and run again")


def untrained_cells(config: GridConfig, targets: Mapping[str, str]) -> list[Cell]:
    """The base model on every target, and at every candidate temperature on development questions and targets."""
    dev = _named(config.dev, "--dev") or {name: f"{name}:dev" for name in targets if targets[name] == name}
    cells = [Cell(BASE, _evaluations(config, BASE, targets))]
    for temperature in config.control_temperatures if dev else ():
        name, options = f"{CONTROL}-T{temperature:g}", {"temperature": temperature}
        on_dev = {f"dev-{domain}": questions for domain, questions in dev.items()}
        cells.append(Cell(name, _evaluations(config, name, {**on_dev, **targets}, options)))
    return cells


def trained_cells(config: GridConfig, sources: Mapping[str, str], targets: Mapping[str, str]) -> list[Cell]:
    """Every method on every source with every seed; the first seed of all comes first."""
    cells = []
    for seed in (*config.seeds, *config.more_seeds):
        for name, method in ((name, METHODS[name]) for name in config.methods):
            if seed not in config.seeds and name not in config.more_seeds_for:
                continue
            for source, questions in sources.items():
                cell = f"{name}--{source}--seed{seed}"
                first = config.out / FIRST.format(source=source)
                manifest = first.with_name(name) if method.export else first
                reuse = {"reuse": first} if method.export else {}
                asked = {"model": config.model, "questions": [questions], **config.export}
                run = config.out / "cells" / cell / "train"
                options = {**config.train, **config.methods_train.get(name, {}), **method.train}
                options |= {"manifest": manifest, "seed": seed}
                cells.append(
                    Cell(
                        cell,
                        [
                            Command("neurosig.export", first, "manifest.json", asked),
                            Command("neurosig.export", manifest, "manifest.json", {**asked, **method.export, **reuse}),
                            Command("distill.train", run, "train.json", options),
                            *_evaluations(config, cell, targets, {"adapter": run / "adapter"}),
                        ],
                    )
                )
    return cells


def _evaluations(
    config: GridConfig, cell: str, targets: Mapping[str, str], options: Options | None = None
) -> list[Command]:
    """One evaluation a target, so that adding a target later runs nothing again."""
    out = config.out / "cells" / cell / "eval"
    asked = {"model": config.model, **config.evaluate, **(options or {})}
    return [
        Command("distill.evaluate", out / name, "summary.json", {**asked, "questions": [questions]})
        for name, questions in targets.items()
    ]


def _run(cells: Sequence[Cell], config: GridConfig, context: ForkServerContext) -> list[str]:
    """Run the commands of every cell; returns the names of the cells that failed."""
    works = _Works(config, context)
    failed = []
    with ThreadPoolExecutor(config.jobs) as pool, progress(total=len(cells), desc="grid", quiet=config.quiet) as bar:
        running = {pool.submit(works.run, cell): cell for cell in cells}
        try:
            for done in as_completed(running):
                if not done.result():
                    failed.append(running[done].name)
                bar.set_postfix_str(running[done].name)
                bar.update()
        except BaseException as stopped:
            pool.shutdown(wait=False, cancel_futures=True)
            works.stop()
            if isinstance(stopped, KeyboardInterrupt):
                raise KeyboardInterrupt("the same command goes on from here") from None
            raise
    return failed


class _Works:
    """Runs cells, each command in a process of its own, never two commands on one output folder."""

    def __init__(self, config: GridConfig, context: ForkServerContext):
        self._config, self._context = config, context
        self._folders: dict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._processes: set[BaseProcess] = set()
        self._stopped = False

    def run(self, cell: Cell) -> bool:
        """Whether all commands of the cell are finished.

        Raises:
            KeyboardInterrupt: A command was interrupted.
        """
        for command in cell.commands:
            with self._folders[command.out]:
                if (command.out / command.done).is_file():
                    continue
                log = self._config.out / "cells" / cell.name / LOG
                log.parent.mkdir(parents=True, exist_ok=True)
                code = self._call(command, log)
            if code == EXIT_INTERRUPTED:
                raise KeyboardInterrupt
            if code != EXIT_DONE:
                last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                logger.warning("%s: %s: %s", cell.name, command.module, printable(last))
                return False
        return True

    def stop(self) -> None:
        """End what is at work; it saves, as at Ctrl-C."""
        self._stopped = True
        for process in tuple(self._processes):
            process.terminate()

    def _call(self, command: Command, log: Path) -> int:
        """Run a command in a process of its own, its output appended to ``log``; returns its exit code."""
        argv = [*command_words({"out": command.out, **command.options}), "--resume"]
        process = self._context.Process(target=_in_process, args=(command.module, argv, log, self._config.jobs))
        process.start()
        self._processes.add(process)
        if self._stopped:
            process.terminate()
        process.join()
        self._processes.discard(process)
        return int(process.exitcode or 0)


def _forkserver() -> ForkServerContext:
    """Processes that share the imports: a fresh interpreter would spend ten seconds on them for every command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "distill.train", "distill.evaluate"])
    return context


def _in_process(module: str, argv: Sequence[str], log: Path, jobs: int) -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    threading.Thread(target=_end_with_the_grid, daemon=True).start()
    with log.open("a", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    print(f"$ python -m {module} {shlex.join(argv)}", flush=True)
    command = importlib.import_module(module)
    config = getattr(command, COMMANDS[module])
    sys.exit(run_command(config, command.main, presets=command.PRESETS, prog=f"python -m {module}", argv=argv))


def _end_with_the_grid() -> None:
    """A grid that is killed cannot end its command: it notices, and saves as at Ctrl-C."""
    grid = multiprocessing.parent_process()
    if grid is not None:
        grid.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _named(given: Sequence[str], flag: str) -> dict[str, str]:
    """Domain -> questions, from ``NAME=QUESTIONS`` or the name of a bundled set alone."""
    named: dict[str, str] = {}
    for text in given:
        name, _, questions = text.partition("=")
        if name in named or not re.fullmatch(r"[\w.-]+", name) or "--" in name:
            raise UserError(
                f"{flag} {text}: expected NAME=QUESTIONS with each NAME once, of letters, digits, ., - and _"
            )
        named[name] = questions or name
    return named


def _check(config: GridConfig) -> None:
    if config.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {config.jobs}")
    unknown = [name for name in (*config.methods, *config.more_seeds_for, *config.methods_train) if name not in METHODS]
    if unknown:
        raise UserError(f"method {unknown[0]}: expected one of {', '.join(METHODS)}")


def _keep_settings(config: GridConfig) -> None:
    """Note the options that every cell depends on; another value of one needs another folder."""
    shared = ("model", "export", "train", "evaluate", "methods_train")
    record = {name: value for name, value in config_record(config).items() if name in shared}
    path = config.out / SETTINGS
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in shared if found.get(name) != record[name]]
        if changed:
            raise UserError(
                f"{config.out}: its cells were made with other {', '.join(changed)} options (see {SETTINGS}); give the "
                "same ones or another --out"
            )
    write_atomic(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(GridConfig, main, presets=PRESETS, prog="python -m figures.grid"))
