"""The probe on features whose meaning is planted: what it finds, what it does not, and what no fold has seen."""

from __future__ import annotations

import numpy as np
import pytest

from neurosig.runtime.errors import UserError
from neurosig.screening.agreement_probe import fit_probe, measured
from neurosig.screening.config import ScreenProbeConfig

N, WIDTH, SIGNAL = 120, 40, 1


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of three layers, and vote shares of eighths that one direction of layer `SIGNAL` tells."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N, 3, WIDTH)) * 10 ** rng.uniform(-2, 2, size=WIDTH)  # neurons differ in scale
    direction = rng.normal(size=WIDTH) / features[:, SIGNAL].std(axis=0)
    shares = 0.5 + 0.25 * (features[:, SIGNAL] @ direction) / np.sqrt(WIDTH)
    return features, np.round(np.clip(shares, 0, 1) * 8) / 8


def test_the_layer_that_holds_the_signal_is_found_and_predicts_new_questions() -> None:
    (features, shares), (new, truth) = planted(), planted(1)
    new[:, SIGNAL], truth = features[::-1, SIGNAL] * 1.01, shares[::-1]
    probe = fit_probe(features, shares, np.arange(N), ScreenProbeConfig(), quiet=True)
    measures = measured(probe, shares, seed=0)
    assert probe.layer == SIGNAL and measures["r2"] > 0.4
    assert measures["auroc"]["low"] > 0.75 and measures["spearman"]["low"] > 0.5
    assert np.corrcoef(probe.expected(new[:, SIGNAL]), truth)[0, 1] > 0.9
    bins = measures["calibration"]
    assert sum(one["n"] for one in bins) == N and bins[0]["observed"]["high"] < bins[-1]["observed"]["low"]


def test_shares_that_mean_nothing_are_not_predicted() -> None:
    """Choosing among layers and penalties must not look like skill, which it would without folds inside the folds."""
    features, shares = planted()
    found = []
    for seed in range(8):
        permuted = np.random.default_rng(seed).permutation(shares)
        probe = fit_probe(features, permuted, np.arange(N), ScreenProbeConfig(), quiet=True)
        found.append(measured(probe, permuted, seed=0))
    assert max(one["r2"] for one in found) < 0.15 and np.mean([one["r2"] for one in found]) < 0.02
    assert abs(np.mean([one["auroc"]["estimate"] for one in found]) - 0.5) < 0.1


def test_a_prediction_does_not_depend_on_the_questions_own_share() -> None:
    features, shares = planted()
    groups = np.arange(N) // 2
    before = fit_probe(features, shares, groups, ScreenProbeConfig(), quiet=True).cross_fitted
    changed = shares.copy()
    changed[[0, 1]] = 1 - changed[[0, 1]]
    after = fit_probe(features, changed, groups, ScreenProbeConfig(), quiet=True).cross_fitted
    assert np.allclose(before[:2], after[:2]) and not np.allclose(before, after)


def test_what_only_tells_the_kinds_apart_predicts_no_kind_that_was_not_seen() -> None:
    rng = np.random.default_rng(0)
    kinds = np.arange(N) % 6
    features = rng.normal(size=(6, 1, WIDTH))[kinds] + 0.3 * rng.normal(size=(N, 1, WIDTH))
    shares = np.array([0.1, 0.9, 0.3, 0.7, 0.2, 0.8])[kinds] + 0.02 * rng.normal(size=N)
    r2 = {
        name: measured(fit_probe(features, shares, groups, ScreenProbeConfig(groups=name), quiet=True), shares, seed=0)
        for name, groups in {"question": np.arange(N), "kind": kinds}.items()
    }
    assert r2["question"]["r2"] > 0.8 and r2["kind"]["r2"] < 0.1


@pytest.mark.parametrize(
    ("n", "groups", "same", "message"),
    [
        (19, 19, False, "19 questions with rollouts are too few for a probe; export at least 20"),
        (40, 2, False, "--groups kind: its questions have 2 values of it; cross-fitting needs at least 3"),
        (40, 40, True, "every question has the same vote share, 0.5, so there is nothing to predict"),
    ],
)
def test_a_pilot_that_teaches_nothing_is_refused(n: int, groups: int, same: bool, message: str) -> None:
    rng = np.random.default_rng(0)
    shares = np.full(n, 0.5) if same else rng.random(n)
    with pytest.raises(UserError, match=message):
        fit_probe(rng.normal(size=(n, 2, 4)), shares, np.arange(n) % groups, ScreenProbeConfig(groups="kind"))
