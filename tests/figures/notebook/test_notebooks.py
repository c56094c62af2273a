"""Every notebook runs from a clean kernel, finds what it should, holds no logic, and is committed without outputs."""

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

from tests.support.flow import save_tiny, write_questions
from tests.support.pages import section
from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {
    "01_neuron_signals": 3,
    "02_hallucination_neurons": 4,
    "03_reasoning_patterns": 3,
    "04_entropy_gap": 2,
    "05_calibration": 1,
    "06_the_whole_method": 0,
}
"""Figures of each notebook; none of them is skipped."""
SMALLER_RUN = """
from pathlib import Path
from figures.notebook import runs
runs.SMALL_EXPORT = {**runs.SMALL_EXPORT, "limit": 24}
runs.SMALL_EVALUATION = {**runs.SMALL_EVALUATION, "limit": (8, 6)}
runs.small_run(Path("run"), "adapter")
assert not Path("run/eval").exists()
runs.small_run(Path("run"), "evaluations")  # continues
"""
VIEWS = {
    "01_neuron_signals": 7,
    "02_hallucination_neurons": 2,
    "03_reasoning_patterns": 7,
    "04_entropy_gap": 1,
    "06_the_whole_method": 2,
}
"""Views and tables (`neurosig.views`) of each notebook."""


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
        own = [node for node in found if isinstance(node, ast.FunctionDef)]  # a function of the reader's, to register
        assert len(found) <= 1 and not any(isinstance(node, ast.ClassDef) for node in found)
        assert all("neurosig.register(" in cell.source and len(node.body) <= 3 for node in own)
    assert nbformat.read(path, as_version=4).cells[-1].cell_type == "markdown"  # it ends with what was seen
    assert not any(isinstance(node, ast.Assert) for cell in cells for node in ast.walk(syntax_tree(cell.source)))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all notebooks, with one small run for those that look at one.

    A process of its own makes the run: what training and evaluation load is gone afterwards.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        subprocess.run([sys.executable, "-c", SMALLER_RUN], cwd=folder, check=True)
        patch.setenv("NEUROSIG_RUN", str(folder / "run"))
        yield folder


@pytest.mark.smollm2
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, workplace: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    name = path.stem.partition("_")[2]  # of the function that looks at what the notebook computed
    source = f"from tests.figures.notebook.outcomes import {name}\n{name}(globals())"
    notebook.cells.append(nbformat.v4.new_code_cell(source))
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
    with pytest.raises(UserError, match="no finished adapter in "):
        run_folder("adapter")


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


@pytest.mark.smollm2
def test_the_readme_s_notebook_runs_as_written(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the small run in the place of ``make demo``'s."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(workplace / "run", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    exec(section("In Python").partition("```python\n")[2].partition("```")[0], seen)
    assert seen["probe"].auroc > 0.8 and len(seen["probe"].neurons)
    assert 0 < len(seen["export"].questions) == len(seen["export"].scores)


def test_a_small_run_says_that_it_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here by a model of random weights; a second call finds the first one's."""
    from figures.notebook import runs

    save_tiny(tmp_path / "model")
    questions = write_questions(tmp_path / "questions.jsonl", domain="letters")
    own = {"model": str(tmp_path / "model"), "questions": (str(questions),), "num_generations": 2, "set_size": 16}
    monkeypatch.setattr(
        runs, "SMALL_EXPORT", {**own, "max_new_tokens": 4, "question_filter": "all", "keep_truncated": True}
    )
    folder = runs.small_run(tmp_path / "small")
    printed = capsys.readouterr()
    assert f"a small one is made once, in {folder} (about a minute" in printed.out and "small run: 100%" in printed.err
    assert runs.small_run(tmp_path / "small") == folder
    assert not capsys.readouterr().out
