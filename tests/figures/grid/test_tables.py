"""Tables in the paper's form: the published ones from a made-up matrix, and our own from per-question rows."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from distill.evaluate import EvaluateConfig
from distill.evaluate import main as evaluate
from figures.draw import paper_tables
from figures.draw.paper_tables import averages_without
from figures.grid import config
from figures.grid.config import BASE, CONTROL, METHOD_LABELS
from figures.grid.rows import Run, evaluation_rows, grid_results, read_grid, write_grid
from figures.grid.table_text import FIELDS, markdown, rounded, signed
from figures.grid.tables import METRICS, PAPER, Layout, Results, Table, matrix_table, plain, scope_table
from figures.style import METHODS
from neurosig.runtime.errors import UserError
from neurosig.statistics import metrics
from neurosig.statistics.significance import minimum_detectable_effect
from tests.support.flow import save_tiny, write_questions
from tests.support.paths import FIGURE_DATA, TESTS

METRIC_OF = {3: METRICS["avg_at_k"], 4: METRICS["ece"]}
INCONSISTENT = {(4, "LMSI", "in", "AVG", "delta"): ("+0.007", "+0.006")}
"""Printed and computed: +0.007 is what the difference of the printed averages gives; no matrix gives it."""


def witness(table: int) -> Results:
    base: dict[str, float] = {}
    matrices: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    with (TESTS / "data" / "witness_matrix.csv").open() as handle:
        for row in csv.DictReader(handle):
            if int(row["table"]) != table:
                continue
            if row["method"] == BASE:
                base[row["target"]] = float(row["value"])
            else:
                matrices[row["method"]][row["source"]][row["target"]] = float(row["value"])
    return plain(METRIC_OF[table], PAPER, base, matrices)


def published_cells(table: int) -> dict[tuple[str, str, str], tuple[str, str]]:
    with (FIGURE_DATA / f"paper_table{table}.csv").open() as handle:
        return {(r["method"], r["scope"], r["column"]): (r["value"], r["delta"]) for r in csv.DictReader(handle)}


def printed(table: Table) -> dict[tuple[str, str, str], tuple[str, str]]:
    decimals = table.metric.decimals
    return {
        (row.method, row.scope, column): (
            "" if cell.value is None else rounded(cell.value, decimals),
            "" if cell.delta is None else signed(cell.delta, decimals),
        )
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
    }


@pytest.mark.parametrize("number", [3, 4])
def test_golden_every_published_cell_as_a_string(number: int) -> None:
    ours, published = printed(scope_table(witness(number))), published_cells(number)
    assert list(ours) == list(published)  # rows and columns in the paper's order
    assert len(ours) == 9 * 8
    different = {
        (number, *key, part): (published[key][index], ours[key][index])
        for key in ours
        for index, part in enumerate(("value", "delta"))
        if ours[key][index] != published[key][index]
    }
    assert different == {key: value for key, value in INCONSISTENT.items() if key[0] == number}


def test_the_lead_rests_on_one_column() -> None:
    """Without the education set, which one method lacks, another method leads in-domain."""
    frame = averages_without(paper_tables.published()["Table 3"], "EDU")
    rows = frame[frame["scope"].isin(["base", "in"])].set_index("method")
    assert rows["without"].round(2).to_dict() == {
        "base": 73.91, "LMSI": 72.91, "TTRL": 75.14, "Intuitor": 75.52, "N-OPSD": 74.92,
    }  # fmt: skip
    whole = rows[rows["complete"]]["average"]
    assert whole.idxmax() == "N-OPSD"
    assert list(rows.index[~rows["complete"]]) == ["Intuitor"]


# Numbers and formulas


@pytest.mark.parametrize(
    ("value", "decimals", "text", "change"),
    [
        (0.125, 2, "0.13", "+0.13"),
        (-0.125, 2, "-0.13", "-0.13"),
        (2.675, 2, "2.68", "+2.68"),  # a float just below the half
        (np.mean([0.1, 0.2, 0.075]), 3, "0.125", "+0.125"),
        (-0.004, 2, "0.00", "+0.00"),
        (72.1, 2, "72.10", "+72.10"),
    ],
)
def test_halves_go_up_and_zero_has_no_minus(value: float, decimals: int, text: str, change: str) -> None:
    assert (rounded(value, decimals), signed(value, decimals)) == (text, change)


def test_columns_are_in_the_papers_order() -> None:
    assert PAPER.columns == ("BIO", "MAT", "PHYS", "CHEM", "SKE_AVG", "EDU", "MMLU_PRO", "AVG")
    ours = Layout(("geography", "language", "chemistry"), {"facts": ("geography", "chemistry")})
    assert ours.columns == ("geography", "language", "chemistry", "facts", "AVG")


def test_a_layout_of_our_own_by_hand() -> None:
    """Two sources of three have values; every number follows from the matrix on the back of an envelope."""
    layout = Layout(("a", "b", "c"), {"ab": ("a", "b")})
    base = {"a": 10.0, "b": 20.0, "c": 60.0}
    matrix = {"a": {"a": 12.0, "b": 26.0, "c": 60.0}, "b": {"a": 11.0, "b": 21.0, "c": 65.0}}
    metric = METRICS["avg_at_k"]
    cells = printed(scope_table(plain(metric, layout, base, {"m": matrix})))
    expected = {
        ("base", "base"): [("10.00", ""), ("20.00", ""), ("15.00", ""), ("60.00", ""), ("30.00", "")],
        ("m", "in"): [("12.00", "+2.00"), ("21.00", "+1.00"), ("16.50", "+1.50"), ("", ""), ("16.50", "+1.50")],
        # from a: (26 + 60) / 2 against (20 + 60) / 2; from b: (11 + 65) / 2 against (10 + 60) / 2
        ("m", "cross"): [("43.00", "+3.00"), ("38.00", "+3.00"), ("40.50", "+3.00"), ("", ""), ("40.50", "+3.00")],
    }
    for (method, scope), texts in expected.items():
        assert [cells[method, scope, column] for column in ("a", "b", "ab", "c", "AVG")] == texts
    full = matrix_table(plain(metric, layout, base, {"m": matrix}))
    assert [(row.method, row.scope) for row in full.rows] == [("base", ""), ("m", "a"), ("m", "b")]
    assert printed(full)["m", "b", "AVG"] == ("32.33", "+2.33")


def test_a_partial_mean_does_not_compete() -> None:
    table = scope_table(witness(3))
    average = table.columns.index("AVG")
    best = {table.rows[row].method for row, column in table.best() if column == average}
    assert best == {"N-OPSD"}  # Intuitor's 75.52 lacks one domain
    assert "75.52† (+1.60)" in markdown(table)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(("a", "a")), '"a" names two columns'),
        (lambda: Layout(("a", "AVG")), '"AVG" names two columns'),
        (lambda: Layout(("a",), {"g": ("b",)}), 'group "g": "b" is no domain; have a'),
        (lambda: plain(METRICS["ece"], Layout(("a", "b")), {"a": 0.1}, {}), '"b": no value of the base'),
        (lambda: plain(METRICS["ece"], Layout(("a",)), {"a": 0.1}, {"m": {"a": {"z": 1.0}}}), "a to z is not among a"),
        (lambda: scope_table(witness(3), against="control"), 'no untrained model "control"'),
    ],
)
def test_tables_that_cannot_be_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# Our own runs


DOMAINS, K = ("geography", "language", "chemistry"), 8
SIZES = {"geography": 60, "language": 30, "chemistry": 20}


def question_rows(run: Run, target: str, chance: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Answers of one run: right with the question's chance, and wrong answers that all differ, so some tie."""
    rows = []
    for index, right in enumerate(rng.binomial(K, chance)):
        votes = max(int(right), 1)
        n_tied = 1 if right > 1 else K
        rows.append(
            {
                "method": run.method, "source": run.source or None, "target": target, "seed": run.seed,
                "question_id": f"{target}-{index}", "n_correct": int(right), "k": K, "votes": votes, "n_tied": n_tied,
                "n_tied_right": int(right > 0),
            }
        )  # fmt: skip
    return rows


