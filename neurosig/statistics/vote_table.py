"""The votes of one evaluation as columns, their metrics, and intervals paired with another evaluation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.metrics import Interval, bootstrap_interval, ece, maj_at_k, paired_mean_interval


@dataclass(frozen=True, slots=True)
class VoteTable:
    """One entry per question.

    Attributes:
        k: Samples per question.
        votes: Samples that gave the winning answer.
        avg_at_k: Share of the samples that are right.
        maj_at_k: Expected correctness of the majority vote.
    """

    k: int
    votes: Int[np.ndarray, " questions"]
    avg_at_k: Float[np.ndarray, " questions"]
    maj_at_k: Float[np.ndarray, " questions"]

    def __len__(self) -> int:
        return len(self.votes)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> VoteTable:
        """The columns of the rows of ``results.parquet``, all with the same K."""
        names = ("n_correct", "votes", "n_tied", "n_tied_right")
        n_correct, votes, n_tied, right = (np.array([row[name] for row in rows]) for name in names)
        return cls(rows[0]["k"], votes, n_correct / rows[0]["k"], maj_at_k(right, n_tied))

    def interval(self, metric: str, *, minus: VoteTable | None = None, seed: int, resamples: int) -> Interval:
        """95% bootstrap interval of ``avg_at_k``, ``maj_at_k`` or ``ece``.

        Args:
            metric: Which.
            minus: Take the difference from this table of the same questions in the same order.
            seed: Seed of the bootstrap.
            resamples: Bootstrap resamples.

        Raises:
            UserError: Fewer than two questions.
        """
        if metric != "ece":
            own = getattr(self, metric)
            other = np.zeros(len(own)) if minus is None else getattr(minus, metric)
            return paired_mean_interval(own, other, seed=seed, resamples=resamples)

        def statistic(index: Int[np.ndarray, " questions"]) -> float:
            return self.ece(index) if minus is None else self.ece(index) - minus.ece(index)

        return bootstrap_interval(statistic, len(self), seed=seed, resamples=resamples)

    @takes_arrays
    def ece(self, index: Int[np.ndarray, " questions"] | None = None) -> float:
        """Expected calibration error over these questions, repeats included; over all by default."""
        chosen = slice(None) if index is None else index
        return ece(self.votes[chosen], self.k, self.maj_at_k[chosen])
