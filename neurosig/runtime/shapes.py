"""Marks of options, from which reuse, resume and records follow, and the check of a configuration's values."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from neurosig.runtime.errors import UserError


class Shapes(enum.Flag):
    """Mark of an option, written as ``temperature: Annotated[float, Shapes.ROLLOUTS] = 0.8``."""

    MODEL = enum.auto()
    """The model's weights and dtype, which are compared directly, not by their options."""
    ROLLOUTS = enum.auto()
    """The questions, their prompts and what is sampled."""
    TRACES = enum.auto()
    """The neurons that are read and the active sets."""
    SELECTION = enum.auto()
    """Parsed answers, votes, scores, selected questions and contexts."""
    TRAINING = enum.auto()
    """The trained weights."""
    DISTILLATION = enum.auto()
    """Only the methods nopsd, u-opsd and opsa; those on TRL's trainers refuse the option."""
    TEACHER = enum.auto()
    """Only the methods with a teacher, nopsd and u-opsd; all others refuse the option."""
    RESOURCES = enum.auto()
    """Memory and speed only: may change when a run is resumed, though the last bits of its results then may too."""
    EXTENDS = enum.auto()
    """How far a run goes: may grow when it is resumed, for the same results as a run of that length."""
    PLACE = enum.auto()
    """No result: folders, checkpoints to keep, how requests are sent."""
    MESSAGES = enum.auto()
    """The terminal's output alone; no record holds the option."""


def option_names(config_class: type, *marks: Shapes) -> tuple[str, ...]:
    """Names of a dataclass's options with any of these marks, in the order of its fields."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return tuple(
        name
        for name, hint in hints.items()
        if any(
            isinstance(mark, Shapes) and mark & wanted for mark in getattr(hint, "__metadata__", ()) for wanted in marks
        )
    )


@runtime_checkable
class Mark(Protocol):
    """What limits an option's values, written among its annotations."""

    def check(self, option: str, value: Any) -> None:
        """Raise a `UserError` for a value that it does not allow."""


@dataclass(frozen=True)
class AtLeast:
    """Mark of an option's smallest value but for None, written as ``steps: Annotated[int, AtLeast(1)] = 20``."""

    value: int

    def check(self, option: str, value: Any) -> None:
        if value is not None and not value >= self.value:
            raise UserError(f"{_flag(option)}: expected at least {self.value}, got {value}")


class Above0:
    """Mark of an option that is a finite number above 0."""

    @staticmethod
    def check(option: str, value: Any) -> None:
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{_flag(option)}: expected a number above 0, got {value}")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def check_config(config: Any) -> None:
    """Refuse a value that a dataclass's annotations do not allow; call it in ``__post_init__``.

    Raises:
        UserError: Naming the option, and its names (of a ``Literal``) or its bound.
    """
    config_class: Any = type(config)
    for name, hint in _hints(config_class).items():
        value = getattr(config, name)
        check_choice(name, value, hint)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Mark):
                mark.check(name, value)


def check_choice(option: str, value: object, hint: Any) -> None:
    """Refuse a value that is none of a ``Literal``'s names, such as a misspelt name or a function.

    Args:
        option: What the value is called.
        value: The value; of a tuple of names, all of them.
        hint: ``Literal``, optional or not, or a tuple of it; any other annotation allows every value.

    Raises:
        UserError: Listing the names.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        check_choice(option, value, parts[0])
    elif origin is tuple and isinstance(value, tuple):
        for item in value:
            check_choice(option, item, parts[0])
    elif origin in (typing.Union, types.UnionType) and value is not None and len(parts) == 2 and type(None) in parts:
        check_choice(option, value, next(part for part in parts if part is not type(None)))
    elif origin is typing.Literal and not any(value is name or value == name for name in parts):
        raise UserError(f"{option} is {value!r}; choose one of {', '.join(map(str, parts))}")


@functools.cache
def _hints(config_class: Any) -> dict[str, Any]:
    """The annotations of its fields that `check_config` checks."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
