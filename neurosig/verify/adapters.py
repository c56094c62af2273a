"""Whether the adapter that a record names by its hash is the one at hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from neurosig.models.run_folder import find_adapter
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.verify import SKIPPED


def another(what: str, wanted: str, others: Collection[str]) -> str:
    """That what a record names by its hash is not there, while others are; skipped if there is none at all."""
    if not others:
        return f"{SKIPPED}its {what} is not here"
    return f"its {what} has SHA-256 {wanted[:12]}, here are {', '.join(digest[:12] for digest in others)}"


def adapter_problem(digest: str, base: Mapping[str, str], place: object, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with the adapter of a manifest or an evaluation; empty if nothing is.

    Args:
        digest: SHA-256 of its weights.
        base: Hashes of its base model's weights.
        place: Where it was.
        runs: Hash of a weights file -> the training record it belongs to, of the runs in the folder.
    """
    if digest in runs:
        same = runs[digest]["model"]["weights"] == base
        return "" if same else "its base model is not the one that was trained"
    try:
        file = find_adapter(Path(str(place))).file
    except UserError:
        return another("adapter", digest, list(runs))
    return "" if sha256_file(file) == digest else f"{file} has another hash"
