"""The ``--help`` page of a command, written from its dataclass: sections, options and their docstrings, presets."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MAX_WIDTH = 100


class Section(enum.Enum):
    """Headings of a page in their order. A mark on an option holds up to the next mark in its class."""

    REQUIRED = "Required"
    OPTIONS = "Options"
    QUESTIONS = "Questions and model"
    SCORING = "Scoring"
    SAMPLING = "Sampling"
    PROMPT = "Prompt and answers"
    NEURONS = "Neurons"
    SCORE = "Hallucination score"
    SELECTION = "Selection and context"
    TRAINING = "Training"
    LOSS = "Teacher and loss"
    BASELINES = "Baselines"
    REPLAY = "Replay"
    STOPPING = "Stop rules"
    RESOURCES = "Precision, memory and speed"
    SERVER = "Server"
    OUTPUT = "Output and resuming"
    COMMON = "Common"


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        flag: ``--max-new-tokens``, or ``FOLDER`` for an argument without a flag.
        hint: Its type.
        text: Its docstring on one line.
        section: Where the page lists it.
        default: Its default; ``dataclasses.MISSING`` for a required option.
    """

    flag: str
    hint: Any
    text: str
    section: Section
    default: Any

    @property
    def flags(self) -> tuple[str, ...]:
        """What turns it on and off."""
        return (self.flag, f"--no-{self.flag[2:]}") if self.hint is bool else (self.flag,)

    @property
    def expected(self) -> str:
        """Its type in words, such as ``int`` or ``one of train, dev, test``."""
        return _expected(self.hint)

    def lines(self, width: int) -> list[str]:
        """Its lines on the page."""
        value = "" if self.hint is bool or not self.flag.startswith("--") else " " + _placeholder(self.hint)
        default = "" if self.default in (MISSING, None, ()) else f" (default: {_shown(self.default)})"
        head = f"{', '.join(self.flags)}{value}".replace(",", ", ").replace(",  ", ", ")
        return [
            *textwrap.wrap(head, width, initial_indent="  ", subsequent_indent=" " * 8),
            *textwrap.wrap(self.text + default, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]


def command_options(config_class: type, defaults: Mapping[str, Any]) -> list[Option]:
    """The options of a command in the order of its page.

    Args:
        config_class: The command's dataclass.
        defaults: Field -> default, ``dataclasses.MISSING`` for a required one.
    """
    hints = typing.get_type_hints(config_class, include_extras=True)
    options: dict[str, Option] = {}
    for base in filter(dataclasses.is_dataclass, config_class.__mro__):
        section = Section.OPTIONS
        for name, text in _docstrings(base).items():
            marks = getattr(hints[name], "__metadata__", ())
            section = next((mark for mark in marks if isinstance(mark, Section)), section)
            hint = hints[name].__origin__ if marks else hints[name]
            if name in options or typing.get_origin(hint) is dict:  # a table of the TOML file has no flag
                continue
            flag = name.upper() if "Positional" in map(str, marks) else f"--{name.replace('_', '-')}"
            place = Section.REQUIRED if defaults[name] is MISSING else section
            options[name] = Option(flag, hint, text, place, defaults[name])
    order = list(Section)
    return sorted(options.values(), key=lambda option: order.index(option.section))


def help_page(
    options: Sequence[Option],
    *,
    prog: str,
    description: str,
    example: str,
    presets: Mapping[str, Mapping[str, object]],
) -> str:
    """The page: what the command does, an example, options by section, and what each preset sets."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    paragraphs = [" ".join(paragraph.split()) for paragraph in description.split("\n\n")]
    words = [option.flag if option.default is MISSING else f"[{option.flag}]" for option in options]
    lines = [" ".join(["usage:", prog, *(word for word in words if "--" not in word), "[options]"]), ""]
    for paragraph in filter(None, paragraphs):
        lines += [*textwrap.wrap(paragraph, width), ""]
    if example:
        lines += ["Example:", *textwrap.indent(textwrap.dedent(example), "  ").splitlines(), ""]
    section = None
    for option in options:
        if option.section is not section:
            section = option.section
            lines += [] if lines[-1] == "" else [""]
            lines += [f"{section.value}:"]
        lines += option.lines(width)
    if presets:
        lines += ["", "Presets (--preset NAME), in the words of a --config file:"]
    names_of: dict[str, list[str]] = {}
    for name, values in presets.items():
        text = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items()) or "the defaults"
        names_of.setdefault(text, []).append(name)
    for text, names in names_of.items():
        head = f"  {', '.join(names):<10}  "
        lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * 14)
    return "\n".join(lines)


def example_of(doc: str | None) -> str:
    """The first indented command of a module's docstring, with its continuation lines."""
    lines = (doc or "").splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("    python -m ")), len(lines))
    end = start
    while end < len(lines) and (end == start or lines[end - 1].endswith("\\")):
        end += 1
    return "\n".join(lines[start:end])


def _docstrings(config_class: type) -> dict[str, str]:
    """Fields that a dataclass declares itself, with the string after each."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for node, after in pairwise([*tree.body, None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            value = after.value if isinstance(after, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
            texts[node.target.id] = " ".join(text.split())
    return texts


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(part for part in typing.get_args(hint) if part is not type(None))]  # noqa: UP007
    return hint


def _expected(hint: Any) -> str:
    hint = _without_none(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"values, each {_expected(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is typing.Union:
        kinds = [*map(_expected, typing.get_args(hint))]
        return " or ".join(kind for kind in kinds if f"values, each {kind}" not in kinds)
    return {str: "a text", Path: "a path"}.get(hint, hint.__name__)


def _placeholder(hint: Any) -> str:
    hint = _without_none(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return f"{_placeholder(typing.get_args(hint)[0])} ..."
    if typing.get_origin(hint) is typing.Union:
        names = [*map(_placeholder, typing.get_args(hint))]
        return "|".join(name for name in names if f"{name} ..." not in names)  # one is written as several are
    return {str: "TEXT", bool: "{True,False}"}.get(hint, hint.__name__.upper())


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else '""'
