"""The tables of methods by domains: the published ones, next to those of a grid of runs.

Writes ``paper_tables.md`` (the page), ``.tex`` (booktabs), ``.csv`` (every cell, unrounded, with its interval), and
``.pdf`` and ``.png`` of the changes in-domain. The published numbers are ``figures/data/paper_table3.csv`` and
``paper_table4.csv`` (arXiv 2607.02460, poster), and INFLOW's on the page (`figures.draw.inflow_table`); our own come
from the ``grid.parquet`` or ``grid.csv`` of the results folder, or of ``figures/data/grid`` (`figures.grid.evidence`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from figures.draw import inflow_table
from figures.grid import table_text
from figures.grid.config import BASE, CONTROL, method_label
from figures.grid.coverage import coverage_text, evaluation_text
from figures.grid.evidence import grid_folder
from figures.grid.rows import Grid, grid_results, read_grid
from figures.grid.tables import (
    AVERAGE,
    METRICS,
    PAPER,
    Cell,
    Layout,
    Metric,
    Results,
    Row,
    Table,
    matrix_table,
    scope_table,
)
from figures.sources import DATA
from figures.style import METHODS, Colour, save_figure, subplots
from neurosig.runtime.files import write_atomic
from neurosig.statistics.significance import planned_mde
from neurosig.statistics.vote_table import graded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "paper_tables"
NEEDS = None
PUBLISHED = {"Table 3": ("paper_table3.csv", "avg_at_k"), "Table 4": ("paper_table4.csv", "ece")}
PAPER_K = 8
RESAMPLES, SEED = 5000, 0
IN_PAPER = {"lmsi": "LMSI", "ttrl": "TTRL", "intuitor": "Intuitor", "nopsd": "N-OPSD"}
"""Our method -> the paper's name of it."""
DRAWN = {**IN_PAPER, **{name: method_label(name) for name in ("u-opsd", "opsa", "canon", "inflow", "probe")}}
"""Method -> its label in the figure; the controls of ours are in `figures.draw.methods`."""
LEGEND = (
    "A cell reads *value (change / smallest change that this comparison would detect with 80% power at the 5% level)*. "
    "**Bold**: best of its column among the rows of its kind (the base competes with `in`). `~` (grey in LaTeX): the "
    "95% interval of the change contains zero; such a cell is never bold. `*`: the change is significant after Holm's "
    "correction over the domains of its row. `†`: a mean over fewer domains than the other rows have; it does not "
    "compete. (1 seed): training seeds alone change a score by about a point, which the interval does not include."
)


def draw(results: Path, out: Path) -> list[Path]:
    """Write the tables of ``results``, and the published ones, into ``out``.

    Raises:
        UserError: The grid's file cannot be used (`figures.grid.rows.read_grid`).
    """
    paper = published()
    folder = grid_folder(results)
    grid = read_grid(folder)
    ours = own_tables(grid_results(grid, resamples=RESAMPLES, seed=SEED))
    if "lenient" in grid.gradings:
        lenient = grid_results(read_grid(folder, "lenient"), resamples=RESAMPLES, seed=SEED)
        ours |= {f"{graded(name, 'lenient')} against {BASE}": scope_table(result) for name, result in lenient.items()}
    cells = table_text.csv_rows({**{f"paper: {name}": table for name, table in paper.items()}, **ours})
    paths = save_figure(_draw_changes(paper, ours), out, NAME, cells)
    texts = {"md": _page(paper, grid, ours), "tex": _latex(paper, grid, ours)}
    for suffix, text in texts.items():
        write_atomic(out / f"{NAME}.{suffix}", text)
    return [*paths, *(out / f"{NAME}.{suffix}" for suffix in texts)]


def published() -> dict[str, Table]:
    """The published Tables 3 and 4."""
    return {name: _read_published(DATA / file, METRICS[metric]) for name, (file, metric) in PUBLISHED.items()}


