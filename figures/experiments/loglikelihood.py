"""The finished cells of a grid without a parser: which of all possible answers each model finds likeliest.

    python -m figures.experiments.loglikelihood --grid runs/grid

Every trained model is scored in its own domain, the base in all, on the test questions that have choices or an answer
space, by ``distill.evaluate --scoring loglikelihood --choice-form text --mutual-info``: the mean log-probability per
token of each possible answer, with and without its prior after an empty question. Nothing is sampled or parsed, so a
learned wording cannot count as knowledge. ``loglikelihood.csv`` has one row per cell and domain, with changes against
the base that are paired by question; run it again to resume, or to add cells that were finished since.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from figures.grid.cells import Cell, Command
from figures.grid.collect import adapter_of, evaluations, run_of
from figures.grid.config import BASE, METHOD_LABELS, SETTINGS, method_label
from figures.grid.evidence import LOGLIKELIHOOD
from figures.grid.processes import LOG, forkserver, run_cells
from figures.grid.rows import Run
from figures.grid.texts import evaluated_questions
from figures.sources import question_lines
from neurosig.questions.answers.spaces import members
from neurosig.runtime.cli import CommonConfig, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.runtime.shapes import AtLeast, Shapes
from neurosig.statistics.metrics import paired_mean_interval

logger = logging.getLogger(__name__)

FOLDER = "loglikelihood"
MEASURES = {"accuracy": "correct", "accuracy_mutual_info": "correct_mutual_info"}
"""Measure -> its column of ``results.parquet``."""


@dataclass(kw_only=True)
class LoglikelihoodConfig(CommonConfig):
    """Score the finished cells of a grid in their own domains by log-likelihood, without sampling or parsing."""

    grid: Path = Path("runs/grid")
    """Folder written by figures.grid."""
    jobs: Annotated[int, Shapes.RESOURCES, AtLeast(1)] = 1
    """Cells that are scored at the same time."""


def main(config: LoglikelihoodConfig) -> None:
    """Score the cells that are not scored yet, and write ``loglikelihood.csv``.

    Raises:
        UserError: There is no grid, its base is not evaluated, or a cell failed.
    """
    import pandas as pd

    scored = list(_cells(config.grid))
    if not scored:
        raise UserError(f"{config.grid}: nothing to score; no finished evaluation of questions with possible answers")
    cells, folder = [cell for *_, cell in scored], config.grid / FOLDER
    failed = run_cells(cells, folder, forkserver(), jobs=config.jobs, quiet=config.quiet)
    if failed:
        raise UserError(f"{len(failed)} cells failed ({', '.join(failed)}): see {LOG} in {folder}; run again")
    table = pd.DataFrame([_row(folder, *one) for one in scored])
    table = table.sort_values(["method", "source", "seed", "target"], kind="stable")
    write_atomic(config.grid / LOGLIKELIHOOD, table.to_csv(index=False, float_format="%.6g"))
    print(table_text(config.grid))


def table_text(folder: Path) -> str:
    """``loglikelihood.csv`` as a Markdown table, one row per method: means over its cells; empty without the file."""
    import pandas as pd

    if not (folder / LOGLIKELIHOOD).is_file():
        return ""
    table = pd.read_csv(folder / LOGLIKELIHOOD, keep_default_na=False, na_values=[""])
    lines = [
        f"| method | cells | questions | {' | '.join(f'{name} | change' for name in MEASURES)} |",
        "|---" * 7 + "|",
    ]
    for method in (name for name in METHOD_LABELS if name in set(table["method"])):
        own = table[table["method"] == method]
        cells = [method_label(method), str(len(own)), str(own.drop_duplicates("target")["n"].sum())]
        for name in MEASURES:
            change, above, below = own[f"{name}_change"].mean(), own[f"{name}_low"] > 0, own[f"{name}_high"] < 0
            text = f"{change:+.3f} ({above.sum()} above, {below.sum()} below)"
            cells += [f"{own[name].mean():.3f}", "" if method == BASE else text]
        lines.append(f"| {' | '.join(cells)} |")
    skipped = table.drop_duplicates("target")["skipped"].sum()
    note = (
        "In-domain accuracy of the likeliest possible answer, mean per token, and minus its prior; nothing is sampled "
        "or parsed. Changes against the base, with the number of cells whose 95% paired interval excludes zero. "
        f"{skipped} test questions without an answer space are left out."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _cells(grid: Path) -> Iterator[tuple[Run, str, int, Cell]]:
    """Finished runs in their own domains, the base in all, with the domain and how many of its questions are left out.

    Writes the other questions of each domain; one without any is named and left out.
    """
    if not (grid / SETTINGS).is_file():
        raise UserError(f"{grid}: no grid; run python -m figures.grid --out {grid}")
    settings = json.loads((grid / SETTINGS).read_text(encoding="utf-8"))
    options = {"model": settings["model"], **settings["evaluate"], "scoring": "loglikelihood", "choice_form": "text"}
    options = {name: value for name, value in options.items() if name != "limit"} | {"mutual_info": True}
    for target in settings["targets"]:
        questions = [
            one for path in evaluations(grid / "cells" / BASE / "eval", target)[:1] for one in evaluated_questions(path)
        ]
        known = [one for one in questions if one.choices or members(one)]
        if not known:
            logger.warning("%s: left out; no evaluated question of it has choices or an answer space", target)
            continue
        place = grid / FOLDER / f"{target}.jsonl"
        place.parent.mkdir(exist_ok=True)
        write_atomic(place, question_lines(known))
        for cell in sorted((grid / "cells").iterdir()):
            run, done = run_of(cell.name, None), evaluations(cell / "eval", target)
            if run is None or not done or run.source not in ("", target):
                continue
            name, adapter = f"{cell.name}--{target}", adapter_of(grid, done[0])
            own = {**options, "questions": [place], **({} if adapter is None else {"adapter": adapter})}
            command = Command("distill.evaluate", grid / FOLDER / name, "summary.json", own)
            yield run, target, len(questions) - len(known), Cell(name, [command])


def _row(folder: Path, run: Run, target: str, skipped: int, cell: Cell) -> dict[str, Any]:
    import pandas as pd

    names = (cell.name, f"{BASE}--{target}")
    own, base = (pd.read_parquet(folder / name / "results.parquet").set_index("question_id") for name in names)
    row = {"method": run.method, "source": run.source, "target": target, "seed": run.seed, "n": len(own)}
    row |= {"skipped": skipped, "chance": (1 / own["choices"]).mean()}
    for name, column in MEASURES.items():
        row |= {name: own[column].mean(), f"{name}_change": None, f"{name}_low": None, f"{name}_high": None}
        if run.method != BASE:
            pair = (table.loc[own.index, column].to_numpy(dtype=np.float64) for table in (own, base))
            change = paired_mean_interval(*pair, seed=0)
            row |= {f"{name}_change": change.estimate, f"{name}_low": change.low, f"{name}_high": change.high}
    return row


if __name__ == "__main__":
    sys.exit(run_command(LoglikelihoodConfig, main, presets={}, prog="python -m figures.experiments.loglikelihood"))
