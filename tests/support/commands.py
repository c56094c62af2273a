"""The commands, called in this process or imported by another."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

from tests.support.paths import ROOT


def command_module(name: str) -> ModuleType:
    """The module that ``python -m name`` runs: that of a package is its ``__main__``."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"no module {name}"
    return importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)


def loaded_after(statement: str, *names: str) -> set[str]:
    """Those of the modules that a new process has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())