def averages_without(table: Table, domain: str, layout: Layout = PAPER) -> pd.DataFrame:
    """Both averages of each row: over all its domains, as printed in the table, and over all but ``domain``.

    Returns:
        Columns ``method``, ``scope``, ``average``, ``complete`` (whether it has all domains), ``without``.
    """
    kept = [index for index, column in enumerate(table.columns) if column in layout.domains and column != domain]
    lines = []
    for row in table.rows:
        values = [value for index in kept if (value := row.cells[index].value) is not None]
        average = row.cells[table.columns.index(AVERAGE)]
        lines.append(
            {
                "method": row.method,
                "scope": row.scope,
                "average": average.value,
                "complete": not average.partial,
                "without": float(np.mean(values)) if len(values) == len(kept) else float("nan"),
            }
        )
    return pd.DataFrame(lines)


def own_tables(results: dict[str, Results]) -> dict[str, Table]:
    """Every table of a grid by name: the paper's form against base and against the control, and the full matrices."""
    tables = {}
    for name, result in results.items():
        for against in (BASE, CONTROL) if CONTROL in result.untrained else (BASE,):
            tables[f"{name} against {against}"] = scope_table(result, against=against)
        tables[f"{name}, every source and target"] = matrix_table(result)
    return tables


def next_to(ours: Table, paper: Table) -> Table:
    """Our rows, each followed by the paper's row of the same method, over the columns that both tables have."""
    columns = tuple(column for column in ours.columns if column in paper.columns)
    paper_rows = {(row.method, row.scope): row for row in paper.rows}
    rows = []
    for row in ours.rows:
        rows.append(replace(row, cells=_chosen(row, ours.columns, columns)))
        twin = paper_rows.get((IN_PAPER.get(row.method, row.method), row.scope))
        if twin is not None:
            cells = _chosen(twin, paper.columns, columns)
            rows.append(Row(f"{twin.method} (paper)", twin.scope, cells, rivals=f"paper {twin.rivals}"))
    return Table(ours.metric, columns, tuple(rows), ours.against)


# The page


def _page(paper: dict[str, Table], grid: Grid, ours: dict[str, Table]) -> str:
    parts = [
        "# Tables",
        LEGEND,
        "## Published",
        "Numbers of arXiv 2607.02460 (poster), Qwen3-4B, without intervals; its Tables 7 and 8 were not available.",
    ]
    for name, table in paper.items():
        parts += [f"### {name}: {table.metric.title}", table_text.markdown(table)]
    parts += ["### What the average depends on", *_rests_on(paper)]
    parts += ["### What a test of this size can detect", _visible(paper["Table 3"])]
    parts += ["## This project", _sizes(grid, ours)]
    for name, table in ours.items():
        parts += [f"### {_title(name, table)}", table_text.markdown(table)]
    parts += ["## Next to the paper's"]
    parts.append("Averages over different domains and models are not comparable; the paper's rows give the scale.")
    for published in paper.values():
        table = next_to(ours[f"{published.metric.name} against {BASE}"], published)
        parts += [f"### {table.metric.title}", table_text.markdown(table)]
    parts += inflow_table.page(ours["avg_at_k, every source and target"])
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _rests_on(paper: dict[str, Table], domain: str = "EDU") -> list[str]:
    """Which method leads with and without one domain: one sentence per metric and scope, and all numbers."""
    parts, lines = [], [f"| metric | method | eval | {AVERAGE} | without {domain} |", "|---|---|---|---|---|"]
    for table in paper.values():
        frame, metric = averages_without(table, domain), table.metric
        for column in ("average", "without"):
            frame[column] = [table_text.rounded(value, metric.decimals) for value in frame[column]]
        for scope, rivals in (("in-domain", ["base", "in"]), ("cross-domain", ["cross"])):
            rows = frame[frame["scope"].isin(rivals)]
            leader = _ranked(rows[rows["complete"]], "average", metric).iloc[0]
            without = _ranked(rows, "without", metric)
            order = ", ".join(
                f"{method} {value}" for method, value in zip(without["method"], without["without"], strict=True)
            )
            moved = without["method"].iloc[0] != leader["method"]
            parts.append(
                f"{metric.title}, {scope}: {leader['method']} leads the average of all columns ({leader['average']}). "
                f"Without {domain} the order is {order}: "
                + (f"the overall lead depends on {domain} alone." if moved else "the lead stays.")
            )
        for line in frame.to_dict("records"):
            fewer = "" if line["complete"] else table_text.FEWER
            cells = (metric.title, line["method"], line["scope"], f"{line['average']}{fewer}", line["without"])
            lines.append(f"| {' | '.join(cells)} |")
    return [*parts, "\n".join(lines)]


