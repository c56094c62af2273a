"""The texts behind a grid's tables, and the tables' rows computed again from them.

``rollouts.parquet`` has one row per rollout: the columns of `figures.grid.rows.KEY`, ``rollout_id``, ``text`` and
``finish_reason``. ``questions.jsonl`` has the questions with their gold answers, ``reader.json`` how the answers were
read. The grid in ``figures/data/grid`` was run before texts were kept, so its numbers cannot be computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from figures.grid.config import BASE, method_label
from figures.grid.rows import KEY
from figures.sources import question_lines
from neurosig.options import RereadOptions
from neurosig.questions.load import Question, load_questions, questions_sha256
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic, write_parquet
from neurosig.sampling.rollouts import Rollout, read_rollouts
from neurosig.statistics.metrics import paired_mean_interval
from neurosig.statistics.vote_table import VoteTable

ROLLOUTS, QUESTIONS, READER = FILES = ("rollouts.parquet", "questions.jsonl", "reader.json")
CHECKED = ("parse_rate", "strict_minus_lenient")


def rollout_rows(folder: Path, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``rollouts.parquet`` from a finished evaluation; ``known`` are the columns of its run and target."""
    return [
        {**known, **{name: getattr(rollout, name) for name in ("question_id", "rollout_id", "text", "finish_reason")}}
        for group in read_rollouts(folder / "rollouts.jsonl").values()
        for rollout in group
    ]


def write_texts(out: Path, rows: Sequence[Mapping[str, Any]], evaluations: Iterable[Path]) -> None:
    """Write the three files.

    Args:
        out: Folder of the grid.
        rows: See `rollout_rows`.
        evaluations: One evaluation per target, whose questions and reader are those of all runs.

    Raises:
        UserError: The questions are not here, or have changed.
    """
    questions: dict[str, Question] = {}
    summary: dict[str, Any] = {}
    for folder in evaluations:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        questions |= {one.id: one for one in evaluated_questions(folder)}
    write_parquet(out / ROLLOUTS, sorted(rows, key=_key), compression="zstd")
    write_atomic(out / QUESTIONS, question_lines(questions.values()))
    write_atomic(out / READER, json.dumps(summary["answers"], indent=1) + "\n")


def evaluated_questions(folder: Path) -> list[Question]:
    """The questions of an evaluation, with their gold answers.

    Raises:
        UserError: They are not here, or have changed.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    options = summary["config"]
    read = load_questions(options["questions"], split=options["split"], fields=options.get("fields", ()))
    known = {one.id: one for one in read}
    evaluated = [known[name] for name in read_rollouts(folder / "rollouts.jsonl") if name in known]
    if questions_sha256(evaluated) != summary["questions_sha256"]:
        sources = ", ".join(options["questions"])
        raise UserError(f"{folder}: {sources} changed after it was evaluated; restore the file, or evaluate again")
    return evaluated


def reread_grid(folder: Path, options: RereadOptions) -> list[dict[str, Any]]:
    """Rows of `distill.results.sampled_row` for all runs, with ``method``, ``source``, ``seed`` and ``target``.

    Raises:
        UserError: The texts were not kept, or the reader is not here.
    """
    import pyarrow.parquet

    from distill.results import sampled_row

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: no {missing[0]}; this grid was collected before texts were kept, so it cannot be read again: "
            f"run figures.grid --out {folder}"
        )
    reader = options.reader(json.loads((folder / READER).read_text(encoding="utf-8")))
    questions = {question.id: question for question in load_questions(folder / QUESTIONS)}
    rows = []
    for key, texts in groupby(
        pyarrow.parquet.read_table(folder / ROLLOUTS).to_pylist(), key=lambda row: _key(row)[:-1]
    ):
        run = dict(zip(KEY[:-1], key, strict=False))
        group = [Rollout(one["question_id"], one["rollout_id"], one["text"], (), one["finish_reason"]) for one in texts]
        rows.append({**sampled_row(questions[key[-1]], group, reader), **run})
    return rows


def format_check(rows: Sequence[Mapping[str, Any]]) -> str:
    """Parse rate and strict minus lenient Avg@K of every method, and their changes against the base, as Markdown.

    A question's value is its mean over seeds and sources; the intervals are paired over questions.

    Args:
        rows: Rows of `distill.results.sampled_row` with ``method``, ``source``, ``seed`` and ``target``.
    """
    import pandas as pd

    frame = pd.DataFrame([dict(row) for row in rows])
    table = VoteTable.from_rows(rows)
    frame = frame.assign(**{name: table[name] for name in CHECKED})
    place = ["target", "question_id"]
    base = frame[frame["method"] == BASE].groupby(place)[list(CHECKED)].mean()
    lines = [
        "| method | eval | parse rate | change | strict minus lenient Avg@K | change |",
        "|---|---|---|---|---|---|",
    ]
    cells = [f"{base[name].mean():.3f} | " for name in CHECKED]
    lines.append(f"| {method_label(BASE)} |  | {' | '.join(cells)} |")
    changed = []
    trained = frame[frame["source"] != ""]
    for method in dict.fromkeys(trained["method"]):
        for scope, inside in (("in", True), ("cross", False)):
            own = trained[(trained["method"] == method) & ((trained["source"] == trained["target"]) == inside)]
            own = own.groupby(place)[list(CHECKED)].mean().sort_index()
            own = own[own.index.isin(base.index)]
            if len(own) < 2:
                continue
            other = base.loc[own.index]
            intervals = {
                name: paired_mean_interval(own[name].to_numpy(), other[name].to_numpy(), seed=0) for name in CHECKED
            }
            cells = [f"{own[name].mean():.3f} | {interval:+.3f}" for name, interval in intervals.items()]
            lines.append(f"| {method_label(method)} | {scope} | {' | '.join(cells)} |")
            if any(interval.low > 0 or interval.high < 0 for interval in intervals.values()):
                changed.append(f"{method_label(method)} ({scope})")
    text = "\n".join(lines) + "\n"
    if changed:
        text += f"\nTraining changed the wording of the answers: {', '.join(changed)}; part of a gain may be that.\n"
    return text


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(row[name] for name in KEY), row["rollout_id"])
