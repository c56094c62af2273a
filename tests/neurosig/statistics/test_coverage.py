"""Coverage of the intervals over training seeds and questions, against what theory says of it."""

from __future__ import annotations

import pytest

from neurosig.runtime.errors import UserError
from neurosig.statistics.coverage import seed_interval_coverage

SIZE = {"n": 200, "k": 8, "replicates": 300, "resamples": 200}


def test_without_a_spread_between_seeds_an_interval_covers_as_it_says() -> None:
    assert 0.91 <= seed_interval_coverage(**SIZE, seeds=1, seed_sd=0.0) <= 0.98


def test_one_seed_covers_far_too_rarely_and_more_seeds_help() -> None:
    """With seeds that differ by more than the questions' error, one seed's interval misses their spread altogether."""
    one, three, eight = (seed_interval_coverage(**SIZE, seeds=seeds, seed_sd=0.04) for seeds in (1, 3, 8))
    assert one < 0.6 < three < 0.93
    assert three < eight


@pytest.mark.parametrize("change", [{"n": 1}, {"seeds": 0}, {"seed_sd": -0.1}, {"spread": 0.3}])
def test_impossible_studies_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(UserError, match="coverage: "):
        seed_interval_coverage(**{"n": 10, "k": 8, "seeds": 1, "seed_sd": 0.0, **change})  # type: ignore[arg-type]
