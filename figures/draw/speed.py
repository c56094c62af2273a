"""Speed compared with other implementations: tracing, a training step, and nearest neighbours of active sets.

Draws ``figures/data/speed.csv``: what ``make bench`` printed on two idle CPU cores, copied by hand (README, Speed);
writes ``speed.pdf``, ``.png`` and the numbers as ``speed.csv``. ``ratio`` is the printed one: against a
plain forward pass for tracing, against neurosig for a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from figures.sources import DATA
from figures.style import Colour, caption, save_figure, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "speed"
NEEDS = None
TABLE = DATA / f"{NAME}.csv"
LINES = ((Colour.OURS, "D", "-"), (Colour.VARIANT, "s", "--"), (Colour.BASELINE, "o", ":"))


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure into ``out``; it needs no results."""
    table = pd.read_csv(TABLE)
    use_style()
    figure = Figure(figsize=(7, 4.9))
    axes = figure.subplot_mosaic([["tracing", "training"], ["neighbours", "training"]])
    tracing = table[table["panel"] == "tracing"]
    _draw_bars(axes["tracing"], tracing, "")
    axes["tracing"].set_title("tracing")
    training = table[table["panel"] == "training"]
    _draw_bars(axes["training"], training, "setting")
    axes["training"].set_title("one training step")
    _draw_neighbours(axes["neighbours"], table[table["panel"] == "neighbours"])
    caption(
        figure,
        "SmolLM2-135M in float32 on 2 CPU cores; tracing 32 rollouts x 192 tokens, ratios to the plain forward pass; "
        "LoRA steps\nof 64 tokens per rollout, the better of two, ratios to neurosig; synthetic sets, seed 0 (usearch "
        "finds 98.9% or more\nof the nearest); single timings, so no intervals",
    )
    return save_figure(figure, out, NAME, TABLE.read_text())


def _draw_bars(axis: Axes, table: pd.DataFrame, by: str) -> None:
    """One bar per implementation, in groups, with its ratio."""
    groups = table.groupby(by, sort=False) if by else [("", table)]
    ticks: list[tuple[float, str]] = []
    place = 0.0
    for name, rows in groups:
        if name:
            axis.text(0.3, place, str(name), fontsize=8, fontweight="bold", va="center")
            place += 0.9
        for row in rows.to_dict("records"):
            style: dict[str, Any] = (
                {"color": Colour.OURS}
                if row["ours"]
                else {"color": Colour.BACKGROUND, "hatch": "///", "edgecolor": "white"}
            )
            axis.barh(place, row["seconds"], height=0.72, linewidth=0, **style)
            axis.text(row["seconds"], place, f" {row['ratio']:.2f}x", va="center", fontsize=8)
            ticks.append((place, row["name"]))
            place += 1
        place += 0.4
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axis.set_ylim(place - 0.8, -0.6)
    axis.set_xlim(0, 1.22 * float(table["seconds"].max()))
    axis.set_xlabel("seconds")
    axis.grid(axis="y", visible=False)


def _draw_neighbours(axis: Axes, table: pd.DataFrame) -> None:
    for (name, rows), (colour, marker, line) in zip(table.groupby("name", sort=False), LINES, strict=True):
        sizes = rows["setting"].astype(int).tolist()
        axis.plot(sizes, rows["seconds"], line, marker=marker, color=colour, markersize=5)
        axis.annotate(
            str(name),
            (sizes[-1], rows["seconds"].iloc[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
    axis.set(xscale="log", yscale="log", xlabel="sets of 1,020 neurons", ylabel="seconds")
    sizes = sorted(set(table["setting"].astype(int).tolist()))
    axis.set_xticks(sizes, [f"{size // 1000}k" for size in sizes])
    axis.set_xticks([], minor=True)
    axis.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axis.set(xlim=(800, 130_000), ylim=(0.08, 300))
    axis.set_title("10 nearest of each set")
