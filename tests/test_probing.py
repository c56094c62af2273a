"""The probe: from active sets to located neurons."""

from __future__ import annotations

import numpy as np

from neurosig.contributions import PAD
from neurosig.probing import contribution_matrix


def test_ragged_sets_become_a_matrix_without_their_pads() -> None:
    ids = np.array([[4, 1, 0], [2, PAD, PAD], [PAD, PAD, PAD]], dtype=np.int32)
    values = np.array([[0.5, 0.25, -1.0], [3.0, 0.0, 9.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    matrix = contribution_matrix(ids, values, 5)
    assert matrix.toarray().tolist() == [[-1.0, 0.25, 0, 0, 0.5], [0, 0, 3.0, 0, 0], [0] * 5]
    assert matrix.nnz == 4 and matrix.has_canonical_format
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
