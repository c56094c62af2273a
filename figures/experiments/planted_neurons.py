"""Precision and recall of the neurons that the probe locates, on planted neurons.

Draws ``figures/data/planted_neurons.csv``, which ``python -m figures.experiments.planted_neurons`` recomputes (about
three minutes on one core): synthetic contributions of 46,080 neurons as sparse as real ones
(`neurosig.hallucination.planted`), in which 20 neurons depend on the label. Located are the stable neurons
(`neurosig.hallucination.stability`); every neuron with a weight in one L1 fit is drawn for comparison. With labels
shuffled over the questions, every located neuron is false. Bars are 95% t intervals over data sets.

Strong effects cost some precision: a neuron that shares the topics of a planted one helps the probe to read it, and is
located too, although the label does not act on it. The bound is about neurons that predict nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from figures.sources import DATA
from figures.style import Colour, save_figure, subplots
from neurosig.runtime.cli import CommonConfig, progress, run_command
from neurosig.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neurosig.hallucination.planted import PlantedData

NAME = "planted_neurons"
NEEDS = None
TABLE = DATA / f"{NAME}.csv"
EFFECTS = (0.25, 0.5, 1.0, 1.5)
QUESTIONS = (50, 100, 200, 400)
GENERATIONS, PLANTED, DATASETS, SHUFFLED_DATASETS, PAIRS = 4, 20, 4, 16, 25
COLOURS = {50: Colour.CONTROL, 100: Colour.VARIANT, 200: Colour.GREEN, 400: Colour.OURS}
MARKERS = {50: "o", 100: "s", 200: "^", 400: "D"}


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure into ``out``; it needs no results."""
    table = pd.read_csv(TABLE)
    figure, axes = subplots(1, 3, size=(9.6, 3.6), width_ratios=[1, 1, 0.9])
    planted = table[table["data"] == "planted"]
    _draw_curves(axes[0], planted, "recall")
    axes[0].set(ylabel=f"share of the {PLANTED} planted neurons found")
    axes[0].set_title(f"recall, {DATASETS} data sets")
    _draw_curves(axes[1], planted, "precision")
    axes[1].set(ylabel="share of the located neurons planted")
    axes[1].set_title(f"precision, {DATASETS} data sets")
    _draw_shuffled(axes[2], table[table["data"] == "shuffled"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return save_figure(figure, out, NAME, TABLE.read_text())


def compute(*, quiet: bool = False) -> pd.DataFrame:
    """One row per data set and number of questions: how many neurons were located, and how many of them are planted."""
    from neurosig.hallucination.planted import PlantedConfig, plant

    rows = []
    jobs = [(effect, seed) for effect in EFFECTS for seed in range(DATASETS)]
    for effect, seed in progress(jobs, desc="planted", quiet=quiet):
        data = plant(PlantedConfig(QUESTIONS[-1], GENERATIONS, PLANTED, effect, seed=seed))
        rows += [{"data": "planted", "effect": effect, "seed": seed, **_locate(data, n)} for n in QUESTIONS]
    for seed in progress(range(SHUFFLED_DATASETS), desc="shuffled", quiet=quiet):
        data = plant(PlantedConfig(QUESTIONS[-1], GENERATIONS, PLANTED, 1.0, seed=1000 + seed))
        rows += [
            {"data": "shuffled", "effect": 0.0, "seed": 1000 + seed, **_locate(data, n, shuffle=seed)}
            for n in QUESTIONS
        ]
    return pd.DataFrame(rows)


def _locate(data: PlantedData, n_questions: int, shuffle: int | None = None) -> dict[str, Any]:
    """Counts for the first ``n_questions`` questions; ``shuffle`` is a seed that shuffles their labels."""
    from neurosig.hallucination.config import ProbeConfig
    from neurosig.hallucination.lasso import design, fit_l1
    from neurosig.hallucination.locate import stable_neurons

    config = ProbeConfig(pairs=PAIRS)
    questions = np.repeat(np.arange(n_questions), GENERATIONS)
    labels = data.labels[: len(questions)]
    planted = data.planted
    if shuffle is not None:
        labels = np.random.default_rng(shuffle).permutation(labels[::GENERATIONS])[questions]
        planted = planted[:0]
    prepared = design(data.contributions()[: len(questions)], config.min_active_share)
    stability = stable_neurons(prepared.matrix, labels, questions, config)
    stable = prepared.columns[stability.stable]
    weighted = prepared.columns[fit_l1(prepared.matrix, labels, config.inverse_penalty or 0.1, 0).coef_[0] != 0]
    return {
        "questions": n_questions,
        "candidates": len(prepared.columns),
        "stable": len(stable),
        "stable_planted": int(np.isin(stable, planted).sum()),
        "expected_false": round(stability.expected_false, 4),
        "weighted": len(weighted),
        "weighted_planted": int(np.isin(weighted, planted).sum()),
    }


def _draw_curves(axis: Axes, table: pd.DataFrame, measure: str) -> None:
    for series, n in enumerate(QUESTIONS):
        for located in ("stable", "weighted"):
            points = []
            for effect in EFFECTS:
                cell = table[(table["questions"] == n) & (table["effect"] == effect)]
                hits, n_located = cell[f"{located}_planted"], cell[located]
                share = hits / PLANTED if measure == "recall" else (hits / n_located)[n_located > 0]
                points.append(_interval(share.to_numpy(np.float64)))
            mean, low, high = (np.array(column) for column in zip(*points, strict=True))
            x = np.arange(len(EFFECTS)) + 0.09 * (series - (len(QUESTIONS) - 1) / 2)
            if located == "weighted":
                axis.plot(x, mean, ":", color=COLOURS[n], linewidth=1.1)
            else:
                axis.errorbar(
                    x,
                    mean,
                    [mean - low.clip(0), high.clip(max=1) - mean],
                    fmt=f"{MARKERS[n]}-",
                    color=COLOURS[n],
                    label=f"{n} questions",
                    capsize=2,
                    markersize=4.5,
                    linewidth=1.2,
                )
    axis.plot([], [], ":", color="black", linewidth=1.1, label="every neuron with a weight in one L1 fit")
    axis.set_xticks(range(len(EFFECTS)), [f"{effect:g}" for effect in EFFECTS])
    axis.set(xlabel="effect (Cohen's d)", ylim=(-0.03, 1.05))
    axis.grid(axis="x", visible=False)


def _draw_shuffled(axis: Axes, table: pd.DataFrame) -> None:
    for x, n in enumerate(QUESTIONS):
        cell = table[table["questions"] == n]
        mean, low, high = _interval(cell["stable"].to_numpy(np.float64))
        error = [[mean - max(low, 0.0)], [high - mean]]
        axis.errorbar([x], [mean], error, fmt=MARKERS[n], color=COLOURS[n], capsize=2, markersize=4.5)
        axis.plot([x - 0.35, x + 0.35], [cell["expected_false"].mean()] * 2, color="black", linewidth=1.2)
    axis.text(len(QUESTIONS) - 0.65, 1.03, "stated bound", ha="right", va="bottom", fontsize=8)
    axis.set_xticks(range(len(QUESTIONS)), [str(n) for n in QUESTIONS])
    axis.set(xlim=(-0.5, len(QUESTIONS) - 0.5), ylim=(-0.04, 1.4), xlabel="questions")
    axis.set(ylabel="false discoveries per data set")
    axis.set_title(f"labels shuffled, {SHUFFLED_DATASETS} data sets")
    axis.grid(axis="x", visible=False)


def _interval(values: Float[np.ndarray, " sets"]) -> tuple[float, float, float]:
    """Mean over data sets and its 95% t interval; NaN if there is no value."""
    if len(values) < 2:
        return (float(values.mean()) if len(values) else np.nan), np.nan, np.nan
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


@dataclass(kw_only=True)
class PlantedNeuronsConfig(CommonConfig):
    """Recompute the data of the figure."""

    out: Path = TABLE
    """CSV file to write."""


def main(config: PlantedNeuronsConfig) -> None:
    """Compute and write the table."""
    write_atomic(config.out, compute(quiet=config.quiet).to_csv(index=False))


if __name__ == "__main__":
    sys.exit(run_command(PlantedNeuronsConfig, main, presets={}, prog="python -m figures.experiments.planted_neurons"))
