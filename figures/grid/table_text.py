"""Tables as text: Markdown, LaTeX (booktabs) and CSV in long form.

A cell reads ``74.59 (+0.61 / 1.30)``: the value, its change, and the smallest change that the comparison would detect
with 80% power. The best value of a column is bold. A cell is grey, never bold, if the interval of its change contains
zero. A star marks a change that is significant after Holm's correction over the domains of its row, a dagger a mean
over fewer domains than the other rows have.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal

from figures.grid.config import method_label
from figures.grid.tables import Cell, Row, Table
from neurosig.runtime.files import csv_cell

DASH, GREY, FEWER, STAR = "—", "~", "†", "\\*"
FIELDS = (
    "table", "metric", "against", "method", "scope", "column", "value", "delta", "low", "high", "p", "p_holm", "mde",
    "mde_unpaired", "n", "seeds", "best", "unsure", "partial",
)  # fmt: skip


def rounded(value: float, decimals: int) -> str:
    """``value`` with ``decimals``, halves rounded away from zero, never "-0.00"."""
    exact = Decimal(f"{value:.10f}")  # the float error of a mean must not decide a half
    text = str(exact.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP))
    return text.removeprefix("-") if not text.strip("-0.") else text


def signed(value: float, decimals: int) -> str:
    """`rounded`, with its sign: "+0.61"."""
    text = rounded(value, decimals)
    return text if text.startswith("-") else f"+{text}"


def markdown(table: Table) -> str:
    """A Markdown table; a cell whose interval contains zero begins with "~" instead of being grey."""
    lines = ["| " + " | ".join([*table.heads, *table.columns]) + " |", "|---" * (2 + len(table.columns)) + "|"]
    best = table.best()
    for index, row in enumerate(table.rows):
        cells = [_markdown_cell(cell, table.metric.decimals, (index, c) in best) for c, cell in enumerate(row.cells)]
        lines.append("| " + " | ".join([_name(row), row.scope, *cells]) + " |")
    return "\n".join(lines) + "\n"


def latex(table: Table, *, caption: str, label: str) -> str:
    """A floating LaTeX table; needs the packages booktabs, graphicx and xcolor."""
    best = table.best()
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{_escaped(caption)}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{ll{'c' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(_escaped(name) for name in (*table.heads, *table.columns)) + r" \\",
        r"\midrule",
    ]
    for index, row in enumerate(table.rows):
        if index and _block(row) != _block(table.rows[index - 1]):
            lines.append(r"\midrule")
        cells = [_latex_cell(cell, table.metric.decimals, (index, c) in best) for c, cell in enumerate(row.cells)]
        lines.append(" & ".join([_escaped(_name(row)), _escaped(row.scope), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""]
    return "\n".join(lines)


def csv_rows(tables: Mapping[str, Table]) -> str:
    """All cells of all tables, one per line, unrounded; the columns are `FIELDS`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for name, table in tables.items():
        best = table.best()
        for index, row in enumerate(table.rows):
            for position, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
                if cell.value is None:
                    continue
                numbers = {key: getattr(cell, key) for key in ("value", "delta", "low", "high", "p", "p_holm")}
                numbers |= {"mde": cell.mde, "mde_unpaired": cell.mde_unpaired}
                line = {key: None if number is None else f"{number:.8g}" for key, number in numbers.items()}
                writer.writerow(
                    line
                    | {"table": name, "metric": table.metric.name, "against": table.against, "scope": row.scope}
                    | {"method": csv_cell(row.method), "column": csv_cell(column), "n": cell.n, "seeds": row.seeds}
                    | {"best": int((index, position) in best), "unsure": int(cell.unsure), "partial": int(cell.partial)}
                )
    return text.getvalue()


def cell_text(cell: Cell, decimals: int) -> str:
    """``74.59 (+0.61 / 1.30)`` without marks; a dash if there is no value."""
    if cell.value is None:
        return DASH
    text = rounded(cell.value, decimals)
    if cell.delta is None:
        return text
    mde = "" if cell.mde is None else f" / {rounded(cell.mde, decimals)}"
    return f"{text} ({signed(cell.delta, decimals)}{mde})"


# Inside


def _markdown_cell(cell: Cell, decimals: int, best: bool) -> str:
    text = cell_text(cell, decimals)
    if cell.value is None:
        return text
    value, _, change = text.partition(" ")
    if best and not cell.unsure:
        value = f"**{value}**"
    marks = (FEWER if cell.partial else "") + (STAR if _proven(cell) else "")
    return (GREY if cell.unsure else "") + f"{value}{marks} {change}".strip()


def _latex_cell(cell: Cell, decimals: int, best: bool) -> str:
    text = cell_text(cell, decimals)
    if cell.value is None:
        return "--"
    value, _, change = text.partition(" ")
    value = value.replace("-", "$-$")
    if best and not cell.unsure:
        value = rf"\textbf{{{value}}}"
    marks = (r"$^\dagger$" if cell.partial else "") + (r"$^*$" if _proven(cell) else "")
    small = rf" {{\tiny {change.replace('-', '$-$')}}}" if change else ""
    return rf"\textcolor{{gray}}{{{value}{marks}{small}}}" if cell.unsure else f"{value}{marks}{small}"


def _proven(cell: Cell) -> bool:
    return cell.p_holm is not None and cell.p_holm <= 0.05 and not cell.unsure


def _name(row: Row) -> str:
    return method_label(row.method) + (" (1 seed)" if row.seeds == 1 else "")


def _block(row: Row) -> str:
    """The block of a row; rules separate blocks."""
    return "untrained" if row.scope in ("base", "") else row.method


def _escaped(text: str) -> str:
    special: Sequence[tuple[str, str]] = (("\\", r"\textbackslash "), *((c, f"\\{c}") for c in "&%$#_{}"))
    for character, safe in special:
        text = text.replace(character, safe)
    return text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