def _ranked(rows: pd.DataFrame, column: str, metric: Metric) -> pd.DataFrame:
    """Best first, by the printed numbers."""
    return rows.sort_values(column, key=pd.to_numeric, ascending=not metric.higher_is_better, kind="stable")


def _visible(table: Table) -> str:
    """The smallest detectable effects at the paper's accuracy, and how many published changes are larger."""
    points = {
        name: 100 * planned_mde(n, PAPER_K, correlation=correlation)
        for name, n, correlation in (
            ("alike", 1000, 1.0), ("apart", 1000, 0.85), ("unpaired", 1000, 0.0), ("small", 200, 0.98),
        )
    }  # fmt: skip
    changes = [
        abs(cell.delta)
        for row in table.rows
        if row.scope == "in"
        for column, cell in zip(table.columns, row.cells, strict=True)
        if column in PAPER.domains and cell.delta is not None
    ]
    larger = {name: sum(change > points[name] for change in changes) for name in ("alike", "apart")}
    few, many = f"{points['alike']:.1f}", f"{points['apart']:.1f}"
    return (
        f"With n=1,000 questions and K={PAPER_K} the smallest change of Avg@{PAPER_K} that a paired test detects with "
        f"80% power is about {few} to {many} points (unpaired {points['unpaired']:.1f}), at n=200 about "
        f"{points['small']:.0f}. Of the {len(changes)} published in-domain changes {larger['alike']} exceed {few} and "
        f"{larger['apart']} exceed {many}. Training seeds vary by about a point; the published tables name "
        "neither seeds nor intervals nor the number of questions."
    )


def _sizes(grid: Grid, ours: dict[str, Table]) -> str:
    n = ", ".join(f"{len(ids)} {domain}" for domain, ids in grid.ids.items())
    rows = next(iter(ours.values())).rows
    seeds = ", ".join(dict.fromkeys(f"{method_label(row.method)} {row.seeds}" for row in rows if row.seeds))
    control = "" if CONTROL in {row.method for row in rows} else " There is no control of the sampling temperature."
    return (
        f"Questions: {n}; K={grid.k}. Training seeds (the fewest over the sources): {seeds or 'none'}. Intervals: 95% "
        f"percentile bootstrap, training seeds and then questions with all their rollouts, paired ({RESAMPLES:,} "
        f"draws, seed {SEED}), {evaluation_text(grid.evaluations)}. {coverage_text(grid)}{control}"
    )


def _title(name: str, table: Table) -> str:
    against = method_label(table.against)
    form = "every source and target" if "every" in name else f"changes against {against}"
    form += ", lenient grading" if "lenient" in name else ""
    return f"{table.metric.title}, {form}"


def _latex(paper: dict[str, Table], grid: Grid, ours: dict[str, Table]) -> str:
    parts = ["% needs: \\usepackage{booktabs,graphicx,xcolor}\n"]
    for name, table in paper.items():
        caption = f"{table.metric.title}, {name} of arXiv 2607.02460 (poster), as published."
        parts.append(table_text.latex(table, caption=caption, label=f"tab:paper-{table.metric.name}"))
    for index, (name, table) in enumerate(ours.items()):
        caption = f"{_title(name, table)}; in brackets the change and the smallest detectable one. {_sizes(grid, ours)}"
        parts.append(table_text.latex(table, caption=caption, label=f"tab:ours-{index}"))
    return "\n".join(parts)


