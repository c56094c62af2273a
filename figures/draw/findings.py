"""The stated tests on a grid of runs: which findings hold, are contradicted, or stay open.

The tests are those of ``figures/data/evidence_plan.toml``, each under the strict and the lenient grading of the
answers: its p is the larger of both, and it is open where they differ in sign. A test that is not in the copy of this
file that the grid kept when it was started is labelled post hoc; one of methods that were not run is left out and
named. The data is ``grid.parquet``, ``results.csv`` and ``signals.csv`` (`figures.grid.evidence`) of the results
folder, or of ``figures/data/grid``. Writes ``findings.pdf``, ``.png``, ``.csv`` and the same as a Markdown table.
"""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from figures.experiments.loglikelihood import table_text
from figures.grid.collect import RESULTS
from figures.grid.config import BASE, CONTROL, METHODS, PLAN
from figures.grid.coverage import coverage_text, evaluation_text
from figures.grid.evidence import SIGNALS, grid_folder
from figures.grid.rows import FILES, grid_results, read_grid
from figures.grid.tables import Results
from figures.style import Colour, caption_lines, save_figure, subplots
from figures.style import caption as write_caption
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.statistics.auroc import auroc_draws
from neurosig.statistics.metrics import format_interval
from neurosig.statistics.resampling import percentile_ends, question_counts
from neurosig.statistics.significance import bootstrap_p, holm
from neurosig.statistics.vote_table import GRADINGS, Grading, graded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "findings"
NEEDS = None
RESAMPLES, SEED = 2000, 0
POST_HOC = (
    " Post hoc: not stated when this grid was started. As planned: corrected over the tests that were primary then."
)
ESTIMATE = ("estimate", "low", "high")
RIGHT, GAIN = "right", "avg_at_k"
VERDICTS = {"holds": (Colour.OURS, "D"), "open": (Colour.BASELINE, "o"), "contradicted": (Colour.CONTRADICTED, "X")}
"""Verdict -> colour and marker."""
UNITS = {
    "auroc": "AUROC",
    "slope": "gain in points of Avg@8 for each nat of gap",
    "avg_at_k": "points",
    "maj_at_k": "points",
    "ece": "ECE",
}


@dataclass(frozen=True)
class Evidence:
    """The data of the tests.

    Attributes:
        results: Metric, with its grading (`graded`) -> its values by method.
        cells: Aggregates of the cells, one row per cell, target and evaluation seed.
        signals: Scores of the training questions.
        coverage: How often such intervals hold the truth, measured (`figures.grid.coverage.coverage_text`).
        planned: The tests that were stated when the grid was started; empty where it kept no copy of them.
    """

    results: Mapping[str, Results]
    cells: pd.DataFrame
    signals: pd.DataFrame
    coverage: str = ""
    planned: Sequence[Mapping[str, Any]] = ()


def draw(results: Path, out: Path) -> list[Path]:
    """Compute the tests on ``results``, write and draw them into ``out``.

    Raises:
        UserError: A file is missing, or a test names an unknown method.
    """
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    evidence = read_evidence(grid_folder(results))
    table = tests(plan, evidence)
    text = caption(plan, evidence, table)
    figure = _draw(table, plan["findings"], text)
    paths = save_figure(figure, out, NAME, table.to_csv(index=False, float_format="%.6g"))
    page = markdown(table, plan["findings"], text)
    if unparsed := table_text(grid_folder(results)):
        page += f"\n## Without a parser\n\n{unparsed}"
    write_atomic(out / f"{NAME}.md", page)
    return [*paths, out / f"{NAME}.md"]


