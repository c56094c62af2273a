"""Marks of options: what an option shapes, from which reuse, resume and records follow, and its smallest value."""

from __future__ import annotations

import enum
import math
import typing
from dataclasses import dataclass
from typing import Any

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
    """Only the methods nopsd and u-opsd; the baselines refuse the option."""
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


@dataclass(frozen=True)
class AtLeast:
    """Mark of an option's smallest value, written as ``steps: Annotated[int, AtLeast(1)] = 20``."""

    value: int


class Above0:
    """Mark of an option that is a finite number above 0."""


def check_bounds(config: Any) -> None:
    """Refuse options of a dataclass below their marked bounds.

    Raises:
        UserError: Naming the flag and its bound.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
            if isinstance(mark, AtLeast) and value < mark.value:
                raise UserError(f"{flag}: expected at least {mark.value}, got {value}")
            if mark is Above0 and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{flag}: expected a number above 0, got {value}")
