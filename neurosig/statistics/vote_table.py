"""The votes of one evaluation as columns, their metrics, and intervals paired with another evaluation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from neurosig.statistics.metrics import Interval, ece, maj_at_k, paired_mean_interval
from neurosig.statistics.resampling import percentile_ends, question_counts
from neurosig.statistics.significance import ece_draws

Grading = Literal["strict", "lenient"]
"""How completions are graded (`neurosig.questions.reader.Grades`)."""
GRADINGS: tuple[Grading, ...] = get_args(Grading)


def graded(metric: str, grading: Grading) -> str:
    """Name of a metric under a grading: ``ece``, ``ece_lenient``."""
    return metric if grading == "strict" else f"{metric}_{grading}"


@dataclass(frozen=True, slots=True)
class VoteTable:
    """One entry per question.

    Attributes:
        k: Samples per question.
        votes: Samples that gave the winning answer.
        columns: Metric -> its value for each question; a metric's mean is its estimate. ``from_rows`` has
            ``avg_at_k``, the share of the samples that are right, ``maj_at_k``, the expected correctness of the
            majority vote, both also graded leniently (`graded`), ``parse_rate``, the share of the samples that have an
            answer, and ``strict_minus_lenient``, the difference of the two ``avg_at_k``. Where the rows have them:
            ``truncated_rate`` and ``unclosed_rate``, the shares that were cut off and that end inside a thought, and
            the tokens per thought and answer.
    """

    k: int
    votes: Int[np.ndarray, " questions"]
    columns: Mapping[str, Float[np.ndarray, " questions"]]

    def __len__(self) -> int:
        return len(self.votes)

    def __getitem__(self, metric: str) -> Float[np.ndarray, " questions"]:
        return self.columns[metric]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> VoteTable:
        """The columns of the rows of ``results.parquet``, all with the same K."""
        k = int(rows[0]["k"])
        names = (
            "votes",
            "n_tied",
            "unparsed",
            *(graded(n, g) for n in ("n_correct", "n_tied_right") for g in GRADINGS),
        )
        count = {name: np.array([row[name] for row in rows]) for name in names}
        columns = {}
        for grading in GRADINGS:
            columns[graded("avg_at_k", grading)] = count[graded("n_correct", grading)] / k
            columns[graded("maj_at_k", grading)] = maj_at_k(count[graded("n_tied_right", grading)], count["n_tied"])
        columns["parse_rate"] = 1 - count["unparsed"] / k
        columns["strict_minus_lenient"] = columns["avg_at_k"] - columns["avg_at_k_lenient"]
        for name in ("truncated", "unclosed"):
            if name in rows[0]:
                columns[f"{name}_rate"] = np.array([row[name] for row in rows]) / k
        for name in ("mean_thought_length", "mean_answer_length"):
            if name in rows[0]:
                columns[name] = np.array([row[name] for row in rows])
        return cls(k, count["votes"], columns)

    def interval(self, metric: str, *, minus: VoteTable | None = None, seed: int, resamples: int) -> Interval:
        """95% bootstrap interval of a metric: the name of a column, ``ece`` or ``ece_lenient``.

        Args:
            metric: Which.
            minus: Take the difference from this table of the same questions in the same order.
            seed: Seed of the bootstrap.
            resamples: Bootstrap resamples.

        Raises:
            UserError: Fewer than two questions.
        """
        n = len(self)
        if metric in self.columns:
            other = np.zeros(n) if minus is None else minus[metric]
            return paired_mean_interval(self[metric], other, seed=seed, resamples=resamples)
        blocks = [
            self._ece_draws(metric, counts) - (0.0 if minus is None else minus._ece_draws(metric, counts))
            for counts in question_counts(n, resamples, seed=seed)
        ]
        estimate = self.estimate(metric) - (0.0 if minus is None else minus.estimate(metric))
        return Interval(estimate, *percentile_ends(np.concatenate(blocks)), n, resamples, seed)

    def estimate(self, metric: str) -> float:
        """The metric over all questions."""
        if metric in self.columns:
            return float(self[metric].mean())
        return ece(self.votes, self.k, self._majority_right(metric))

    def _ece_draws(self, metric: str, counts: Int[np.ndarray, "draws questions"]) -> Float[np.ndarray, " draws"]:
        return ece_draws(self.votes[:, None], self.k, self._majority_right(metric)[:, None], counts)[:, 0]

    def _majority_right(self, ece_name: str) -> Float[np.ndarray, " questions"]:
        return self[ece_name.replace("ece", "maj_at_k")]
