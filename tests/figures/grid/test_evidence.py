"""The stated tests and the figure of all methods, on grids whose truth is known."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from figures.draw import findings, methods
from figures.grid.collect import RESULTS
from figures.grid.config import METHODS, PLAN
from figures.grid.evidence import COMMITTED, SIGNALS
from figures.grid.rows import grid_results, read_grid, write_grid
from figures.grid.tables import Layout
from figures.sources import DATA
from figures.style import save_figure
from neurosig.runtime.errors import UserError
from neurosig.statistics.significance import holm
from tests.support.paths import ROOT

K, N = 8, 120
DOMAINS = ("geography", "language")
SHIFT = {"base": 0.0, "control": 0.1, "nopsd": 0.3, "lmsi": 0.1, "vote-only": 0.15, "vote-only-random": 0.05}
"""How much likelier than the base's a method's answers are right."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method of the plan on both sources, with the accuracies of `SHIFT` (.1 for the others)."""
    out = tmp_path_factory.mktemp("grid")
    rng = np.random.default_rng(0)
    hard = {domain: rng.uniform(0.1, 0.5, N) for domain in DOMAINS}
    rows, cells, signals = [], [], []
    for method in ("base", "control", *METHODS):
        trained = method not in ("base", "control")
        for source in DOMAINS if trained else ("",):
            for target in DOMAINS:
                right = rng.binomial(K, hard[target] + SHIFT.get(method, 0.1))
                rows += [
                    {"method": method, "source": source, "target": target, "seed": 0, "question_id": f"q{index}"}
                    | {"n_correct": int(n), "k": K, "votes": max(int(n), K - int(n)), "n_tied": 1}
                    | {"n_tied_right": int(n > K - n)}
                    for index, n in enumerate(right)
                ]
                gap = 0.2 + SHIFT.get(method, 0.1)
                cells.append(
                    {"method": method, "source": source, "target": target, "seed": 0}
                    | {"avg_at_k": right.mean() / K, "first_entropy_gap": gap if trained else None}
                )
    for source in DOMAINS:
        right = rng.random(N) < 0.5
        signals.append(
            pd.DataFrame(
                {"source": source, "question_id": [f"q{index}" for index in range(N)], "right": right}
                | {"probe_score": rng.normal(size=N), "vote_share": right + rng.normal(size=N)}
            )
        )
    write_grid(out, rows, Layout(DOMAINS))
    pd.DataFrame(cells).to_csv(out / RESULTS, index=False)
    pd.concat(signals).to_csv(out / SIGNALS, index=False)
    return out


def test_the_plan_names_methods_that_the_grid_runs() -> None:
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    named = {name for test in plan["tests"] if test["kind"] != "auroc" for name in (*test["a"], *test.get("b", ()))}
    run = set(plan["command"].partition("--methods ")[2].partition(" --")[0].split())
    assert named <= run | {"base", "control"} and run <= set(METHODS)
    assert {str(test["finding"]) for test in plan["tests"] if test["primary"]} == set(plan["findings"])


def test_verdicts_follow_the_truth(folder: Path) -> None:
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    table = findings.tests(plan, findings.read_evidence(folder)).set_index("id")
    assert table.loc["2a", "verdict"] == "holds"
    assert table.loc["2a", "estimate"] == pytest.approx(30, abs=5)
    assert all(table.loc[name, "estimate"] == pytest.approx(20, abs=5) for name in ("2e", "2f", "2g", "5e"))
    assert table.loc["1a", "verdict"] == "open"  # the probe is noise, the vote is not
    assert table.loc["1b", "verdict"] == "contradicted"
    assert table.loc["5b", "verdict"] == "holds"
    primary = table[table["primary"]]
    assert (primary["p_holm"] >= primary["p"]).all() and table.loc["5a", "p_holm"] != table.loc["5a", "p_holm"]


def test_a_difference_is_that_of_the_plain_means(folder: Path) -> None:
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    table = findings.tests(plan, findings.read_evidence(folder)).set_index("id")
    cells = pd.read_csv(folder / RESULTS, keep_default_na=False).set_index(["method", "source", "target"])["avg_at_k"]
    inside = np.mean([cells["nopsd", d, d] - cells["base", "", d] for d in DOMAINS])
    cross = np.mean([cells["nopsd", s, t] for s in DOMAINS for t in DOMAINS if s != t])
    assert table.loc["2a", "estimate"] == pytest.approx(100 * inside)
    assert table.loc["2b", "estimate"] == pytest.approx(
        100 * (cross - np.mean([cells["base", "", d] for d in DOMAINS]))
    )


def test_the_slope_is_that_of_the_least_squares_line(folder: Path) -> None:
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    evidence = findings.read_evidence(folder)
    test = next(test for test in plan["tests"] if test["kind"] == "slope")
    points = findings.gap_and_gain(test, evidence)
    table = findings.tests(plan, evidence).set_index("id")
    assert len(points) == len(test["a"]) * len(DOMAINS)
    assert table.loc[test["id"], "estimate"] == pytest.approx(np.polyfit(points["gap"], points["gain"], 1)[0])
    assert table.loc[test["id"], "verdict"] == "holds"


