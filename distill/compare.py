"""Compare evaluations of the same questions: a table with paired intervals, and a closing sentence.

    python -m distill.compare --base runs/demo/eval/base --control runs/demo/eval/control \\
        --trained runs/demo/eval/nopsd --train runs/demo/nopsd --out runs/demo/report

Much of what self-training gains in Avg@K is mere sharpening, which a lower sampling temperature gives for free. The
control is therefore the untrained base at the temperature that a development split prefers, and the closing sentence
gives the gain beyond it.

Training can also teach a model the wording that the parser takes. Every metric is therefore given under the strict and
the lenient grading (`neurosig.questions.reader.Grades`), a gain is claimed only where both agree, and a second table
checks the format: the parse rate, strict minus lenient Avg@K, cut-off rollouts and lengths.
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
FORMAT = {"parse_rate": "parse rate", "strict_minus_lenient": "strict minus lenient Avg@{k}"}
LENGTHS = {"truncated_rate": "cut off", "mean_answer_length": "tokens per answer"}
THOUGHTS = {"unclosed_rate": "unclosed thoughts", "mean_thought_length": "tokens per thought"}
"""Columns of the format check; the last two only where a run has thoughts."""


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
    explained = _explained(rows, k, runs, config) + _notes(runs, groups, allowed)
    text = "\n".join([_table(rows, k), _format_check(rows, k), explained, verdict])
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
    from neurosig.models.run_folder import RECORD

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
    from neurosig.statistics.vote_table import GRADINGS, VoteTable, graded

    votes = {
        name: VoteTable.from_rows([row for _, row in sorted(run["rows"].items()) if row["domain"] in domains])
        for name, run in runs.items()
    }
    bootstrap: Any = {"seed": config.seed, "resamples": config.resamples}
    known = [name for name in (*LENGTHS, *THOUGHTS) if all(name in own.columns for own in votes.values())]
    for name, own in votes.items():
        row = {"run": name, "scope": scope, "n": len(own), "temperature": runs[name]["config"]["temperature"]}
        for metric in (*(graded(name, grading) for grading in GRADINGS for name in METRICS), *FORMAT, *known):
            row[metric] = own.interval(metric, **bootstrap)
            for other in ("base", "control"):
                if other in runs and name not in ("base", other):
                    row[f"{metric}_vs_{other}"] = own.interval(metric, minus=votes[other], **bootstrap)
        row["mean_confidence"] = float((own.votes / own.k).mean())
        row["ece_floor"] = ece_floor(own.k, len(own))
        yield row


def _table(rows: Sequence[Mapping[str, Any]], k: str) -> str:
    """Every run under both gradings, one below the other."""
    from neurosig.statistics.vote_table import GRADINGS, graded

    head = ["scope", "run", "n", "grading", *(name for title in METRICS.values() for name in (title, "change"))]
    lines = [
        [row["scope"], f"{row['run']} (T={row['temperature']:g})", str(row["n"]), grading]
        + [cell for name in METRICS for cell in _cells(row, graded(name, grading))]
        for row in rows
        for grading in GRADINGS
    ]
    return _markdown(head, lines, k)


def _format_check(rows: Sequence[Mapping[str, Any]], k: str) -> str:
    columns = FORMAT | {name: title for name, title in LENGTHS.items() if name in rows[0]}
    if any("mean_thought_length" in row and row["mean_thought_length"].estimate for row in rows):
        columns |= THOUGHTS
    head = ["scope", "run", *(name for title in columns.values() for name in (title, "change"))]
    lines = [[row["scope"], row["run"], *(cell for name in columns for cell in _cells(row, name))] for row in rows]
    return "Format check:\n\n" + _markdown(head, lines, k)


def _cells(row: Mapping[str, Any], metric: str) -> list[str]:
    change = row.get(f"{metric}_vs_base")
    return [f"{row[metric].estimate:.3f}", "" if change is None else f"{change:+.3f}"]


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], k: str) -> str:
    titles = [title.format(k=k) for title in head]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, ["---"] * len(head), *lines))


def _explained(rows: Sequence[Mapping[str, Any]], k: str, runs: Mapping[str, Any], config: CompareConfig) -> str:
    floors = ", ".join(f"{row['ece_floor']:.3f} {row['scope']}" for row in rows if row["run"] == "base")
    text = (
        f"Change against base with its 95% paired bootstrap interval over questions ({config.resamples:,} resamples, "
        f"seed {config.seed}); K={k} rollouts per question, sampling seed {runs['base']['config']['seed']}. A "
        f"perfectly calibrated sampler would show an ECE of about {floors} at this K and n. strict: the parsed answer "
        "is the gold answer; lenient: the answer statement names the gold answer and no other possible answer.\n"
    )
    changed = [
        f"{title.format(k=k)} {row['scope']} by {change:+.3f}"
        for row in rows
        if row["run"] == "trained"
        for metric, title in FORMAT.items()
        if (change := row[f"{metric}_vs_base"]).low > 0 or change.high < 0
    ]
    if changed:
        text += (
            f"\nTraining changed the wording of the answers ({'; '.join(changed)}): part of a gain may be learned "
            "wording.\n"
        )
    return text


def _verdict(rows: Sequence[Mapping[str, Any]], k: str) -> str:
    """The closing sentence: the change under both gradings, and the change beyond the control."""
    row = next(row for row in rows if row["run"] == "trained" and row["scope"] == "in-domain")
    text = f"In-domain, training changes {_claim(row, 'avg_at_k', 'base', k)}."
    if "avg_at_k_vs_control" in row:
        avg, maj = (_claim(row, metric, "control", k) for metric in ("avg_at_k", "maj_at_k"))
        ece, lenient = row["ece_vs_control"], row["ece_lenient_vs_control"]
        text += (
            f" Against the untrained base at its best temperature, it changes {avg}, {maj}, and ECE by {ece:+.3f} "
            f"strictly and {lenient:+.3f} leniently."
        )
    return text + "\n"


def _claim(row: Mapping[str, Any], metric: str, other: str, k: str) -> str:
    """The change of a metric under both gradings, and whether it is a gain: only where the two agree."""
    changes = [row[f"{name}_vs_{other}"] for name in (metric, f"{metric}_lenient")]
    strict, lenient = map(_reading, changes)
    meaning = f"{strict} under both gradings" if strict == lenient else f"strictly {strict}, leniently {lenient}"
    return f"{METRICS[metric].format(k=k)} by {changes[0]:+.3f} strictly and {changes[1]:+.3f} leniently ({meaning})"


def _reading(interval: Interval) -> str:
    if interval.low > 0:
        return "a gain"
    return "a loss" if interval.high < 0 else "not distinguishable from zero"


if __name__ == "__main__":
    sys.exit(run_command(CompareConfig, main, presets={}, prog="python -m distill.compare"))
