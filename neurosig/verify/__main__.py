"""Check a folder of results against its own records: hashes, votes, aggregates, and what was made from what.

    python -m neurosig.verify runs/demo

Finds every manifest, training run, evaluation, comparison and grid in the folder. Files must match their recorded
hashes, votes and aggregates must follow from their rows, and a training run's manifest, an evaluation's adapter and a
comparison's evaluations must be in the folder. One line per check, "skip" without its files; exit code 2 if one fails.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from neurosig.neurons.config import neuron_name
from neurosig.runtime.cli import CommonConfig, printable, run_command, untimed
from neurosig.runtime.errors import UserError
from neurosig.verify import SKIPPED
from neurosig.verify.adapters import adapter_problem, another

logger = logging.getLogger(__name__)

Check = tuple[str, str]
"""Name of a check and its problem: empty if there is none, "skipped: ..." if it could not be made."""
LEFT_OUT = {".work", "checkpoints", "adapter", "model", ".final"}


@dataclass(kw_only=True)
class VerifyConfig(CommonConfig):
    """Check everything in a results folder against its records."""

    folder: Positional[Path]
    """A manifest, a training run, an evaluation, a grid, or a folder that holds several."""


@dataclass
class Found:
    """Records of everything in the folder, for checks between them."""

    manifests: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Content hash -> header."""
    runs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Hash of a weights file -> the training record it belongs to."""
    evaluations: dict[Path, list[Mapping[str, Any]]] = field(default_factory=dict)
    """Folder -> rows."""
    hashes: dict[Path, Mapping[str, str]] = field(default_factory=dict)
    """Folder -> hashes of an evaluation's summary.json and results.parquet."""


def main(config: VerifyConfig) -> None:
    """Run every check and print it."""
    if not config.folder.is_dir():
        raise UserError(f"{config.folder}: no such folder")
    logging.getLogger("neurosig.questions.load").setLevel(logging.WARNING)  # no log line per question set
    found, failed, done = Found(), [], 0
    kinds: tuple[tuple[str, Callable[[Path, Found], Iterator[Check]]], ...] = (
        ("manifest.json", check_manifest),
        ("train.json", check_training),
        ("manifest.json", check_manifest_adapter),
        ("summary.json", check_evaluation),
        ("comparison.json", check_comparison),
        ("grid.json", check_grid),
    )
    folders = list(_folders(config.folder))
    for marker, check in kinds:
        for folder in folders:
            if not (folder / marker).is_file():
                continue
            name = str(folder.relative_to(config.folder)) if folder != config.folder else "."
            for what, problem in _guarded(check, folder, found):
                done += 1
                state = "ok" if not problem else "skip" if problem.startswith(SKIPPED) else "FAIL"
                print(f"{state:<5} {printable(name)}: {what}{printable(': ' + problem) if problem else ''}")
                if state == "FAIL":
                    failed.append(f"{name}: {what}")
    if not done:
        raise UserError(f"{config.folder}: no manifest, training run, evaluation or grid in it")
    if failed:
        raise UserError(f"{len(failed)} of {done} checks failed, the first is {failed[0]}; do not use these results")
    logger.info("%d checks, none failed", done)


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        if inside.name not in LEFT_OUT or (inside / "manifest.json").is_file():
            yield from _folders(inside)


def _guarded(check: Callable[[Path, Found], Iterator[Check]], folder: Path, found: Found) -> Iterator[Check]:
    """The checks of a folder; a record that cannot be read ends them with a failed one."""
    try:
        yield from check(folder, found)
    except UserError as error:
        yield "readable", str(error)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        yield "readable", f"not what this version writes ({type(error).__name__}: {error})"


# manifests


