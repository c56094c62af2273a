"""Folders of the project and its data."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
FIGURE_DATA = ROOT / "figures" / "data"
REAL_DATA = Path(os.environ.get("NEUROSIG_REAL_DATA") or ROOT.parent / "shared" / "data")
"""Real question sets, not part of the project; tests that read them are skipped where they are missing."""
REAL_CASES = REAL_DATA.parent / "cases"
"""Real completions, in the same way."""
