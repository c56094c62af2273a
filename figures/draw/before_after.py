"""Accuracy and calibration before and after training: base, temperature control and trained model.

Reads ``report/comparison.json`` and ``eval/*/results.parquet`` of a results folder; writes ``before_after.pdf``,
``.png`` and the plotted numbers as ``before_after.csv``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from figures.style import RUNS, Colour, save_figure, subplots
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "before_after"
NEEDS = Path("report/comparison.json")
METRICS = {"avg_at_k": "Avg@{k}", "maj_at_k": "maj@{k}", "ece": "ECE"}


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``.

    Raises:
        UserError: The report or one of its evaluations is missing.
    """
    report = results / NEEDS
    if not report.is_file():
        raise UserError(f"{report}: no such file; run `python -m distill.compare --out {report.parent}` first")
    record = json.loads(report.read_text())
    table, reliability = _accuracy_table(record), _reliability_table(record, results)

    scopes = list(dict.fromkeys(table["scope"]))
    figure, axes = subplots(
        1, len(scopes) + 1, size=(3.1 * (len(scopes) + 1), 3.3), width_ratios=[*[1] * len(scopes), 1.1]
    )
    for axis, scope in zip(axes, scopes, strict=False):
        _draw_metrics(axis, table[table["scope"] == scope], record["k"])
        n = int(table[table["scope"] == scope]["n"].iloc[0])
        axis.set_title(f"{scope} (n={n})")
        axis.set_ylim(0, 1.1 * float(table["high"].max()))
    axes[0].set_ylabel("value, 95% bootstrap interval")
    _draw_reliability(axes[-1], reliability)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return save_figure(figure, out, NAME, pd.concat([table, reliability]).to_csv(index=False))


def _accuracy_table(record: dict[str, Any]) -> pd.DataFrame:
    rows = [
        {
            "panel": "metrics",
            "scope": row["scope"],
            "run": row["run"],
            "n": row["n"],
            "metric": metric,
            "value": row[metric]["estimate"],
            "low": row[metric]["low"],
            "high": row[metric]["high"],
        }
        for row in record["rows"]
        for metric in METRICS
    ]
    return pd.DataFrame(rows)


def _reliability_table(record: dict[str, Any], results: Path) -> pd.DataFrame:
    """Majority accuracy in-domain at each possible confidence: one bin per number of votes."""
    frames = []
    for run, folder in record["folders"].items():
        rows = pd.read_parquet(_evaluation(Path(folder), results))
        rows = rows[rows["domain"].isin(record["domains"]["in-domain"])]
        rows = rows.assign(
            confidence=rows["votes"] / rows["k"], right=rows["n_tied_right"] / rows["n_tied"].clip(lower=1)
        )
        binned = rows.groupby("confidence")["right"].agg(value="mean", n="size").reset_index()
        frames.append(binned.assign(panel="reliability", scope="in-domain", run=run, metric="maj_accuracy"))
    return pd.concat(frames)


def _evaluation(folder: Path, results: Path) -> Path:
    """The results of the evaluation that the report names, or of ``eval/NAME`` if the results folder was moved.

    Raises:
        UserError: There is no finished evaluation in either place.
    """
    for place in (folder, results / "eval" / folder.name):
        if (place / "results.parquet").is_file():
            return place / "results.parquet"
    raise UserError(f"{folder}: no finished evaluation; run `python -m distill.evaluate --out {folder}` first")


def _draw_metrics(axis: Axes, table: pd.DataFrame, k: int) -> None:
    runs = list(dict.fromkeys(table["run"]))
    for offset, run in enumerate(runs):
        label, colour, marker = RUNS[run]
        rows = table[table["run"] == run].set_index("metric").loc[list(METRICS)]
        x = [position + 0.22 * (offset - (len(runs) - 1) / 2) for position in range(len(METRICS))]
        error = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        axis.errorbar(x, rows["value"], yerr=error, fmt=marker, color=colour, label=label, capsize=2.5, markersize=5.5)
    axis.set_xticks(range(len(METRICS)), [title.format(k=k) for title in METRICS.values()])
    axis.set_xlim(-0.5, len(METRICS) - 0.5)
    axis.grid(axis="x", visible=False)


def _draw_reliability(axis: Axes, table: pd.DataFrame) -> None:
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    for run in dict.fromkeys(table["run"]):
        _, colour, marker = RUNS[run]
        bins = table[table["run"] == run]
        axis.plot(bins["confidence"], bins["value"], color=colour, linewidth=1, alpha=0.7)
        axis.scatter(bins["confidence"], bins["value"], s=6 + 2.2 * bins["n"], color=colour, marker=marker, alpha=0.85)
    axis.set(
        xlim=(0, 1.03),
        ylim=(-0.03, 1.03),
        xlabel="confidence (majority's share of the votes)",
        ylabel="majority is right",
    )
    axis.set_title("reliability, in-domain")
    axis.text(0.03, 0.95, "marker area: questions", fontsize=7.5, color=Colour.NOTE, transform=axis.transAxes)