def test_a_method_that_was_not_run_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no grid\.parquet; run python -m figures.grid.evidence"):
        findings.read_evidence(tmp_path)
    evidence = findings.read_evidence(folder)
    test = {"id": "x", "kind": "difference", "metric": "ece", "scope": "in", "a": ["ttrl2"], "b": ["base"]}
    with pytest.raises(UserError, match="test x: no runs of method ttrl2"):
        findings.tests({"tests": [test]}, evidence)


def test_figures_show_the_table(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Figure] = []

    def seen(figure: Figure, folder: Path, name: str, numbers: str) -> list[Path]:
        shown.append(figure)
        return save_figure(figure, folder, name, numbers)

    for figure in (findings, methods):
        monkeypatch.setattr(figure, "save_figure", seen)
        paths = figure.draw(folder, tmp_path)
        again = figure.draw(folder, tmp_path / "again")
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    table = findings.tests(tomllib.loads(PLAN.read_text(encoding="utf-8")), findings.read_evidence(folder))
    drawn = [
        offset[0]
        for axis in shown[0].axes
        for points in axis.collections
        for offset in getattr(points, "get_offsets", list)()
        if hasattr(points, "get_sizes")
    ]
    assert set(np.round(table["estimate"], 4)) <= set(np.round(drawn, 4))
    assert "| 2a |" in (tmp_path / "findings.md").read_text(encoding="utf-8")
    changes = pd.read_csv(tmp_path / "methods.csv")
    own = methods.changes(grid_results(read_grid(folder), resamples=methods.RESAMPLES, seed=methods.SEED))
    np.testing.assert_allclose(changes["delta"], own["delta"], rtol=1e-4, atol=1e-6)
    labels = [text.get_text() for text in shown[2].axes[0].get_yticklabels()]
    assert labels[0] == "base, best temperature" and len(labels) == 1 + len(METHODS)


# One test per baseline, planned or post hoc


def kept_table() -> pd.DataFrame:
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    return findings.tests(plan, findings.read_evidence(COMMITTED)).set_index("id")


def test_each_baseline_is_tested_on_its_own_and_corrected_with_all() -> None:
    """A method that is behind one baseline and ahead of another must not look equal to both."""
    table, plan = kept_table(), tomllib.loads(PLAN.read_text(encoding="utf-8"))
    for metric in ("avg_at_k", "ece"):
        tests = [test for test in plan["tests"] if test["primary"] and test.get("metric") == metric]
        against = [test["b"] for test in tests]
        assert all([name] in against for name in ("lmsi", "ttrl", "intuitor")) and all(len(b) == 1 for b in against)
    lmsi = table[table["test"] == "Avg@8 in-domain, N-OPSD over LMSI"].iloc[0]
    assert lmsi["estimate"] == pytest.approx(-3.77, abs=0.01) and lmsi["high"] < 0
    primary = table[table["primary"]]
    assert primary["p_holm"].tolist() == pytest.approx(holm(primary["p"].tolist()))


def test_a_test_stated_after_the_run_is_called_post_hoc(folder: Path, tmp_path: Path) -> None:
    """By what the grid kept when it was started, not by what the plan says of itself."""
    table = kept_table()
    assert set(table.index[~table["planned"]]) == {"2e", "2f", "2g", "3b", "3c", "3d"}
    assert table.loc["3a", "p_as_planned"] == pytest.approx(0.028, abs=0.001)  # over the ten tests of that plan
    text = findings.markdown(table.reset_index(), {}, "")
    assert "N-OPSD over LMSI (post hoc)" in text and "as planned" in text

    shutil.copytree(folder, tmp_path / "grid")
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    assert not findings.tests(plan, findings.read_evidence(tmp_path / "grid"))["planned"].any()  # no copy, no proof
    shutil.copy(PLAN, tmp_path / "grid" / PLAN.name)
    evidence = findings.read_evidence(tmp_path / "grid")
    assert findings.tests(plan, evidence)["planned"].all()
    plan["tests"][0]["claim"] = "less"
    assert not findings.tests(plan, evidence)["planned"].iloc[0]


def test_the_committed_findings_and_the_readme_follow_from_the_committed_grid() -> None:
    table = kept_table()
    kept = pd.read_csv(DATA / "findings.csv").set_index("id")
    pd.testing.assert_frame_equal(kept, table, check_dtype=False, rtol=1e-5, check_exact=False)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("### What the evidence says") : readme.index("### What one run prints")]
    for name in ("2e", "2f", "2g", "5e"):
        row = table.loc[name]
        assert f"{row['estimate']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]" in section, name
    for name in ("2d", "2e", "2g", "3a"):
        assert f"p = {table.loc[name, 'p_holm']:.3f}".replace("0.", ".") in section, name
    coverage = findings.read_evidence(COMMITTED).coverage
    (one, _), (three, _) = re.findall(r"(\d+%) with (\d)", coverage)
    assert f"in {one} with one training\nseed, {three} with three" in section
    assert "one evaluation seed" in section and f"over all {int(table['primary'].sum())}" in section
