"""Jaccard neighbours at scale: time, memory and growth; printed, never asserted. Run with ``make bench``."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from neurosig.hallucination.planted import PlantedConfig, plant
from neurosig.patterns.similarity import Neighbours, nearest_sets
from tests.benchmarks.resident import measured

pytestmark = pytest.mark.bench
SIZES = (1_000, 3_000, 10_000, 30_000)
SCIPY_UP_TO = 10_000
M = 10


def scipy_products(sets: Tensor) -> None:
    """The shared counts of all pairs by scipy's CSR product alone, 1,000 rows at a time."""
    n, size = sets.shape
    pointers = np.arange(0, n * size + 1, size)
    members = sparse.csr_array((np.ones(n * size, np.float32), sets.numpy().ravel(), pointers))
    transposed = members.T.tocsr()
    for start in range(0, n, 1_000):
        members[start : start + 1_000] @ transposed


def test_nearest_sets_against_the_scipy_product(capsys: pytest.CaptureFixture[str]) -> None:
    """Sets of 1,020 of 46,080 neurons, as similar as real ones (`neurosig.hallucination.planted`), one per question,
    on 200 topics.
    """
    data = plant(PlantedConfig(n_questions=SIZES[-1], num_generations=1, n_planted=0, n_topics=200))
    everything = torch.from_numpy(data.ids)
    usearch = importlib.util.find_spec("usearch") is not None
    nearest_sets(everything[:100], M)
    lines = [f"top {M} Jaccard neighbours of N sets of {data.ids.shape[1]} ids, {torch.get_num_threads()} threads"]
    times: list[float] = []
    for n in SIZES:
        sets = everything[:n]
        exact, seconds, megabytes = measured(lambda sets=sets: nearest_sets(sets, M))  # type: ignore[misc]
        assert isinstance(exact, Neighbours)
        line = f"N {n:6,}: exact {seconds:7.2f} s, +{megabytes:5.0f} MB"
        if times:
            previous = SIZES[len(times) - 1]
            line += f", growth N^{math.log(seconds / times[-1]) / math.log(n / previous):.2f}"
        times.append(seconds)
        if n <= SCIPY_UP_TO:
            scipy_seconds = measured(lambda sets=sets: scipy_products(sets))[1]  # type: ignore[misc]
            line += f"; scipy CSR product {scipy_seconds:7.2f} s: exact takes {seconds / scipy_seconds:.3f} of it"
        if usearch:
            approximate, near_seconds, near_megabytes = measured(
                lambda sets=sets: nearest_sets(sets, M, backend="usearch")
            )  # type: ignore[misc]
            assert isinstance(approximate, Neighbours)
            recall = (
                (approximate.similarity >= exact.similarity[:, -1:]).double().mean()
            )  # equally similar sets are as good
            line += f"; usearch {near_seconds:7.2f} s, +{near_megabytes:5.0f} MB, recall {recall:.4f}"
        lines.append(line)
    with capsys.disabled():
        print("\n" + "\n".join(lines))
