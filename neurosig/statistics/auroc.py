"""How well a signal predicts right answers: AUROC, correlations, and what it adds to other signals.

A signal is one number per question or per rollout, with the sign for which higher is more trustworthy. The unit of all
resampling is the question with everything that belongs to it, so the rollouts of one question never count as
independent; and the draws depend on the seed alone, so that any two statistics of the same questions are paired.

    auroc_interval(trust, right, owners)                          # owners: the question of each row
    nested_gain(vote_share[:, None], trust, right, owners).auroc  # what it adds to the vote share
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from neurosig.runtime.errors import UserError
from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.metrics import Interval
from neurosig.statistics.resampling import CELLS_AT_ONCE, percentile_ends, question_counts
from neurosig.statistics.significance import bootstrap_p

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class AnalysisConfig:
    """Bootstrap and cross-fitting.

    Attributes:
        seed: Of the draws and of the folds.
        resamples: Bootstrap resamples of the questions.
        folds: Cross-fitting folds.
        repeats: Times the folds are drawn; averaging over them takes most of the folds' noise out of a comparison.
    """

    seed: int = 0
    resamples: int = 2000
    folds: int = 5
    repeats: int = 4

    def __post_init__(self) -> None:
        for name, least in (("resamples", 100), ("folds", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Gain:
    """What a signal adds to a base, both cross-fitted.

    Attributes:
        auroc: AUROC with the signal minus AUROC of the base alone.
        log_loss: Log-loss of the base alone minus log-loss with the signal, in nats; positive is an improvement.
        p: Two-sided bootstrap p-value of the AUROC difference, which takes the signal as given.
        p_refit: For a fitted signal, the p-value from refits on permuted labels
            (`neurosig.statistics.permutation.permutation_p`); ``None`` for others.
    """

    auroc: Interval
    log_loss: Interval
    p: float
    p_refit: float | None = None


# AUROC and its bootstrap


@takes_arrays
def auroc_draws(
    trust: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    counts: Int[np.ndarray, "draws questions"],
) -> Float[np.ndarray, " draws"]:
    """AUROC of each draw, exact with ties counted half; ``nan`` where a draw holds one class only.

    A row weighs as often as its question was drawn. Sorting happens once, for all draws.

    Args:
        trust: The signal, higher for right.
        right: The label.
        owners: Index of each row's question.
        counts: How often each draw holds each question.
    """
    return _share(*_won_pairs(trust, right, owners, counts))


@takes_arrays
def auroc_interval(
    trust: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    config: AnalysisConfig = AnalysisConfig(),
) -> Interval:
    """AUROC with its percentile bootstrap interval over questions.

    Raises:
        UserError: All rows are right, or all wrong.
    """
    _check_classes(right)
    whole = auroc_draws(trust, right, owners, _once(owners))[0]
    draws = [auroc_draws(trust, right, owners, counts) for counts in _draws(owners, config)]
    return _interval(whole, np.concatenate(draws), owners, config)


@takes_arrays
def spearman_interval(
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    config: AnalysisConfig = AnalysisConfig(),
) -> Interval:
    """Spearman correlation with its percentile bootstrap interval over questions; 0 where one side is constant.

    A draw correlates the ranks that the rows have in the whole sample, so no draw needs sorting.
    """
    x, y = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    sums = np.zeros((owners.max() + 1, 6))
    np.add.at(sums, owners, np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1))
    draws = [_correlation(counts @ sums) for counts in _draws(owners, config)]
    return _interval(_correlation(sums.sum(axis=0, keepdims=True))[0], np.concatenate(draws), owners, config)


# What a signal adds


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out predictions: the chance that each row is right, and the fold that held it out, for each repeat."""

    chances: Float[np.ndarray, "repeats n"]
    folds: Int[np.ndarray, "repeats n"]


