"""Training and evaluation seeds of a grid: what is averaged, and what the intervals cover."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from figures.draw import paper_tables
from figures.grid.coverage import coverage_text, evaluation_text, seed_sd
from figures.grid.rows import grid_results, read_grid, write_grid
from neurosig.runtime.errors import UserError


def seeded(evaluations: int, k: int = 8, n: int = 60, spread: float = 0.0) -> list[dict[str, object]]:
    """A base and a method with three training seeds that differ by ``spread``, evaluated with several seeds."""
    rng = np.random.default_rng(0)
    hard, rows = rng.uniform(0.2, 0.6, n), []
    for method, source, seeds in (("base", "", 1), ("nopsd", "a", 3)):
        for seed in range(seeds):
            for evaluation in range(evaluations):
                right = rng.binomial(k, hard + (0.2 + spread * (seed - 1) if source else 0.0))
                rows += [
                    {"method": method, "source": source, "target": "a", "seed": seed, "evaluation_seed": evaluation}
                    | {
                        "question_id": f"q{index}",
                        "n_correct": int(count),
                        "k": k,
                        "votes": max(int(count), k - int(count)),
                    }
                    | {"n_tied": 1, "n_tied_right": int(count > k - count)}
                    for index, count in enumerate(right)
                ]
    return rows


def test_evaluation_seeds_are_averaged_and_keep_their_k(tmp_path: Path) -> None:
    """Two draws of 8 rollouts have the mean of two ECEs at K=8; an ECE of 16 votes would be smaller."""
    rows = seeded(2)
    both = grid_results(read_grid(write_grid(tmp_path / "both", rows).parent), resamples=200)
    each = [
        grid_results(
            read_grid(write_grid(tmp_path / str(seed), [r for r in rows if r["evaluation_seed"] == seed]).parent),
            resamples=200,
        )
        for seed in (0, 1)
    ]
    for name in ("avg_at_k", "maj_at_k", "ece"):
        assert both[name].evaluations == 2 and each[0][name].evaluations == 1
        mean = np.mean([result[name].trained["nopsd"][..., 0] for result in each], axis=0)
        np.testing.assert_allclose(both[name].trained["nopsd"][..., 0], mean)
        widths = [np.ptp(np.quantile(result[name].untrained["base"][0, 1:], [0.1, 0.9])) for result in (both, each[0])]
        assert name == "ece" or widths[0] < 1.1 * widths[1]


def test_another_evaluation_seed_must_answer_the_same_questions(tmp_path: Path) -> None:
    rows = [row for row in seeded(2) if (row["evaluation_seed"], row["question_id"]) != (1, "q3")]
    write_grid(tmp_path, rows)
    with pytest.raises(UserError, match="evaluation seed 1 answers other questions of a than its earlier seeds"):
        read_grid(tmp_path)


def test_the_text_states_evaluation_seeds_and_measured_coverage(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path / "alike", seeded(1)).parent)
    assert evaluation_text(grid.evaluations) == "one evaluation seed"
    apart = read_grid(write_grid(tmp_path / "apart", seeded(2, spread=0.1)).parent)
    assert evaluation_text(apart.evaluations) == "2 evaluation seeds"
    assert seed_sd(apart) == pytest.approx(0.1, abs=0.02)
    assert "between training seeds (as measured here)" in coverage_text(apart)
    covered = [int(re.search(r"(\d+)% with 3 training seeds", coverage_text(each))[1]) for each in (grid, apart)]  # type: ignore[index]
    assert covered[0] >= 92 > covered[1]
    page = paper_tables._sizes(grid, paper_tables.own_tables(grid_results(grid, resamples=100)))
    assert "one evaluation seed" in page and coverage_text(grid) in page
