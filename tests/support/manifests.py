"""Edits of a finished manifest whose hashes follow, so that only the content itself can be wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neurosig.manifest import HEADER, QUESTIONS


def rehash(folder: Path, header: dict[str, Any] | None = None) -> None:
    """Write the header again with the sizes and hashes that the files have now."""
    header = header or json.loads((folder / HEADER).read_text())
    for name, entry in header["files"].items():
        if (folder / name).exists():
            data = (folder / name).read_bytes()
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    header.pop("content_sha256", None)
    header["content_sha256"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (folder / HEADER).write_text(json.dumps(header))


def edit_row(folder: Path, line: int, change: Callable[[dict[str, Any]], Any], name: str = QUESTIONS) -> None:
    """Change the record on a line, counted from 1, of a JSONL file."""
    lines = (folder / name).read_text().splitlines()
    row = json.loads(lines[line - 1])
    change(row)
    lines[line - 1] = json.dumps(row)
    (folder / name).write_text("\n".join(lines) + "\n")
    rehash(folder)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the fields of ``manifest.json``."""
    header = json.loads((folder / HEADER).read_text())
    change(header)
    rehash(folder, header)
