"""The stated tests and the figure of all methods, on grids whose truth is known."""

from __future__ import annotations

import json
import shlex
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from figures.draw import findings, methods, paper_tables
from figures.grid import coverage
from figures.grid.collect import RESULTS
from figures.grid.config import METHOD_LABELS, METHODS, PLAN, PRESETS, GridConfig
from figures.grid.evidence import COMMITTED, SIGNALS, signals
from figures.grid.rows import grid_results, read_grid, write_grid
from figures.grid.tables import Layout
from figures.sources import DATA
from figures.style import METHODS as STYLE
from figures.style import save_figure
from neurosig.export import main as export
from neurosig.runtime.arguments import parse_config
from neurosig.runtime.errors import UserError
from neurosig.statistics.significance import holm
from tests.support.exports import K as EXPORTED_K
from tests.support.exports import write_lines, write_world
from tests.support.flow import export_config
from tests.support.paths import ROOT

K, N = 8, 120
DOMAINS = ("geography", "language")
SHIFT = {"base": 0.0, "control": 0.1, "nopsd": 0.3, "vote-only": 0.15, "vote-only-random": 0.05}
"""How much likelier than the base's a method's answers are right; .1 for the others."""
LENIENT = {**SHIFT, "lmsi": 0.3, "ttrl": 0.45}
"""The same, graded leniently: LMSI is as good as N-OPSD, and TTRL is better."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method of the plan on both sources, with the accuracies of `SHIFT` and `LENIENT`."""
    out = tmp_path_factory.mktemp("grid")
    rng = np.random.default_rng(0)
    hard = {domain: rng.uniform(0.1, 0.5, N) for domain in DOMAINS}
    rows, cells, signals = [], [], []
    for method in ("base", "control", *METHODS):
        trained = method not in ("base", "control")
        for source in DOMAINS if trained else ("",):
            for target in DOMAINS:
                right, lenient = (rng.binomial(K, hard[target] + shift.get(method, 0.1)) for shift in (SHIFT, LENIENT))
                rows += [
                    {"method": method, "source": source, "target": target, "seed": 0, "question_id": f"q{index}"}
                    | {"n_correct": int(n), "k": K, "votes": max(int(n), K - int(n)), "n_tied": 1}
                    | {
                        "n_tied_right": int(n > K - n),
                        "n_correct_lenient": int(m),
                        "n_tied_right_lenient": int(2 * m > K),
                    }
                    for index, (n, m) in enumerate(zip(right, lenient, strict=True))
                ]
                gap = 0.2 + SHIFT.get(method, 0.1)
                cells.append(
                    {"method": method, "source": source, "target": target, "seed": 0}
                    | {"avg_at_k": right.mean() / K, "avg_at_k_lenient": lenient.mean() / K}
                    | {"first_entropy_gap": gap if trained else None}
                )
    for source in DOMAINS:
        right = rng.random(N) < 0.5
        signals.append(
            pd.DataFrame(
                {"source": source, "question_id": [f"q{index}" for index in range(N)], "right": right}
                | {"right_lenient": right, "probe_score": rng.normal(size=N)}
                | {"vote_share": right + rng.normal(size=N)}
            )
        )
    write_grid(out, rows, Layout(DOMAINS))
    pd.DataFrame(cells).to_csv(out / RESULTS, index=False)
    pd.concat(signals).to_csv(out / SIGNALS, index=False)
    return out


@pytest.fixture(scope="module")
def evidence(folder: Path) -> findings.Evidence:
    return findings.read_evidence(folder)


@pytest.fixture
def plan() -> dict[str, Any]:
    return tomllib.loads(PLAN.read_text(encoding="utf-8"))