def made_up_rows(runs: Sequence[tuple[Run, float]], seed: int = 0) -> list[dict[str, Any]]:
    """Runs that shift every question's chance by a known amount."""
    rng = np.random.default_rng(seed)
    chances = {target: rng.beta(0.6, 0.8, n) for target, n in SIZES.items()}
    return [
        row
        for run, shift in runs
        for target in DOMAINS
        for row in question_rows(run, target, np.clip(chances[target] + shift, 0, 1), rng)
    ]


RUNS = [
    (Run("nopsd", "geography", 0), 0.2),
    (Run("nopsd", "geography", 1), 0.25),
    (Run("nopsd", "language", 0), 0.2),
    (Run("lmsi", "geography", 0), 0.0),
    (Run("control", "", 0), 0.1),
    (Run("base", "", 0), 0.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    write_grid(folder, made_up_rows(RUNS), Layout(DOMAINS, {"facts": ("geography", "chemistry")}))
    return folder


def test_matrices_are_the_metrics_of_the_rows(folder: Path) -> None:
    results = grid_results(read_grid(folder), resamples=50)
    frame = pd.DataFrame(made_up_rows(RUNS)).fillna({"source": ""})
    assert list(results["avg_at_k"].trained) == ["lmsi", "nopsd"]  # the order of the tables
    assert results["ece"].seeds == {"lmsi": 1, "nopsd": 1}  # the fewest: language has one seed
    for source, target, seeds in (("geography", "chemistry", [0, 1]), ("language", "geography", [0])):
        expected: dict[str, list[float]] = {"avg_at_k": [], "maj_at_k": [], "ece": []}
        runs = frame[(frame["method"] == "nopsd") & (frame["source"] == source) & (frame["target"] == target)]
        for seed in seeds:
            run = runs[runs["seed"] == seed]
            majority = metrics.maj_at_k(run["n_tied_right"].to_numpy(), run["n_tied"].to_numpy())
            expected["avg_at_k"].append(100 * (run["n_correct"] / K).mean())
            expected["maj_at_k"].append(100 * majority.mean())
            expected["ece"].append(metrics.ece(run["votes"].to_numpy(), K, majority))
        for name, values in expected.items():
            matrix = results[name].trained["nopsd"][DOMAINS.index(source), DOMAINS.index(target)]
            assert matrix[0] == pytest.approx(np.mean(values))
            assert len(matrix) == 51
    assert np.isnan(results["ece"].trained["nopsd"][DOMAINS.index("chemistry")]).all()


def test_cells_have_paired_intervals(folder: Path) -> None:
    """The in-domain cell of a single seed agrees with the paired bootstrap of `neurosig.statistics.metrics`."""
    table = scope_table(grid_results(read_grid(folder), resamples=4000)["avg_at_k"])
    row = next(row for row in table.rows if (row.method, row.scope) == ("nopsd", "in"))
    cell = row.cells[table.columns.index("language")]
    frame = pd.DataFrame(made_up_rows(RUNS)).query("target == 'language'").set_index("question_id").sort_index()
    after = frame.query("method == 'nopsd' and source == 'language'")["n_correct"].to_numpy() / K
    before = frame.query("method == 'base'")["n_correct"].to_numpy() / K
    interval = metrics.paired_mean_interval(after, before, seed=1, resamples=4000)
    assert cell.delta == pytest.approx(100 * interval.estimate)
    assert (cell.low, cell.high) == pytest.approx((100 * interval.low, 100 * interval.high), abs=0.8)
    paired, apart = (after - before).std(ddof=1), np.hypot(after.std(ddof=1), before.std(ddof=1))
    for mde, spread in ((cell.mde, paired), (cell.mde_unpaired, apart)):
        expected = minimum_detectable_effect(float(100 * spread / np.sqrt(len(after))))
        assert mde == pytest.approx(expected, rel=0.06)
    assert cell.mde is not None and cell.mde_unpaired is not None and cell.mde < 0.75 * cell.mde_unpaired
    assert (cell.n, cell.unsure) == (30, False)
    assert cell.p is not None and cell.p_holm is not None and cell.p < cell.p_holm <= 0.05
    assert row.cells[table.columns.index("chemistry")].value is None
    lmsi = next(row for row in table.rows if (row.method, row.scope) == ("lmsi", "in"))
    assert lmsi.cells[table.columns.index("geography")].unsure
    cross = next(row for row in table.rows if (row.method, row.scope) == ("nopsd", "cross"))
    assert cross.cells[table.columns.index("geography")].n == 30 + 20
    assert cross.cells[table.columns.index("AVG")].n == 60 + 30 + 20


def test_seeds_that_disagree_widen_the_interval(tmp_path: Path) -> None:
    """Two seeds apart by 60 points against two alike: only the first interval knows."""

    def width(shifts: tuple[float, float]) -> float:
        runs = [(Run("base", "", 0), 0.0), *((Run("nopsd", "geography", s), x) for s, x in enumerate(shifts))]
        write_grid(tmp_path, made_up_rows(runs), Layout(DOMAINS))
        row = scope_table(grid_results(read_grid(tmp_path), resamples=500)["avg_at_k"]).rows[1]
        assert row.seeds == 2
        low, high = row.cells[0].low, row.cells[0].high
        assert low is not None and high is not None
        return high - low

    assert width((-0.3, 0.3)) > 1.5 * width((0.0, 0.0))


def test_the_page_of_a_grid(folder: Path, tmp_path: Path) -> None:
    paths = paper_tables.draw(folder, tmp_path / "out")
    assert {path.suffix for path in paths} == {".md", ".tex", ".csv", ".pdf", ".png"}
    page, tex = ((tmp_path / "out" / f"paper_tables.{suffix}").read_text() for suffix in ("md", "tex"))
    assert "N-OPSD (published reading) (1 seed)" in page and "LMSI (1 seed)" in page
    assert "changes against base, best temperature" in page
    assert "Questions: 60 geography, 30 language, 20 chemistry; K=8." in page
    assert "| N-OPSD (paper) | in | **74.47** (+2.05) |" in page
    lmsi = next(line for line in page.split("## This project")[1].splitlines() if line.startswith("| LMSI"))
    assert "| ~" in lmsi and "**" not in lmsi  # nothing changed: grey, never bold
    for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 2 + 3 * 3
    assert r"\textcolor{gray}{" in tex and r"SKE\_AVG" in tex
    for body in re.findall(r"\\midrule\n(.*?)\\bottomrule", tex, flags=re.DOTALL):
        assert len({line.count("&") for line in body.splitlines() if "&" in line}) == 1
    frame = pd.read_csv(tmp_path / "out" / "paper_tables.csv")
    assert list(frame.columns) == list(FIELDS)
    own = frame[frame["table"] == "avg_at_k against control"]
    assert (own[own["method"] == "base"]["delta"] < 0).all() and own[own["method"] == "control"]["delta"].isna().all()
    assert frame[frame["mde"].notna()]["low"].notna().all()
    assert "lenient grading" not in page  # the rows have no such columns
    again = paper_tables.draw(folder, tmp_path / "again")
    assert all(path.read_bytes() == (tmp_path / "out" / path.name).read_bytes() for path in again)


def test_a_method_has_one_colour_and_marker_in_every_figure() -> None:
    assert set(METHODS) == set(METHOD_LABELS) == {BASE, CONTROL, *config.METHODS}
    assert len(set(METHODS.values())) == len(METHODS)
    own = paper_tables.own_tables({"avg_at_k": witness(3), "ece": witness(4)})
    legend = paper_tables._draw_changes(paper_tables.published(), own).legends[0]
    marks = [to_hex(mark.get_facecolor()[0]) for mark in legend.legend_handles[:4]]
    assert marks == [METHODS[name][0].lower() for name in ("lmsi", "ttrl", "intuitor", "nopsd")]
    assert [text.get_text() for text in legend.get_texts()[:4]] == ["LMSI", "TTRL", "Intuitor", "N-OPSD"]


def test_our_rows_are_next_to_the_papers() -> None:
    ours, published = scope_table(witness(3)), paper_tables.published()["Table 3"]
    lines = markdown(paper_tables.next_to(ours, published)).splitlines()[2:]
    assert len(lines) == 18
    for own, paper in zip(lines[::2], lines[1::2], strict=True):
        assert own.replace(" |", " (paper) |", 1) == paper
    named = replace(ours, rows=tuple(replace(row, method="nopsd") for row in ours.rows if row.method == "N-OPSD"))
    lines = markdown(paper_tables.next_to(named, published)).splitlines()[2:]
    assert [line.split(" |")[0] for line in lines[:2]] == ["| N-OPSD (published reading)", "| N-OPSD (paper)"]


def test_rows_come_from_evaluations(tmp_path: Path) -> None:
    """Two evaluations of a tiny model at different seeds, as base and control: read back as they were measured."""
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl")
    rows = []
    for seed, run in enumerate((Run("base", "", 0), Run("control", "", 0))):
        out = tmp_path / run.method
        config = {"num_generations": 3, "max_new_tokens": 3, "quiet": True, "seed": seed, "out": out}
        evaluate(EvaluateConfig(model=str(model), questions=(str(questions),), **config))
        rows += evaluation_rows(run, out)
    write_grid(tmp_path, rows)
    results = grid_results(read_grid(tmp_path), resamples=20)
    for name in ("base", "control"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())["domains"]["colour"]
        for metric, scale in (("avg_at_k", 100), ("maj_at_k", 100), ("ece", 1)):
            assert results[metric].untrained[name][0, 0] == pytest.approx(scale * summary[metric]["estimate"])
    with pytest.raises(UserError, match="no finished evaluation"):
        evaluation_rows(Run("lmsi", "colour", 0), tmp_path / "none")


def test_a_csv_is_read_like_parquet(folder: Path, tmp_path: Path) -> None:
    pd.DataFrame(made_up_rows(RUNS)).assign(kind="extra").to_csv(tmp_path / "grid.csv", index=False)
    (tmp_path / "layout.json").write_bytes((folder / "layout.json").read_bytes())
    one, other = (grid_results(read_grid(path), resamples=20)["ece"] for path in (folder, tmp_path))
    np.testing.assert_array_equal(one.trained["nopsd"], other.trained["nopsd"])


def test_a_run_that_lacks_a_target_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row for row in made_up_rows(RUNS) if (row["method"], row["target"]) != ("lmsi", "chemistry")]
    write_grid(tmp_path, rows)
    grid = read_grid(tmp_path)
    assert "lmsi, geography, seed 0: no rows for chemistry; left out" in caplog.text
    assert {run.method for run in grid.answers} == {"base", "control", "nopsd"}
    assert grid.layout == Layout(tuple(sorted(DOMAINS)))


def _without(name: str) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [{key: value for key, value in row.items() if key != name} for row in rows]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("votes"), 'no column "votes"'),
        (lambda rows: [], "no rows"),
        (lambda rows: [*rows, rows[0]], 'nopsd, geography, seed 0: question "geography-0" of geography appears twice'),
        (lambda rows: [row for row in rows if row["method"] != "base"], 'no rows of method "base" for chemistry'),
        (lambda rows: [*rows[1:], {**rows[0], "question_id": "other"}], "nopsd, geography, seed 0: not the questions"),
        (
            lambda rows: [{**r, "source": "physics"} if r["method"] == "lmsi" else r for r in rows],
            "physics, seed 0: .phy",
        ),
        (lambda rows: [{**rows[0], "n_correct": 9}, *rows[1:]], r"row 1 \(question geography-0\): n_correct is not"),
        (lambda rows: [{**rows[0], "k": 4, "n_correct": 1, "votes": 1}, *rows[1:]], "k differs from the first row's"),
        (lambda rows: [{**rows[0], "n_tied_right": 9}, *rows[1:]], "n_tied_right is not between"),
        (lambda rows: [{**row, "votes": "many"} for row in rows], 'column "votes" is not whole'),
        (lambda rows: [*rows, {**rows[0], "method": "control"}], 'other rows of "control" have no source'),
        (lambda rows: [{**rows[0], "question_id": None}, *rows[1:]], 'column "question_id" has 1 rows without a value'),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, spoil: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_grid(tmp_path, spoil(made_up_rows(RUNS)))
        read_grid(tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither grid\.parquet nor grid\.csv"):
        read_grid(tmp_path)
    write_grid(tmp_path, made_up_rows(RUNS))
    (tmp_path / "layout.json").write_text('{"domains": 3}')
    with pytest.raises(UserError, match=r"layout\.json: no layout"):
        read_grid(tmp_path)
    (tmp_path / "grid.parquet").write_text("none")
    with pytest.raises(UserError, match=r"grid\.parquet: cannot be read"):
        read_grid(tmp_path)
