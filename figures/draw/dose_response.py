"""The effect of scaling the located neurons on the answers, compared with the controls.

Reads ``intervene/results.csv`` and ``results.json`` of a results folder (`neurosig.intervene`); writes
``dose_response.pdf``, ``.png`` and the plotted numbers as ``dose_response.csv``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from figures.style import Colour, caption, save_figure, subplots
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "dose_response"
NEEDS = Path("intervene/results.json")
GROUPS = {
    "located": ("located by the probe", Colour.OURS, "D", "-"),
    "activity": ("random, same layers and contribution", Colour.CONTROL, "s", "--"),
    "layer": ("random, same layers", Colour.BASELINE, "o", ":"),
    "strongest": ("largest contributors, same layers", Colour.BLACK, "^", "-."),
}
"""Group of neuron sets -> label, colour, marker and line."""
COMPARED = ("change", "change_low", "change_high", "difference", "difference_low", "difference_high")
"""Columns of the table beside what is drawn; those of the perplexity are in nats."""
PANELS = {
    "avg_at_k": "Avg@{k}",
    "no_answer": "no answer or a refusal",
    "nll": "perplexity of its own rollouts",
    "agreement": "majority's share of the votes",
}


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``.

    Raises:
        UserError: There is no finished run of neurosig.intervene.
    """
    folder = (results / NEEDS).parent
    if not (results / NEEDS).is_file():
        raise UserError(f"{folder}: no finished run; run `python -m neurosig.intervene --out {folder}` first")
    record = json.loads((folder / "results.json").read_text())
    table = _plotted(pd.read_csv(folder / "results.csv"))

    figure, axes = subplots(2, 2, size=(7, 5.4))
    for axis, (measure, title) in zip(axes.flat, PANELS.items(), strict=True):
        _draw_panel(axis, table[table["measure"] == measure], log=measure == "nll")
        axis.set_title(title.format(k=record["k"]))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    sizes = {entry["neurons"] for entry in record["sets"].values()}
    draws = int(table["draws"].max())
    caption(
        figure,
        f"factor on the values of {sizes.pop()} neurons; {int(table['n'].iloc[0])} questions, {record['k']} rollouts "
        f"each, random controls of {draws} draws, seed {record['config']['seed']};\nbars: 95% bootstrap interval of "
        "the change against x1, paired over questions, cut at 0",
    )
    return save_figure(figure, out, NAME, table.to_csv(index=False, float_format="%.6g"))


def _plotted(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the panels: the interval of the change is shifted to the value, nats become perplexities."""
    table = results[results["measure"].isin(list(PANELS))].copy()
    start = table["value"] - table["change"].fillna(0)
    table["low"] = start + table["change_low"].fillna(0)
    table["high"] = start + table["change_high"].fillna(0)
    nats = table["measure"] == "nll"
    table.loc[nats, ["value", "low", "high"]] = np.exp(table.loc[nats, ["value", "low", "high"]])
    table = table.reindex(columns=["measure", "group", "draws", "factor", "n", "value", "low", "high", *COMPARED])
    return table.dropna(axis=1, how="all")


def _draw_panel(axis: Axes, table: pd.DataFrame, *, log: bool) -> None:
    factors = sorted(set(table["factor"]))
    groups = [group for group in GROUPS if group in set(table["group"])]
    for place, group in enumerate(groups):
        label, colour, marker, line = GROUPS[group]
        rows = table[table["group"] == group].set_index("factor").loc[factors]
        x = np.arange(len(factors)) + 0.13 * (place - (len(groups) - 1) / 2)
        error = [rows["value"] - rows["low"].clip(lower=0), rows["high"] - rows["value"]]
        axis.errorbar(
            x, rows["value"], yerr=error, fmt=marker, linestyle=line, color=colour, label=label, capsize=2,
            markersize=4.5, linewidth=1.1,
        )  # fmt: skip
    if 1 in factors:
        axis.axhline(float(table[table["factor"] == 1]["value"].iloc[0]), color=Colour.ZERO, linewidth=0.8, zorder=0)
    if log:
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        top = axis.get_ylim()[1]
        axis.set_ylim(-0.03 * top, 1.03 * top)  # markers at 0 and at the top are not cut
    axis.set_xticks(range(len(factors)), [f"x{factor:g}" for factor in factors])
    axis.grid(axis="x", visible=False)
