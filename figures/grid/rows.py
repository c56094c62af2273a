"""The file behind the tables of a grid, one row per run and question, and the matrices made from it.

``grid.parquet`` (or ``grid.csv``) holds these columns, and may hold more:

    method         the method; "base", "control" and the like for untrained models
    source         the domain that it was trained on; empty for untrained models
    target         the domain of the question
    seed           training seed; sampling seed for untrained models
    question_id    id of the question
    n_correct      number of right samples among the k
    k              number of samples; the same in the whole file, because the ECE depends on it
    votes          votes of the majority answer; 0 without any answer
    n_tied         number of answers tied for most votes
    n_tied_right   number of right answers among those
    n_correct_lenient, n_tied_right_lenient   the same by the lenient grading; optional
    evaluation_seed   sampling seed of the evaluation; optional, 0 where there is no such column

All but the first four and the last are columns of distill.evaluate's ``results.parquet``, whose ``domain`` is the
target. Every run answers the same questions as the base, so that every comparison is paired by question.
``layout.json`` next to it gives the order of the domains and their groups, ``{"domains": [...], "groups": {"SKE_AVG":
[...]}}``; without it the domains are in alphabetical order and there are no groups.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from figures.grid.config import BASE, METHOD_LABELS
from figures.grid.tables import METRICS, Layout, Results
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.statistics.metrics import maj_at_k
from neurosig.statistics.resampling import question_counts, resample_weights
from neurosig.statistics.significance import ece_draws, mean_draws
from neurosig.statistics.vote_table import GRADINGS, Grading, graded

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

FILES, LAYOUT = ("grid.parquet", "grid.csv"), "layout.json"
TEXT = ("method", "source", "target", "question_id")
WHOLE = ("seed", "n_correct", "k", "votes", "n_tied", "n_tied_right")
LENIENT = ("n_correct_lenient", "n_tied_right_lenient")
MOST = {"votes": "k", "n_correct": "k", LENIENT[0]: "k", "n_tied_right": "n_tied", LENIENT[1]: "n_tied"}
"""Count -> the column that it cannot exceed."""
EVALUATION_SEED = "evaluation_seed"
KEY = ("method", "source", "seed", "target", EVALUATION_SEED, "question_id")


@dataclass(frozen=True, slots=True)
class Run:
    """One model: a method trained on a source with a seed; ``source`` is empty for an untrained one."""

    method: str
    source: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.source or 'untrained'}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Answers:
    """Results of one run on the questions of one target, in the order of their ids; one column per evaluation seed.

    Attributes:
        n_correct: Right samples of the K.
        votes: Votes of the majority answer.
        majority: Accuracy of the majority vote, in expectation over ties.
    """

    n_correct: Int[np.ndarray, "questions evaluations"]
    votes: Int[np.ndarray, "questions evaluations"]
    majority: Float[np.ndarray, "questions evaluations"]


@dataclass(frozen=True, slots=True)
class Grid:
    """All runs over the same questions.

    Attributes:
        k: Samples per question.
        layout: Domains and groups.
        ids: Ids of each target's questions, sorted.
        answers: Answers of each run, by target.
        gradings: Gradings that the file can be read under.
    """

    k: int
    layout: Layout
    ids: Mapping[str, Sequence[str]]
    answers: Mapping[Run, Mapping[str, Answers]]
    gradings: tuple[Grading, ...] = ("strict",)

    @property
    def evaluations(self) -> int:
        """Evaluation seeds of the run and target that has the fewest."""
        return min(answers.votes.shape[1] for by_target in self.answers.values() for answers in by_target.values())


def find_grid(folder: Path) -> Path | None:
    """The grid's file in ``folder``; ``None`` if there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def write_grid(folder: Path, rows: Sequence[Mapping[str, Any]], layout: Layout | None = None) -> Path:
    """Check the rows and write ``grid.parquet``, and ``layout.json`` where a layout is given; returns the former.

    Raises:
        UserError: See `read_grid`.
    """
    import pyarrow
    import pyarrow.parquet

    path = folder / FILES[0]
    if not rows:
        raise UserError(f"{path}: no rows to write")
    folder.mkdir(parents=True, exist_ok=True)
    table = _checked(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    if layout is not None:
        write_atomic(folder / LAYOUT, json.dumps(asdict(layout), indent=1) + "\n")
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    write_atomic(path, buffer.getvalue())
    return path


def evaluation_rows(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Rows of `write_grid` from a finished evaluation of ``run``, the folder of a `distill.evaluate`.

    Raises:
        UserError: There is no finished evaluation by sampling.
    """
    from distill.evaluate import read_sampled

    summary, rows, _ = read_sampled(folder)
    known = run_columns(run, summary)
    return sampled_grid_rows([{**row, **known, "target": row["domain"]} for row in rows])


def run_columns(run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that name a run and its evaluation, but for the target."""
    seeds = {"seed": run.seed, EVALUATION_SEED: summary["config"]["seed"]}
    return {"method": run.method, "source": run.source, **seeds}


def sampled_grid_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The columns of `write_grid` of rows of `distill.results.sampled_row` with those of `run_columns` and
    ``target``."""
    return [{name: row[name] for name in (*TEXT, *WHOLE, *LENIENT, EVALUATION_SEED)} for row in rows]


def read_grid(folder: Path, grading: Grading = "strict") -> Grid:
    """Read ``grid.parquet`` or ``grid.csv`` of ``folder``. A run that lacks a target is left out, with a warning.

    Raises:
        UserError: The file is missing; a column is missing or of the wrong type; a count is out of range; a question
            appears twice in a run; there are several K, or no base; a run has other questions than the base; the
            layout lacks a domain; the grid was not graded like this.
    """
    path = find_grid(folder)
    if path is None:
        raise UserError(f"{folder}: neither {' nor '.join(FILES)} there; run figures.grid --out {folder}")
    table = _checked(_load(path), path)
    gradings = tuple(name for name in GRADINGS if graded("n_correct", name) in table.column_names)
    if grading not in gradings:
        raise UserError(f"{path}: no {grading} grades; grade its kept texts again with figures.grid.rescore")
    answers, ids = _split(table, path, grading)
    layout = _layout(folder, sorted(set(table["target"].to_pylist())))
    base_ids: dict[str, Sequence[str]] = {}
    for run in (run for run in answers if run.method == BASE and not run.source):
        base_ids |= {target: ids[run][target] for target in answers[run]}
    for domain in layout.domains:
        if domain not in base_ids:
            raise UserError(f'{path}: no rows of method "{BASE}" for {domain}; evaluate the untrained model on it')
    untrained = {run.method for run in answers if not run.source}
    complete = {}
    for run, by_target in answers.items():
        if run.source and run.method in untrained:
            raise UserError(
                f'{path}: {run}: other rows of "{run.method}" have no source; give every trained run its own'
            )
        for target in by_target:
            if target not in layout.domains or run.source not in ("", *layout.domains):
                unknown = target if target not in layout.domains else run.source
                raise UserError(f'{path}: {run}: "{unknown}" is not among {", ".join(layout.domains)}')
            if ids[run][target] != base_ids[target]:
                raise UserError(
                    f"{path}: {run}: not the questions that the base answers in {target} ({len(ids[run][target])} "
                    f"against {len(base_ids[target])}); evaluate both on the same set"
                )
        missing = [domain for domain in layout.domains if domain not in by_target]
        if missing:
            logger.warning("%s: %s: no rows for %s; left out of the tables", path, run, ", ".join(missing))
        else:
            complete[run] = by_target
    questions = {domain: base_ids[domain] for domain in layout.domains}
    return Grid(int(table["k"][0].as_py()), layout, questions, complete, gradings)


def grid_results(grid: Grid, *, resamples: int = 2000, seed: int = 0) -> dict[str, Results]:
    """Matrices of every metric of `METRICS`, with bootstrap draws.

    One draw takes questions with replacement in every target, the same for all runs, and for every method and source
    takes training seeds with replacement. So any two cells are paired, and a mean over cells has the interval of that
    mean. With few seeds the intervals can be too narrow: `figures.grid.coverage.coverage_text` measures it. Evaluation
    seeds are averaged: the mean of their scores, each of K samples, never one score of more samples.

    Args:
        grid: The runs.
        resamples: Number of draws.
        seed: Seed of the draws.

    Raises:
        UserError: A target has fewer than two questions.
    """
    runs = list(grid.answers)
    domains = grid.layout.domains
    values = {name: np.empty((len(runs), len(domains), resamples + 1)) for name in METRICS}
    for index, domain in enumerate(domains):
        answers = [grid.answers[run][domain] for run in runs]
        share = np.stack([answer.n_correct.mean(axis=1) / grid.k for answer in answers], axis=1)
        majority = np.stack([answer.majority.mean(axis=1) for answer in answers], axis=1)
        votes = np.concatenate([answer.votes for answer in answers], axis=1)
        right = np.concatenate([answer.majority for answer in answers], axis=1)
        sizes = [answer.votes.shape[1] for answer in answers]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        observed = np.ones((1, len(share)), dtype=np.int64)
        start = 0
        for counts in chain([observed], question_counts(len(share), resamples, seed=[seed, index])):
            rows = slice(start, start + len(counts))
            values["avg_at_k"][:, index, rows] = mean_draws(share, counts).T
            values["maj_at_k"][:, index, rows] = mean_draws(majority, counts).T
            each = ece_draws(votes, grid.k, right, counts).T  # of K votes each: pooled votes would be a larger K
            values["ece"][:, index, rows] = np.add.reduceat(each, starts) / np.array(sizes)[:, None]
            start += len(counts)
    cells: dict[tuple[str, str], list[int]] = {}
    for index, run in enumerate(runs):
        cells.setdefault((run.method, run.source), []).append(index)
    weights = _seed_weights(cells, resamples, [seed, len(domains)])
    return {name: _results(name, grid, values[name], cells, weights) for name in METRICS}


def _load(path: Path) -> pyarrow.Table:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        types = {name: pyarrow.string() for name in TEXT} | {name: pyarrow.int64() for name in WHOLE}
        return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{path}: cannot be read ({error})") from error


def _checked(table: pyarrow.Table, path: Path) -> pyarrow.Table:
    """The known columns in their types, sorted by `KEY`; every row is checked by itself."""
    import pyarrow
    import pyarrow.compute

    for name in (*TEXT, *WHOLE):
        if name not in table.column_names:
            raise UserError(f'{path}: no column "{name}"; see figures.grid.rows for the {len(TEXT + WHOLE)} it needs')
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows")
    if EVALUATION_SEED not in table.column_names:
        table = table.append_column(EVALUATION_SEED, pyarrow.array([0] * table.num_rows))
    columns = {}
    for name in (*TEXT, *WHOLE, *(LENIENT if set(LENIENT) <= set(table.column_names) else ()), EVALUATION_SEED):
        try:
            column = table[name].cast(pyarrow.string() if name in TEXT else pyarrow.int64())
        except (ValueError, NotImplementedError) as error:  # of pyarrow, both
            raise UserError(
                f'{path}: column "{name}" is not {"text" if name in TEXT else "whole"} ({error})'
            ) from error
        if name == "source":
            column = pyarrow.compute.fill_null(column, "")
        elif column.null_count:
            raise UserError(f'{path}: column "{name}" has {column.null_count} rows without a value')
        columns[name] = column
    count = {name: column.to_numpy() for name, column in columns.items() if name not in TEXT}
    ranges = [(name, most) for name, most in MOST.items() if name in count]
    for reason, wrong in (
        *((f"{name} is not between 0 and {m}", (count[name] < 0) | (count[name] > count[m])) for name, m in ranges),
        ("k differs from the first row's; evaluate all with the same --num-generations", count["k"] != count["k"][0]),
        ("k is below 1", count["k"] < 1),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(f"{path}: row {row + 1} (question {columns['question_id'][row]}): {reason}")
    return pyarrow.table(columns).sort_by([(name, "ascending") for name in KEY])


def _split(
    table: pyarrow.Table, path: Path, grading: Grading
) -> tuple[dict[Run, dict[str, Answers]], dict[Run, dict[str, Sequence[str]]]]:
    """Answers and question ids of each run, by target; methods in the order of `METHOD_LABELS`."""
    key = {name: table[name].to_numpy() for name in KEY}
    names = (graded("n_correct", grading), "votes", graded("n_tied_right", grading), "n_tied")
    n_correct, votes, n_tied_right, n_tied = (table[name].to_numpy() for name in names)
    new = np.zeros(len(key["question_id"]), dtype=bool)
    for name in KEY[:-1]:
        new[1:] |= key[name][1:] != key[name][:-1]
    twice = ~new[1:] & (key["question_id"][1:] == key["question_id"][:-1])
    if twice.any():
        row = int(np.argmax(twice))
        run = Run(key["method"][row], key["source"][row], int(key["seed"][row]))
        raise UserError(f'{path}: {run}: question "{key["question_id"][row]}" of {key["target"][row]} appears twice')
    edges = [0, *np.flatnonzero(new).tolist(), len(new)]
    answers: dict[Run, dict[str, Answers]] = {}
    ids: dict[Run, dict[str, Sequence[str]]] = {}
    for start, end in pairwise(edges):
        run, target = Run(key["method"][start], key["source"][start], int(key["seed"][start])), key["target"][start]
        rows = slice(start, end)
        majority = maj_at_k(n_tied_right[rows], n_tied[rows])
        parts = [part[:, None] for part in (n_correct[rows], votes[rows], majority)]
        question_ids = key["question_id"][rows].tolist()
        earlier = answers.setdefault(run, {}).get(target)
        if earlier is not None:
            if ids[run][target] != question_ids:
                raise UserError(
                    f"{path}: {run}: evaluation seed {key[EVALUATION_SEED][start]} answers other questions of {target} "
                    "than its earlier seeds; evaluate all on the same set"
                )
            before = (earlier.n_correct, earlier.votes, earlier.majority)
            parts = [np.concatenate(pair, axis=1) for pair in zip(before, parts, strict=True)]
        answers[run][target] = Answers(*parts)
        ids.setdefault(run, {})[target] = question_ids
    order = [*METHOD_LABELS, *sorted({run.method for run in answers} - set(METHOD_LABELS))]
    return dict(sorted(answers.items(), key=lambda item: order.index(item[0].method))), ids


def _layout(folder: Path, targets: Sequence[str]) -> Layout:
    from pydantic import TypeAdapter, ValidationError

    path = folder / LAYOUT
    if not path.is_file():
        return Layout(tuple(targets))
    try:
        return TypeAdapter(Layout).validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no layout: {error}") from error


def _seed_weights(
    cells: Mapping[tuple[str, str], Sequence[int]], resamples: int, seed: Sequence[int]
) -> dict[tuple[str, str], Float[np.ndarray, "seeds draws"]]:
    """Weight of each training seed in each draw; equal in the first, which is the data itself."""
    rng = np.random.default_rng(seed)
    weights = {}
    for cell, runs in cells.items():
        n = len(runs)
        drawn = resample_weights(n, resamples, rng)
        weights[cell] = np.concatenate([np.full((1, n), 1 / n), drawn]).T
    return weights


def _results(
    name: str,
    grid: Grid,
    values: Float[np.ndarray, "runs targets draws"],
    cells: Mapping[tuple[str, str], Sequence[int]],
    weights: Mapping[tuple[str, str], Float[np.ndarray, "seeds draws"]],
) -> Results:
    domains, metric = grid.layout.domains, METRICS[name]
    untrained: dict[str, Float[np.ndarray, "targets draws"]] = {}
    trained: dict[str, Float[np.ndarray, "sources targets draws"]] = {}
    seeds: dict[str, int] = {}
    for (method, source), runs in cells.items():
        mean = metric.scale * np.einsum("std,sd->td", values[runs], weights[method, source])
        if source:
            empty = np.full((len(domains), *mean.shape), np.nan)
            trained.setdefault(method, empty)[domains.index(source)] = mean
            seeds[method] = min(len(runs), seeds.get(method, len(runs)))
        else:
            untrained[method] = mean
    questions = [len(grid.ids[domain]) for domain in domains]
    return Results(
        replace(metric, title=metric.title.format(k=grid.k)),
        grid.layout,
        untrained,
        trained,
        seeds,
        questions,
        grid.evaluations,
    )