@takes_arrays
def cross_fit(
    features: Float[np.ndarray, "n features"],
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    config: AnalysisConfig = AnalysisConfig(),
    *,
    signed: bool = False,
) -> HeldOut:
    """Chance that each row is right, from a logistic regression that never saw the row's question.

    Args:
        features: One row per row of ``right``.
        right: The label.
        owners: Index of each row's question.
        config: Folds and repeats.
        signed: The last feature's coefficient cannot be negative: higher means right, as fixed beforehand. Where the
            regression would turn it round, it is left out.

    Raises:
        UserError: Fewer questions with a right, or with a wrong, row than folds.
    """
    _check_folds(right, owners, config)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    predictions = HeldOut(
        np.empty((config.repeats, len(right))), np.empty((config.repeats, len(right)), dtype=np.int64)
    )
    for repeat in range(config.repeats):
        folds = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed + repeat)
        for fold, (seen, unseen) in enumerate(folds.split(features, right, owners)):
            used, fitted = slice(None), model.fit(features[seen], right[seen])
            if signed and fitted[-1].coef_[0, -1] < 0:
                used = slice(-1)
                fitted = model.fit(features[seen, used], right[seen])
            chances = fitted.predict_proba(features[unseen, used])[:, 1]
            predictions.chances[repeat, unseen], predictions.folds[repeat, unseen] = chances, fold
    return predictions


@takes_arrays
def held_out_auroc(
    predictions: HeldOut,
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    counts: Int[np.ndarray, "draws questions"],
) -> Float[np.ndarray, " draws"]:
    """AUROC of each draw over the pairs that one fitted model scored, all folds and repeats together.

    Pairs across folds are left out: a model that never saw a right row predicts a little lower, so across folds rows
    that a discrete base ties would be in the wrong order, and any noise that breaks the ties would seem to help.
    """
    won, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for chances, folds in zip(predictions.chances, predictions.folds, strict=True):
        for fold in range(folds.max() + 1):
            rows = folds == fold
            part = _won_pairs(chances[rows], right[rows], owners[rows], counts)
            won, pairs = won + part[0], pairs + part[1]
    return _share(won, pairs)


@takes_arrays
def nested_gain(
    base: Float[np.ndarray, "n features"],
    signal: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    config: AnalysisConfig = AnalysisConfig(),
    *,
    signed: bool = False,
) -> Gain:
    """What ``signal`` adds to ``base``: nested logistic regressions, cross-fitted, paired bootstrap over questions.

    The interval and its p take the signal as given; where the signal was fitted, `added_auroc` and
    `neurosig.statistics.permutation.permutation_p` tell its gain from that of a fit to labels that mean nothing.

    Raises:
        UserError: See `cross_fit`.
    """
    full = cross_fit(np.column_stack([base, signal]), right, owners, config, signed=signed)
    return compare(cross_fit(base, right, owners, config), full, right, owners, config)


def added_auroc(
    base: Float[np.ndarray, "n features"],
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    config: AnalysisConfig = AnalysisConfig(),
) -> Callable[[Float[np.ndarray, " n"]], float]:
    """A function from a signal to the AUROC that it adds to ``base``, its sign fixed: higher means right.

    The base is fitted once, so that many refits of a signal can be compared with it.

    Raises:
        UserError: See `cross_fit`.
    """
    once = _once(owners)
    alone = held_out_auroc(cross_fit(base, right, owners, config), right, owners, once)[0]

    def added(signal: Float[np.ndarray, " n"]) -> float:
        full = cross_fit(np.column_stack([base, signal]), right, owners, config, signed=True)
        return float(held_out_auroc(full, right, owners, once)[0] - alone)

    return added


@takes_arrays
def compare(
    base: HeldOut,
    full: HeldOut,
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    config: AnalysisConfig = AnalysisConfig(),
) -> Gain:
    """Gain of the predictions ``full`` over ``base``: paired bootstrap over questions, without refitting."""
    saved = (_log_loss(base, right) - _log_loss(full, right)).mean(axis=0)
    sums = np.zeros((int(owners.max()) + 1, 2))
    np.add.at(sums, owners, np.stack([saved, np.ones_like(saved)], axis=1))

    def difference(counts: Int[np.ndarray, "draws questions"]) -> Float[np.ndarray, " draws"]:
        return held_out_auroc(full, right, owners, counts) - held_out_auroc(base, right, owners, counts)

    auroc, loss = [], []
    for counts in _draws(owners, config):
        auroc.append(difference(counts))
        totals = counts @ sums
        loss.append(totals[:, 0] / totals[:, 1])
    draws = np.concatenate(auroc)
    draws = draws[~np.isnan(draws)]
    return Gain(
        _interval(difference(_once(owners))[0], draws, owners, config),
        _interval(float(saved.mean()), np.concatenate(loss), owners, config),
        bootstrap_p(draws),
    )


