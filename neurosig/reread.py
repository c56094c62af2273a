"""The answers and votes of a manifest's rollouts under another reader; nothing here knows a gold answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurosig.manifest import Manifest
from neurosig.questions.reader import AnswerReader


def reread(manifest: Manifest, reader: AnswerReader) -> list[dict[str, Any]]:
    """One row per question with rollouts.

    Returns:
        Rows with ``question_id``, ``k``, the new ``raw_answers``, ``answers``, ``winner``, ``votes``, ``n_tied``, the
        manifest's ``recorded_answers`` and ``recorded_pseudo_label``, and whether the latter ``changed``.

    Raises:
        UserError: See `AnswerReader.read`.
    """
    rows = []
    for row in manifest.rows:
        if row.vote is None:
            continue
        group = [manifest.rollouts[row.question_id, index] for index in range(len(row.answers))]
        reading = reader.read(group, row.as_question())
        rows.append(
            {
                "question_id": row.question_id,
                "k": len(group),
                "raw_answers": list(reading.raw_answers),
                "answers": list(reading.answers),
                "winner": reading.vote.winner,
                "votes": reading.vote.count,
                "n_tied": reading.vote.n_tied,
                "recorded_answers": list(row.answers),
                "recorded_pseudo_label": row.pseudo_label,
                "changed": reading.vote.winner != row.pseudo_label,
            }
        )
    return rows


def parse_rate(rows: Sequence[dict[str, Any]], column: str = "answers") -> float:
    """Share of the rollouts that have an answer in this column of `reread`."""
    return sum(answer is not None for row in rows for answer in row[column]) / sum(row["k"] for row in rows)