# Reading and drawing


def _read_published(path: Path, metric: Metric) -> Table:
    frame = pd.read_csv(path)
    columns = tuple(dict.fromkeys(frame["column"]))
    rows = []
    for (method, scope), group in frame.groupby(["method", "scope"], sort=False):
        cells = [
            Cell(None if pd.isna(value) else float(value), None if pd.isna(delta) else float(delta))
            for value, delta in zip(group["value"], group["delta"], strict=True)
        ]
        has = [column in PAPER.domains and cell.value is None for column, cell in zip(columns, cells, strict=True)]
        if any(has):
            cells[columns.index(AVERAGE)] = replace(cells[columns.index(AVERAGE)], partial=True)
        rows.append(Row(str(method), str(scope), tuple(cells), rivals="cross" if scope == "cross" else "in"))
    return Table(replace(metric, title=metric.title.format(k=PAPER_K)), columns, tuple(rows))


def _chosen(row: Row, columns: tuple[str, ...], chosen: tuple[str, ...]) -> tuple[Cell, ...]:
    return tuple(row.cells[columns.index(column)] for column in chosen)


def _draw_changes(paper: dict[str, Table], ours: dict[str, Table]) -> Figure:
    """In-domain changes, one panel per table; bands cover what a paired test of 1,000 questions cannot detect."""
    panels = {f"published, {table.metric.title}": table for table in paper.values()}
    panels |= {
        f"ours, {table.metric.title}": table
        for name, table in ours.items()
        if name in {f"{published.metric.name} against {BASE}" for published in paper.values()}
    }
    lines = len(panels) // len(paper)
    figure, axes = subplots(lines, len(paper), size=(11, 3.6 * lines), squeeze=False)
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=True):
        _draw_panel(axis, table)
        axis.set_title(title)
    band = 100 * planned_mde(1000, PAPER_K, correlation=1.0), 100 * planned_mde(1000, PAPER_K, correlation=0.85)
    for points, shade, systems in zip(reversed(band), Colour.BANDS, ("dissimilar", "similar"), strict=True):
        label = f"±{points:.1f}: smallest detectable with 1,000 questions, {systems} systems"
        axes[0][0].axhspan(-points, points, color=shade, zorder=0, label=label)
    marks = {label: mark for axis in axes.flat for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_panel(axis: Axes, table: Table) -> None:
    drawn = {label: METHODS[name] for name, label in DRAWN.items()}
    rows = [row for row in table.rows if row.scope == "in" and DRAWN.get(row.method, row.method) in drawn]
    shown = [at for at in range(len(table.columns)) if any(row.cells[at].delta is not None for row in rows)]
    axis.axhline(0, color="black", linewidth=0.8)
    for offset, row in enumerate(rows):
        label = DRAWN.get(row.method, row.method)
        colour, marker = drawn[label]
        shift = min(0.14, 0.8 / len(rows)) * (offset - (len(rows) - 1) / 2)
        for x, cell in enumerate(row.cells[at] for at in shown):
            if cell.delta is None:
                continue
            if cell.low is not None and cell.high is not None:
                axis.vlines(x + shift, cell.low, cell.high, color=colour, linewidth=1.2)
            face = "white" if cell.unsure else colour
            axis.scatter(x + shift, cell.delta, color=face, edgecolors=colour, marker=marker, s=26, zorder=3)
        axis.scatter([], [], color=colour, marker=marker, s=26, label=label)
    axis.set_xticks(range(len(shown)), [table.columns[at].replace("_", " ") for at in shown], fontsize=7.5)
    axis.set_ylabel("change against base, in-domain")
    axis.grid(axis="x", visible=False)