def check_manifest(folder: Path, found: Found) -> Iterator[Check]:
    """Files, rows and contexts (`neurosig.manifest.read_manifest`), then votes, counts, signals and neurons."""
    from neurosig.manifest import read_manifest
    from neurosig.verify.functions import function_checks
    from neurosig.verify.recomputed import lengths_problem, votes_problem

    manifest = read_manifest(folder)
    header = manifest.header
    found.manifests[header.content_sha256] = header.model_dump()
    own = sum(row.privileged_context is not None for row in manifest.rows)
    privileged = f", {own} of them privileged_context of the question file" if own else ""
    yield f"{len(header.files)} files as hashed, {len(manifest.rows)} questions and their contexts{privileged}", ""
    yield "answers and votes follow from the rollouts", votes_problem(manifest)
    reasons = Counter(row.reason for row in manifest.rows)
    counts = {"questions": len(manifest.rows), **{str(reason): count for reason, count in reasons.items()}}
    yield "counts by reason", "" if counts == header.counts else f"{header.counts}, the rows say {counts}"
    yield "lengths of the rollouts", lengths_problem(manifest)
    yield from function_checks(header)
    gold = {"answer", "aliases", "gold", "answers_gold", "answerKey"} & set(_keys(folder / "manifest.json"))
    yield "no gold answer in it", f"manifest.json has the field {min(gold)}" if gold else ""
    yield "signals and neurons", _signals_problem(folder, len(manifest.rollouts))
    record = folder / "run.json"
    run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    yield "versions on record", _versions_problem(run) if run else f"{SKIPPED}no run.json"


def check_manifest_adapter(folder: Path, found: Found) -> Iterator[Check]:
    """The adapter of the model that made a manifest, once the training runs are known."""
    header = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if digest := header["model"].get("adapter"):
        problem = adapter_problem(digest, header["model"]["weights"], header["options"].get("adapter"), found.runs)
        yield "made by the adapter in the folder", problem


def _keys(path: Path) -> Iterator[str]:
    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
            value = list(value.values())
        for inside in value if isinstance(value, list) else ():
            yield from walk(inside)

    return walk(json.loads(path.read_text(encoding="utf-8")))


