"""Open options: functions by name, our own and those of the user, and where each came from.

    import neurosig
    neurosig.register("score", "surprise", surprise)          # then ExportConfig(hallucination_score="surprise")
    python -m neurosig.export --hallucination-score my_scores:surprise ...

A function of the user's is called as ours of the same kind are; the SHA-256 of its source is recorded.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from operator import attrgetter
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal, cast, get_args

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file, sha256_text
from neurosig.runtime.shapes import check_config

Function = Callable[..., Any]

Kind = Literal["score", "filter", "context", "contribution", "active_set", "answer_parser"]
NeuronScore = Literal["probe_score", "agreement", "agreement_majority", "knn_medoid", "neuron_count"]
OutputScore = Literal["vote_share", "mean_logprob", "entropy", "self_certainty", "length", "random"]
ContextScore = Literal["belief_shift", "entropy_gap", "teacher_agreement", "teacher_set_size", "context_information"]
"""Scores that see what the context is, or what it does to the teacher."""
HallucinationScore = Literal[NeuronScore, OutputScore, ContextScore]
QuestionFilter = Literal["neuron", "vote_only", "neuron_only", "threshold", "redundancy", "all"]
ContextPolicy = Literal[
    "nearest", "nearest_first", "random", "random_within_kind", "trajectory", "final_layer", "mutual",
    "majority_solution", "likeliest_solution", "none",
]  # fmt: skip
Contribution = Literal["cett", "magnitude", "unembed"]
ActiveSet = Literal["layer_mean", "global", "per_token", "entries", "token_entries"]


@dataclass(frozen=True, slots=True)
class Home:
    """Where a kind is chosen, and where our own functions of it are: a table of a module, and their names."""

    flag: str
    module: str = ""
    table: str = ""
    names: tuple[str, ...] = ()


KINDS: Mapping[Kind, Home] = {
    "score": Home("--hallucination-score", "neurosig.hallucination.scores", "SCORES", get_args(HallucinationScore)),
    "filter": Home("--question-filter", "neurosig.selection.choose", "FILTERS", get_args(QuestionFilter)),
    "context": Home("--context-policy", "neurosig.selection.contexts", "CONTEXTS", get_args(ContextPolicy)),
    "contribution": Home("--contribution", "neurosig.neurons.contributions", "CONTRIBUTIONS", get_args(Contribution)),
    "active_set": Home("--active-set", "neurosig.neurons.contributions", "ACTIVE_SETS", get_args(ActiveSet)),
    "answer_parser": Home("--answer-parser"),
}
_REGISTERED: dict[tuple[str, str], Registered] = {}


class MissingFunction(UserError):
    """A function whose module cannot be found, or that was registered in another process."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A function, its name, and the SHA-256 of its source; ``None`` for our own, which the tool's version names."""

    name: str
    function: Function
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Open:
    """Mark of an option whose value names a function: one of ours, a registered one, or ``MODULE:FUNCTION``."""

    kind: Kind

    def __post_init__(self) -> None:
        check_config(self)

    def check(self, option: str, value: object) -> None:
        """Refuse a name that is neither.

        Raises:
            UserError: Listing the names.
        """
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None and not (isinstance(name, str) and (name in names(self.kind) or ":" in name)):
                known = "".join(f"{name}, " for name in names(self.kind))
                raise UserError(f"{option} is {name!r}; choose one of {known}or MODULE:FUNCTION")

    def record(self, value: Any) -> Any:
        """The value as a run records it: with the hash of its source, if it is not ours."""
        if value is None:
            return None
        if isinstance(value, (tuple, list)):
            return [self.record(name) for name in value]
        found = find(self.kind, value)
        return value if found.sha256 is None else {"name": value, "sha256": found.sha256}


def register(kind: Kind | str, name: str, function: Any) -> Any:
    """Give a function a name under which options of its kind find it, in this process.

    A name of the user's is free to be registered again; the last function counts. ``neurosig/README.md`` says how a
    function of each kind is called.

    Args:
        kind: What it is, such as ``score``; see `KINDS`.
        name: Lower-case letters, digits and underscores.
        function: The function; its source must be in a file or a notebook's cell.

    Returns:
        The function.

    Raises:
        UserError: An unknown kind, a name of ours or of another form, or a function without source.
    """
    if kind not in KINDS:
        raise UserError(f"register: kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)):
        raise UserError(f"register: name is {name!r}; use lower-case letters, digits and underscores")
    kind = cast(Kind, kind)
    if name in KINDS[kind].names:
        raise UserError(f"register: {name} is a {kind} of neurosig's own; choose another name")
    if not callable(function):
        raise UserError(f"register: {name} is no function, but a {type(function).__name__}")
    try:
        digest = sha256_text(inspect.getsource(inspect.getmodule(function) or function))
    except (OSError, TypeError):
        try:
            digest = sha256_text(inspect.getsource(function))
        except (OSError, TypeError):
            raise UserError(
                f"register: {name} has no source whose hash could be recorded; define it in a file or a notebook"
            ) from None
    _REGISTERED[kind, name] = Registered(name, function, digest)
    return function


def names(kind: Kind) -> tuple[str, ...]:
    """Names of a kind: ours, then the registered ones."""
    return (*KINDS[kind].names, *(name for other, name in _REGISTERED if other == kind))


def find(kind: Kind, name: str) -> Registered:
    """The function that an option of this kind names.

    Raises:
        MissingFunction: No such name here, or no such module.
        UserError: See `load_function`.
    """
    if (kind, name) in _REGISTERED:
        return _REGISTERED[kind, name]
    home = KINDS[kind]
    if name in home.names:
        return Registered(name, getattr(importlib.import_module(home.module), home.table)[name], None)
    if ":" not in name and home.names:
        raise MissingFunction(f"{home.flag} {name}: not registered in this process; call neurosig.register first")
    return Registered(name, *load_function(home.flag, name))


def load_function(option: str, name: str) -> tuple[Function, str]:
    """The function that ``MODULE:FUNCTION`` names, and the SHA-256 of its module's source file.

    Modules are also searched in the current folder. A source that changed since an earlier call is run again.

    Args:
        option: What names it, for messages.
        name: ``MODULE:FUNCTION``.

    Raises:
        MissingFunction: There is no such module.
        UserError: The name has another form, the module fails or has no source file, or there is no such function.
    """
    flag = f"{option} {name}"
    module_name, colon, function = name.partition(":")
    if not (colon and module_name and function):
        raise UserError(f"{flag}: expected MODULE:FUNCTION, such as my_functions:name for a file my_functions.py here")
    spec = _find_spec(module_name)
    if spec is None:
        raise MissingFunction(f"{flag}: no module {module_name} in {Path.cwd()} or among the installed packages")
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"{flag}: module {module_name} has no source file whose hash could be recorded")
    digest = sha256_file(spec.origin)
    try:
        found = attrgetter(function)(_module(option, module_name, spec.origin, digest))
    except UserError:
        raise
    except AttributeError:
        raise UserError(f"{flag}: {spec.origin} has no function {function}") from None
    if not callable(found):
        raise UserError(f"{flag}: {function} in {spec.origin} is no function, but a {type(found).__name__}")
    return found, digest


def _find_spec(module: str) -> ModuleSpec | None:
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
def _module(option: str, name: str, origin: str, sha256: str) -> ModuleType:
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
        raise UserError(f"{option}: {origin} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
        if before is not None:
            sys.modules[name] = before
    return module