def test_the_plan_names_methods_and_seeds_that_its_command_runs(plan: dict[str, Any]) -> None:
    words = shlex.split(plan["command"])
    config = parse_config(GridConfig, presets=PRESETS, prog="grid", argv=words[3:])
    named = {name for test in plan["tests"] if test["kind"] != "auroc" for name in (*test["a"], *test.get("b", ()))}
    assert named <= {*config.methods, "base", "control"} and set(config.methods) <= set(METHODS)
    seeds = {name: [*config.seeds, *config.more_seeds] for name in config.more_seeds_for}
    assert plan["seeds"] == {**seeds, "others": list(config.seeds)}
    assert {str(test["finding"]) for test in plan["tests"] if test["primary"]} == set(plan["findings"])
    make = " ".join((ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").split())
    assert f"$(RUN) {' '.join(words[2:])} $(RUN)" in make


def test_verdicts_follow_the_truth(plan: dict[str, Any], evidence: findings.Evidence) -> None:
    table = findings.tests(plan, evidence).set_index("id")
    assert table.loc["2a", "verdict"] == "holds"
    assert table.loc["2a", "estimate"] == pytest.approx(30, abs=5)
    assert all(table.loc[name, "estimate"] == pytest.approx(20, abs=5) for name in ("2e", "2f", "2g", "2j"))
    assert table.loc["1a", "verdict"] == "open"  # the probe is noise, the vote is not
    assert table.loc["1b", "verdict"] == "contradicted"
    assert table.loc["5b", "verdict"] == "contradicted"  # under either grading
    primary = table[table["primary"]]
    assert (primary["p_holm"] >= primary["p"]).all() and table.loc["5a", "p_holm"] != table.loc["5a", "p_holm"]


def test_a_test_holds_only_where_both_gradings_agree(plan: dict[str, Any], evidence: findings.Evidence) -> None:
    table = findings.tests(plan, evidence).set_index("id")
    assert table.loc["2g", "verdict"] == "holds"  # Intuitor is behind by 20 points, strictly and leniently
    assert (table.loc["2e", "low"], table.loc["2e", "verdict"]) > (0, "open")  # by p: leniently there is no difference
    assert table.loc["2e", "p_holm"] > 0.05 > abs(table.loc["2e", "estimate_lenient"]) / 100
    assert table.loc["2f", "low"] > 0 > table.loc["2f", "high_lenient"]  # by sign: each grading alone is sure
    assert (table.loc["2f", "p_holm"] < 0.05) and table.loc["2f", "verdict"] == "open"
    strict = replace(evidence, results={k: v for k, v in evidence.results.items() if not k.endswith("_lenient")})
    alone = findings.tests(plan, strict).set_index("id")
    assert (alone.loc[["2e", "2f"], "verdict"] == "holds").all() and alone["estimate_lenient"].notna().sum() == 3
    assert (table["p"] >= alone["p"]).all() and alone.loc["2e", "estimate"] == table.loc["2e", "estimate"]

    random = np.random.default_rng(0).random(len(evidence.signals)) < 0.5
    signals = replace(evidence, signals=evidence.signals.assign(right_lenient=random))
    assert findings.tests(plan, signals).set_index("id").loc["1b", "verdict"] == "open"


def test_a_difference_is_that_of_the_plain_means(
    folder: Path, plan: dict[str, Any], evidence: findings.Evidence
) -> None:
    table = findings.tests(plan, evidence).set_index("id")
    every = pd.read_csv(folder / RESULTS, keep_default_na=False).set_index(["method", "source", "target"])
    for suffix in ("", "_lenient"):
        cells = every[f"avg_at_k{suffix}"]
        inside = np.mean([cells["nopsd", d, d] - cells["base", "", d] for d in DOMAINS])
        cross = np.mean([cells["nopsd", s, t] for s in DOMAINS for t in DOMAINS if s != t])
        assert table.loc["2a", f"estimate{suffix}"] == pytest.approx(100 * inside)
        assert table.loc["2b", f"estimate{suffix}"] == pytest.approx(
            100 * (cross - np.mean([cells["base", "", d] for d in DOMAINS]))
        )


def test_the_slope_is_that_of_the_least_squares_line(plan: dict[str, Any], evidence: findings.Evidence) -> None:
    test = next(test for test in plan["tests"] if test["kind"] == "slope")
    table = findings.tests(plan, evidence).set_index("id")
    for grading, name in (("strict", "estimate"), ("lenient", "estimate_lenient")):
        points = findings.gap_and_gain(test, evidence, grading)  # type: ignore[arg-type]
        assert len(points) == len(test["a"]) * len(DOMAINS)
        assert table.loc[test["id"], name] == pytest.approx(np.polyfit(points["gap"], points["gain"], 1)[0])
    assert table.loc[test["id"], "verdict"] == "holds"


def test_tests_of_methods_that_were_not_run_are_left_out_and_named(
    plan: dict[str, Any], evidence: findings.Evidence, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no grid\.parquet; run python -m figures.grid.evidence"):
        findings.read_evidence(tmp_path)
    fewer = {
        name: replace(result, trained={m: values for m, values in result.trained.items() if m not in ("opsa", "canon")})
        for name, result in evidence.results.items()
    }
    lacking = replace(evidence, results=fewer)
    table = findings.tests(plan, lacking)
    assert set(findings.tests(plan, evidence)["id"]) - set(table["id"]) == {"2j", "2k", "4a", "5e", "5i"}
    primary = table[table["primary"]]
    assert primary["p_holm"].tolist() == pytest.approx(holm(primary["p"].tolist()))
    caption = findings.caption(plan, lacking, table)
    assert "methods that this grid lacks: 2j, 2k, 5i (opsa); 4a, 5e (canon)." in caption
    assert "lacks" not in findings.caption(plan, evidence, findings.tests(plan, evidence))
    with pytest.raises(UserError, match="test 2a: no method ttrl2; have base, control, nopsd"):
        findings.tests({**plan, "tests": [{**plan["tests"][2], "b": ["ttrl2"]}]}, evidence)


def test_a_grid_without_lenient_grades_says_so(folder: Path, tmp_path: Path, plan: dict[str, Any]) -> None:
    """As the grids were that kept none."""
    shutil.copytree(folder, tmp_path / "grid")
    rows = pd.read_parquet(folder / "grid.parquet").drop(columns=["n_correct_lenient", "n_tied_right_lenient"])
    write_grid(tmp_path / "grid", rows.to_dict("records"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"grid\.parquet: no lenient grades; grade its kept texts again"):
        read_grid(tmp_path / "grid", "lenient")
    evidence = findings.read_evidence(tmp_path / "grid")
    table = findings.tests(plan, evidence)
    assert "Graded strictly alone: 2a, 2b, " in findings.caption(plan, evidence, table)
    assert "Graded strictly" not in findings.caption(plan, findings.read_evidence(folder), table.fillna(0))
    row = next(line for line in findings.markdown(table, {}, "").splitlines() if line.startswith("| 2f |"))
    assert row.split("|")[4].strip() == "" and row.endswith("| holds |")


def test_a_grid_may_be_trained_on_fewer_domains_than_it_is_judged_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], evidence: findings.Evidence
) -> None:
    """Untrained models then count over the pairs of source and target of the trained ones, and no test is left out."""
    monkeypatch.setattr(coverage, "STUDIES", 20)
    grid = tmp_path / "grid"
    shutil.copytree(folder, grid)
    rows = pd.read_parquet(folder / "grid.parquet")
    rows = rows[rows["source"].isin(["", "geography"])]
    write_grid(grid, rows.to_dict("records"))  # type: ignore[arg-type]
    one = findings.read_evidence(grid)
    table = findings.tests(plan, one)
    assert set(table["id"]) == set(findings.tests(plan, evidence)["id"])
    assert "in 2 domains, trained on geography (2 to 4)" in findings.caption(plan, one, table)
    points = 100 / K * rows.groupby(["method", "target"])["n_correct"].mean()
    changes = methods.changes(grid_results(read_grid(grid), resamples=50)).set_index(["metric", "scope", "method"])
    for name, scope, target, other in (("2c", "in", "geography", "control"), ("2b", "cross", "language", "base")):
        expected = points["nopsd", target] - points[other, target]
        assert table.set_index("id").loc[name, "estimate"] == pytest.approx(expected)
        shift = points["control", target] - points["base", target]
        assert changes.loc[("avg_at_k", scope, "control"), "delta"] == pytest.approx(shift)
    chosen = tmp_path / "plan.toml"
    test = plan["tests"][2]
    lines = [f"{name} = {json.dumps(value)}" for name, value in test.items()]
    chosen.write_text("threshold = 0.05\n[findings]\n2 = 'One'\n[[tests]]\n" + "\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(findings, "PLAN", chosen)
    for figure in (findings, methods, paper_tables):
        assert figure.draw(grid, tmp_path / "drawn")
    assert list(pd.read_csv(tmp_path / "drawn" / "findings.csv")["id"]) == [test["id"]]


def test_figures_show_the_table(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan: dict[str, Any],
    evidence: findings.Evidence,
) -> None:
    shown: list[Figure] = []
    monkeypatch.setattr(coverage, "STUDIES", 20)

    def seen(figure: Figure, folder: Path, name: str, numbers: str) -> list[Path]:
        shown.append(figure)
        return save_figure(figure, folder, name, numbers)

    for figure in (findings, methods):
        monkeypatch.setattr(figure, "save_figure", seen)
        paths = figure.draw(folder, tmp_path)
        again = figure.draw(folder, tmp_path / "again")
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    table = findings.tests(plan, evidence)
    drawn = [
        offset[0]
        for axis in shown[0].axes
        for points in axis.collections
        for offset in getattr(points, "get_offsets", list)()
        if hasattr(points, "get_sizes")
    ]
    for name in ("estimate", "estimate_lenient"):
        assert set(np.round(table[name], 4)) <= set(np.round(drawn, 4))
    assert "| 2a |" in (tmp_path / "findings.md").read_text(encoding="utf-8")
    changes = pd.read_csv(tmp_path / "methods.csv")
    own = methods.changes(grid_results(read_grid(folder), resamples=methods.RESAMPLES, seed=methods.SEED))
    np.testing.assert_allclose(changes["delta"], own["delta"], rtol=1e-4, atol=1e-6)
    labels = [text.get_text() for text in shown[2].axes[0].get_yticklabels()]
    assert labels[0] == "base, best temperature" and len(labels) == 1 + len(METHODS)
    names = [name for name in METHOD_LABELS if name != "base"]
    assert labels == [METHOD_LABELS[name] for name in names]
    for part in shown[2].axes[0].collections:
        in_domain = [y + 0.15 for _, y in part.get_offsets() if hasattr(part, "get_sizes") and round(y % 1, 2) == 0.85]
        for place in in_domain:
            assert to_hex(part.get_facecolor()[0]) == STYLE[names[round(place)]][0].lower()


def test_the_page_of_tables_has_both_gradings(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_tables, "RESAMPLES", 20)
    monkeypatch.setattr(coverage, "STUDIES", 20)
    paper_tables.draw(folder, tmp_path)
    page = (tmp_path / "paper_tables.md").read_text(encoding="utf-8")
    assert "### Avg@8 (per cent), changes against base, lenient grading" in page
    cells = pd.read_csv(tmp_path / "paper_tables.csv").set_index(["table", "method", "scope", "column"])["value"]
    kept = pd.read_csv(folder / RESULTS, keep_default_na=False).set_index(["method", "source", "target"])
    for name in ("avg_at_k", "avg_at_k_lenient"):
        value = cells[f"{name} against base", "ttrl", "in", "geography"]
        assert value == pytest.approx(100 * kept.loc[("ttrl", "geography", "geography"), name])


def test_a_majority_can_be_right_leniently_alone(tmp_path: Path) -> None:
    """Six majorities answer "west gold" for gold; of the other questions, both gradings say the same."""
    folder = write_world(tmp_path)
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    longer = [f"q{index:02d}" for index in range(10, 16)]
    rollouts = [
        {**row, "text": f"I would say. Answer: west gold{int(row['question_id'][1:])}"}
        if row["question_id"] in longer
        else row
        for row in map(json.loads, lines)
    ]
    known = {"rollouts": write_lines(folder / "rollouts.jsonl", rollouts), "num_generations": EXPORTED_K}
    export(export_config(folder, folder / "model", folder / "questions.jsonl", **known))
    table = signals(folder / "manifest", "made up").set_index("question_id")
    assert not table.loc[longer, "right"].any() and table.loc[longer, "right_lenient"].all()
    others = table.drop(longer)
    assert (others["right"] == others["right_lenient"]).all() and 0 < others["right"].sum() < len(others)


def test_each_baseline_is_tested_on_its_own_and_corrected_with_all(
    plan: dict[str, Any], evidence: findings.Evidence
) -> None:
    """A method that is behind one baseline and ahead of another must not look equal to both."""
    table = findings.tests(plan, evidence).set_index("id")
    for metric in ("avg_at_k", "ece"):
        tests = [test for test in plan["tests"] if test["primary"] and test.get("metric") == metric]
        against = [test["b"] for test in tests]
        assert all([name] in against for name in ("lmsi", "ttrl", "intuitor")) and all(len(b) == 1 for b in against)
    primary = table[table["primary"]]
    assert primary["p_holm"].tolist() == pytest.approx(holm(primary["p"].tolist()))


def test_a_test_stated_after_the_run_is_called_post_hoc(folder: Path, tmp_path: Path, plan: dict[str, Any]) -> None:
    """By what the grid kept when it was started, not by what the plan says of itself."""
    shutil.copytree(folder, tmp_path / "grid")
    assert not findings.tests(plan, findings.read_evidence(tmp_path / "grid"))["planned"].any()  # no copy, no proof
    shutil.copy(PLAN, tmp_path / "grid" / PLAN.name)
    evidence = findings.read_evidence(tmp_path / "grid")
    assert findings.tests(plan, evidence)["planned"].all()
    fewer = replace(evidence, planned=[test for test in plan["tests"] if test["id"] not in ("2e", "3a")])
    table = findings.tests(plan, fewer).set_index("id")
    assert set(table.index[~table["planned"]]) == {"2e", "3a"}
    stated = table[table["primary"] & table["planned"]]
    assert stated["p_as_planned"].tolist() == pytest.approx(holm(stated["p"].tolist()))
    text = findings.markdown(table.reset_index(), {}, "")
    assert "N-OPSD over LMSI (post hoc)" in text and "as planned" in text
    plan["tests"][0]["claim"] = "less"
    assert not findings.tests(plan, evidence)["planned"].iloc[0]


def test_the_committed_findings_follow_from_the_committed_grid(plan: dict[str, Any]) -> None:
    table = findings.tests(plan, findings.read_evidence(COMMITTED))
    kept = pd.read_csv(DATA / "findings.csv")
    pd.testing.assert_frame_equal(kept, table, check_dtype=False, rtol=1e-5, check_exact=False)