def _signals_problem(folder: Path, rollouts: int) -> str:
    """Read apart from `neurosig.exported`: verifying needs no analysis library and no tensor in memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "signals.safetensors", framework="numpy") as stored:
            sites = json.loads((stored.metadata() or {})["sites"])
            sizes = {name: stored.get_slice(name).get_shape()[0] for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        return f"signals.safetensors: {error}"
    if set(sizes.values()) != {rollouts}:
        return f"signals.safetensors: {sizes} rows for {rollouts} rollouts"
    seen = set()
    with (folder / "neurons.csv").open(newline="", encoding="utf-8") as handle:
        for number, row in enumerate(csv.DictReader(handle), start=2):
            role, layer, index = row.get("role", "hallucination"), int(row["layer"]), int(row["index"])
            number_of, name = {"hallucination": "weight", "pattern": "q"}.get(role), neuron_name(layer, index)
            if number_of is None:
                return f"neurons.csv:{number}: no role {role}; expected hallucination or pattern"
            if not (0 <= layer < sites["n_layers"] and 0 <= index < sites["d_mlp"]):
                return f"neurons.csv:{number}: no neuron {name}; the model has {sites}"
            if (role, layer, index) in seen or not math.isfinite(float(row[number_of])):
                return f"neurons.csv:{number}: neuron {name} appears twice or has no finite {number_of}"
            seen.add((role, layer, index))
    return ""


def _versions_problem(run: Mapping[str, Any]) -> str:
    lacking = [name for name in ("version", "python", "libraries", "command") if not run.get(name)]
    lacking += [f"libraries.{name}" for name in ("torch", "transformers") if not run.get("libraries", {}).get(name)]
    return f"the record lacks {', '.join(lacking)}" if lacking else ""


# training runs


def check_training(folder: Path, found: Found) -> Iterator[Check]:
    """Weights against their record, the record against the metrics, and the manifest it was trained on."""
    from neurosig.runtime.files import sha256_file

    record = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    name = "model" if record["config"].get("full") else "adapter"
    problem = ""
    for file, digest in record["weights"].items():
        found.runs[digest] = record
        path = folder / name / file
        if not path.is_file() or sha256_file(path) != digest:
            problem = f"{name}/{file} is {'changed' if path.is_file() else 'missing'}"
    stray = {path.name for path in (folder / name).glob("*.safetensors")} - set(record["weights"])
    yield f"weights in {name}/ as hashed", problem or (f"{name}/{min(stray)} is not on record" if stray else "")
    copy = folder / name / "train.json"
    if copy.is_file():
        same = json.loads(copy.read_text(encoding="utf-8")) == record
        yield "the record next to the weights is the same", "" if same else f"{name}/train.json differs from train.json"
    if (folder / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        yield f"{len(lines)} steps of metrics", _metrics_problem(lines, record)
    for state in sorted(folder.glob("checkpoints/step-*/state.json")):
        hashes = json.loads(state.read_text(encoding="utf-8"))["sha256"]
        changed = [file for file, digest in hashes.items() if sha256_file(state.parent / file) != digest]
        found.runs[hashes["weights.safetensors"]] = record
        yield f"checkpoint {state.parent.name} as hashed", f"{', '.join(changed)} changed" if changed else ""
    named = record["config"]["manifest"]
    hashes = [one["sha256"] for one in record.get("manifests", [])] or [record["manifest_sha256"]]
    for digest, place in zip(hashes, [named] if isinstance(named, str) else named, strict=True):
        yield from _manifest_check(digest, Path(place), record, found)
    yield "versions on record", _versions_problem(record["run"])


def _manifest_check(digest: str, place: Path, record: Mapping[str, Any], found: Found) -> Iterator[Check]:
    """Whether a manifest that was trained on is at hand, and made by the model and adapter that training began with."""
    header = found.manifests.get(digest)
    if header is None:
        there = place / "manifest.json"
        header = json.loads(there.read_text(encoding="utf-8")) if there.is_file() else None
        if header is None or header["content_sha256"] != digest:
            others = [header["content_sha256"]] if header is not None else list(found.manifests)
            yield "trained on the manifest in the folder", another("manifest", digest, others)
            return
    made, began = ((model["weights"], model.get("adapter")) for model in (header["model"], record["model"]))
    allowed = record["config"].get("allow_model_mismatch")
    problem = "another model" if made[0] != began[0] else "another adapter" if made[1] != began[1] else ""
    yield "trained on the manifest and the model that made it", "" if allowed else problem


def _metrics_problem(lines: list[dict[str, Any]], record: Mapping[str, Any]) -> str:
    lines = [untimed(line) for line in lines]
    if not lines or lines[0] != record["first"] or record["last"] not in lines:
        return "the first or last step is not that of train.json"
    earlier = {"step": (record.get("stopped") or {}).get("weights_of_step", len(lines))}  # of an earlier version
    kept = record.get("kept", earlier)["step"]
    if record["last"]["step"] != kept:
        return f"train.json describes step {record['last']['step']}, its weights are those of step {kept}"
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        return "steps are missing or out of order"
    bad = next((line["step"] for line in lines if not math.isfinite(line.get("loss") or 0.0)), None)
    return f"the loss of step {bad} is not finite" if bad else ""


# evaluations and what is made of them


def check_evaluation(folder: Path, found: Found) -> Iterator[Check]:
    """Rows against rollouts (and gold answers, where the questions are at hand), aggregates against rows."""
    import pyarrow.parquet

    from neurosig.questions.load import load_questions
    from neurosig.questions.reader import AnswerReader
    from neurosig.registry import MissingFunction
    from neurosig.runtime.files import sha256_file
    from neurosig.verify.recomputed import aggregates, choice_aggregates, choice_row_problem, difference, row_problem

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = summary["config"]
    rows = pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()
    sampled = config["scoring"] == "sampling"
    if sampled:
        found.evaluations[folder.resolve()] = rows
        found.hashes[folder.resolve()] = {
            name: sha256_file(folder / name) for name in ("summary.json", "results.parquet")
        }
    rollouts: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines():
        rollout = json.loads(line)
        rollouts.setdefault(rollout["question_id"], []).append(rollout)
    try:
        read = load_questions(config["questions"], split=config.get("split"), fields=config.get("fields", ()))
        gold = {question.id: question for question in read}
    except UserError:
        gold = {}
    known = all(row["question_id"] in gold for row in rows)
    problem_of: Callable[..., str] = row_problem if sampled else choice_row_problem
    try:
        form = AnswerReader.from_record(summary["answers"]) if sampled else config["choice_form"]
        problems = (
            (name, problem_of(row, rollouts.get(name, []), gold.get(name), form))
            for row in rows
            for name in [row["question_id"]]
        )
        wrong = next((f'question "{name}": {problem}' for name, problem in problems if problem), "")
        if sampled and not form.is_of(summary["answers"]):
            wrong = f"{SKIPPED}another version of the parser read them"
    except MissingFunction as error:
        wrong = f"{SKIPPED}{error}"
    missing = (
        ""
        if set(rollouts) == {row["question_id"] for row in rows}
        else "rollouts and rows belong to different questions"
    )
    yield f"{len(rows)} rows follow from the rollouts" + (" and the gold answers" if known else ""), wrong or missing
    for domain in dict.fromkeys(row["domain"] for row in rows):
        domain_rows = [row for row in rows if row["domain"] == domain]
        expected = (aggregates if sampled else choice_aggregates)(domain_rows, seed=config["seed"])
        stated = summary["domains"].get(domain)
        yield f"aggregates of {printable(domain)} follow from the rows", difference(expected, stated)
    digest = summary["adapter_sha256"]
    if digest is not None:
        problem = adapter_problem(digest, summary["model"]["weights"], config["adapter"], found.runs)
        yield "made by the adapter in the folder", problem
        yield from _prompt_check(summary, found.runs.get(digest, {}))
    yield "versions on record", _versions_problem(summary["run"])


def _prompt_check(summary: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Check]:
    """Whether the questions were asked, and answers read, as in training."""
    from neurosig.runtime.provenance import differences, explain

    trained = {name: value for name, value in run.get("prompt", {}).items() if name != "template"}
    if trained:
        evaluated = {name: summary["config"].get(name) for name in trained}
        hashes = ({"template": record["model"]["chat_template_sha256"]} for record in (run, summary))
        pairs = differences(trained, evaluated) | differences(*hashes)
        yield "asked as the adapter was trained", explain(pairs, "in training", "here")


def check_comparison(folder: Path, found: Found) -> Iterator[Check]:
    """The estimates of ``distill.compare`` against the rows of the evaluations it compares."""
    from neurosig.verify.recomputed import difference, estimates

    record = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    for run, hashes in record.get("sha256", {}).items():
        yield f"{run}: the evaluation that was compared", _compared_problem(Path(record["folders"][run]), hashes, found)
    for row in record["rows"]:
        rows = _evaluation(Path(record["folders"][row["run"]]), found)
        what = f"{row['run']}, {row['scope']}: Avg@K, maj@K and ECE follow from the rows"
        if rows is None:
            yield what, f"{SKIPPED}its evaluation is not here"
            continue
        computed = estimates([one for one in rows if one["domain"] in record["domains"][row["scope"]]])
        stated = {name: {"estimate": value} for name, value in computed.items() if name != "n"}
        yield what, difference({"n": computed["n"], **stated}, row)


def _compared_problem(recorded: Path, hashes: Mapping[str, str], found: Found) -> str:
    if hashes in found.hashes.values():
        return ""
    place = _place(recorded, found)
    if place is None:
        return another(
            "evaluation", hashes["results.parquet"], [kept["results.parquet"] for kept in found.hashes.values()]
        )
    changed = [name for name, digest in hashes.items() if found.hashes[place][name] != digest]
    return f"{', '.join(changed)} changed after the comparison, or of another evaluation"


def _evaluation(recorded: Path, found: Found) -> list[Mapping[str, Any]] | None:
    """Rows of the evaluation at its recorded place or, where results were moved, of the only one with its name."""
    place = _place(recorded, found)
    return None if place is None else found.evaluations[place]


def _place(recorded: Path, found: Found) -> Path | None:
    if recorded.resolve() in found.evaluations:
        return recorded.resolve()
    named = [folder for folder in found.evaluations if folder.name == recorded.name]
    return named[0] if len(named) == 1 else None


def check_grid(folder: Path, found: Found) -> Iterator[Check]:
    """The rows of ``results.csv`` against the evaluations of its cells."""
    from neurosig.verify.recomputed import difference, estimates

    if not (folder / "results.csv").is_file():
        yield "results.csv", f"{SKIPPED}not collected yet"
        return
    with (folder / "results.csv").open(newline="", encoding="utf-8") as handle:
        lines = list(csv.DictReader(handle))
    for line in lines:
        name = f"{line['method']}--{line['source']}--seed{line['seed']}" if line["source"] else line["method"]
        cells = sorted(folder.glob("cells/control-T*")) if name == "control" else [folder / "cells" / name]
        drawn = line.get("evaluation_seed") or "0"
        target = line["target"] + ("" if drawn == "0" else f"--seed{drawn}")
        evaluations = (found.evaluations.get((cell / "eval" / target).resolve()) for cell in cells)
        problems = []
        for rows in filter(None, evaluations):
            computed = {metric: float(f"{value:.6g}") for metric, value in estimates(rows).items() if metric in line}
            problems.append(difference(computed, {metric: float(line[metric]) for metric in computed}))
        problem = "" if "" in problems else (problems or [f"{SKIPPED}its evaluation is not here"])[-1]
        yield f"{name} on {target} as its cell says", problem


if __name__ == "__main__":
    sys.exit(run_command(VerifyConfig, main, presets={}, prog="python -m neurosig.verify"))