def read_evidence(folder: Path) -> Evidence:
    """Read a folder of `figures.grid.evidence`.

    Raises:
        UserError: A file is missing.
    """
    for name in (FILES[0], RESULTS, SIGNALS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; run python -m figures.grid.evidence --grid GRID --out {folder}")
    grid = read_grid(folder)
    results = {
        graded(name, grading): result
        for grading in grid.gradings
        for name, result in grid_results(read_grid(folder, grading), resamples=RESAMPLES, seed=SEED).items()
    }
    kept = folder / PLAN.name
    planned = tomllib.loads(kept.read_text(encoding="utf-8"))["tests"] if kept.is_file() else []
    return Evidence(results, pd.read_csv(folder / RESULTS), pd.read_csv(folder / SIGNALS), coverage_text(grid), planned)


def tests(plan: Mapping[str, Any], evidence: Evidence) -> pd.DataFrame:
    """Every test of the plan with its estimates, 95% intervals, p, p after Holm's correction, and its verdict.

    ``estimate``, ``low`` and ``high`` are strict, those with ``_lenient`` are lenient and empty where the evidence has
    no such grades; ``p`` is the larger of both gradings'. ``planned`` is whether the same comparison was stated when
    the grid was started, whatever its id and wording; ``p_as_planned`` its p corrected over the tests that were primary
    then. Tests of `missing` methods are left out.

    Raises:
        UserError: A test names an unknown method.
    """
    rows: list[dict[str, Any]] = []
    stated = [_compared(test) for test in evidence.planned]
    as_planned = _as_planned(evidence)
    for test in plan["tests"]:
        if missing(test, evidence):
            continue
        draws = _draws(test, evidence)
        row = {
            "id": test["id"],
            "finding": test.get("finding", 0),
            "test": test["text"],
            "unit": UNITS[test.get("metric", test["kind"])],
            "claim": test["claim"],
            "margin": test.get("margin", 0.0),
        }
        for grading in GRADINGS:
            values = draws.get(grading, np.full(2, np.nan))
            ends = (values[0], *percentile_ends(values[1:]))
            row |= {graded(name, grading): end for name, end in zip(ESTIMATE, ends, strict=True)}
        compared = _compared(test)
        row |= {"p": _p(test, draws), "primary": test["primary"], "planned": compared in stated}
        rows.append(row | {"p_as_planned": as_planned.get(compared, np.nan)})
    primary = [row for row in rows if row["primary"]]
    for row, corrected in zip(primary, holm([row["p"] for row in primary]), strict=True):
        row["p_holm"] = corrected
    return pd.DataFrame([row | {"verdict": _verdict(row, plan["threshold"])} for row in rows])


def missing(test: Mapping[str, Any], evidence: Evidence) -> list[str]:
    """Methods of a test that were not run on every source of the grid.

    Raises:
        UserError: A name is no method.
    """
    results, names = evidence.results["avg_at_k"], [] if test["kind"] == "auroc" else [*test["a"], *test.get("b", ())]
    for name in names:
        if name not in (BASE, CONTROL, *METHODS):
            raise UserError(f"test {test['id']}: no method {name}; have {', '.join((BASE, CONTROL, *METHODS))}")
    ran = {name for name in results.trained if not np.isnan(results.mean(name, "in")[0])}
    return [name for name in names if name not in ran and name not in results.untrained]


def markdown(table: pd.DataFrame, findings: Mapping[str, str], caption: str) -> str:
    """The tests as a Markdown table, one row per test, and what its numbers rest on."""
    lines = ["| | test | strict [95%] | lenient [95%] | unit | p (Holm) | verdict |", "|---|---|---|---|---|---|---|"]
    for row in table.to_dict("records"):
        p = f"{row['p_holm']:.3f}" if row["primary"] else f"{row['p']:.3f} (uncorrected)"
        if not table["planned"].all() and row["p_as_planned"] == row["p_as_planned"]:
            p += f"; {row['p_as_planned']:.3f} as planned"
        values = [[row[graded(name, grading)] for name in ESTIMATE] for grading in GRADINGS]
        texts = [
            "" if np.isnan(value[0]) else format_interval(value[0], value[1], value[2], "+.3g") for value in values
        ]
        lines.append(f"| {' | '.join([row['id'], _named(row), *texts, row['unit'], p, row['verdict']])} |")
    return "\n".join(["# The findings at this scale", "", *_claims(findings), "", *lines, "", caption]) + "\n"


def _compared(test: Mapping[str, Any]) -> str:
    """What makes a test the same one as another: the comparison and its claim."""
    return repr([test.get(name) for name in ("kind", "metric", "scope", "a", "b", "claim", "margin")])


def _p(test: Mapping[str, Any], draws: Mapping[Grading, Float[np.ndarray, " draws"]]) -> float:
    """The larger of the gradings' p."""
    return max(bootstrap_p(values[1:] - test.get("margin", 0.0)) for values in draws.values())


def _as_planned(evidence: Evidence) -> dict[str, float]:
    """p of the tests that were primary when the grid was started, corrected over these alone."""
    primary = [test for test in evidence.planned if test["primary"] and not missing(test, evidence)]
    corrected = holm([_p(test, _draws(test, evidence)) for test in primary])
    return {_compared(test): p for test, p in zip(primary, corrected, strict=True)}


def _named(row: Mapping[Any, Any]) -> str:
    return str(row["test"]) if row["planned"] else f"{row['test']} (post hoc)"


def _draws(test: Mapping[str, Any], evidence: Evidence) -> dict[Grading, Float[np.ndarray, " draws"]]:
    """Draws of a test under each grading that the evidence has; the first is the observed value."""
    make = {"difference": _difference, "auroc": _auroc, "slope": _slope}[test["kind"]]
    name, known = {
        "difference": (test.get("metric", ""), evidence.results),
        "auroc": (RIGHT, evidence.signals),
        "slope": (GAIN, evidence.cells),
    }[test["kind"]]
    return {grading: make(test, evidence, grading) for grading in GRADINGS if graded(name, grading) in known}


def _difference(test: Mapping[str, Any], evidence: Evidence, grading: Grading) -> Float[np.ndarray, " draws"]:
    results = evidence.results[graded(test["metric"], grading)]
    a, b = (np.mean([results.mean(method, test["scope"]) for method in test[side]], axis=0) for side in ("a", "b"))
    return np.asarray(a - b)


def _auroc(test: Mapping[str, Any], evidence: Evidence, grading: Grading) -> Float[np.ndarray, " draws"]:
    """Mean over the sources; the same draws of questions for both signals."""
    by_source = []
    for index, (_, rows) in enumerate(evidence.signals.groupby("source", sort=False)):
        right, owners = rows[graded(RIGHT, grading)].to_numpy(dtype=bool), np.arange(len(rows))
        counts = np.concatenate(
            [np.ones((1, len(rows)), dtype=np.int64), *question_counts(len(rows), RESAMPLES, seed=[SEED, index])]
        )
        a, b = (
            [auroc_draws(rows[name].to_numpy(dtype=np.float64), right, owners, counts) for name in test.get(side, ())]
            for side in ("a", "b")
        )
        by_source.append(np.mean(a, axis=0) - (np.mean(b, axis=0) if b else 0.5))
    return np.asarray(np.mean(by_source, axis=0))


def gap_and_gain(test: Mapping[str, Any], evidence: Evidence, grading: Grading = "strict") -> pd.DataFrame:
    """One row per cell of the lowest seed: ``method``, ``source``, ``gap`` in nats, ``gain`` in points."""
    run, name = ["method", "source", "target", "seed"], graded(GAIN, grading)  # a cell's evaluation seeds are one point
    every = evidence.cells.groupby(run, dropna=False)[[name, "first_entropy_gap"]].mean().reset_index()
    cells = every[every["source"] == every["target"]].set_index(["method", "source"])
    base = every[every["method"] == BASE].set_index("target")[name]
    rows = []
    for method in test["a"]:
        runs = cells.loc[[method]]
        for (_, source), row in runs[runs["seed"] == runs["seed"].min()].iterrows():
            gain = 100 * (row[name] - base[source])
            rows.append({"method": method, "source": source, "gap": row["first_entropy_gap"], "gain": gain})
    return pd.DataFrame(rows)


def _slope(test: Mapping[str, Any], evidence: Evidence, grading: Grading) -> Float[np.ndarray, " draws"]:
    """The least-squares slope, refitted on resampled cells."""
    points = gap_and_gain(test, evidence, grading)
    n = len(points)
    drawn = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    chosen = np.concatenate([np.arange(n)[None], drawn])
    x, y = points["gap"].to_numpy()[chosen], points["gain"].to_numpy()[chosen]
    x = x - x.mean(axis=1, keepdims=True)
    return np.asarray((x * y).sum(axis=1) / (x * x).sum(axis=1))


def _verdict(row: Mapping[str, Any], threshold: float) -> str:
    p = row.get("p_holm", row["p"])
    values = [row[graded(ESTIMATE[0], grading)] for grading in GRADINGS]
    above = {value > row["margin"] for value in values if not np.isnan(value)}
    if p >= threshold or len(above) > 1:  # the gradings differ in sign
        return "open"
    return "holds" if above == {row["claim"] == "greater"} else "contradicted"


def _claims(findings: Mapping[str, str]) -> list[str]:
    return [f"{number}. {text}" for number, text in findings.items()]


def caption(plan: Mapping[str, Any], evidence: Evidence, table: pd.DataFrame) -> str:
    """What the numbers of `tests` rest on, and which tests of the plan are not among them."""
    results = evidence.results["ece"]
    seeds = ", ".join(f"{method} {count}" for method, count in results.seeds.items() if count > 1)
    graded_by = f"Filled: strict grading; hollow: lenient; p is the larger of both.{_ungraded(table)}"
    trained = f"Training seeds: {seeds + ', others 1' if seeds else '1'}; {evaluation_text(results.evaluations)}."
    return (
        f"n = {sum(results.questions or ())} test questions in {len(results.layout.domains)} domains, "
        f"trained on {results.sources_text} (2 to 4), {len(evidence.signals)} training questions (1). {trained}\n"
        f"95% bootstrap intervals over questions and training seeds ({RESAMPLES:,} draws, seed {SEED}), for 4 over "
        f"cells. {evidence.coverage}\n"
        f"Verdicts at p < .05 after Holm's correction over the {int(table['primary'].sum())} tests of findings 1 to 4. "
        "Dotted: the margin stated beforehand." + ("" if table["planned"].all() else POST_HOC) + "\n"
        f"{graded_by}{_left_out(plan, evidence)}"
    )


def _ungraded(table: pd.DataFrame) -> str:
    """Which tests have no lenient grades."""
    ids = table["id"][table[graded(ESTIMATE[0], "lenient")].isna()]
    which = "" if ids.empty else "this grid" if len(ids) == len(table) else ", ".join(ids)
    return f" Graded strictly alone: {which}." if which else ""


def _left_out(plan: Mapping[str, Any], evidence: Evidence) -> str:
    """Which tests of the plan are left out, and the methods that were not run."""
    ids: dict[tuple[str, ...], list[str]] = {}
    for test in plan["tests"]:
        ids.setdefault(tuple(sorted(missing(test, evidence))), []).append(test["id"])
    lacking = [f"{', '.join(tests)} ({', '.join(methods)})" for methods, tests in ids.items() if methods]
    return f" Left out, with the methods that this grid lacks: {'; '.join(lacking)}." if lacking else ""


def _draw(table: pd.DataFrame, findings: Mapping[str, str], note: str) -> Figure:
    """One panel per finding, one line per test."""
    panels: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _, row in table.iterrows():
        panels.setdefault((row["finding"], row["unit"]), []).append(dict(row))
    heights = [len(rows) + 1.6 for rows in panels.values()]
    size = (9.5, 0.36 * sum(heights) + 0.15 * len(caption_lines(note, 9.5)))
    figure, axes = subplots(len(panels), 1, size=size, height_ratios=heights, squeeze=False)
    for axis, ((finding, unit), rows) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_panel(axis, rows)
        text = findings.get(str(finding), "Secondary tests (not corrected)")
        axis.set_title("\n".join(textwrap.wrap(f"{finding}. {text}" if finding else text, 100)), loc="left", x=-0.74)
        axis.set_xlabel(unit, fontsize=8, labelpad=1)
    last = axes[-1, 0]
    for verdict, (colour, marker) in VERDICTS.items():
        last.scatter([], [], color=colour, marker=marker, s=30, label=verdict)
    figure.legend(*last.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    write_caption(figure, note)
    return figure


def _draw_panel(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    for y, row in enumerate(rows):
        colour, marker = VERDICTS[row["verdict"]]
        if row["margin"]:
            axis.plot([row["margin"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=0.8, linestyle=":")
        known = [grading for grading in GRADINGS if not np.isnan(row[graded(ESTIMATE[0], grading)])]
        for grading, shift in zip(known, (-0.17, 0.17) if len(known) > 1 else (0.0,), strict=True):
            estimate, low, high = (row[graded(name, grading)] for name in ESTIMATE)
            face = colour if grading == "strict" else "white"
            axis.hlines(y + shift, low, high, color=colour, linewidth=1.4)
            axis.scatter(estimate, y + shift, color=face, edgecolors=colour, marker=marker, s=30, zorder=3)
    axis.set_yticks(range(len(rows)), [_named(row) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
