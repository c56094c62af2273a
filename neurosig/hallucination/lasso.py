"""L1 logistic regression on contributions: the fit beneath the probe and its stability selection.

Scikit-learn's liblinear solves it; what is here prepares the columns. Neither step looks at a label: columns that
are active in too few rollouts are left out, and the others are scaled to a largest magnitude of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from neurosig.statistics.arrays import takes_arrays


@dataclass(frozen=True, slots=True)
class Design:
    """Scaled contributions of the neurons a probe may use.

    Attributes:
        matrix: [rollouts, eligible], each column's largest magnitude 1.
        columns: The neuron of each column, a flat id.
        scale: What each column was divided by.
    """

    matrix: sparse.csr_array
    columns: Int[np.ndarray, " eligible"]
    scale: Float[np.ndarray, " eligible"]


def design(contributions: sparse.csr_array, min_active_share: float) -> Design:
    """Keep the neurons that are active in at least ``min_active_share`` of the rollouts (and once), and scale them."""
    active = contributions.count_nonzero(axis=0)
    columns = np.flatnonzero(active >= max(1.0, min_active_share * contributions.shape[0]))
    kept = contributions[:, columns]
    scale = abs(kept).max(axis=0).toarray().ravel()
    matrix = sparse.csr_array(kept @ sparse.diags_array(1.0 / scale))
    matrix.sort_indices()
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)  # for liblinear
    return Design(matrix, columns, scale)


@takes_arrays
def fit_l1(
    matrix: sparse.csr_array, labels: Int[np.ndarray, " rollouts"], inverse_penalty: float, seed: int
) -> LogisticRegression:
    """Minimise ``sum |w| + inverse_penalty * sum(weight * log loss)``, both classes weighing the same."""
    model = LogisticRegression(
        l1_ratio=1.0,
        C=inverse_penalty,
        solver="liblinear",
        class_weight="balanced",
        random_state=seed,
        max_iter=1000,
    )
    return model.fit(matrix, labels)


@takes_arrays
def fit_ridge(
    matrix: sparse.csr_array, labels: Int[np.ndarray, " rollouts"], inverse_penalty: float, seed: int
) -> LogisticRegression:
    """`fit_l1` with ``sum w^2 / 2`` in place of ``sum |w|``: every neuron gets a weight."""
    model = LogisticRegression(C=inverse_penalty, class_weight="balanced", random_state=seed, max_iter=1000)
    return model.fit(matrix, labels)


@takes_arrays
def entry_penalty(matrix: sparse.csr_array, labels: Int[np.ndarray, " rollouts"]) -> float:
    """The inverse penalty at which the first neuron gets a weight: below it, all are zero."""
    counts = np.bincount(labels, minlength=2)
    residual = len(labels) / (2 * counts[labels]) * (labels - 0.5)
    return float(1.0 / np.abs(matrix.T @ residual).max())
