"""What a ranking of questions yields: trustworthy questions in its top part against a random draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from neurosig.statistics.resampling import percentile_ends, question_draws

TOPS = (0.1, 0.2, 0.5)
MEASURES = ("multiple", "per_token", "precision", "precision_all")


@dataclass(frozen=True, slots=True)
class Truth:
    """What sampling K rollouts of each question of a pool shows, under one grading.

    Attributes:
        passes: 1 where the vote share is at least one half.
        right: Whether the majority is right, in expectation over tied answers.
        tokens: Sampled tokens of the K rollouts.
        strata: Index of the part within which each question is ranked.
    """

    passes: Float[np.ndarray, " questions"]
    right: Float[np.ndarray, " questions"]
    tokens: Float[np.ndarray, " questions"]
    strata: Int[np.ndarray, " questions"]


def yields(
    truth: Truth, scores: Sequence[Float[np.ndarray, " questions"]], *, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """Rows of ``top``, ``measure``, ``value``, ``low``, ``high``: mean over the rankings, 95% interval over questions.

    ``multiple``: questions with a vote share of at least one half and a right majority in the top part of the ranking,
    over their number in a random draw of as many; ``per_token``: the same per sampled token; ``precision``: right
    majorities among those of the top part that pass the vote; ``precision_all``: the same in the whole pool.

    Args:
        truth: What is known of the pool.
        scores: Expected agreement of each question; several for rankings that are random.
        seed: Seed of the bootstrap.
        resamples: Bootstrap resamples.
    """
    n = len(truth.passes)
    whole = _measures(truth, scores, np.arange(n))
    draws = np.array(
        [_measures(truth, scores, drawn) for block in question_draws(n, resamples, seed=seed) for drawn in block]
    )
    rows = []
    for place, top in enumerate(TOPS):
        for number, measure in enumerate(MEASURES):
            known = draws[:, place, number][np.isfinite(draws[:, place, number])]
            low, high = percentile_ends(known) if len(known) else (np.nan, np.nan)
            row = {"top": top, "measure": measure, "value": whole[place, number], "low": low, "high": high}
            rows.append({**row, "n": n})
    return rows


def _measures(
    truth: Truth, scores: Sequence[Float[np.ndarray, " questions"]], drawn: Int[np.ndarray, " draw"]
) -> Float[np.ndarray, "tops measures"]:
    passes, right, tokens = truth.passes[drawn], truth.right[drawn], truth.tokens[drawn]
    good, strata = passes * right, truth.strata[drawn]
    values = np.zeros((len(scores), len(TOPS), len(MEASURES)))
    for which, one in enumerate(scores):
        order = np.lexsort((-one[drawn], strata))  # by stratum, then by score
        starts = np.searchsorted(strata[order], strata[order])
        sizes = np.bincount(strata, minlength=strata.max() + 1)[strata[order]]
        rank = np.arange(len(drawn)) - starts
        for place, top in enumerate(TOPS):
            chosen = order[rank < np.round(top * sizes)]
            share = len(chosen) / len(drawn)
            with np.errstate(divide="ignore", invalid="ignore"):
                values[which, place] = (
                    good[chosen].sum() / (share * good.sum()),
                    (good[chosen].sum() / tokens[chosen].sum()) / (good.sum() / tokens.sum()),
                    good[chosen].sum() / passes[chosen].sum(),
                    good.sum() / passes.sum(),
                )
    return values.mean(axis=0)
