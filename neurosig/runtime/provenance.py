"""The record of what made an output: tool, libraries, machine and command; every output has one next to it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import neurosig
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "trl",
    "nnsight",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyarrow",
    "pydantic",
)
MOST_SHOWN = 80
"""Characters of a value in a message."""


def run_record() -> dict[str, Any]:
    """Describe this run as plain JSON values.

    Returns:
        ``tool``, ``version``, ``git_commit`` and ``git_dirty`` (null unless git tracks the package), ``python``,
        ``libraries`` (name -> version, null when not installed), ``platform``, ``machine``, ``cpus``, ``threads``
        (torch's intra-op threads, null when torch is not loaded), ``omp_num_threads``, ``processes`` (of a
        distributed launch) and ``command``.
    """
    commit, dirty = _git_state(Path(neurosig.__file__).resolve().parent)
    torch = sys.modules.get("torch")
    return {
        "tool": "neurosig",
        "version": neurosig.__version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of every entry that differs, of nested mappings under ``name.entry``; an absent one is null.

    Mappings with ``sha256`` are the same when their hashes are, wherever their files are. An empty list is as an absent
    value, a list of one as that one: what options that took one value have on record.
    """
    pairs: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*found, *wanted}):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and "sha256" not in {*old, *new}:
            pairs |= {f"{name}.{inner}": pair for inner, pair in differences(old, new).items()}
        elif _content(old) != _content(new):
            pairs[name] = old, new
    return pairs


def _content(value: Any) -> Any:
    if isinstance(value, Mapping) and "sha256" in value:
        return {key: inner for key, inner in value.items() if key != "path"}
    if not isinstance(value, list):
        return value
    return _content(value[0]) if len(value) == 1 else [_content(one) for one in value] or None


def explain(pairs: Mapping[str, tuple[Any, Any]], before: str = "before", now: str = "now") -> str:
    """`differences` in words: ``temperature (0.8 before, 0.5 now), ...``."""
    return ", ".join(f"{name} ({_shown(old)} {before}, {_shown(new)} {now})" for name, (old, new) in pairs.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "sha256" in value:
        return f"{value.get('path', '')} with SHA-256 {value['sha256'][:12]}".strip()
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        return " ".join(map(_shown, value))
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... (SHA-256 {sha256_text(text)[:12]})"


def check_same_run(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a run that other options started.

    Args:
        folder: The run's folder.
        found: Recorded options of the interrupted run, as JSON values.
        wanted: Options of this run, as JSON values.

    Raises:
        UserError: Naming every key that differs, with both values.
    """
    if pairs := differences(found, wanted):
        raise UserError(
            f"{folder}: cannot resume, these differ from the interrupted run: {explain(pairs)}; use the same options "
            "or --overwrite"
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(package: Path) -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the working tree that tracks ``package``; nulls for an installed copy."""
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(package, "rev-parse", "HEAD") if tracked else None
    if commit is None:
        return None, None
    return commit, bool(_git(package, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
