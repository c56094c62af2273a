"""Grade kept rollouts again, without a model: with another parser, another merging of answers, or other gold answers.

    python -m distill.rescore runs/demo/eval/base runs/demo/eval/nopsd --answer-format short --vote-merge exact

An evaluation becomes one with the rows that `distill.evaluate` would write with these options, so `distill.compare`
reads it. A manifest gets ``answers.parquet`` (`neurosig.reread`): the answers and vote of each question, and whether
the pseudo-label changed. The command prints both readings, one below the other. A grid has `figures.grid.rescore`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from distill.evaluate import RESULTS, ROLLOUTS, SUMMARY
from neurosig.options import RereadOptions
from neurosig.runtime.cli import printable, run_command
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.questions.load import Question

logger = logging.getLogger(__name__)

ANSWERS = "answers.parquet"
SHOWN = ("avg_at_k", "maj_at_k", "ece", "avg_at_k_lenient", "maj_at_k_lenient", "ece_lenient", "parse_rate")
Graded = tuple[list[list[str]], Callable[[Path], None]]
"""Lines of the printed table, and what writes the new folder."""


@dataclass(kw_only=True)
class RescoreConfig(RereadOptions):
    """Parse, merge and grade the rollouts of finished evaluations or manifests again; no model is loaded."""

    folders: Positional[tuple[Path, ...]]
    """Evaluations of distill.evaluate by sampling, or manifests of neurosig.export."""
    questions: tuple[str, ...] = ()
    """Sources of an evaluation's questions, which may have other gold answers; default: those recorded, unchanged."""
    fields: tuple[str, ...] = ()
    """FIELD=COLUMN for columns of --questions with other names, as in neurosig.export; default: as recorded."""
    out: Path | None = None
    """Folder that gets one new folder for each given one, of the same name; default: NAME-rescored beside each."""
    overwrite: bool = False
    """Replace earlier results in the new folders."""


def main(config: RescoreConfig) -> None:
    """Grade every folder again, then write all results and print the table.

    Raises:
        UserError: A folder cannot be graded again, or its new folder exists; nothing is written then.
    """
    from neurosig.runtime.folder import output_folder

    names = [folder.resolve().name for folder in config.folders]
    outs = [
        folder.resolve().with_name(f"{name}-rescored") if config.out is None else config.out / name
        for folder, name in zip(config.folders, names, strict=True)
    ]
    for folder, out in zip(config.folders, outs, strict=True):
        if outs.count(out) > 1 or out.resolve() in [one.resolve() for one in config.folders]:
            raise UserError(f"{folder}: its new folder {out} is another's or given itself; give another --out")
        if out.exists() and any(out.iterdir()) and not config.overwrite:
            raise UserError(f"{out}: exists; give --overwrite to replace it, or another --out")
    work = [_graded(config, folder) for folder in config.folders]
    for out, (_, write) in zip(outs, work, strict=True):
        owned = (RESULTS, ROLLOUTS, SUMMARY, ANSWERS)
        with output_folder(out, finished=SUMMARY, owned=owned, resume=False, overwrite=config.overwrite):
            write(out)
    titles = ["folder", "domain", "reading", "n", *(name.replace("_at_k", "@K").replace("_", " ") for name in SHOWN)]
    for cells in [[*titles, "changed pseudo-labels"], ["---"] * 12, *(line for lines, _ in work for line in lines)]:
        print(printable(f"| {' | '.join(cells)} |"))


def _graded(config: RescoreConfig, folder: Path) -> Graded:
    from neurosig.manifest import HEADER

    if (folder / HEADER).is_file():
        return _manifest(config, folder)
    if (folder / "grid.parquet").is_file():
        raise UserError(f"{folder}: a grid; run python -m figures.grid.rescore --grid {folder}")
    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder}: no finished evaluation ({SUMMARY}) and no manifest ({HEADER}) there")
    return _evaluation(config, folder)


