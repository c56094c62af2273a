"""Which state of the code wrote the figures' numbers: ``figures/data/written_by.json``, and the command that keeps it.

    make demo figures && python -m figures.written_by before_after reliability --command "make demo figures"

A figure's entry names the command, the version of the numbers (`NUMBERS`) and the SHA-256 of its files in ``figures/``
and ``figures/data``. One of an earlier version says why it has not been made again. A test compares files and entries,
and recomputes some numbers of every kind, so that `NUMBERS` is raised when one changes; a change that leaves all
numbers alone makes no figure older.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from figures.sources import DATA
from neurosig.runtime.cli import CommonConfig, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file, write_atomic

NUMBERS = 2
"""Raised when the same inputs and seeds give other numbers. 1: answers had to be the gold answer and nothing else, and
votes counted wordings. 2: answers are read as statements, votes count meanings, both gradings are reported."""
RECORD = DATA / "written_by.json"


@dataclass(kw_only=True)
class WrittenByConfig(CommonConfig):
    """Note what has just written a figure's files in figures/ and figures/data."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Figures, or files of figures/data without their ending."""
    command: str
    """The command that made the numbers."""
    numbers: int = NUMBERS
    """Version of the numbers, of files that an earlier state of the code wrote."""
    reason: str = ""
    """Why files of an earlier version have not been made again."""


def main(config: WrittenByConfig) -> None:
    """Write the entries.

    Raises:
        UserError: A name has no file, or an earlier version no reason.
    """
    if (config.numbers < NUMBERS) != bool(config.reason):
        raise UserError(f"--reason belongs to --numbers below {NUMBERS}: why the files have not been made again")
    record = read()
    for name in config.names:
        files = {path.relative_to(DATA.parent).as_posix(): sha256_file(path) for path in files_of(name)}
        if not files:
            raise UserError(f"{name}: no such file in {DATA} or {DATA.parent}")
        entry = {"command": config.command, "numbers": config.numbers, "files": files}
        record[name] = {**entry, "reason": config.reason} if config.reason else entry
    write_atomic(RECORD, json.dumps(dict(sorted(record.items())), indent=1) + "\n")


def read() -> dict[str, Any]:
    """Name -> entry."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.is_file() else {}


def files_of(name: str) -> list[Path]:
    """The committed files of a figure: pictures and pages, numbers, and those of a folder of numbers."""
    own = [*DATA.parent.glob(f"{name}.*"), *DATA.glob(f"{name}.*"), *(DATA / name).glob("*")]
    return sorted(path for path in own if path.is_file() and path.suffix not in (".py", ".pyc"))


if __name__ == "__main__":
    sys.exit(run_command(WrittenByConfig, main, presets={}, prog="python -m figures.written_by"))
