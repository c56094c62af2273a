"""The p-value of what a fitted score gains, from refits on permuted labels.

A score fitted to uninformative labels is a random direction in its features, and features that know anything about the
outcome make a random direction gain too. An interval around the gain of one fit cannot see this; fitting again to
permuted labels can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from neurosig.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class Permutation:
    """Gains with their p-values; several gains of the same fit share its permutations.

    Attributes:
        gain: With the labels as they are; a scalar, or one value per gain.
        p: Share of the fits, the observed one included, that gain at least as much; one-sided, at least 1 / (1 + n).
        null: The gains of each permutation.
    """

    gain: Float[np.ndarray, "*gains"]
    p: Float[np.ndarray, "*gains"]
    null: Float[np.ndarray, " n *gains"]


def permutation_p(
    fit_and_gain: Callable[[Int[np.ndarray, " rows"]], ArrayLike],
    labels: Int[np.ndarray, " rows"],
    n: int = 199,
    seed: int = 0,
    groups: Int[np.ndarray, " rows"] | None = None,
    *,
    strata: Int[np.ndarray, " rows"] | None = None,
) -> Permutation:
    """Fit everything again to ``n`` permutations of the labels: ``p = (1 + #(gain >= observed)) / (1 + n)``.

    Args:
        fit_and_gain: Refits all that the labels fit and returns its gain, or several; larger is better, and the sign
            that counts as a gain is fixed beforehand.
        labels: What is fitted to; rows of -1 are unlabelled and stay so.
        n: Permutations.
        seed: Their seed.
        groups: Index of each row's question: the rows of a question move together. Default: every row is its own.
        strata: Index of what labels never leave, such as the row's kind of question: what it says of the label stays
            in the null.

    Raises:
        UserError: No permutation, or labels that `permuted_labels` refuses.
    """
    if n < 1:
        raise UserError(f"permutations: expected at least 1, got {n}")
    rows = np.arange(len(labels)) if groups is None else groups
    observed = np.asarray(fit_and_gain(labels), dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = (permuted_labels(labels, rows, rng, strata) for _ in range(n))
    null = np.stack([np.asarray(fit_and_gain(permuted), np.float64) for permuted in draws])
    return Permutation(observed, np.asarray((1 + (null >= observed).sum(axis=0)) / (1 + n)), null)


def permuted_labels(
    labels: Int[np.ndarray, " rows"],
    groups: Int[np.ndarray, " rows"],
    rng: np.random.Generator,
    strata: Int[np.ndarray, " rows"] | None = None,
) -> Int[np.ndarray, " rows"]:
    """The labels with questions changing places: a question gets all labels of another with as many labelled rows.

    With ``strata``, of another in its stratum.

    Raises:
        UserError: No two questions with labels (in one stratum) have as many labelled rows.
    """
    rows = np.flatnonzero(labels >= 0)
    order = rows[np.argsort(groups[rows], kind="stable")]
    blocks = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    permuted, moved = labels.copy(), False
    alike_blocks: defaultdict[tuple[int, int], list[Int[np.ndarray, " rows"]]] = defaultdict(list)
    for block in blocks:
        alike_blocks[0 if strata is None else int(strata[block[0]]), len(block)].append(block)
    for _, same in sorted(alike_blocks.items(), key=lambda item: item[0]):
        alike = np.stack(same)
        moved |= len(alike) > 1
        permuted[alike] = labels[alike][rng.permutation(len(alike))]
    if not moved:
        raise UserError(f"permutations: {len(blocks)} questions with labels; two with as many rows are needed")
    return permuted
