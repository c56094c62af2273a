"""Parsers of the user's own: ``MODULE:FUNCTION``, run from the source that is hashed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from operator import attrgetter
from pathlib import Path
from types import CodeType, ModuleType

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file

Parser = Callable[..., object]


class MissingParser(UserError):
    """A parser whose module cannot be found."""


def load_parser(name: str) -> tuple[Parser, str]:
    """The function that ``MODULE:FUNCTION`` names, and the SHA-256 of its module's source file.

    Modules are also searched in the current folder. A source that changed since an earlier call is run again.

    Raises:
        MissingParser: There is no such module.
        UserError: The name has another form, the module fails or has no source file, or there is no such function.
    """
    flag = f"--answer-parser {name}"
    module_name, colon, function = name.partition(":")
    if not (colon and module_name and function):
        raise UserError(f"{flag}: expected MODULE:FUNCTION, such as my_parser:parse for a file my_parser.py here")
    spec = _find(module_name)
    if spec is None:
        raise MissingParser(f"{flag}: no module {module_name} in {Path.cwd()} or among the installed packages")
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"{flag}: module {module_name} has no source file whose hash could be recorded")
    digest = sha256_file(spec.origin)
    try:
        parse = attrgetter(function)(_module(module_name, spec.origin, digest))
    except UserError:
        raise
    except AttributeError:
        raise UserError(f"{flag}: {spec.origin} has no function {function}") from None
    if not callable(parse):
        raise UserError(f"{flag}: {function} in {spec.origin} is no function, but a {type(parse).__name__}")
    return parse, digest


def _find(module: str) -> ModuleSpec | None:
    importlib.invalidate_caches()
    places = [os.getcwd(), *sys.path]
    *parents, last = module.split(".")
    for parent in parents:  # by its own name: under the full one, a folder without __init__.py needs its parent loaded
        spec = PathFinder.find_spec(parent, places)
        if spec is None or spec.submodule_search_locations is None:
            return None
        here = [os.path.join(place, parent) for place in places]
        places = here if spec.origin is None else list(spec.submodule_search_locations)
    return PathFinder.find_spec(last, places)


class _SourceLoader(SourceFileLoader):
    """Loads a module from its source as it is now, not from bytecode of an earlier one."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


@cache
def _module(name: str, origin: str, sha256: str) -> ModuleType:
    loader, here, before = _SourceLoader(name, origin), os.getcwd(), sys.modules.get(name)
    spec = importlib.util.spec_from_file_location(name, origin, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    sys.path.insert(0, here)
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"--answer-parser: {origin} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
        if before is not None:
            sys.modules[name] = before
    return module
