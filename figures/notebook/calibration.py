"""The numbers behind the reliability diagrams: of every evaluation of a run, and of a probe's probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from neurosig.runtime.errors import UserError
from neurosig.statistics import metrics
from neurosig.statistics.vote_table import VoteTable


def calibration_table(run: Path) -> pd.DataFrame:
    """Every question of every evaluation in ``run/eval``, one row each.

    Columns: ``method``, ``temperature``, ``scope`` (``in-domain`` if the manifest has the domain), ``domain``,
    ``question_id``, ``k``, ``votes`` and ``accuracy`` (of the majority, in expectation over ties).

    Raises:
        UserError: There is no finished evaluation.
    """
    from distill.evaluate import RESULTS, SUMMARY
    from neurosig.manifest import read_manifest

    trained_on = {row.domain for row in read_manifest(run / "manifest").rows}
    frames = []
    for summary in sorted((run / "eval").glob(f"*/{SUMMARY}")):
        rows = pd.read_parquet(summary.parent / RESULTS)
        frames.append(
            pd.DataFrame(
                {
                    "method": summary.parent.name,
                    "temperature": json.loads(summary.read_text())["config"]["temperature"],
                    "scope": np.where(rows["domain"].isin(trained_on), "in-domain", "cross-domain"),
                    "domain": rows["domain"],
                    "question_id": rows["question_id"],
                    "k": rows["k"],
                    "votes": rows["votes"],
                    "accuracy": metrics.maj_at_k(rows["n_tied_right"].to_numpy(), rows["n_tied"].to_numpy()),
                }
            )
        )
    if not frames:
        raise UserError(f"{run / 'eval'}: no finished evaluation; run distill.evaluate --out {run / 'eval' / 'base'}")
    return pd.concat(frames, ignore_index=True)


def calibration_summary(questions: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """ECE with its 95% bootstrap interval over questions, smooth ECE, Brier and signed gap, per method and scope.

    ``ece_floor`` is the ECE of a perfectly calibrated sampler at this K and n
    (`neurosig.statistics.metrics.ece_floor`).
    """
    rows = []
    for (scope, method), group in questions.groupby(["scope", "method"], sort=False):
        votes, k = group["votes"].to_numpy(np.int64), int(group["k"].iloc[0])
        accuracy = group["accuracy"].to_numpy(np.float64)
        table = VoteTable(k, votes, {"maj_at_k": accuracy})
        interval = table.interval("ece", seed=seed, resamples=resamples)
        rows.append(
            {
                "scope": scope,
                "method": method,
                "temperature": float(group["temperature"].iloc[0]),
                "n": len(group),
                "k": k,
                "maj_at_k": float(accuracy.mean()),
                "confidence": float((votes / k).mean()),
                "ece": interval.estimate,
                "ece_low": interval.low,
                "ece_high": interval.high,
                "ece_floor": metrics.ece_floor(k, len(group), seed=seed),
                "smooth_ece": metrics.smooth_ece(votes, k, accuracy),
                "brier": metrics.brier(votes, k, accuracy),
                "signed_gap": metrics.signed_gap(votes, k, accuracy),
            }
        )
    return pd.DataFrame(rows).sort_values("scope", ascending=False, kind="stable", ignore_index=True)


def calibration_points(questions: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """Accuracy of the majority at each number of votes, with its 95% bootstrap interval over those questions.

    Columns: ``scope``, ``method``, ``votes``, ``confidence`` (votes over K), ``accuracy``, ``low``, ``high`` and ``n``.
    One question has no interval: ``low`` and ``high`` are NaN.
    """
    rows = []
    for (scope, method, votes), group in questions.groupby(["scope", "method", "votes"], sort=False):
        accuracy, low, high = group["accuracy"].to_numpy(np.float64), np.nan, np.nan
        if len(accuracy) > 1:
            interval = metrics.paired_mean_interval(accuracy, np.zeros(len(accuracy)), seed=seed, resamples=resamples)
            low, high = interval.low, interval.high
        confidence = group["votes"].iloc[0] / int(group["k"].iloc[0])
        rows.append((scope, method, votes, confidence, float(accuracy.mean()), low, high, len(group)))
    columns = ["scope", "method", "votes", "confidence", "accuracy", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns).sort_values(["scope", "method", "votes"], ignore_index=True)


def probability_bins(
    probabilities: Float[np.ndarray, " texts"], positive: Bool[np.ndarray, " texts"], *, bins: int = 6
) -> pd.DataFrame:
    """How often texts are positive, by the probability that a probe gives them.

    Each bin holds about as many texts as any other; equal probabilities share one.

    Returns:
        A row per bin: ``probability`` (mean), ``share`` of its texts that are positive, ``low`` and ``high`` (its 95%
        interval after Wilson 1927, texts counted as independent) and ``n`` (texts).
    """
    texts = pd.DataFrame({"probability": probabilities, "positive": positive})
    edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, bins + 1)[1:-1]))
    rows = []
    for _, group in texts.groupby(np.searchsorted(edges, probabilities)):
        found = stats.binomtest(int(group["positive"].sum()), len(group)).proportion_ci(method="wilson")
        rows.append((group["probability"].mean(), group["positive"].mean(), found.low, found.high, len(group)))
    return pd.DataFrame(rows, columns=["probability", "share", "low", "high", "n"])
