"""What a screen writes: the log of its scores, the ranked question file and the calibration chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from neurosig.questions.load import Question
from neurosig.runtime.keyed_log import KeyedLog


class ScoreLog(KeyedLog):
    """Append-only log with one line per batch of prompts, from which an interrupted screen resumes.

    Attributes:
        scores: Question id -> expected vote share.

    Raises:
        UserError: See `KeyedLog`.
    """

    def __init__(self, path: str | Path, key: Mapping[str, Any]):
        self.scores: dict[str, float] = {}
        super().__init__(path, key)

    def read(self, line: Any) -> None:
        self.scores |= {str(name): float(score) for name, score in line.items()}

    def append(self, scores: Mapping[str, float]) -> None:
        """Add the scores of a batch and flush them to disk."""
        self.write(scores)
        self.scores |= scores


def ranked_lines(questions: Sequence[Question], scores: Mapping[str, float]) -> str:
    """The questions that have a score as JSON lines, those with the highest expected vote share first.

    Every field that neurosig read is written as it was read, the gold answer too, so that reading the lines gives the
    same questions with the same ids. ``expected_vote_share`` is limited to 0 to 1; the order is by the unlimited
    score, of equal ones the input order.
    """
    ranked = sorted((question for question in questions if question.id in scores), key=lambda q: -scores[q.id])
    lines = []
    for rank, question in enumerate(ranked, start=1):
        values = {field.name: getattr(question, field.name) for field in fields(question) if field.name != "line"}
        record = {name: value for name, value in values.items() if value not in (None, (), False)}
        record |= {"expected_vote_share": round(min(1.0, max(0.0, scores[question.id])), 6), "screen_rank": rank}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def calibration_chart(bins: Sequence[Mapping[str, Any]], n: int) -> str:
    """Expected against observed vote share as SVG; what is expected outside 0 to 1 is drawn at the edge.

    Args:
        bins: See `neurosig.screening.agreement_probe.measured`.
        n: Questions in all bins.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    drawn = [{**one, "place": min(1.0, max(0.0, one["expected"]))} for one in bins]
    return environment.get_template("calibration.svg.jinja").render(bins=drawn, n=n)
