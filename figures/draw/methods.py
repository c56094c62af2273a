"""Changes of every method against the untrained model and its temperature control, in and across domains.

Reads the results folder's ``grid.parquet`` (`figures.grid.rows`), or the committed one; writes
``methods.pdf``, ``.png`` and the plotted numbers as ``methods.csv``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from figures.grid.config import BASE, CONTROL, METHOD_LABELS, method_label
from figures.grid.coverage import evaluation_text
from figures.grid.evidence import grid_folder
from figures.grid.rows import Grid, grid_results, read_grid
from figures.grid.tables import LEVEL, SCOPES, Results
from figures.style import METHODS, Colour, caption, save_figure, subplots
from neurosig.statistics.resampling import percentile_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "methods"
NEEDS = None
RESAMPLES, SEED = 2000, 0


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``.

    Raises:
        UserError: The grid's file cannot be used (`figures.grid.rows.read_grid`).
    """
    grid = read_grid(grid_folder(results))
    tables = grid_results(grid, resamples=RESAMPLES, seed=SEED)
    table = changes(tables)
    names = [name for name in METHOD_LABELS if name in set(table["method"])]
    figure, axes = subplots(1, len(tables), size=(11, 1.5 + 0.36 * len(names)), sharey=True)
    for axis, (name, result) in zip(axes, tables.items(), strict=True):
        _draw_panel(axis, table[table["metric"] == name], names)
        axis.set_title(result.metric.title.replace(" (per cent)", ""))
        better = "" if result.metric.higher_is_better else ", lower is better"
        axis.set_xlabel(f"change against base{', points' if result.metric.scale == 100 else better}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    caption(figure, _caption(grid, table, tables["ece"].sources_text))
    return save_figure(figure, out, NAME, table.to_csv(index=False, float_format="%.6g"))


def changes(results: Mapping[str, Results]) -> pd.DataFrame:
    """Mean change of every method against base over the grid's sources: one row per metric, method and scope.

    Columns ``metric``, ``method``, ``scope`` ("in", "cross"), ``seeds``, ``value``, ``delta``, ``low``, ``high``.
    Methods that lack a source are left out.
    """
    rows = []
    for name, result in results.items():
        for method in (*result.untrained, *result.trained):
            seeds = 0 if method in result.untrained else result.seeds.get(method)
            for scope in SCOPES:
                value = result.mean(method, scope)
                change = value - result.mean(BASE, scope)
                if method != BASE and not np.isnan(change[0]):
                    ends = percentile_ends(change[1:], LEVEL)
                    rows.append((name, method, scope, seeds, value[0], change[0], *ends))
    return pd.DataFrame(rows, columns=["metric", "method", "scope", "seeds", "value", "delta", "low", "high"])


def _draw_panel(axis: Axes, table: pd.DataFrame, names: Sequence[str]) -> None:
    control = table[(table["method"] == CONTROL) & (table["scope"] == "in")]
    axis.axvline(0, color="black", linewidth=0.8)
    for _, row in control.iterrows():
        axis.axvspan(row["low"], row["high"], color=Colour.CONTROL, alpha=0.13, linewidth=0)
        axis.axvline(row["delta"], color=Colour.CONTROL, linewidth=1, linestyle="--")
    for y, name in enumerate(names):
        colour, marker = METHODS[name]
        for shift, scope in ((-0.15, "in"), (0.15, "cross")):
            for _, row in table[(table["method"] == name) & (table["scope"] == scope)].iterrows():
                if name == CONTROL and scope == "cross":
                    continue
                axis.hlines(y + shift, row["low"], row["high"], color=colour, linewidth=1.4)
                face = colour if scope == "in" else "white"
                axis.scatter(row["delta"], y + shift, color=face, edgecolors=colour, marker=marker, s=26, zorder=3)
    axis.scatter([], [], color="black", s=26, label="in-domain")
    axis.scatter([], [], color="white", edgecolors="black", s=26, label="cross-domain")
    axis.plot([], [], color=Colour.CONTROL, linewidth=1, linestyle="--", label="control")
    axis.set_yticks(range(len(names)), [METHOD_LABELS[name] for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def _caption(grid: Grid, table: pd.DataFrame, sources: str) -> str:
    n = ", ".join(f"{len(ids)} {domain}" for domain, ids in grid.ids.items())
    trained = table[table["seeds"] > 1].drop_duplicates("method")
    several = "".join(
        f"{int(row['seeds'])} for {method_label(row['method']).partition(' (')[0]}; " for _, row in trained.iterrows()
    )
    return (
        f"Means of models trained on {sources}; n = {n} test questions, K={grid.k}; 95% paired bootstrap "
        f"intervals over questions and seeds ({RESAMPLES:,} draws, seed {SEED}).\n"
        f"Training seeds: {several}1 for {'the others' if several else 'all'}; {evaluation_text(grid.evaluations)}. "
        "Band: the untrained base at the temperature that development questions prefer."
    )
