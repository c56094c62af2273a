"""Context policies on a tiny manifest: measured once, resumed from their parts, drawn as measured."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from figures.experiments import context_policies
from neurosig.manifest import read_manifest
from neurosig.runtime.errors import UserError


def test_contexts_are_measured_and_drawn(results: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    config = context_policies.ContextsConfig(
        manifest=results / "manifest", out=tmp_path, policies=("nearest_all",), num_generations=2, quiet=True
    )
    context_policies.main(config)
    made = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    points = pd.read_csv(tmp_path / "gap_gain.csv")
    selected = [row.question_id for row in read_manifest(results / "manifest").selected]
    assert set(points["policy"]) == {"none", "random_within_kind", "nearest_all"}
    for policy, measured in points.groupby("policy"):
        assert list(measured["question"]) == selected, policy
    none = points[points["policy"] == "none"]
    assert (none["gap"].abs() < 1e-4).all() and (none["gain"] == 0).all()
    assert (points[points["policy"] == "random_within_kind"]["same_kind"] == 1).all()
    table = pd.read_csv(tmp_path / "context_policies.csv").set_index("policy")
    nearest = points[points["policy"] == "nearest_all"]
    assert table.loc["nearest_all", "gap"] == pytest.approx(nearest["gap"].mean(), abs=2e-6)
    assert table.loc["nearest_all", "n"] == len(selected) and table.loc["random_within_kind", "over_kind"] == 0
    context_policies.draw(tmp_path, tmp_path / "out")
    for axis, (column, *_) in zip(drawn[0].axes, context_policies.PANELS, strict=True):
        assert [line.get_xdata()[0] for line in axis.lines[1:]] == list(table[column])
    for part in (tmp_path / "parts").iterdir():
        part.write_text(part.read_text())
    context_policies.main(config)  # from its parts: nothing is sampled again
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == made
    with pytest.raises(UserError, match="--policies nonesuch: no such policy; have none, random"):
        context_policies.main(context_policies.ContextsConfig(manifest=tmp_path, policies=("nonesuch",)))
