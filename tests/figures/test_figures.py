"""The figures command: what is drawn by default, by name, and from whose numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from figures.__main__ import FIGURES, FiguresConfig, main
from neurosig.runtime.errors import UserError
from tests.support.paths import FIGURE_DATA


def test_by_default_what_has_no_results_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="figures")
    main(FiguresConfig(results=tmp_path))
    for name in ("before_after", "dose_response"):
        assert f"{name}: left out, there is no {tmp_path}" in caplog.text
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {path.stem for path in (tmp_path / "figures").glob("*.pdf")} != set()
    assert drawn < set(FIGURES)
    for name in drawn - {"paper_tables"}:  # from two files: see test_tables
        assert (tmp_path / "figures" / f"{name}.csv").read_bytes() == (FIGURE_DATA / f"{name}.csv").read_bytes()


def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    for out in ("a", "b"):
        main(FiguresConfig(names=("organism",), results=tmp_path, out=tmp_path / out))
    for suffix in ("pdf", "png"):
        first, second = ((tmp_path / out / f"organism.{suffix}").read_bytes() for out in ("a", "b"))
        assert first == second


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonesuch", "figure nonesuch: no such figure; have before_after"),
        ("dose_response", "no finished run; run `python -m neurosig.intervene"),
        ("before_after", "no such file; run `python -m distill.compare"),
    ],
)
def test_a_figure_given_by_name_must_be_drawn(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(FiguresConfig(names=(name,), results=tmp_path))
    assert not (tmp_path / "figures").exists()
