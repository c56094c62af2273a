"""A finished export as DataFrames, read without a model and without torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from neurosig.manifest import SIGNALS, QuestionRow
from neurosig.neurons.config import neuron_name
from neurosig.report.words import MEANING
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.exported import Exported

MOST_ROWS = 100
"""Rows that a page shows of a table."""
REASONS: Mapping[str, str] = {
    "too_long": "too long for the model",
    "no_parse": "no answer could be read",
    "tie": "vote tied",
    "low_agreement": "too few rollouts agree",
    "cut_off": "no finished rollout with the majority answer",
    "score": "{score} {side}",
    "hallucination": "{score} {side}",
    "rejected": "rejected by the filter",
    "no_context": "no demonstration fits",
}
"""A manifest's ``reason`` in words that judge no answer; ``selected`` is its own."""


class Table(pd.DataFrame):
    """A DataFrame that a notebook shows with its long texts wrapped and its names explained; the data stay whole.

    It escapes texts, needs no style sheet, and scrolls inside its own box. At most `MOST_ROWS` rows are shown.
    """

    @property
    def _constructor(self) -> Callable[..., Table]:
        return Table

    def _repr_html_(self) -> str:
        from neurosig.views.html import render

        return render("table", _Shown(pd.DataFrame(self)))


class _Shown:
    """What the template shows of a table."""

    def __init__(self, frame: pd.DataFrame) -> None:
        plain = isinstance(frame.index, pd.RangeIndex) and frame.index.name is None
        table = frame.head(MOST_ROWS)
        table = table if plain else table.reset_index(allow_duplicates=True)
        self.columns = [_header(name) for name in table.columns]
        self.rows = [[_cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
        self.left_out = len(frame) - len(table)
        cells = {text for row in self.rows for is_number, text in row if not is_number and text in MEANING}
        known = [name for name in self.columns if name in MEANING] + sorted(cells)
        self.words = [(name, MEANING[name]) for name in dict.fromkeys(known)]


def _header(name: Hashable) -> str:
    return " ".join(map(str, name)).strip() if isinstance(name, tuple) else str(name)


def _cell(value: Any) -> tuple[bool, str]:
    """Whether a cell holds a number, and its text."""
    if isinstance(value, bool | np.bool_):
        return False, "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return True, str(value)
    if isinstance(value, float | np.floating):
        return True, "" if np.isnan(value) else f"{value:.4g}"
    if isinstance(value, tuple | list):
        return False, "; ".join(map(str, value))
    return False, "" if value is None or value is pd.NA else str(value)


def decision(row: QuestionRow, options: Mapping[str, Any]) -> str:
    """Why a question is selected or not, in words, such as ``probe score too high``."""
    side = "too low" if options.get("keep_scores") == "highest" else "too high"
    words = REASONS.get(row.reason, row.reason.replace("_", " "))
    return words.format(score=str(options["hallucination_score"]).replace("_", " "), side=side)


def questions(exported: Exported) -> Table:
    """See `neurosig.views.explorer.Explorer.questions`."""
    options = exported.manifest.header.options
    rows = [
        {
            "question_id": row.question_id,
            "line": row.line,
            "domain": row.domain,
            "kind": row.kind,
            "question": row.question,
            "choices": row.choices,
            "pseudo_label": row.pseudo_label,
            "votes": None if row.vote is None else row.vote.count,
            "rollouts": None if row.vote is None else row.vote.n,
            "n_tied": None if row.vote is None else row.vote.n_tied,
            "vote_share": None if row.vote is None else row.vote.count / row.vote.n,
            "selected": row.selected,
            "reason": row.reason,
            "decision": decision(row, options),
            "weight": row.weight,
            "demonstrations": len(row.context),
        }
        for row in exported.manifest.rows
    ]
    counts = dict.fromkeys(("votes", "rollouts", "n_tied"), "Int64")
    return Table(pd.DataFrame(rows).astype(counts).set_index("question_id"))


def rollouts(exported: Exported, verdict: Callable[[QuestionRow, int], str]) -> Table:
    """See `neurosig.views.explorer.Explorer.rollouts`."""
    scores = _probe_scores(exported.manifest.folder / SIGNALS, len(exported.place))
    rows = []
    for (name, rollout_id), rollout in exported.manifest.rollouts.items():
        row = exported.rows[name]
        rows.append(
            {
                "question_id": name,
                "rollout_id": rollout_id,
                "text": rollout.text,
                "answer": row.answers[rollout_id],
                "raw_answer": row.raw_answers[rollout_id] if row.raw_answers else None,
                "verdict": verdict(row, rollout_id),
                "tokens": len(rollout.completion_ids),
                "finish_reason": rollout.finish_reason,
                "mean_logprob": rollout.mean_logprob,
                "mean_entropy": rollout.mean_entropy,
                "mean_self_certainty": rollout.mean_self_certainty,
                "probe_score": float(scores[exported.place[name, rollout_id]]),
            }
        )
    return Table(rows)


def scores(exported: Exported) -> Table:
    """See `neurosig.views.explorer.Explorer.scores`."""
    rows = [{"question_id": row.question_id, **row.scores} for row in exported.manifest.rows]
    return Table(pd.DataFrame(rows).set_index("question_id"))


def neurons(path: Path) -> Table:
    """See `neurosig.views.explorer.Explorer.neurons`.

    Raises:
        UserError: The table is missing, no CSV, or lacks the columns layer, index and weight.
    """
    if not path.is_file():
        raise UserError(f"neurons {path}: no such file")
    try:
        table = pd.read_csv(path)
        table = table.astype({"layer": np.int64, "index": np.int64, "weight": np.float64})
        integers = {name: "Int64" for name in ("kinds", "kinds_agreeing", "cluster") if name in table}
        table = table.astype(integers)
    except (KeyError, ValueError) as error:
        raise UserError(f"neurons {path}: expected the columns layer, index and weight ({error})") from error
    names = [neuron_name(*pair) for pair in zip(table["layer"], table["index"], strict=True)]
    rest = table.drop(columns="role", errors="ignore")
    rest.insert(0, "neuron", names)
    rest.insert(1, "role", table.get("role", "hallucination"))
    return Table(rest)


def contexts(exported: Exported) -> Table:
    """See `neurosig.views.explorer.Explorer.contexts`."""
    columns = ["question_id", "place", "demonstration_id", "rollout_id", "similarity", "demonstration", "response"]
    rows: list[Sequence[Any]] = [
        (
            row.question_id,
            place,
            item.question_id,
            item.rollout_id,
            item.similarity,
            exported.rows[item.question_id].question,
            exported.manifest.rollouts[item.question_id, item.rollout_id].text,
        )
        for row in exported.manifest.rows
        for place, item in enumerate(row.context, start=1)
    ]
    return Table(rows, columns=columns)


def _probe_scores(path: Path, n: int) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stored:
            found: np.ndarray = stored.get_tensor("probe_scores")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}; export again") from error
    if len(found) != n:
        raise UserError(f"{path}: {len(found)} rows for {n} rollouts; export again")
    return found
