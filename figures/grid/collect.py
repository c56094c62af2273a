"""The results of a grid's finished cells in two files: one row per cell and target, and one row per question."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.evaluate import read_sampled
from distill.metrics_log import METRICS as METRICS_FILE
from figures.grid.config import BASE, CONTROL
from figures.grid.rows import (
    EVALUATION_SEED,
    Run,
    grid_results,
    read_grid,
    run_columns,
    sampled_grid_rows,
    write_grid,
)
from figures.grid.table_text import markdown
from figures.grid.tables import METRICS, Layout, scope_table
from figures.grid.texts import format_check, rollout_rows, write_texts
from neurosig.models.trained import trained_on_text
from neurosig.runtime.files import csv_cell, write_atomic
from neurosig.runtime.recorded import check_alike, unlike
from neurosig.statistics.vote_table import graded

RESULTS, SECONDS = "results.csv", "seconds.csv"
AGGREGATES = (
    *("brier", "smooth_ece", "ece_floor", "pass_at_k", "mean_confidence", "signed_gap", "parse_rate", "unparsed_rate"),
    *("tie_rate", "truncated_rate", "distinct_answers", "mean_length", "mean_entropy"),
)


def collect(out: Path, targets: Sequence[str], allow_difference: Sequence[str] = ()) -> str:
    """Collect the finished cells of the grid in ``out``.

    Writes ``grid.parquet`` (`figures.grid.rows`), the texts behind it (`figures.grid.texts`) and ``results.csv``, the
    aggregates of each cell, target and evaluation seed with the budget of its training; ``seconds.csv`` has the time of
    each training, which alone differs between two runs. The untrained model at the temperature with the best mean Avg@K
    on the development questions is named ``control``.

    Args:
        out: Folder of the grid.
        targets: Domains in the order of the tables.
        allow_difference: What the evaluations of a target may differ in, besides temperature, seed and adapter.

    Returns:
        The tables and the format check as Markdown, with allowed differences and questions that a cell was trained on;
        empty until the base is evaluated on every target.

    Raises:
        UserError: An evaluation differs from the base's in anything else.
    """
    chosen = control_temperature(sorted((out / "cells").iterdir()))
    rows, texts, results, notes = [], [], [], []
    seconds: list[dict[str, Any]] = []
    for cell in sorted(path for path in (out / "cells").iterdir() if path.is_dir()):
        run = run_of(cell.name, chosen)
        if run is None:
            continue
        judged = [(target, folder) for target in targets for folder in evaluations(cell / "eval", target)]
        adapter = adapter_of(out, judged[0][1]) if judged else None
        trained = _training(adapter) if adapter else {}
        if adapter:
            spent = {"seconds": training_seconds(_run_folder(adapter))}
            seconds.append({"method": run.method, "source": run.source, "seed": run.seed, **spent})
        for target, folder in judged:
            notes += _notes(out / "cells" / BASE / "eval" / target, folder, allow_difference)
            summary, sampled, _ = read_sampled(folder)
            known = {**run_columns(run, summary), "target": target}
            rows += [{**row, **known} for row in sampled]
            texts += rollout_rows(folder, known)
            results.append({**_key(run, target), **_aggregates(folder), **trained})
    write_atomic(out / RESULTS, _csv(results))
    write_atomic(out / SECONDS, _csv(seconds))
    if not rows:
        return ""
    write_grid(out, sampled_grid_rows(rows), Layout(tuple(targets)))
    if {row["target"] for row in rows if row["method"] == BASE} != set(targets):
        return ""
    write_texts(out, texts, [out / "cells" / BASE / "eval" / target for target in targets])
    under = "".join(f"\n{note}\n" for note in notes)
    return f"{tables_text(out)}{under}\nFormat check\n\n{format_check(rows)}"


def tables_text(folder: Path) -> str:
    """The tables of a collected grid as Markdown."""
    tables = grid_results(read_grid(folder))
    return "\n".join(f"{table.metric.title}\n\n{markdown(scope_table(table))}" for table in tables.values())


def _notes(base: Path, folder: Path, allowed: Sequence[str]) -> list[str]:
    """Allowed differences of an evaluation from the base's, and how many of its questions were trained on."""
    from distill.evaluate import EvaluateConfig

    if not (base / "summary.json").is_file():
        return []
    first, summary = (json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in (base, folder))
    name = f"{folder.parents[1].name} on {folder.name}"
    names = [option.replace("-", "_") for option in allowed]
    differences = check_alike(unlike(EvaluateConfig, first, summary), names, str(folder), ("for base", f"for {name}"))
    notes = (differences and f"Allowed differences: {differences}.", trained_on_text(name, summary["domains"].values()))
    return [note for note in notes if note]


