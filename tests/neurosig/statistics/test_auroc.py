from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from neurosig.report.signal_table import Signal, SignalRow, analyse, headline
from neurosig.runtime.errors import UserError
from neurosig.statistics.auroc import (
    AnalysisConfig,
    Gain,
    auroc_draws,
    auroc_interval,
    cross_fit,
    held_out_auroc,
    nested_gain,
    spearman_interval,
    token_overlap,
)
from neurosig.statistics.metrics import Interval

QUICK = AnalysisConfig(resamples=300, repeats=2)
Array = np.ndarray[Any, Any]


def voters(n: int, seed: int, k: int = 8) -> tuple[Array, Array, np.random.Generator]:
    """Vote shares of n questions, whether each majority is right, and the generator: a strong, discrete base."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(0.8, 0.8, n)
    return np.maximum(rng.binomial(k, chance), 1) / k, rng.random(n) < chance, rng


@pytest.mark.parametrize("levels", [3, 20, 10_000])
def test_auroc_is_that_of_sklearn_with_ties_and_weights(levels: int) -> None:
    rng = np.random.default_rng(levels)
    trust = rng.integers(levels, size=90).astype(float)
    right = rng.random(90) < 0.4
    owners = np.repeat(np.arange(30), 3)
    counts = rng.integers(4, size=(5, 30))
    expected = [roc_auc_score(right, trust, sample_weight=row[owners]) for row in counts]
    np.testing.assert_allclose(auroc_draws(trust, right, owners, counts), expected, rtol=1e-12)
    assert auroc_interval(trust, right, owners, QUICK).estimate == pytest.approx(roc_auc_score(right, trust))


def test_a_draw_of_one_class_has_no_auroc() -> None:
    right = np.array([True, False, False])
    drawn = auroc_draws(np.array([3.0, 1.0, 2.0]), right, np.arange(3), np.array([[3, 0, 0], [1, 1, 1], [0, 2, 1]]))
    np.testing.assert_array_equal(drawn, [np.nan, 1.0, np.nan])


def test_intervals_cover_the_true_auroc() -> None:
    """Normal scores one standard deviation apart: AUROC is the normal distribution at 1/sqrt(2)."""
    truth, covered, repeats = stats.norm.cdf(1 / np.sqrt(2)), 0, 200
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        right = rng.random(80) < 0.5
        interval = auroc_interval(rng.normal(size=80) + right, right, np.arange(80), QUICK)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / repeats <= 0.985  # binomial sd .015 around .95, less what a percentile bootstrap lacks


def test_rollouts_of_one_question_are_not_independent() -> None:
    """Eight copies of each question know no more than one: clustered intervals stay, naive ones shrink by sqrt(8)."""
    rng = np.random.default_rng(1)
    right = rng.random(60) < 0.5
    trust = rng.normal(size=60) + right
    single = auroc_interval(trust, right, np.arange(60), QUICK)
    owners = np.repeat(np.arange(60), 8)
    clustered = auroc_interval(trust[owners], right[owners], owners, QUICK)
    naive = auroc_interval(trust[owners], right[owners], np.arange(480), QUICK)
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high))
    assert clustered.n == 60
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(np.sqrt(8), rel=0.2)


def test_spearman_is_that_of_scipy_and_its_interval_is_clustered() -> None:
    rng = np.random.default_rng(2)
    a = rng.integers(6, size=200).astype(float)
    b = a + rng.normal(size=200) * 2
    interval = spearman_interval(a, b, np.arange(200), QUICK)
    expected = stats.spearmanr(a, b).statistic
    assert interval.estimate == pytest.approx(expected)
    fisher = np.tanh(np.arctanh(expected) + np.array([-1.96, 1.96]) * np.sqrt((1 + expected**2 / 2) / 197))
    assert (interval.low, interval.high) == pytest.approx(fisher, abs=0.035)  # Bonett & Wright 2000
    owners = np.repeat(np.arange(200), 4)
    copied = spearman_interval(a[owners], b[owners], owners, QUICK)
    assert (copied.low, copied.high) == pytest.approx((interval.low, interval.high))
    assert spearman_interval(np.ones(200), b, np.arange(200), QUICK).estimate == 0


def test_held_out_predictions_never_saw_the_question() -> None:
    """A feature that names the question is worthless to other questions, though rollouts of one share it."""
    owners = np.repeat(np.arange(40), 8)
    right = np.repeat(np.arange(40) % 2 == 0, 8)
    features = np.eye(40)[owners]
    predictions = cross_fit(features, right, owners, QUICK)
    assert all(len(set(row[owners == question])) == 1 for row in predictions.folds for question in range(40))
    ones = np.ones((1, 40), dtype=np.int64)
    assert held_out_auroc(predictions, right, owners, ones)[0] == pytest.approx(0.5, abs=0.01)


def test_noise_adds_nothing() -> None:
    """Neither on average, where pairs across folds would make ties in the base look like a gain, nor too often."""
    gains = []
    once = AnalysisConfig(resamples=300, repeats=1)
    for seed in range(40):
        vote, right, rng = voters(150, seed, k=2)
        gains.append(nested_gain(vote[:, None], rng.normal(size=150), right, np.arange(150), once))
    estimates = np.array([gain.auroc.estimate for gain in gains])
    assert estimates.mean() < 2 * estimates.std(ddof=1) / np.sqrt(40)
    assert sum(gain.auroc.low > 0 for gain in gains) <= 3  # at 2.5% a side: more than 3 of 40 in 2% of runs
    assert np.median([gain.p for gain in gains]) > 0.2


def test_what_the_base_already_says_adds_nothing() -> None:
    vote, right, _ = voters(300, 0)
    gain = nested_gain(vote[:, None], np.round(vote * 3), right, np.arange(300), QUICK)
    assert gain.auroc.low <= 0 <= gain.auroc.high and abs(gain.auroc.estimate) < 0.01


def test_a_planted_signal_adds_and_more_of_it_adds_more() -> None:
    vote, right, rng = voters(300, 3)
    noise = rng.normal(size=300)
    weak, strong = (
        nested_gain(vote[:, None], right * size + noise, right, np.arange(300), QUICK) for size in (1.0, 2.0)
    )
    assert weak.auroc.low > 0 and weak.auroc.estimate < strong.auroc.low
    assert weak.log_loss.low > 0 and weak.log_loss.estimate < strong.log_loss.estimate
    assert strong.p == pytest.approx(2 / 301)


def test_labels_that_allow_no_comparison_are_refused() -> None:
    right = np.array([True] * 20)
    with pytest.raises(UserError, match="20 rows that are all right; it needs both"):
        auroc_interval(np.arange(20.0), right, np.arange(20), QUICK)
    right[:3] = False
    with pytest.raises(UserError, match="3 questions of the rarer class; 5 folds need as many"):
        cross_fit(np.arange(20.0)[:, None], right, np.arange(20), QUICK)
    with pytest.raises(UserError, match="1 question; at least 2"):
        auroc_interval(np.arange(20.0), right, np.zeros(20, dtype=np.int64), QUICK)
    with pytest.raises(UserError, match="resamples: expected at least 100, got 10"):
        AnalysisConfig(resamples=10)


def test_token_overlap_by_hand() -> None:
    """Sets {1,2}, {2,3}, {2,1}: Jaccard 1/3, 1 and 1/3."""
    np.testing.assert_allclose(token_overlap([(1, 2, 2), (2, 3), (2, 1)]), [2 / 3, 1 / 3, 2 / 3])
    np.testing.assert_array_equal(token_overlap([(4,)]), [1.0])


def confounded(n: int = 300) -> tuple[list[Signal], Array, dict[str, Array]]:
    """Short answers are right; ``neurons`` is length with a little noise, ``planted`` knows more than the outputs."""
    vote, right, rng = voters(n, 5)
    length = rng.normal(size=n) * 3 + 12 - 5 * right
    signals = [
        Signal("neurons", -length + rng.normal(size=n) * 0.7, "neuron"),
        Signal("planted", right * 1.5 + rng.normal(size=n), "neuron"),
        Signal("vote_share", vote, "output"),
        Signal("length", -length, "output"),
        Signal("random", rng.random(n), "control"),
    ]
    return signals, right, {"length": length, "vote_share": vote}


def test_a_signal_that_is_length_in_disguise_is_found_out() -> None:
    signals, right, confounders = confounded()
    rows = {row.signal.name: row for row in analyse(signals, right, np.arange(300), confounders, QUICK)}
    assert rows["neurons"].auroc is not None and rows["neurons"].auroc.low > 0.7  # alone it looks like a find
    assert rows["neurons"].correlations["length"].high < -0.9
    assert rows["neurons"].adds_to_vote and not rows["neurons"].adds_to_outputs
    assert "nearly the same as length (Spearman -0.9" in rows["neurons"].verdict
    assert rows["planted"].adds_to_outputs and rows["planted"].verdict.count("adds +0.") == 2
    assert rows["vote_share"].over_vote is None and rows["vote_share"].over_outputs is not None
    assert "nearly the same as vote share" not in rows["vote_share"].verdict
    assert rows["random"].verdict.startswith("adds nothing to vote share or to all output signals: both")
    text = headline(list(rows.values()), "the majority is right")
    assert "add to all output-level signals: planted +0." in text and "(of 2)" in text


def test_verdicts_are_corrected_for_the_number_of_signals() -> None:
    signals, right, confounders = confounded()
    vote = signals[2]
    rng = np.random.default_rng(6)
    config = AnalysisConfig(resamples=1000, repeats=2)
    faint = Signal("faint", right * 0.8 + rng.normal(size=300), "neuron")
    alone = analyse([faint, vote], right, np.arange(300), confounders, config)[0]
    assert alone.over_vote is not None and alone.over_vote.auroc.low > 0 and alone.adds_to_vote
    crowd = [Signal(f"noise{i}", rng.normal(size=300), "neuron") for i in range(4)]
    among = analyse([faint, vote, *crowd], right, np.arange(300), confounders, config)[0]
    assert among.over_vote == alone.over_vote and not among.adds_to_vote
    assert "may add to vote share, but not after correction" in among.verdict


@pytest.mark.parametrize("labels", ["none", "all right", "too few wrong"])
def test_labels_that_tell_little_leave_the_rest(labels: str) -> None:
    signals, _, confounders = confounded(40)
    given = None if labels == "none" else np.ones(40, dtype=bool)
    if labels == "too few wrong" and given is not None:
        given[:3] = False
    rows = analyse(signals, given, np.arange(40), confounders, QUICK)
    assert all(row.over_vote is None and row.over_outputs is None for row in rows)
    assert all((row.auroc is not None) == (labels == "too few wrong") for row in rows)
    assert rows[3].correlations["length"].estimate == pytest.approx(-1)


def test_a_gain_that_permuted_labels_have_too_is_not_called_one() -> None:
    """The same interval and correction: only the refits tell the two apart."""
    gain = Gain(Interval(0.03, 0.01, 0.05, 90, 300, 0), Interval(0.0, 0.0, 0.0, 90, 300, 0), 0.001)
    row = SignalRow(Signal("probe_score", np.zeros(1), "neuron", True), None, {}, gain, None, 0.01, 1.0)
    assert row.adds_to_vote and row.verdict == "adds +0.030 [+0.010, +0.050] to vote share"
    alike = replace(row, over_vote=replace(gain, p_refit=0.4))
    assert not alike.adds_to_vote
    assert alike.verdict.endswith("on vote share, but fits to permuted labels gain as much (p 0.40)")
    assert replace(row, over_vote=replace(gain, p_refit=0.02)).adds_to_vote
