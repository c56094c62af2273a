"""A bare install runs what the README promises of it; `tests.trust.installs` shows it in fresh environments."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from neurosig.runtime.extras import EXTRAS
from tests.support.paths import ROOT
from tests.support.promised import prepare, steps

EXTRAS_OF_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_bare_install_trains_evaluates_and_compares(tmp_path: Path) -> None:
    """Here all packages but those of a bare install are hidden."""
    prepare(tmp_path)
    promised = steps("base", tmp_path)
    (tmp_path / "steps.json").write_text(json.dumps([step.words for step in promised]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.bare", str(tmp_path / "steps.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for step, result in zip(promised, results, strict=True):
        assert step.problem(result["code"], result["out"], result["err"]) == ""
    assert not (tmp_path / "base" / "other").exists()


def test_the_named_extra_holds_the_package() -> None:
    """The advice to install ``neurosig[EXTRA]`` brings the package that was missing."""
    distributions = importlib.metadata.packages_distributions()
    for extra, modules in EXTRAS.items():
        required = {canonicalize_name(Requirement(text).name) for text in EXTRAS_OF_PROJECT[extra]}
        if "neurosig" in required:
            required |= {canonicalize_name(Requirement(text).name) for text in EXTRAS_OF_PROJECT["signals"]}
        for module in modules:
            names = {canonicalize_name(name) for name in distributions[module]}
            depends = {
                canonicalize_name(Requirement(text).name)
                for name in required - {"neurosig"}
                for text in importlib.metadata.requires(name) or ()
                if "extra" not in text
            }
            assert names & (required | depends), (extra, module)
    assert set(EXTRAS) == set(EXTRAS_OF_PROJECT) - {"dev", "all"}
