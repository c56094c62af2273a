"""Read a command's options from defaults, preset, TOML file and command line; every mistake is a one-line error."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from neurosig.runtime.errors import UserError, os_text
from neurosig.runtime.help import Option, command_options, help_page

ConfigT = TypeVar("ConfigT", bound=Any)


def parse_config(
    config_class: type[ConfigT],
    *,
    presets: Mapping[str, Mapping[str, object]],
    prog: str,
    argv: Sequence[str],
    example: str = "",
) -> ConfigT:
    """Build the configuration: dataclass defaults < preset < config file < command line.

    Raises:
        UserError: unknown preset; a config file that cannot be read, or holds an unknown key or a wrong type; an
            unknown option, a missing one or a value of another type.
        SystemExit: code 0 after ``--help``.
    """
    named = _option(argv, "--config")
    from_file = _read_config(config_class, Path(named)) if named is not None else {}
    preset = _option(argv, "--preset") or from_file.get("preset")
    values: dict[str, Any] = dict(from_file)
    if preset is not None:
        if preset not in presets:
            raise UserError(f"--preset {preset}: no such preset{_suggest(preset, presets)}; have {_list(presets)}")
        values = {**presets[preset], "preset": preset, **from_file}
    defaults = {}
    for field in dataclasses.fields(config_class):
        made = field.default if field.default_factory is MISSING else field.default_factory()
        defaults[field.name] = values.pop(field.name, made)
    if values:
        raise TypeError(f"preset {preset!r} of {prog}: {config_class.__name__} has no field {_list(values)}")

    options = command_options(config_class, defaults)
    if "--help" in argv or "-h" in argv:
        description = config_class.__doc__ or ""
        print(help_page(options, prog=prog, description=description, example=example, presets=presets))
        raise SystemExit(0)
    return _parse(config_class, defaults, options, prog, argv, from_file)


def _parse(
    config_class: type[ConfigT],
    defaults: Mapping[str, Any],
    options: Sequence[Option],
    prog: str,
    argv: Sequence[str],
    explicit: Iterable[str],
) -> ConfigT:
    """Parse the command line with tyro; its boxes on stderr become one-line errors."""
    given = _given(argv)
    known = {flag: option for option in options for flag in option.flags}
    names = {flag: option.flag.strip("-").replace("-", "_") for flag, option in known.items()}
    for flag in given:
        if flag not in known:
            raise UserError(f"{flag}: no such option{_suggest(flag, known)}")
    for option in options:
        if option.default is MISSING and option.flag.startswith("--") and option.flag not in given:
            raise UserError(f"{option.flag} is required: {option.text}")
    import tyro

    # Filled field by field: __post_init__ must see the final values only, and a required field has none yet.
    default = object.__new__(config_class)
    for name, value in defaults.items():
        object.__setattr__(default, name, tyro.MISSING if value is MISSING else value)
    with contextlib.redirect_stderr(io.StringIO()) as boxes:
        try:
            config = tyro.cli(config_class, prog=prog, args=argv, default=default)
            config.explicit = frozenset({*explicit, *(names[flag] for flag in given)})
            return config
        except SystemExit as stop:
            fault = stop
    cause = fault.__context__
    while cause is not None:
        if isinstance(cause, UserError):  # of the configuration's own checks, which tyro replaces by the option's type
            raise cause
        cause = cause.__context__
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", boxes.getvalue()).split())
    for flag in re.findall(r"--[\w-]+", text):
        if flag in given:
            raise UserError(f"{' '.join([flag, *given[flag]])}: expected {known[flag].expected}") from fault
    if surplus := re.search(r"Unrecognized options: (?!Unrecognized)(\S+)", text):
        raise UserError(f"{surplus[1]}: one word too many; see --help") from fault
    absent = [option for option in options if option.default is MISSING and option.flag not in given]
    missing = next((option for option in absent if option.text in text), next(iter(absent), None))
    raise UserError(text if missing is None else f"{missing.flag} is required: {missing.text}") from fault


def _given(argv: Sequence[str]) -> dict[str, list[str]]:
    """Flags of a command line, each with the words up to the next one."""
    given: dict[str, list[str]] = {}
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            given[flag] = [value] if equals else []
        elif flag:
            given[flag].append(word)
    return given


def _option(argv: Sequence[str], flag: str) -> str | None:
    """Last value of ``flag``; None when the flag or its value is missing (the parser reports a missing value)."""
    value = None
    for position, argument in enumerate(argv):
        if argument.startswith(flag + "="):
            value = argument[len(flag) + 1 :]
        elif argument == flag and position + 1 < len(argv):
            value = argv[position + 1]
    return value


def _read_config(config_class: type, path: Path) -> dict[str, Any]:
    from pydantic import TypeAdapter, ValidationError

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"config {path}: {os_text(fault)}") from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"config {path}: not UTF-8 (byte {fault.start})") from fault
    except tomllib.TOMLDecodeError as fault:
        raise UserError(f"config {path}: invalid TOML: {fault}") from fault
    hints = typing.get_type_hints(config_class)
    names = {field.name: field for field in dataclasses.fields(config_class) if field.name != "config"}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in names:
            raise UserError(f"config {path}: {key}: unknown option{_suggest(key.replace('-', '_'), names)}")
        try:  # JSON rules: a list may become a tuple and a text a path, but "8" is no int and 1 no bool
            values[key] = TypeAdapter(hints[key]).validate_json(json.dumps(value), strict=True)
        except (ValidationError, TypeError) as fault:
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            wanted = wanted if type(hints[key]) is type else str(hints[key]).replace("typing.", "")
            raise UserError(f"config {path}: {key}: expected {wanted}, got {value!r}") from fault
    return values


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _suggest(name: str, known: Iterable[str]) -> str:
    spelled = name if name.startswith("--") else name.replace("-", "_")
    close = difflib.get_close_matches(spelled, list(known), n=1)
    quote = "" if name.startswith("--") else '"'
    return f" (did you mean {quote}{close[0]}{quote}?)" if close else ""