@takes_arrays
def rarest_class(right: Bool[np.ndarray, " n"], owners: Int[np.ndarray, " n"]) -> int:
    """Questions with a right row or questions with a wrong row, whichever are fewer: what limits the folds."""
    return min(len(np.unique(owners[right])), len(np.unique(owners[~right])))


# Baselines from the text alone


def token_overlap(token_ids: Sequence[Sequence[int]]) -> Float[np.ndarray, " k"]:
    """Mean Jaccard similarity of each rollout's token set to those of its question's other rollouts.

    The baseline that neuron-set agreement has to beat: alike texts switch on alike neurons. 1 for a single rollout.
    """
    k = len(token_ids)
    if k == 1:
        return np.ones(1)
    sets = [frozenset(ids) for ids in token_ids]
    totals = np.zeros(k)
    for i, j in combinations(range(k), 2):
        union = len(sets[i] | sets[j])
        totals[[i, j]] += len(sets[i] & sets[j]) / union if union else 1.0
    return totals / (k - 1)


# Inside


def _draws(owners: Int[np.ndarray, " n"], config: AnalysisConfig) -> Iterator[Int[np.ndarray, "draws questions"]]:
    return question_counts(
        int(owners.max()) + 1, config.resamples, seed=config.seed, block=max(1, CELLS_AT_ONCE // len(owners))
    )


def _once(owners: Int[np.ndarray, " n"]) -> Int[np.ndarray, "draws questions"]:
    return np.ones((1, int(owners.max()) + 1), dtype=np.int64)


def _interval(
    estimate: float, draws: Float[np.ndarray, " draws"], owners: Int[np.ndarray, " n"], config: AnalysisConfig
) -> Interval:
    """The percentile interval; draws without a value (one class only) are left out."""
    known = draws[~np.isnan(draws)]
    low, high = percentile_ends(known, LEVEL) if len(known) else (math.nan, math.nan)
    return Interval(float(estimate), low, high, int(owners.max()) + 1, config.resamples, config.seed)


def _correlation(sums: Float[np.ndarray, "draws 6"]) -> Float[np.ndarray, " draws"]:
    """Pearson correlation from sums of 1, x, y, x², y² and xy."""
    n, x, y, xx, yy, xy = sums.T
    spread = np.sqrt(np.maximum(xx * n - x * x, 0) * np.maximum(yy * n - y * y, 0))
    return np.divide(xy * n - x * y, spread, out=np.zeros(len(sums)), where=spread > 1e-9)


def _won_pairs(
    trust: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    counts: Int[np.ndarray, "draws questions"],
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """Pairs of a right and a wrong row that ``trust`` puts in order, ties counted half, and all pairs."""
    order = np.argsort(trust[~right], kind="stable")
    below, upto = (np.searchsorted(trust[~right][order], trust[right], side) for side in ("left", "right"))
    weights = counts[:, owners[right]].astype(np.float64)
    mass = np.zeros((len(counts), len(order) + 1))
    np.cumsum(counts[:, owners[~right][order]], axis=1, out=mass[:, 1:])
    won = np.einsum("dn,dn->d", weights, mass[:, below] + mass[:, upto]) / 2
    return won, weights.sum(axis=1) * mass[:, -1]


def _share(won: Float[np.ndarray, " draws"], pairs: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def _log_loss(predictions: HeldOut, right: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "repeats n"]:
    return -np.log(np.clip(np.where(right, predictions.chances, 1 - predictions.chances), 1e-12, None))


def _check_classes(right: Bool[np.ndarray, " n"]) -> None:
    if right.all() or not right.any():
        raise UserError(f"AUROC of {len(right)} rows that are all {'right' if right.any() else 'wrong'}; it needs both")


def _check_folds(right: Bool[np.ndarray, " n"], owners: Int[np.ndarray, " n"], config: AnalysisConfig) -> None:
    rarest = rarest_class(right, owners)
    if rarest < config.folds:
        raise UserError(f"cross-fitting: {rarest} questions of the rarer class; {config.folds} folds need as many")
