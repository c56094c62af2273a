"""p-values from refits on permuted labels, on data whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from neurosig.runtime.errors import UserError
from neurosig.statistics.auroc import AnalysisConfig, added_auroc, nested_gain
from neurosig.statistics.permutation import permutation_p, permuted_labels

N, K, D = 300, 2, 20
OWNERS = np.repeat(np.arange(N), K)
CONFIG = AnalysisConfig(resamples=200, repeats=1, folds=2)


def study(seed: int, real: bool) -> tuple[Any, Callable[[Any], float], Any, Callable[[Any], Any], Any, Any]:
    """Dense features that know which answers are right; labels that say something of it, or nothing at all."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=N)
    right_of = 2 * ease + rng.normal(size=N) > 0
    features = np.repeat(rng.normal(size=(N, D)) + 1.5 * np.outer(ease, rng.normal(size=D)), K, axis=0)
    features += 0.1 * rng.normal(size=features.shape)
    vote = np.repeat(np.round(0.3 * ease + rng.normal(size=N)), K)
    of_question = (ease + rng.normal(size=N) < 0) if real else rng.random(N) < 0.5
    labels = np.repeat(of_question.astype(int), K)
    half = np.arange(N * K) < N * K // 2  # fitted on one half of the questions, judged on the other

    def trust(labels: Any) -> Any:
        return -Ridge(10.0).fit(features[half], labels[half]).predict(features[~half])

    right, owners = np.repeat(right_of, K)[~half], OWNERS[~half] - N // 2
    added = added_auroc(vote[~half, None], right, owners, CONFIG)
    return labels, (lambda labels: added(trust(labels))), vote[~half, None], trust, right, owners


def test_a_dense_probe_of_noise_gains_nothing_by_its_permutations() -> None:
    """Today's interval excludes zero in many of these studies, though the labels say nothing at all."""
    p_values, fooled = [], 0
    for seed in range(20):
        labels, fit_and_gain, vote, trust, right, owners = study(seed, real=False)
        gain = nested_gain(vote, trust(labels), right, owners, CONFIG)
        fooled += gain.auroc.low > 0
        p_values.append(float(permutation_p(fit_and_gain, labels, 19, seed, OWNERS).p))
    assert fooled >= 6  # of 20, where a test at 2.5% allows one
    assert sum(p <= 0.05 for p in p_values) <= 4
    assert 0.35 < np.mean(p_values) < 0.7


def test_a_probe_of_labels_that_mean_something_has_a_small_p() -> None:
    p_values = [float(permutation_p(study(s, real=True)[1], study(s, real=True)[0], 39, s, OWNERS).p) for s in range(3)]
    assert np.median(p_values) <= 0.05


def test_the_sign_is_fixed_beforehand() -> None:
    """A signal that points the wrong way gains nothing, however well it predicts."""
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.5
    base, owners = rng.normal(size=(200, 1)), np.arange(200)
    added = added_auroc(base, right, owners, CONFIG)
    signal = right + 0.5 * rng.normal(size=200)
    assert added(signal) > 0.2 and added(-signal) == 0.0


def test_p_counts_the_observed_fit_and_its_equals() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1])
    assert permutation_p(lambda labels: 1.0, labels, 9).p == 1.0  # every permutation gains as much
    seen: list[Any] = []

    def first_is_best(labels: Any) -> list[float]:
        seen.append(labels)
        return [float(len(seen) == 1), -float(len(seen) == 1)]

    result = permutation_p(first_is_best, labels, 9)
    assert result.p.tolist() == [0.1, 1.0] and result.gain.tolist() == [1.0, -1.0] and result.null.shape == (9, 2)
    assert len(seen) == 10 and all(sorted(permuted) == sorted(labels) for permuted in seen)


def test_the_rollouts_of_a_question_move_together() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat([3, 0, 7, 5], [2, 2, 3, 2])
    labels = np.array([0, 1, 1, 1, 0, 0, 1, -1, -1])
    rows = {0: (0, 2), 1: (2, 4), 2: (4, 7), 3: (7, 9)}
    found = set()
    for _ in range(50):
        permuted = permuted_labels(labels, groups, rng)
        found.add(tuple(permuted))
        blocks = [tuple(permuted[a:b]) for a, b in rows.values()]
        assert sorted(blocks[:2]) == [(0, 1), (1, 1)]  # only these two have as many labelled rows
        assert blocks[2:] == [(0, 0, 1), (-1, -1)]
    assert len(found) == 2


def test_what_cannot_be_permuted_is_refused() -> None:
    with pytest.raises(UserError, match="permutations: expected at least 1, got 0"):
        permutation_p(lambda labels: 0.0, np.array([0, 1]), 0)
    with pytest.raises(UserError, match="2 questions with labels; two with as many rows are needed"):
        permuted_labels(np.array([0, 1, 1]), np.array([0, 1, 1]), np.random.default_rng(0))


def test_labels_never_leave_their_stratum() -> None:
    labels, kinds = np.array([0, 0, 0, 1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    questions, rng = np.arange(8), np.random.default_rng(0)
    seen = np.stack([permuted_labels(labels, questions, rng, kinds) for _ in range(50)])
    assert (seen[:, :4].sum(axis=1) == 1).all() and (seen[:, 4:].sum(axis=1) == 3).all()
    assert len(np.unique(seen, axis=0)) > 8
    left = [permuted_labels(labels, questions, rng)[:4].sum() for _ in range(50)]
    assert len(set(left)) > 1  # without strata they do
    with pytest.raises(UserError, match="permut"):
        permuted_labels(labels, questions, rng, questions)
