"""Measured coverage of the intervals that resample training seeds and questions: how often they hold the truth.

With S seeds the bootstrap sees (S - 1) / S of their variance, and nothing of it with one seed, so these intervals are
narrower than they say. `seed_interval_coverage` measures by how much, by simulation at a study's own numbers.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from neurosig.runtime.errors import UserError
from neurosig.statistics.resampling import percentile_ends, question_counts, resample_weights

POPULATION = 200_000


@cache
def seed_interval_coverage(
    *,
    n: int,
    k: int,
    seeds: int,
    seed_sd: float,
    domains: int = 1,
    accuracy: float = 0.35,
    spread: float = 0.1,
    effect: float = 0.1,
    replicates: int = 1000,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> float:
    """Share of simulated studies whose interval for a change of Avg@K holds the true change.

    A question's chance of a right sample is drawn from a Beta distribution. Training with a seed shifts all chances of
    its domain by the effect plus that seed's own normal deviation. A study samples K answers per question from the
    base and from the model of each seed, and its percentile interval resamples questions and seeds, as
    ``figures.grid`` does. The true change is the mean over all questions and all seeds.

    Args:
        n: Questions per domain.
        k: Samples per question.
        seeds: Training seeds per domain.
        seed_sd: Standard deviation of the seeds' effects, as a fraction (0.01 is a point of Avg@K).
        domains: Domains that the change is averaged over, each with questions and seeds of its own.
        accuracy: Mean chance of the base.
        spread: Variance of the base's chances over questions.
        effect: Mean shift.
        replicates: Simulated studies; at 1,000 the result is known to about 1.4 points at 95% (two standard errors).
        resamples: Bootstrap draws per study.
        level: Nominal coverage.
        seed: Seed of the simulation.

    Returns:
        A fraction, to compare with ``level``.

    Raises:
        UserError: Fewer than two questions, fewer than one seed, sample or domain, or a spread that no chances have.
    """
    if n < 2 or min(k, seeds, domains, replicates) < 1 or seed_sd < 0:
        raise UserError(
            f"coverage: n={n}, k={k}, seeds={seeds}, domains={domains}, seed_sd={seed_sd}; give at least 2 questions, "
            "1 sample, seed and domain, and a standard deviation of 0 or more"
        )
    if not 0 < spread < accuracy * (1 - accuracy):
        raise UserError(f"coverage: spread {spread} must lie between 0 and {accuracy * (1 - accuracy):.4f}")
    rng = np.random.default_rng(seed)
    concentration = accuracy * (1 - accuracy) / spread - 1
    shape = accuracy * concentration, (1 - accuracy) * concentration
    chance = rng.beta(*shape, size=POPULATION)
    shift = effect + seed_sd * rng.standard_normal(POPULATION)
    truth = float((np.clip(chance + shift, 0, 1) - chance).mean())
    covered = 0
    for replicate in range(replicates):
        draws = np.zeros(resamples)
        for domain in range(domains):
            chance = rng.beta(*shape, size=(n, 1))
            shift = effect + seed_sd * rng.standard_normal(seeds)
            trained = rng.binomial(k, np.clip(chance + shift, 0, 1)) / k
            change = trained - rng.binomial(k, chance) / k
            (counts,) = question_counts(n, resamples, seed=[seed, replicate, domain], block=resamples)
            draws += (counts @ change / n * resample_weights(seeds, resamples, rng)).sum(axis=1) / domains
        low, high = percentile_ends(draws, level)
        covered += low <= truth <= high
    return covered / replicates
