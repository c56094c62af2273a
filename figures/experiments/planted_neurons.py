"""Precision and recall of the neurons that the probe locates, on planted neurons, and where they fail.

Draws ``figures/data/planted_neurons.csv``, which ``python -m figures.experiments.planted_neurons`` recomputes (about
five minutes on one core): synthetic contributions of 46,080 neurons as sparse as real ones
(`neurosig.hallucination.planted`), in which 20 neurons depend on the label. Located are the stable neurons
(`neurosig.hallucination.stability`); every neuron with a weight in one L1 fit is drawn for comparison. With labels
shuffled over the questions, every located neuron is false. Bars are 95% t intervals over data sets.

Strong effects cost some precision: a neuron that shares the topics of a planted one helps the probe to read it, and is
located too, although the label does not act on it. The bound is about neurons that predict nothing.

Below, each planted neuron has a decoy in its layer (`neurosig.hallucination.planted`): one that correlates with it, one
that follows the length on which the label depends too, or one that marks hard kinds of question. Stable neurons are
shown as they are, if their sign agrees in every kind, if they stay stable whichever kind is left out, and if both hold
(`neurosig.hallucination.kinds`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
DECOY_QUESTIONS, DECOY_PLANTED, DECOY_EFFECT, KINDS = 240, 10, 0.5, 4
MARKERS_OF_KINDS = {"decoy": "kind", "n_decoys": 2, "decoy_effect": 3.0}
SCENARIOS: dict[str, dict[str, Any]] = {
    "no decoys": {},
    "correlated": {"decoy": "correlated"},
    "length": {"decoy": "length", "n_decoys": 2},
    "one hard kind": {**MARKERS_OF_KINDS, "hard_kinds": 1},
    "half hard kinds": {**MARKERS_OF_KINDS, "hard_kinds": KINDS // 2},
    "half, nearly decisive": {**MARKERS_OF_KINDS, "hard_kinds": KINDS // 2, "confounding": 0.9},
}
"""What the decoys follow; the label's propensity correlates .7 with it, .9 in the last."""
RULES = {
    "stable": ("stable over questions", Colour.BASELINE, "o"),
    "agreeing": ("and of one sign in every kind", Colour.CONTROL, "s"),
    "left_out": ("and stable with any kind left out", Colour.VARIANT, "^"),
    "both": ("and both", Colour.OURS, "D"),
}
"""Rule -> label, colour and marker."""
COLOURS = {50: Colour.CONTROL, 100: Colour.VARIANT, 200: Colour.GREEN, 400: Colour.OURS}
MARKERS = {50: "o", 100: "s", 200: "^", 400: "D"}


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure into ``out``; it needs no results."""
    table = pd.read_csv(TABLE)
    figure, (axes, below) = subplots(2, 3, size=(9.6, 7.2), width_ratios=[1, 1, 0.9])
    planted = table[table["data"] == "planted"]
    _draw_curves(axes[0], planted, "recall")
    axes[0].set(ylabel=f"share of the {PLANTED} planted neurons found")
    axes[0].set_title(f"recall, {DATASETS} data sets")
    _draw_curves(axes[1], planted, "precision")
    axes[1].set(ylabel="share of the located neurons planted")
    axes[1].set_title(f"precision, {DATASETS} data sets")
    _draw_shuffled(axes[2], table[table["data"] == "shuffled"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    decoys = table[table["data"].isin(list(SCENARIOS))]
    for axis, measure in zip(below, ("recall", "precision", "decoys"), strict=True):
        _draw_rules(axis, decoys, measure)
    handles, labels = below[0].get_legend_handles_labels()
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
    scenarios = [(name, seed) for name in SCENARIOS for seed in range(DATASETS)]
    for name, seed in progress(scenarios, desc="decoys", quiet=quiet):
        rows.append(
            {"data": name, "effect": DECOY_EFFECT, "seed": 2000 + seed, **_decoys(SCENARIOS[name], 2000 + seed)}
        )
    table = pd.DataFrame(rows)
    counts = table.select_dtypes("number").columns.difference(["effect", "expected_false"])
    return table.astype(dict.fromkeys(counts, "Int64"))


def _decoys(scenario: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """How many neurons each rule locates, how many of them are planted, and how many decoys."""
    from neurosig.hallucination.config import ProbeConfig
    from neurosig.hallucination.kinds import frequency_without_kind, marginal_signs, signs_by_kind
    from neurosig.hallucination.lasso import design
    from neurosig.hallucination.locate import stable_neurons
    from neurosig.hallucination.planted import PlantedConfig, plant

    config = ProbeConfig(pairs=PAIRS)
    data = plant(PlantedConfig(DECOY_QUESTIONS, GENERATIONS, DECOY_PLANTED, DECOY_EFFECT, KINDS, seed=seed, **scenario))
    questions = np.repeat(np.arange(DECOY_QUESTIONS), GENERATIONS)
    prepared = design(data.contributions(), config.min_active_share)
    stability = stable_neurons(prepared.matrix, data.labels, questions, config)
    stable = np.flatnonzero(stability.stable)
    matrix = prepared.matrix[:, stable]
    signs = marginal_signs(matrix, data.labels, questions)
    agreeing = signs_by_kind(matrix, signs, data.labels, questions, data.topics).survives
    frequency = frequency_without_kind(prepared.matrix, data.labels, questions, data.topics, config)
    left_out = (frequency[:, stable] >= config.stable_frequency).all(axis=0)
    kept = {
        "stable": np.ones(len(stable), dtype=bool),
        "agreeing": agreeing,
        "left_out": left_out,
        "both": agreeing & left_out,
    }
    counts: dict[str, Any] = {
        "questions": DECOY_QUESTIONS,
        "candidates": len(prepared.columns),
        "expected_false": round(stability.expected_false, 4),
    }
    for rule, mask in kept.items():
        found = prepared.columns[stable[mask]]
        counts |= {rule: len(found), f"{rule}_planted": int(np.isin(found, data.planted).sum())}
        counts |= {f"{rule}_decoys": int(np.isin(found, data.decoys).sum())}
    return counts


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


def _draw_rules(axis: Axes, table: pd.DataFrame, measure: str) -> None:
    """Recall, precision or the number of decoys of each rule, by what the decoys follow."""
    for series, (rule, (label, colour, marker)) in enumerate(RULES.items()):
        for x, name in enumerate(SCENARIOS):
            cell = table[table["data"] == name]
            located = cell[rule].to_numpy(np.float64)
            hits = cell[f"{rule}_planted"].to_numpy(np.float64)
            values = {
                "recall": hits / DECOY_PLANTED,
                "precision": (hits / np.maximum(located, 1))[located > 0],
                "decoys": cell[f"{rule}_decoys"].to_numpy(np.float64),
            }[measure]
            mean, low, high = _interval(values)
            top = np.inf if measure == "decoys" else 1.0
            error = np.nan_to_num([[mean - max(low, 0.0)], [min(high, top) - mean]])
            place = x + 0.17 * (series - (len(RULES) - 1) / 2)
            axis.errorbar(
                [place],
                [mean],
                error,
                fmt=marker,
                color=colour,
                label=label if x == 0 else None,
                capsize=2,
                markersize=4.5,
            )
    axis.set_xticks(range(len(SCENARIOS)), list(SCENARIOS), rotation=30, ha="right", fontsize=8)
    axis.set(xlim=(-0.5, len(SCENARIOS) - 0.5))
    if measure == "decoys":
        axis.set(ylabel="decoys located")
    else:
        axis.set(ylim=(-0.03, 1.05))
        axis.set(ylabel={"recall": "share of planted found", "precision": "share of located planted"}[measure])
    axis.set_title(f"{measure}, by decoy; {DECOY_QUESTIONS} questions")
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
