"""What a ranking yields, by hand; and the experiment from exports and an evaluation of a tiny model to its figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from figures.experiments import screening
from figures.experiments.screening_yield import MEASURES, TOPS, Truth, yields
from neurosig.export import main as export
from neurosig.runtime.errors import UserError
from tests.support.exports import write_lines
from tests.support.flow import export_config, save_tiny
from tests.support.paths import FIGURE_DATA


def truth(n: int = 20, strata: int = 1) -> Truth:
    """Half of the questions pass the vote, three quarters of these are right; a right one took half of the tokens."""
    place = np.arange(n)
    passes = (place % 2 == 0).astype(float)
    right = (place % 8 != 6).astype(float)
    return Truth(passes, right, np.where(passes * right > 0, 10.0, 20.0), place * strata // n)


def measure(rows: list[dict[str, float]], name: str, top: float) -> dict[str, float]:
    return next(row for row in rows if row["measure"] == name and row["top"] == top)


def test_a_perfect_ranking_yields_as_much_as_there_is() -> None:
    known = truth(40)
    good = known.passes * known.right
    rows = yields(known, [good], seed=0, resamples=200)
    assert [(row["top"], row["measure"]) for row in rows] == [(top, name) for top in TOPS for name in MEASURES]
    found = measure(rows, "multiple", 0.2)
    assert found["value"] == pytest.approx(1 / good.mean()) and found["low"] < found["value"] < found["high"]
    assert measure(rows, "precision", 0.2)["value"] == 1
    assert measure(rows, "precision_all", 0.2)["value"] == pytest.approx(0.75)
    per_token = (1 / 10) / (good.sum() / known.tokens.sum())
    assert measure(rows, "per_token", 0.2)["value"] == pytest.approx(per_token)
    reversed_rows = yields(known, [-good], seed=0, resamples=100)
    assert measure(reversed_rows, "multiple", 0.5)["value"] == 0


def test_random_rankings_yield_one_and_strata_are_ranked_apart() -> None:
    known = truth(400, strata=2)
    rng = np.random.default_rng(0)
    rows = yields(known, [rng.random(400) for _ in range(30)], seed=0, resamples=100)
    assert measure(rows, "multiple", 0.5)["value"] == pytest.approx(1, abs=0.05)
    first = (known.strata == 0).astype(float)  # prefers one stratum, of which no more may be chosen
    rows = yields(known, [first + 1e-6 * rng.random(400) for _ in range(30)], seed=0, resamples=100)
    assert measure(rows, "multiple", 0.2)["value"] == pytest.approx(1, abs=0.1)


def test_the_figure_shows_the_committed_table(tmp_path: Path, drawn: list[Figure]) -> None:
    screening.draw(tmp_path, tmp_path / "out")
    table = pd.read_csv(FIGURE_DATA / "screening.csv")
    rows = table[(table["setting"] == "in domain") & (table["features"] == "neurons") & (table["top"] == 0.2)]
    for axis, grading in zip(drawn[0].axes, ("strict", "lenient"), strict=True):
        wanted = rows[(rows["grading"] == grading) & (rows["measure"] == "multiple")]["value"]
        assert [line.get_xdata()[0] for line in axis.lines[: len(wanted)]] == list(wanted)


def test_a_pool_that_shares_a_question_with_a_pilot_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    questions = [{"id": f"q{i}", "question": f"Is {i} nice?", "answer": "yes", "kind": "k"} for i in range(4)]
    source = write_lines(tmp_path / "questions.jsonl", questions)
    export(export_config(tmp_path, model, source))
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "rollouts.jsonl").write_bytes((tmp_path / "manifest" / "rollouts.jsonl").read_bytes())
    config = screening.ScreeningConfig(
        pilots=(tmp_path / "manifest",), pool=tmp_path / "pool", questions=(str(source),), out=tmp_path / "out"
    )
    with pytest.raises(UserError, match="shares question q0 with a pilot; judge on other questions"):
        screening.main(config)
