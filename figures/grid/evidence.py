"""The part of a grid that its figures and tests need: ``python -m figures.grid.evidence --grid runs/grid``.

Copies the grid's rows and aggregates, and adds ``signals.csv``: for every training question of every source, whether
its majority answer is right by either grading, and the trust that each score puts in it. Gold answers are read here, to
judge only.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from figures.grid.cells import SHARED_EXPORT
from figures.grid.collect import RESULTS, SECONDS
from figures.grid.config import PLAN, SETTINGS
from figures.grid.rows import FILES, LAYOUT, find_grid
from figures.grid.tuning import TUNING
from figures.sources import DATA
from neurosig.runtime.cli import CommonConfig, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

SIGNALS, LOGLIKELIHOOD = "signals.csv", "loglikelihood.csv"
COMMITTED = DATA / "grid"


@dataclass(kw_only=True)
class EvidenceConfig(CommonConfig):
    """Copy the results of a grid into one small folder, and add the scores of its training questions."""

    grid: Path = Path("runs/grid")
    """Folder written by figures.grid."""
    out: Path = COMMITTED
    """Folder of grid.parquet, layout.json, results.csv, seconds.csv, tuning.csv, loglikelihood.csv, the kept texts,
    signals.csv and the stated tests."""


def main(config: EvidenceConfig) -> None:
    """Write the files, each atomically.

    Raises:
        UserError: The grid is not finished, or gold answers cannot be read.
    """
    import pandas as pd

    from figures.grid import texts

    for name in (FILES[0], LAYOUT, RESULTS, SETTINGS):
        if not (config.grid / name).is_file():
            raise UserError(f"{config.grid}: no {name}; run python -m figures.grid --out {config.grid}")
    config.out.mkdir(parents=True, exist_ok=True)
    for name in (FILES[0], LAYOUT, RESULTS, SECONDS, PLAN.name, TUNING, LOGLIKELIHOOD, *texts.FILES):
        if (config.grid / name).is_file():  # not every grid has tries, scores without a parser, or kept texts
            write_atomic(config.out / name, (config.grid / name).read_bytes())
    sources = pd.read_csv(config.grid / RESULTS)["source"].dropna().unique()
    frames = [signals(config.grid / SHARED_EXPORT.format(source=source), source) for source in sources]
    write_atomic(config.out / SIGNALS, pd.concat(frames).to_csv(index=False, float_format="%.6g"))
    logger.info("%s", config.out)


def grid_folder(results: Path) -> Path:
    """The folder of the grid to draw: ``results`` if it holds one, else the committed ``figures/data/grid``."""
    if find_grid(results) is not None:
        return results
    logger.info("%s: there is no %s; drawn from the committed grid", results, FILES[0])
    return COMMITTED


def signals(folder: Path, source: str) -> pd.DataFrame:
    """One row per question of a manifest: ``source``, ``question_id``, ``right``, ``right_lenient``, and its trust by
    each score.

    Raises:
        UserError: The manifest, or the gold answers of its questions, cannot be read.
    """
    import pandas as pd

    from neurosig.exported import Exported, join_gold
    from neurosig.questions.vote import n_tied_right_lenient
    from neurosig.report.data import question_level

    exported = Exported(folder)
    gold, _ = join_gold(exported.manifest, required=True)
    level = question_level(exported, gold)
    ids = [name for name in exported.rows if name in gold]
    reader, lenient = exported.manifest.header.answer_reader(), []
    for name in ids:
        reading = reader.read(exported.rollouts[name], gold[name])
        grades = reader.grade(reading, exported.rollouts[name], gold[name])
        winner = replace(reading.vote, tied_answers=() if reading.vote.winner is None else (reading.vote.winner,))
        lenient.append(n_tied_right_lenient(winner, reading.answers, grades.lenient) == 1)
    columns = {"right": level.right, "right_lenient": lenient, **{one.name: one.trust for one in level.signals}}
    return pd.DataFrame({"source": source, "question_id": ids, **columns})


if __name__ == "__main__":
    sys.exit(run_command(EvidenceConfig, main, presets={}, prog="python -m figures.grid.evidence"))
