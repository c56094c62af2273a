"""Reliability diagrams of every evaluation, in the domain that was trained on and across domains.

Reads ``eval/*`` and ``manifest`` of a results folder; writes ``reliability.pdf``, ``.png`` and the plotted numbers as
``reliability.csv``. Confidence is the majority's share of the K rollouts, so each number of votes is a bin.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from figures.notebook.calibration import calibration_summary, calibration_table
from figures.notebook.explore import reliability_diagrams
from figures.sources import finished_export
from figures.style import caption, save_figure, use_style
from neurosig.runtime.errors import UserError

NAME = "reliability"
NEEDS = Path("eval/base/summary.json")
TITLES = {"base": "base", "control": "control", "nopsd": "N-OPSD"}
"""Folder of an evaluation -> its title, in the order of the columns; others follow under their own names."""
RESAMPLES, SEED = 2000, 0


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``.

    Raises:
        UserError: An evaluation of the base or the export is missing.
    """
    if not (results / NEEDS).is_file():
        folder = (results / NEEDS).parent
        raise UserError(f"{folder}: no finished evaluation; run `python -m distill.evaluate --out {folder}` first")
    finished_export(results / "manifest")
    questions = calibration_table(results)
    names = set(questions["method"])
    order = [*(name for name in TITLES if name in names), *sorted(names - set(TITLES))]
    questions = pd.concat([questions[questions["method"] == name] for name in order])
    questions["method"] = questions["method"].map(lambda name: TITLES.get(name, name))
    summary = calibration_summary(questions, seed=SEED, resamples=RESAMPLES)

    use_style()
    figure = reliability_diagrams(questions, summary)
    seeds = {json.loads(path.read_text())["config"]["seed"] for path in results.glob("eval/*/summary.json")}
    caption(
        figure,
        f"one point per number of votes (K={questions['k'].iloc[0]}), its area the number of questions; dashed: "
        "perfect calibration;\nbars and brackets: 95% bootstrap interval over questions; sampling seed "
        f"{', '.join(map(str, sorted(seeds)))}; control: the base at its best temperature",
    )
    return save_figure(figure, out, NAME, _plotted(questions, summary).to_csv(index=False, float_format="%.6g"))


def _plotted(questions: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """``part`` is ``bin`` (accuracy of the majority at a confidence, and the number of questions) or ``summary``."""
    groups = questions.groupby(["scope", "method", "votes"], sort=False)
    bins = groups.agg(k=("k", "first"), accuracy=("accuracy", "mean"), n=("accuracy", "size")).reset_index()
    bins = bins.sort_values(["scope", "method", "votes"], kind="stable")
    bins["confidence"] = bins["votes"] / bins["k"]
    return pd.concat([summary.assign(part="summary"), bins.assign(part="bin")], ignore_index=True)
