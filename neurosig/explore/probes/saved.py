"""A probe's folder: ``probe.safetensors`` with every array, ``probe.json`` with the rest; nothing in it is code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurosig.hallucination.locate import FittedProbe
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file, write_atomic

FORMAT = "neurosig-probe-folder-1"
ARRAYS, RECORD = "probe.safetensors", "probe.json"


def write_probe(folder: str | Path, fitted: FittedProbe, record: Mapping[str, Any]) -> Path:
    """Write both files, the record last; files of other names in the folder stay.

    Raises:
        UserError: The path is a file, or cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fitted.save(folder / ARRAYS)
    except OSError as error:
        raise UserError(f"probe {folder}: cannot be written ({error.strerror}); give another folder") from error
    whole = {"format": FORMAT, "sha256": sha256_file(folder / ARRAYS), **record}
    write_atomic(folder / RECORD, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return folder


def read_probe(folder: str | Path) -> tuple[FittedProbe, dict[str, Any]]:
    """Read what `write_probe` wrote.

    Raises:
        UserError: A file is missing, damaged, of another save, or no saved probe.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise UserError(f"probe {folder}: no {RECORD} in it; give the folder that Probe.save wrote")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record.pop("format") != FORMAT:
            raise ValueError("another format")
        expected = record.pop("sha256")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"probe {folder / RECORD}: not a saved probe ({error}); fit and save it again") from error
    fitted = FittedProbe.load(folder / ARRAYS)
    if sha256_file(folder / ARRAYS) != expected:
        raise UserError(
            f"probe {folder / ARRAYS}: its sha256 is not the one in {RECORD}; the folder is damaged, save it again"
        )
    return fitted, record