def control_temperature(cells: Sequence[Path]) -> str | None:
    """Name of the cell with the best mean Avg@K on the development questions; of equals, the first by name."""
    scores: dict[str, float] = {}
    for cell in cells:
        measured = [_summary(path.parent)["avg_at_k"]["estimate"] for path in cell.glob("eval/dev-*/summary.json")]
        if measured:
            scores[cell.name] = sum(measured) / len(measured)
    return max(sorted(scores), key=lambda name: scores[name]) if scores else None


def evaluations(folder: Path, target: str) -> list[Path]:
    """The finished evaluations on one target, one per sampling seed."""
    found = [folder / target, *sorted(folder.glob(f"{target}--seed*"))]
    return [path for path in found if (path / "summary.json").is_file()]


def adapter_of(out: Path, evaluation: Path) -> Path | None:
    """The adapter of an evaluation in the grid ``out``, which may have been moved; ``None`` for the untrained model."""
    adapter = json.loads((evaluation / "summary.json").read_text(encoding="utf-8"))["config"]["adapter"]
    parts = Path(adapter or "").parts  # .../cells or tries/CELL/train/...
    if "train" not in parts:
        return None
    return out.joinpath(*parts[len(parts) - parts[::-1].index("train") - 3 :])


def run_of(cell: str, control: str | None) -> Run | None:
    """The run of the cell of this name; ``None`` for a temperature that was not chosen."""
    method, *trained = cell.split("--")
    if trained:
        return Run(method, trained[0], int(trained[1].removeprefix("seed")))
    return Run(CONTROL if cell == control else BASE, "", 0) if cell in (BASE, control) else None


def _key(run: Run, target: str) -> dict[str, Any]:
    return {"method": run.method, "source": run.source, "target": target, "seed": run.seed}


def _summary(folder: Path) -> Mapping[str, Any]:
    """The aggregates of an evaluation; of its largest domain, where it has several."""
    domains = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["domains"].values()
    return max(domains, key=lambda domain: int(domain["n"]))


def _aggregates(folder: Path) -> dict[str, Any]:
    summary = _summary(folder)
    row: dict[str, Any] = {"n": summary["n"], "k": summary["k"]}
    for name in (*METRICS, *(graded(name, "lenient") for name in METRICS)):
        value = summary[name]
        row |= {name: value["estimate"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
    row |= {name: summary[name] for name in AGGREGATES} | {"trained_on": summary.get("trained_on", 0)}
    config = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["config"]
    return row | {"temperature": config["temperature"], EVALUATION_SEED: config["seed"]}


def _training(adapter: Path) -> dict[str, Any]:
    """What the adapter's training spent, and after which step the adapter was taken."""
    row = training_row(_run_folder(adapter))
    step = adapter.name.removeprefix("step-")
    return {**row, **({"adapter_step": int(step)} if step.isdigit() else {})}


def training_row(run: Path) -> dict[str, Any]:
    """What a training spent and how it began: selected questions, budget, last step, and the first entropy gap."""
    trained = json.loads((run / "train.json").read_text(encoding="utf-8"))
    row = {"questions_selected": trained["questions_selected"], **trained.get("budget", {})}
    row["adapter_step"] = trained["updates"]
    gaps = [gap for line in _steps(run) if (gap := line.get("entropy_gap")) is not None]
    return row | ({"first_entropy_gap": gaps[0]} if gaps else {})


def training_seconds(run: Path) -> float:
    """Seconds of all phases of all steps."""
    return float(sum(value for line in _steps(run) for name, value in line.items() if name.startswith("seconds_")))


def _run_folder(adapter: Path) -> Path:
    return next(path for path in adapter.parents if path.name == "train")


def _steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: f"{value:.6g}" if isinstance(value, float) else csv_cell(value) for name, value in row.items()}
        )
    return text.getvalue()
