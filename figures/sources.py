"""Where a figure's numbers come from, a results folder or the copies in ``figures/data``, and questions as files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.questions.load import Question

logger = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data"


def made_or_committed(made: Path, figure: str) -> Path:
    """``made`` if it exists, else the committed ``figures/data/FIGURE.csv``; the log names the latter."""
    if made.is_file():
        return made
    logger.info("%s: there is no %s; drawn from the committed numbers", figure, made)
    return DATA / f"{figure}.csv"


def question_lines(questions: Iterable[Question]) -> str:
    """Questions as the lines of a file that `neurosig.questions.load.load_questions` reads."""
    records = [{k: v for k, v in asdict(one).items() if k != "line"} for one in questions]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def finished_export(folder: Path) -> Path:
    """``folder``, if an export was finished there.

    Raises:
        UserError: There is no finished export.
    """
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no finished export; run `python -m neurosig.export --out {folder}` first")
    return folder
