"""INFLOW's Table 1 as Markdown, and a grid's own rows next to it.

``figures/data/inflow_table1.csv`` has the published numbers: Avg@3 in per cent of each model and method after 250
updates on a fifth of the questions, on 100 questions of mathematics, 200 of natural science, 200 of humanities and
social science, and all of them; ``sd`` is the published standard deviation of the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from figures.grid import table_text
from figures.grid.config import BASE, method_label
from figures.grid.tables import METRICS, Cell, Row, Table
from figures.protocols import OVERALL
from figures.sources import DATA

PUBLISHED = DATA / "inflow_table1.csv"
OURS: Mapping[str, str] = {"original": BASE, "neuron": "nopsd"}
"""Its name of a method -> ours, where they differ."""


def published() -> dict[str, Table]:
    """Model -> its table: one row per method, with the change against the untrained model, one column per domain."""
    frame = pd.read_csv(PUBLISHED)
    columns = tuple(dict.fromkeys(frame["domain"]))
    metric = replace(METRICS["avg_at_k"], title="Avg@3 (per cent)", decimals=1)
    tables = {}
    for model, part in frame.groupby("model", sort=False):
        values = part.pivot(index="method", columns="domain", values="value")
        rows = []
        for name in dict.fromkeys(part["method"]):
            changes = values.loc[name] - values.loc["original"]
            cells = [
                Cell(float(values.loc[name, c]), None if name == "original" else float(changes[c])) for c in columns
            ]
            rows.append(Row(OURS.get(name, name), "" if name == "original" else OVERALL, tuple(cells)))
        tables[str(model)] = Table(metric, columns, tuple(rows), heads=("method", "source"))
    return tables


def page(ours: Table) -> list[str]:
    """The published tables, and where a grid has their domains its rows followed by the published ones.

    Args:
        ours: The grid's Avg@K of every source and target.
    """
    tables = published()
    parts = [
        "## INFLOW's Table 1",
        "Avg@3 in per cent after 250 updates, as published (its NEURON is the only published reading of N-OPSD). The "
        "standard deviations of `overall` are .1 to 2.0 points (`figures/data/inflow_table1.csv`).",
    ]
    for model, table in tables.items():
        parts += [f"### {model}", table_text.markdown(table)]
    columns = next(iter(tables.values())).columns
    if set(columns) <= set(ours.columns):
        places = [ours.columns.index(column) for column in columns]
        rows = []
        for row in ours.rows:
            rows.append(replace(row, cells=tuple(row.cells[place] for place in places)))
            twins = [(m, t) for m, table in tables.items() for t in table.rows if t.method == row.method]
            rows += [
                replace(twin, method=f"{method_label(twin.method)} (INFLOW, {model})", rivals=f"INFLOW, {model}")
                for model, twin in twins
                if row.scope in ("", OVERALL)
            ]
        parts += ["### Ours next to it", table_text.markdown(replace(ours, columns=columns, rows=tuple(rows)))]
    return parts
