"""Where a figure's numbers come from: a results folder, or the copies committed in ``figures/data``."""

from __future__ import annotations

import logging
from pathlib import Path

from neurosig.runtime.errors import UserError

logger = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data"


def made_or_committed(made: Path, figure: str) -> Path:
    """``made`` if it exists, else the committed ``figures/data/FIGURE.csv``; the log names the latter."""
    if made.is_file():
        return made
    logger.info("%s: there is no %s; drawn from the committed numbers", figure, made)
    return DATA / f"{figure}.csv"


def finished_export(folder: Path) -> Path:
    """``folder``, if an export was finished there.

    Raises:
        UserError: There is no finished export.
    """
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no finished export; run `python -m neurosig.export --out {folder}` first")
    return folder
