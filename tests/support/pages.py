"""The project's pages: its README, those of its folders, and the ones for contributors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.support.paths import ROOT

PAGES: Mapping[Path, str] = {
    path: path.read_text(encoding="utf-8")
    for pattern in ("README.md", "*/README.md", "figures/data/README.md", ".github/*.md")
    for path in sorted(ROOT.glob(pattern))
}
"""Path -> text."""
README = PAGES[ROOT / "README.md"]


def section(heading: str) -> str:
    """The text under the heading of this name, up to the next one, on the page that has it."""
    found = [
        part.partition("\n")[2]
        for text in PAGES.values()
        for part in re.split(r"^#{1,6} ", text, flags=re.MULTILINE)
        if part.partition("\n")[0] == heading
    ]
    assert len(found) == 1, f"{len(found)} sections {heading!r}"
    return found[0]


def words(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())
