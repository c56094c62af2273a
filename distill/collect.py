"""The results of a grid's cells in two files: a row a cell and target, and a row a question."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurosig.fsio import write_atomic

RESULTS, ANSWERS = "results.csv", "answers.parquet"
PER_QUESTION = ("n_correct", "k", "votes", "winners", "right_winners")
AGGREGATES = ("brier", "smooth_ece", "ece_floor", "pass_at_k", "mean_confidence", "unparsed_rate", "truncated_rate")
MORE_AGGREGATES = ("tie_rate", "distinct_answers", "mean_length", "mean_entropy")


def collect(out: Path) -> list[str]:
    """Gather what is finished; returns a line a cell and target.

    Writes ``answers.parquet`` (method, source, target, seed, id and the counts of each question) and ``results.csv``
    (the aggregates with the seconds and tokens of the training). ``base`` has no source; ``control`` is the untrained
    model at the temperature with the best mean Avg@K on the development questions.
    """
    import pyarrow
    import pyarrow.parquet

    cells = sorted(path for path in (out / "cells").iterdir() if path.is_dir())
    chosen = control_temperature(cells)
    answers, results = [], []
    for cell in cells:
        method, source, seed = _identity(cell.name)
        if method.startswith("control-") and method != chosen:
            continue
        method = "control" if method == chosen else method
        for summary in sorted((cell / "eval").glob("*/summary.json")):
            target = summary.parent.name
            if target.startswith("dev-"):
                continue
            key = {"method": method, "source": source, "target": target, "seed": seed}
            rows = pyarrow.parquet.read_table(summary.parent / "results.parquet").to_pylist()
            answers += [{**key, "id": row["id"], **{name: row[name] for name in PER_QUESTION}} for row in rows]
            results.append({**key, **_aggregates(summary), **_training(cell / "train" / "train.json")})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(answers), buffer)
    write_atomic(out / ANSWERS, buffer.getvalue())
    write_atomic(out / RESULTS, _csv(results))
    return [
        f"{row['method']} {row['source'] or '-'} -> {row['target']} (seed {row['seed']}, n={row['n']}): "
        f"Avg@{row['k']} {row['avg_at_k']:.3f}, maj@{row['k']} {row['maj_at_k']:.3f}, ECE {row['ece']:.3f}"
        for row in results
    ]


def control_temperature(cells: Sequence[Path]) -> str | None:
    """Name of the control cell with the best mean Avg@K on the development questions; the cooler one of equals."""
    scores: dict[str, float] = {}
    for cell in cells:
        measured = [_domain(path)["avg_at_k"]["estimate"] for path in (cell / "eval").glob("dev-*/summary.json")]
        if measured:
            scores[cell.name] = sum(measured) / len(measured)
    return max(sorted(scores), key=lambda name: scores[name]) if scores else None


def _identity(name: str) -> tuple[str, str | None, int]:
    method, *rest = name.split("--")
    return (method, rest[0], int(rest[1].removeprefix("seed"))) if rest else (method, None, 0)


def _domain(summary: Path) -> dict[str, Any]:
    """The aggregates of an evaluation's questions; a target of several domains counts by its largest."""
    domains = json.loads(summary.read_text(encoding="utf-8"))["domains"].values()
    return max(domains, key=lambda domain: domain["n"])


def _aggregates(summary: Path) -> dict[str, Any]:
    domain = _domain(summary)
    row: dict[str, Any] = {"n": domain["n"], "k": domain["k"]}
    for name in ("avg_at_k", "maj_at_k", "ece"):
        row |= {
            name: domain[name]["estimate"],
            f"{name}_low": domain[name]["low"],
            f"{name}_high": domain[name]["high"],
        }
    row |= {name: domain[name] for name in (*AGGREGATES, *MORE_AGGREGATES)}
    row["temperature"] = json.loads(summary.read_text(encoding="utf-8"))["config"]["temperature"]
    return row


def _training(record: Path) -> dict[str, Any]:
    if not record.is_file():
        return {}
    trained = json.loads(record.read_text(encoding="utf-8"))
    return {"questions_selected": trained["questions_selected"], "steps": trained["last"]["step"]}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    )
    return text.getvalue()
