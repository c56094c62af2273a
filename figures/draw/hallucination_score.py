"""The hallucination score: the probe's score of right and wrong majorities, and its AUROC against the output baselines.

Reads ``manifest`` of a results folder (`neurosig.export`) and, to judge only, the gold answers of its questions; writes
``hallucination_score.pdf``, ``.png`` and the plotted numbers as ``hallucination_score.csv``. The probe is
annotation-free and cross-fitted: no question is scored by a probe that has seen it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from figures.notebook.parts import draw_forest
from figures.sources import finished_export
from figures.style import Colour, caption, save_figure, subplots
from neurosig.runtime.files import csv_cell
from neurosig.statistics.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "hallucination_score"
NEEDS = Path("manifest/manifest.json")
RESAMPLES, SEED, BINS = 10_000, 0, 20


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``.

    Raises:
        UserError: There is no finished export, or its questions' gold answers cannot be read.
    """
    table = numbers(finished_export(results / "manifest"))
    scores, areas = table[table["part"] == "score"], table[table["part"] == "auroc"]
    figure, (left, right) = subplots(1, 2, size=(7, 3.3), width_ratios=[1, 1.05])
    _draw_scores(left, scores)
    intervals = [
        (row["name"], row["kind"], Interval(row["value"], row["low"], row["high"], int(row["n"]), RESAMPLES, SEED))
        for row in areas.to_dict("records")
    ]
    draw_forest(right, intervals)
    right.set(xlabel="AUROC for a right majority", xlim=(None, 1.02))
    right.set_title("AUROC of each score")
    right.tick_params(axis="y", labelsize=8)
    right.legend(fontsize=7.5, loc="lower right", handletextpad=0.3)
    caption(
        figure,
        f"{len(scores)} questions; lines: 95% bootstrap intervals over questions ({RESAMPLES:,} draws, seed {SEED}); "
        "dashed: chance",
    )
    return save_figure(figure, out, NAME, table.to_csv(index=False, float_format="%.6g"))


def numbers(folder: Path) -> pd.DataFrame:
    """The numbers of the figure from an export.

    ``part`` is ``score`` (a question: ``name``, ``kind``, the probe's score as ``value``, ``right``) or ``auroc`` (a
    signal: ``name``, ``kind``, ``value``, ``low``, ``high``, ``n``).

    Raises:
        UserError: Gold answers are missing, or the majorities are all right or all wrong.
    """
    from neurosig.exported import Exported, join_gold
    from neurosig.report.data import question_level
    from neurosig.runtime.errors import UserError
    from neurosig.statistics.auroc import AnalysisConfig, auroc_interval

    exported = Exported(folder)
    gold, lacking = join_gold(exported.manifest, required=True)
    if lacking is not None:
        raise UserError(f"{folder}: no gold answers to judge by; {lacking}")
    rows, level = exported.rows.values(), question_level(exported, gold)
    assert level.right is not None
    scores = [
        {
            "part": "score",
            "name": row.question_id,
            "kind": row.kind or row.domain,
            "value": row.scores["probe_score"],
            "right": right,
        }
        for row, right in zip(rows, level.right.astype(int).tolist(), strict=True)
    ]
    areas = []
    for signal in level.signals:
        area = auroc_interval(signal.trust, level.right, level.owners, AnalysisConfig(SEED, RESAMPLES))
        areas.append(
            {"part": "auroc", "name": signal.name, "kind": signal.kind, "value": area.estimate}
            | {"low": area.low, "high": area.high, "n": area.n}
        )
    table = pd.DataFrame([*scores, *areas]).astype({"right": "Int64", "n": "Int64"})
    table[["name", "kind"]] = table[["name", "kind"]].map(csv_cell)
    return table


def _draw_scores(axis: Axes, scores: pd.DataFrame) -> None:
    """Histogram of the scores of right and of wrong majorities, each as a share of its questions, and their medians."""
    edges = np.linspace(0, 1, BINS + 1)
    right, wrong = (scores[scores["right"] == value]["value"].to_numpy(np.float64) for value in (1, 0))
    styles: tuple[dict[str, Any], ...] = (
        {"histtype": "stepfilled", "color": Colour.OURS, "alpha": 0.55},
        {"histtype": "step", "color": "black", "linewidth": 1.3},
    )
    for values, label, style in zip((right, wrong), ("right", "wrong"), styles, strict=True):
        shares = np.full(len(values), 1 / len(values))
        axis.hist(values, edges.tolist(), weights=shares, label=f"{label} (n={len(values)})", **style)
    top = axis.get_ylim()[1]
    axis.plot(np.median(right), 1.06 * top, "v", color=Colour.OURS, markersize=6)
    axis.plot(np.median(wrong), 1.06 * top, "v", color="white", markeredgecolor="black", markersize=6)
    axis.set(
        xlim=(0, 1), ylim=(0, 1.5 * top), xlabel="probe's score (higher: less trusted)", ylabel="share of its questions"
    )
    axis.set_title("majorities by the probe's score")
    axis.locator_params(axis="y", nbins=5)
    axis.grid(axis="x", visible=False)
    axis.legend(fontsize=7.5, loc="upper left", title="majority is (triangle: median)", title_fontsize=7.5)
