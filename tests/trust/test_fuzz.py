"""A short fuzz of the readers; `tests.trust.fuzz` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("atheris", reason="atheris has wheels for Linux only")


@pytest.mark.parametrize("target", ["questions", "manifest"])
def test_a_few_seconds_of_fuzzing_find_nothing(tmp_path: Path, target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trust.fuzz", target, "--seconds", "4", "--out", str(tmp_path)],
        capture_output=True, text=True, errors="replace", check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "findings: 0" in done.stdout
