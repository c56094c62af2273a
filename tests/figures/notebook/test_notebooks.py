"""Every notebook runs from a clean kernel, shows what is true, holds no logic, and is committed without outputs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {
    "01_neuron_signals": 2,
    "02_hallucination_neurons": 3,
    "03_reasoning_patterns": 3,
    "04_entropy_gap": 2,
    "05_calibration": 1,
    "06_the_whole_method": 0,
}
"""Figures of each notebook; none of them is skipped."""
VIEWS = {
    "01_neuron_signals": 6,
    "02_hallucination_neurons": 2,
    "03_reasoning_patterns": 6,
    "04_entropy_gap": 1,
    "06_the_whole_method": 2,
}
"""Views and tables (`neurosig.views`) of each notebook."""
CHECKS = {
    "04_entropy_gap": """
assert set(effects["context"]) == set(policies) and effects.groupby("context").size().nunique() == 1
assert set(effects["outcome_strict"]) <= {"fix", "break", "right", "wrong"}
assert changed["student"].ne(changed["teacher"]).all()  # a fix or a break is another answer
assert effects["belief_shift"].between(0, 0.6932).all()  # a Jensen-Shannon divergence is at most ln 2
gaps = effects.groupby("context")["entropy_gap"].mean()
assert gaps["nearest"] > gaps["random"] > 0
""",
    "05_calibration": """
base = summary[summary["method"] == "base"].set_index("scope")
assert {"in-domain"} <= set(summary["scope"]) and len(summary) == len(questions.groupby(["scope", "method"]))
assert (summary["smooth_ece"] <= summary["ece"] + 1e-9).all()  # never exceeds the exact-support ECE
assert summary["ece"].between(0, 1).all() and (summary["ece_low"] <= summary["ece_high"]).all()
assert summary["ece_floor"].between(0, 1, inclusive="neither").all()
assert ((summary["confidence"] - summary["maj_at_k"] - summary["signed_gap"]).abs() < 1e-9).all()
assert (summary["ece"] >= summary["signed_gap"].abs() - 1e-9).all()  # a mean of absolute gaps
assert all(questions.groupby("method")["question_id"].apply(set).map(lambda ids: ids == set(questions["question_id"])))
sharpened = summary[summary["temperature"] < base["temperature"].min()]
assert len(sharpened) and all(row.confidence > base["confidence"][row.scope] for row in sharpened.itertuples())
""",
    "06_the_whole_method": """
results = {name: pd.read_parquet(folder / "eval" / name / "results.parquet") for name in ("base", "nopsd")}
assert run.selected and all(run.row(name).context for name in run.selected)
assert "answer" not in run.manifest.rows[0].model_dump()  # no gold label in the manifest
assert list(steps["step"]) == [1, 2, 3, 4] and steps["loss"].notna().all()
assert list(results["base"]["question_id"]) == list(results["nopsd"]["question_id"]) and len(results["base"]) == 8
assert set(run.questions.index).isdisjoint(results["base"]["question_id"])  # never seen by the export
assert results["base"]["answers"].map(list).tolist() != results["nopsd"]["answers"].map(list).tolist()
assert (folder / "report" / "table.md").read_text().count("| in-domain |") == 6
assert found.n_texts == found.n_groups == len(texts) and found.models[0] != found.models[1]
assert found.to_frame()["change"].abs().max() > 0 and found.to_frame()["q"].is_monotonic_increasing
""",
}
"""What must be true of a notebook's variables once it has run."""


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def syntax_tree(source: str) -> ast.Module:
    return ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!"))))


def test_the_notebooks_are_these() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_thin_and_stripped(path: Path) -> None:
    cells = code_cells(path)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    for cell in cells:
        logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.Try)
        found = [node for node in ast.walk(syntax_tree(cell.source)) if isinstance(node, logic)]
        assert len(found) <= 1 and not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in found)
    last = nbformat.read(path, as_version=4).cells[-1]
    if path.stem in CHECKS:
        assert last.cell_type == "markdown"  # a notebook ends with what was seen
        assert not any(isinstance(node, ast.Assert) for cell in cells for node in ast.walk(syntax_tree(cell.source)))
        return
    statements = syntax_tree(last.source).body
    asserts = [node for node in statements if isinstance(node, ast.Assert)]
    assert len(asserts) >= 5 and all(isinstance(node, ast.Assert | ast.Assign) for node in statements)
    for node in asserts:  # each looks at something that was computed
        assert any(isinstance(part, ast.Name) for part in ast.walk(node.test))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all notebooks, with one small run for those that look at one.

    A process of its own makes the run: what training and evaluation load is gone afterwards.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        make = "import pathlib, figures.notebook.runs as runs; runs.small_run(pathlib.Path('run'), 'evaluations')"
        subprocess.run([sys.executable, "-c", make], cwd=folder, check=True)
        patch.setenv("NEUROSIG_RUN", str(folder / "run"))
        yield folder


@pytest.mark.smollm2
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, workplace: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    if path.stem in CHECKS:
        notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[path.stem]))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(workplace)}}).execute()
    shown = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if "data" in out]
    assert sum("image/png" in out.data for out in shown) == PICTURES[path.stem]
    views = [out.data["text/html"] for out in shown if "neurosig-view" in out.data.get("text/html", "")]
    assert len(views) == VIEWS.get(path.stem, 0)
    assert not any(part in view for view in views for part in ("http://", "https://", "<script"))


def test_a_named_run_must_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from figures.notebook.runs import VARIABLE, run_folder
    from neurosig.runtime.errors import UserError

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"no finished export in .*{tmp_path.name}; name a folder"):
        run_folder()
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "manifest.json").touch()
    assert run_folder() == tmp_path
    with pytest.raises(UserError, match="no finished evaluations in "):
        run_folder("evaluations")


def test_a_named_run_is_seen_from_here_and_from_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from figures.notebook import runs
    from neurosig.runtime.errors import UserError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "REPOSITORY", tmp_path / "repository")
    monkeypatch.setenv(runs.VARIABLE, "runs/mine")
    with pytest.raises(UserError) as error:
        runs.run_folder()
    assert f"in {tmp_path}/runs/mine or {tmp_path}/repository/runs/mine; name" in str(error.value)
    for place in (tmp_path / "repository", tmp_path):
        (place / "runs/mine/manifest").mkdir(parents=True)
        (place / "runs/mine/manifest/manifest.json").touch()
        assert runs.run_folder() == place / "runs/mine"


def test_a_demo_is_found_from_the_notebooks_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from figures.notebook.runs import VARIABLE, run_folder

    monkeypatch.delenv(VARIABLE, raising=False)
    for place in ("notebooks", "runs/demo/manifest"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "runs/demo/manifest/manifest.json").touch()
    for here in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(here)
        assert run_folder() == tmp_path / "runs" / "demo"
