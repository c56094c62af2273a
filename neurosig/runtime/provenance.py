"""The record of what made an output: tool, libraries, machine and command; every output has one next to it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import neurosig
from neurosig.runtime.errors import UserError

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


def check_same_run(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a run that other options started.

    Args:
        folder: The run's folder.
        found: Recorded options of the interrupted run, as JSON values.
        wanted: Options of this run, as JSON values.

    Raises:
        UserError: Naming every key that differs.
    """
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if names:
        raise UserError(
            f"{folder}: cannot resume, these differ from the interrupted run: {', '.join(names)}; use the same options "
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
