"""Run the cells of a grid, each command in a process of its own."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from figures.grid.cells import Cell, Command
from neurosig.runtime.cli import EXIT_DONE, EXIT_INTERRUPTED, command_words, printable, progress, run_command

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext
    from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)

LOG = "log.txt"
CONFIGS = {"neurosig.export": "ExportConfig", "distill.train": "TrainConfig", "distill.evaluate": "EvaluateConfig"}
"""Module of a command -> its dataclass of options."""


def forkserver() -> ForkServerContext:
    """Processes that share the imports, which take about ten seconds in a fresh interpreter."""
    # asking the CUDA runtime whether there is a GPU would make it unusable in all processes that are forked afterwards
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "distill.train", "distill.evaluate"])
    return context


def visible_devices() -> tuple[str, ...]:
    """The CUDA devices of this process, as CUDA_VISIBLE_DEVICES names them; none on the CPU."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(map(str, range(count)) if named is None else named.split(","))[:count]


def run_cells(cells: Sequence[Cell], folder: Path, context: ForkServerContext, *, jobs: int, quiet: bool) -> list[str]:
    """Run the unfinished commands of every cell, ``jobs`` cells at a time.

    Of several CUDA devices, each running cell sees one alone, which it shares only if there are more jobs than devices.

    Args:
        cells: The cells.
        folder: Folder of the cells, which gets a ``log.txt`` for each.
        context: Makes the processes.
        jobs: Cells that run at the same time.
        quiet: Show no progress bar.

    Returns:
        Names of the cells that failed.

    Raises:
        KeyboardInterrupt: The grid or one of its commands was interrupted; the commands have saved their work.
    """
    runner = _Runner(folder, context, jobs)
    failed = []
    with ThreadPoolExecutor(jobs) as pool, progress(total=len(cells), desc="grid", quiet=quiet) as bar:
        running = {pool.submit(runner.run, cell): cell for cell in cells}
        try:
            for done in as_completed(running):
                if not done.result():
                    failed.append(running[done].name)
                bar.set_postfix_str(running[done].name)
                bar.update()
        except BaseException as stopped:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            if isinstance(stopped, KeyboardInterrupt):
                raise KeyboardInterrupt("the same command continues from here") from None
            raise
    return failed


class _Runner:
    """Runs cells; two commands never write to one output folder at the same time."""

    def __init__(self, folder: Path, context: ForkServerContext, jobs: int):
        self._folder, self._context, self._jobs = folder, context, jobs
        self._locks: dict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._processes: set[BaseProcess] = set()
        self._stopped = False
        devices = visible_devices() if jobs > 1 else ()
        self._devices: SimpleQueue[str | None] = SimpleQueue()
        for job in range(jobs):
            self._devices.put(devices[job % len(devices)] if devices else None)

    def run(self, cell: Cell) -> bool:
        """Run the cell's unfinished commands; returns whether all are finished.

        Raises:
            KeyboardInterrupt: A command was interrupted.
        """
        device = self._devices.get()
        try:
            return self._run(cell, device)
        finally:
            self._devices.put(device)

    def _run(self, cell: Cell, device: str | None) -> bool:
        for command in cell.commands:
            with self._locks[command.out]:
                if (command.out / command.done).is_file():
                    continue
                log = self._folder / cell.name / LOG
                log.parent.mkdir(parents=True, exist_ok=True)
                code = self._call(command, log, device)
            if code == EXIT_INTERRUPTED:
                raise KeyboardInterrupt
            if code != EXIT_DONE:
                last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                logger.warning("%s: %s: %s", cell.name, command.module, printable(last))
                return False
        return True

    def stop(self) -> None:
        """Terminate the running commands; they save their work, as at Ctrl-C."""
        self._stopped = True
        for process in tuple(self._processes):
            process.terminate()

    def _call(self, command: Command, log: Path, device: str | None) -> int:
        """Run a command in a process of its own, its output appended to ``log``; returns its exit code.

        The process sees only ``device``, unless that is None or the command has a ``--device`` of its own.
        """
        config = getattr(importlib.import_module(command.module), CONFIGS[command.module])
        argv = [*command_words({"out": command.out, **command.options}, config), "--resume"]
        device = None if "device" in command.options else device
        process = self._context.Process(target=_in_process, args=(command.module, argv, log, self._jobs, device))
        process.start()
        self._processes.add(process)
        if self._stopped:
            process.terminate()
        process.join()
        self._processes.discard(process)
        return int(process.exitcode or 0)


def _in_process(module: str, argv: Sequence[str], log: Path, jobs: int, device: str | None) -> None:
    """Run a command as ``python -m`` would, with its output in ``log``, its share of the threads and its device."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    threading.Thread(target=_end_with_the_grid, daemon=True).start()
    with log.open("a", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    print(f"$ python -m {module} {shlex.join(argv)}", flush=True)
    command = importlib.import_module(module)
    config = getattr(command, CONFIGS[module])
    sys.exit(run_command(config, command.main, presets=command.PRESETS, prog=f"python -m {module}", argv=argv))


def _end_with_the_grid() -> None:
    """Wait for the grid's process to end, then save and stop as at Ctrl-C: a killed grid cannot end its commands."""
    grid = multiprocessing.parent_process()
    if grid is not None:
        grid.join()
        os.kill(os.getpid(), signal.SIGTERM)
