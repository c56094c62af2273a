"""Imports run one way, and a command loads only what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import loaded_after
from tests.support.paths import ROOT

HEAVY = ("nnsight", "transformer_lens", "sklearn", "pandas", "matplotlib", "trl")


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "neurosig",
        "neurosig.export",
        "neurosig.screen",
        "neurosig.show",
        "neurosig.intervene.__main__",
        "distill.train",
        "distill.evaluate",
        "distill.compare",
    ],
)
def test_commands_answer_before_the_heavy_libraries_load(module: str) -> None:
    assert loaded_after(f"import {module}", "torch", "transformers", *HEAVY) == set()


def test_training_loads_neither_nnsight_nor_the_analysis_libraries(tmp_path: Path) -> None:
    """This process exports; a new one trains and evaluates on the manifest."""
    from tests.support.flow import make_manifest

    manifest = make_manifest(tmp_path)
    statement = f"""
from pathlib import Path
from distill.config import TrainConfig; from distill.train import main as train
from distill.evaluate import EvaluateConfig, main as evaluate
train(TrainConfig(manifest=Path({str(manifest)!r}), out=Path({str(tmp_path / "run")!r}), steps=1, quiet=True,
    keep_truncated=True))
evaluate(EvaluateConfig(model={str(tmp_path / "model")!r}, questions=({str(tmp_path / "questions.jsonl")!r},),
    out=Path({str(tmp_path / "eval")!r}), max_new_tokens=3, quiet=True))
"""
    names = [name for name in HEAVY if name != "pandas"]  # pyarrow loads pandas by itself where it is installed
    assert loaded_after(statement, "torch", *names) == {"torch"}


def test_public_names_resolve_lazily() -> None:
    assert loaded_after("import neurosig; neurosig.load_questions", "torch") == set()
    import neurosig

    for name in neurosig.__all__:
        assert getattr(neurosig, name) is not None
    with pytest.raises(AttributeError):
        _ = neurosig.no_such_name
