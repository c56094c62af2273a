"""The tables of a grid under another reading of its kept texts, without a model.

    python -m figures.grid.rescore --grid runs/grid --answer-format short --out runs/grid-short

Writes ``grid.parquet`` and ``layout.json`` of the new reading, which ``python -m figures paper_tables --results OUT``
draws, and prints the tables as `figures.grid` does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from neurosig.options import RereadOptions
from neurosig.runtime.cli import run_command
from neurosig.runtime.errors import UserError


@dataclass(kw_only=True)
class RescoreGridConfig(RereadOptions):
    """Parse, merge and grade the kept texts of a grid again."""

    grid: Path
    """Folder written by figures.grid or figures.grid.evidence."""
    out: Path
    """Folder of the new grid.parquet and layout.json."""
    overwrite: bool = False
    """Replace an earlier grid.parquet in --out."""


def main(config: RescoreGridConfig) -> None:
    """Write and print the tables of the new reading.

    Raises:
        UserError: The texts were not kept, or --out holds a grid.
    """
    from figures.grid.collect import tables_text
    from figures.grid.rows import LAYOUT, find_grid, sampled_grid_rows, write_grid
    from figures.grid.texts import format_check, reread_grid
    from neurosig.runtime.files import write_atomic

    if config.out.resolve() == config.grid.resolve() or (find_grid(config.out) and not config.overwrite):
        raise UserError(f"--out {config.out}: holds a grid; give another folder, or --overwrite for an earlier reading")
    rows = reread_grid(config.grid, config)
    write_grid(config.out, sampled_grid_rows(rows))
    if (config.grid / LAYOUT).is_file():
        write_atomic(config.out / LAYOUT, (config.grid / LAYOUT).read_bytes())
    print(tables_text(config.out), format_check(rows), sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(RescoreGridConfig, main, presets={}, prog="python -m figures.grid.rescore"))
