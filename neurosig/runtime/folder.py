"""Output folders: one writer at a time, no silent overwriting, and complete runs are recognised."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from neurosig.runtime.cli import PhaseTimer
from neurosig.runtime.errors import UserError
from neurosig.runtime.ranks import ALONE, Ranks
from neurosig.runtime.recorded import (
    BEGUN,
    begin_record,
    check_inputs_outside,
    finish_record,
    is_longer,
    options_record,
)

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=Any)
LOCK = ".lock"


@contextlib.contextmanager
def output_folder(out: Path, *, finished: str, owned: Sequence[str], resume: bool, overwrite: bool) -> Iterator[bool]:
    """Lock ``out`` for one run; yields whether an earlier run completed it (then change nothing).

    Args:
        out: The folder; created if absent.
        finished: File whose presence means that the run in this folder is complete.
        owned: Glob patterns of all files a run writes here; ``overwrite`` deletes these and nothing else.
        resume: Continue an interrupted run, or leave a finished one unchanged.
        overwrite: Replace an earlier run.

    Raises:
        UserError: The folder is in use, holds an earlier run without either flag, or cannot be written.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    with _locked(out):
        try:
            earlier = [path for pattern in owned for path in out.glob(pattern)]
            if overwrite:
                for path in earlier:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif earlier and not resume:
                raise UserError(
                    f"--out {out}: holds an earlier run; give --resume to continue it, --overwrite, or another folder"
                )
            yield (out / finished).exists()
        finally:
            (out / LOCK).unlink(missing_ok=True)
            if not any(out.iterdir()):
                out.rmdir()


@contextlib.contextmanager
def command_folder(config: Any, *, finished: str, owned: Sequence[str]) -> Iterator[bool]:
    """`output_folder` of a command's ``--out``, which records the options and compares them with an earlier run's.

    Yields whether an earlier run with these options completed the folder.

    Args:
        config: The command's options, with ``out``, ``resume`` and ``overwrite``.
        finished: See `output_folder`.
        owned: See `output_folder`.

    Raises:
        UserError: See `output_folder`; or ``overwrite`` would delete an input, or ``resume`` continue a run with other
            options, each of which is named with both values.
    """
    out: Path = config.out
    if config.overwrite:
        check_inputs_outside(config, out)
    with output_folder(
        out, finished=finished, owned=owned, resume=config.resume, overwrite=config.overwrite
    ) as complete:
        began = any(True for pattern in owned for _ in out.glob(pattern))
        longer = began and is_longer(config, finished)
        complete = complete and not longer
        unfinished = not complete or (out / BEGUN).exists()  # a run killed after its last write left that file
        if unfinished:
            begin_record(out, options_record(config))
        try:
            yield complete
            if unfinished:
                finish_record(out)
        finally:
            if {path.name for path in out.iterdir()} <= {LOCK, BEGUN}:
                (out / BEGUN).unlink(missing_ok=True)


def run_in_folder(
    config: ConfigT,
    work: Callable[[ConfigT, PhaseTimer], None],
    *,
    finished: str,
    owned: Sequence[str],
    temporary: str | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Run a command in its ``--out``, timed by phase; nothing but a message if the same run completed it earlier.

    The main process opens and closes the folder.

    Args:
        config: The command's options, with ``out``, ``resume`` and ``overwrite``.
        work: Called with the options and the timer.
        finished: See `output_folder`.
        owned: See `output_folder`.
        temporary: File or folder that a run killed after its last write leaves behind.
        ranks: The processes, all of which must call this.

    Raises:
        UserError: See `command_folder`.
    """
    out = config.out
    with contextlib.ExitStack() as stack:
        folder = command_folder(config, finished=finished, owned=owned)
        if not ranks.on_main(lambda: stack.enter_context(folder)):
            with PhaseTimer() as timer:
                work(config, timer)
            return
        if temporary is not None and ranks.main:
            shutil.rmtree(out / temporary) if (out / temporary).is_dir() else (out / temporary).unlink(missing_ok=True)
        logger.info("%s: already complete", out)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock a file that names pid and host. The kernel frees the lock of a killed run, so the next run takes it."""
    while True:
        try:
            if out.is_file():
                raise UserError(f"--out {out}: is a file; give a folder")
            out.mkdir(parents=True, exist_ok=True)
            lock = (out / LOCK).open("a+")
        except OSError as error:
            raise UserError(f"--out {out}: cannot write there ({error.strerror})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise UserError(f"--out {out}: in use by pid {holder}; wait or choose another") from error
            if not _is_file(lock, out / LOCK):  # its last holder removed it between our open and our lock
                continue
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield
            return


def _is_file(handle: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