def _evaluation(config: RescoreConfig, folder: Path) -> Graded:
    from distill.evaluate import write_evaluation
    from distill.results import sampled_row, summarise
    from neurosig.questions.load import questions_sha256
    from neurosig.runtime.provenance import run_record
    from neurosig.sampling.rollouts import read_rollouts

    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / SUMMARY}: cannot be read ({error})") from error
    options = summary["config"]
    if options["scoring"] != "sampling":
        raise UserError(f"{folder}: scored by log-likelihood; it has no completions to parse")
    groups = read_rollouts(folder / ROLLOUTS)
    questions = _questions(config, folder, options, list(groups))
    digest = questions_sha256(questions)
    if digest != summary["questions_sha256"]:
        changed = f"{folder}: texts or gold answers of its questions are not those that were evaluated"
        if not config.questions:
            raise UserError(f"{changed} ({', '.join(options['questions'])}); name sources that have them: --questions")
        logger.warning(changed)
    reader = config.reader(summary.get("answers") or options)
    rows = [sampled_row(question, groups[question.id], reader) for question in questions]
    blocks = summarise(rows, seed=options["seed"])
    known = {name: value for name, value in reader.record().items() if name in options}
    given = {name: list(value) for name in ("questions", "fields") if (value := getattr(config, name))}
    record = {
        **summary,
        "domains": {domain: {**summary["domains"].get(domain, {}), **block} for domain, block in blocks.items()},
        "questions_sha256": digest,
        "config": {**options, **known, **given},
        "answers": reader.record(),
        "rescored": str(folder),
        "run": run_record(),
    }
    lines = [
        [str(folder), domain, reading, str(block["n"]), *(_cell(found.get(name)) for name in SHOWN), ""]
        for domain, block in blocks.items()
        for reading, found in (("recorded", summary["domains"].get(domain, {})), ("new", block))
    ]
    return lines, lambda out: write_evaluation(out, rows, groups, record)


def _questions(config: RescoreConfig, folder: Path, options: Mapping[str, Any], ids: Sequence[str]) -> list[Question]:
    from neurosig.questions.load import load_questions

    sources = list(config.questions or options["questions"])
    fields = config.fields or options.get("fields", ())
    by_id = {question.id: question for question in load_questions(sources, split=options.get("split"), fields=fields)}
    for name in ids:
        if name not in by_id or by_id[name].answer is None:
            lacks = "has no answer" if name in by_id else "is not"
            raise UserError(f'{folder}: question "{name}" {lacks} in {", ".join(sources)}; give its --questions')
    return [by_id[name] for name in ids]


def _manifest(config: RescoreConfig, folder: Path) -> Graded:
    from neurosig.manifest import read_manifest
    from neurosig.reread import parse_rate, reread
    from neurosig.runtime.files import write_atomic, write_parquet
    from neurosig.runtime.provenance import run_record

    manifest = read_manifest(folder)
    reader = config.reader(manifest.header.answers)
    rows = reread(manifest, reader)
    changed = sum(row["changed"] for row in rows) / len(rows)
    record = {"rescored": str(folder), "content_sha256": manifest.header.content_sha256, "n": len(rows)}
    record |= {"parse_rate": parse_rate(rows), "changed_pseudo_labels": changed, "answers": reader.record()}
    lines = [
        [str(folder), "", reading, str(len(rows)), *[""] * 6, f"{parse_rate(rows, column):.3f}", share]
        for reading, column, share in (("recorded", "recorded_answers", ""), ("new", "answers", f"{changed:.3f}"))
    ]

    def write(out: Path) -> None:
        write_parquet(out / ANSWERS, rows)
        write_atomic(out / SUMMARY, json.dumps({**record, "run": run_record()}, indent=1) + "\n")

    return lines, write


def _cell(value: Any) -> str:
    number = value["estimate"] if isinstance(value, dict) else value
    return "-" if number is None else f"{number:.3f}"


if __name__ == "__main__":
    sys.exit(run_command(RescoreConfig, main, presets={}, prog="python -m distill.rescore"))
