"""Run steps in one process that has the packages of a bare install only, and print what became of each as JSON.

    python -m tests.support.bare FILE

The file holds a list of ``-m MODULE ...`` or ``-c CODE`` lists. Every other installed package is hidden from imports.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import runpy
import sys
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Sequence, Set
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def base_distributions() -> set[str]:
    """The project's dependencies and theirs, without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    todo, found = list(project["dependencies"]), {"neurosig", "setuptools"}
    while todo:
        requirement = Requirement(todo.pop())
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if name in found or not any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(text.partition(";")[0])
    return found


class BareFinder:
    """The import system's finder of files, without the modules in ``hidden`` and distributions not in ``shown``."""

    hidden: frozenset[str] = frozenset()
    shown: frozenset[str] = frozenset()

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if name.partition(".")[0] in cls.hidden else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context: Any) -> Iterator[importlib.metadata.Distribution]:
        found = PathFinder.find_distributions(*context)
        return (one for one in found if canonicalize_name(one.metadata["Name"]) in cls.shown)


def hide_all_but(distributions: Set[str]) -> None:
    """Hide all other distributions and their modules, none of which may be loaded."""
    BareFinder.shown = frozenset(distributions)
    BareFinder.hidden = frozenset(
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if module != "tests" and not distributions & {canonicalize_name(name) for name in names}
    )
    loaded = BareFinder.hidden & set(sys.modules)
    assert not loaded, f"loaded before they were hidden: {loaded}"
    sys.meta_path[:] = [BareFinder if finder is PathFinder else finder for finder in sys.meta_path]


def run(words: Sequence[str]) -> dict[str, object]:
    """Run ``-m MODULE ...`` or ``-c CODE`` here; its exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = ["python", *words[2:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except Exception:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    hide_all_but(base_distributions())
    warnings.simplefilter("ignore")
    results = [run(words) for words in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
