"""Compare evaluations of the same questions: a table with paired intervals, and a closing sentence.

    python -m distill.compare --base runs/demo/eval/base --control runs/demo/eval/control \\
        --trained runs/demo/eval/nopsd --train runs/demo/nopsd --out runs/demo/report

Much of what self-training gains in Avg@K is mere sharpening, which a lower sampling temperature gives for free. The
control is therefore the untrained base at the temperature that a development split prefers, and the closing sentence
gives the gain beyond it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from neurosig.runtime.cli import CommonConfig, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import Shapes

if TYPE_CHECKING:
    from neurosig.statistics.metrics import Interval

logger = logging.getLogger(__name__)

COMPARISON, TABLE = "comparison.json", "table.md"
METRICS = {"avg_at_k": "Avg@{k}", "maj_at_k": "maj@{k}", "ece": "ECE"}


@dataclass(kw_only=True)
class CompareConfig(CommonConfig):
    """Print the table of base, control and trained model, with 95% paired bootstrap intervals over questions."""

    base: Path
    """Evaluation of the untrained model."""
    trained: Path
    """Evaluation of the trained model on the same questions."""
    control: Path | None = None
    """Evaluation of the untrained model at the sampling temperature chosen on a development split."""
    train: Path | None = None
    """Training run whose manifest gives the in-domain domains; default: the first domain."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of table.md and comparison.json."""
    allow_difference: tuple[str, ...] = ()
    """Options, other than temperature, seed and adapter, in which the evaluations may differ, such as instruction; the
    table names both values."""
    resamples: int = 10_000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the bootstrap."""


def main(config: CompareConfig) -> None:
    """Write and print the comparison described by ``config``."""
    from neurosig.runtime.files import write_atomic
    from neurosig.runtime.provenance import run_record

    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out}: is a file; give a folder")
    folders = {"base": config.base, "control": config.control, "trained": config.trained}
    runs = {name: _read(folder) for name, folder in folders.items() if folder is not None}
    _check_same_questions(config, folders, runs)
    allowed = _check_alike(config, folders, runs)
    source = _source_domains(config, runs["base"])
    groups = {"in-domain": source, "cross-domain": [d for d in runs["base"]["domains"] if d not in source]}
    for scope, domains in groups.items():
        ids = [row["question_id"] for row in runs["base"]["rows"].values() if row["domain"] in domains]
        if len(ids) == 1:
            raise UserError(
                f'{config.base}: "{ids[0]}" is its only {scope} question; an interval needs at least 2, evaluate more'
            )
    rows = [row for scope, domains in groups.items() if domains for row in _compare(runs, scope, domains, config)]
    k = "/".join(dict.fromkeys(str(run["k"]) for run in runs.values()))
    verdict = _verdict(rows, k)
    text = _table(rows, k, runs, config) + _notes(runs, groups, allowed) + "\n" + verdict
    record = {
        "rows": rows,
        "k": runs["base"]["k"],
        "domains": groups,
        "folders": {name: str(folders[name]) for name in runs},
        "sha256": {name: run["sha256"] for name, run in runs.items()},
        "allowed_differences": allowed,
        "verdict": verdict,
        "run": run_record(),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomic(config.out / COMPARISON, json.dumps(record, indent=1, default=asdict) + "\n")
    write_atomic(config.out / TABLE, text)
    print(text)


def _check_same_questions(config: CompareConfig, folders: Mapping[str, Path | None], runs: Mapping[str, Any]) -> None:
    base = runs["base"]
    for name, run in runs.items():
        if run["rows"].keys() != base["rows"].keys():
            raise UserError(
                f"{folders[name]}: not the questions of {config.base}; evaluate both on the same --questions"
            )
        if run["questions"] != base["questions"]:
            raise UserError(
                f"{folders[name]}: the ids are those of {config.base}, but texts or gold answers of its questions are "
                "not; evaluate both on the same --questions"
            )


def _check_alike(config: CompareConfig, folders: Mapping[str, Path | None], runs: Mapping[str, Any]) -> dict[str, str]:
    """Run -> how it differs from the base, where that is allowed."""
    from distill.evaluate import EvaluateConfig
    from neurosig.runtime.recorded import check_alike, unlike

    base, texts = runs["base"], {}
    allowed = [name.replace("-", "_") for name in config.allow_difference]
    if unknown := sorted({*allowed} - {*EvaluateConfig.__dataclass_fields__, "weights", "tokenizer"}):
        raise UserError(f"--allow-difference {unknown[0]}: evaluations have no such option")
    for name, run in runs.items():
        pairs = unlike(EvaluateConfig, base["summary"], run["summary"])
        texts[name] = check_alike(pairs, allowed, str(folders[name]), ("for base", f"for {name}"))
        if run["k"] != base["k"] and "num_generations" not in allowed:
            raise UserError(
                f"{folders[name]}: K={run['k']} samples per question, {config.base} has {base['k']}; ECEs of different "
                "K do not compare, evaluate both with the same --num-generations"
            )
    return {name: text for name, text in texts.items() if text}


def _notes(runs: Mapping[str, Any], groups: Mapping[str, Sequence[str]], allowed: Mapping[str, str]) -> str:
    """What the numbers above rest on: differences, and questions that a model was trained on."""
    from neurosig.models.trained import trained_on_text

    lines = [f"Allowed differences from base: {text}." for text in allowed.values()]
    lines += [
        text
        for name, run in runs.items()
        for scope, domains in groups.items()
        if (text := trained_on_text(f"{name}, {scope}", [run["summary"]["domains"][one] for one in domains]))
    ]
    return "".join(f"\n{line}\n" for line in lines)


def _read(folder: Path) -> dict[str, Any]:
    from distill.evaluate import read_sampled

    summary, rows, sha256 = read_sampled(folder)
    return {
        "summary": summary,
        "sha256": sha256,
        "k": rows[0]["k"],
        "rows": {row["question_id"]: row for row in rows},
        "domains": list(summary["domains"]),
        "config": summary["config"],
        "questions": summary["questions_sha256"],
    }


def _source_domains(config: CompareConfig, base: Mapping[str, Any]) -> list[str]:
    from neurosig.models.trained import RECORD

    if config.train is None:
        return [base["domains"][0]]
    if not (config.train / RECORD).is_file():
        raise UserError(f"--train {config.train}: no finished training run ({RECORD} is missing)")
    trained_on = json.loads((config.train / RECORD).read_text())["domains"]
    source = [domain for domain in base["domains"] if domain in trained_on]
    if not source:
        raise UserError(
            f"--train {config.train}: trained on {', '.join(trained_on)}, but {config.base} holds "
            f"{', '.join(base['domains'])}; evaluate a domain it was trained on"
        )
    return source


def _compare(
    runs: Mapping[str, Any], scope: str, domains: Sequence[str], config: CompareConfig
) -> Iterator[dict[str, Any]]:
    """Every metric of each run, and its change against base and control, over the questions of ``domains``."""
    from neurosig.statistics.metrics import ece_floor
    from neurosig.statistics.vote_table import VoteTable

    votes = {
        name: VoteTable.from_rows([row for _, row in sorted(run["rows"].items()) if row["domain"] in domains])
        for name, run in runs.items()
    }
    bootstrap: Any = {"seed": config.seed, "resamples": config.resamples}
    for name, own in votes.items():
        row = {"run": name, "scope": scope, "n": len(own), "temperature": runs[name]["config"]["temperature"]}
        for metric in METRICS:
            row[metric] = own.interval(metric, **bootstrap)
            for other in ("base", "control"):
                if other in runs and name not in ("base", other):
                    row[f"{metric}_vs_{other}"] = own.interval(metric, minus=votes[other], **bootstrap)
        row["mean_confidence"] = float((own.votes / own.k).mean())
        row["ece_floor"] = ece_floor(own.k, len(own))
        yield row


def _table(rows: Sequence[Mapping[str, Any]], k: str, runs: Mapping[str, Any], config: CompareConfig) -> str:
    names = {metric: title.format(k=k) for metric, title in METRICS.items()}
    lines = [
        "| scope | run | n | " + " | ".join(f"{name} | change" for name in names.values()) + " |",
        "|---|---|---|" + "---|---|" * len(names),
    ]
    for row in rows:
        cells = [row["scope"], f"{row['run']} (T={row['temperature']:g})", str(row["n"])]
        for metric in names:
            change = row.get(f"{metric}_vs_base")
            cells += [f"{row[metric].estimate:.3f}", "" if change is None else f"{change:+.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    floors = ", ".join(f"{row['ece_floor']:.3f} {row['scope']}" for row in rows if row["run"] == "base")
    lines += [
        "",
        f"Change against base with its 95% paired bootstrap interval over questions ({config.resamples:,} resamples, "
        f"seed {config.seed}); K={k} rollouts per question, sampling seed {runs['base']['config']['seed']}. A "
        f"perfectly calibrated sampler would show an ECE of about {floors} at this K and n.",
        "",
    ]
    return "\n".join(lines)


def _verdict(rows: Sequence[Mapping[str, Any]], k: str) -> str:
    """The closing sentence: whether the gain's interval excludes zero, and the gain beyond the control."""
    row = next(row for row in rows if row["run"] == "trained" and row["scope"] == "in-domain")
    change = row["avg_at_k_vs_base"]
    text = (
        f"In-domain, training changes Avg@{k} by {change:+.3f}: the interval "
        f"{'excludes' if change.low > 0 or change.high < 0 else 'includes'} zero."
    )
    if "avg_at_k_vs_control" in row:
        avg, maj, ece = (row[f"{metric}_vs_control"] for metric in METRICS)
        text += (
            f" Against the untrained base at its best temperature, it changes Avg@{k} by {avg:+.3f} ({_reading(avg)}), "
            f"maj@{k} by {maj:+.3f} ({_reading(maj)}) and ECE by {ece:+.3f}."
        )
    return text + "\n"


def _reading(interval: Interval) -> str:
    if interval.low > 0:
        return "a gain"
    return "a loss" if interval.high < 0 else "not distinguishable from zero"


if __name__ == "__main__":
    sys.exit(run_command(CompareConfig, main, presets={}, prog="python -m distill.compare"))
