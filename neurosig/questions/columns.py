"""Columns of a question record: which of them holds what, and their values with checked types.

What a column of another name holds is said once, in the words of the command line: ``question=stem answer=gold
choices=A,B,C,D kind=meta.subject``. A dot reaches into a column that is an object.
"""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from neurosig.runtime.errors import UserError

Record = Mapping[str, Any]
Columns = Mapping[str, tuple[str, ...]]
"""Field -> the columns that hold it: one, or for ``choices`` several."""

ASKED = ("question", "prompt", "messages")
"""What may ask the question; one of them does."""
FIELDS = (
    *(*ASKED, "choices", "answer", "aliases", "answer_space", "id", "domain", "kind", "system"),
    "privileged_context",
)
MISSING = object()


def parse_fields(fields: Sequence[str]) -> Columns:
    """The columns that ``FIELD=COLUMN`` words name.

    Raises:
        UserError: A word has another form, names no field or one twice, or two of them ask the question.
    """
    columns: dict[str, tuple[str, ...]] = {}
    for word in (fields,) if isinstance(fields, str) else fields:
        field, _, column = word.partition("=")
        if field not in FIELDS or not column.strip():
            problem = "expected FIELD=COLUMN" if field in FIELDS or "=" not in word else f'no field "{shown(field)}"'
            raise UserError(f"--fields {shown(word)}: {problem}; the fields are {', '.join(FIELDS)}")
        names = column.split(",") if field == "choices" else [column]
        if field in columns or not all(names) or len({*names}) < len(names):
            raise UserError(f"--fields {shown(word)}: expected each field and each column once, none empty")
        columns[field] = tuple(names)
    if len(given := [field for field in ASKED if field in columns]) > 1:
        raise UserError(f"--fields: {' and '.join(given)} would both ask the question; give one of them")
    return columns


def chosen(record: Record, columns: Columns, found: set[str]) -> dict[str, Any]:
    """The fields of a record that ``columns`` name, of those columns that it has.

    Args:
        record: One record.
        columns: See `parse_fields`.
        found: Gets the names of the columns that are there.

    Raises:
        UserError: The record has no column that asks the question.
    """
    values: dict[str, Any] = {}
    for field, names in columns.items():
        there = {name: value for name in names if (value := lookup(record, name)) is not MISSING}
        found.update(there)
        if field in ASKED and not there:
            raise UserError(f'no column "{shown(names[0])}" (--fields {field}); the record has {columns_of(record)}')
        if len(names) > 1:  # one column per choice
            labelled = {name.rpartition(".")[2]: value for name, value in there.items() if value is not None}
            values[field] = labelled or None
        elif there:
            values[field] = there[names[0]]
    return values


def lookup(record: Record, name: str) -> Any:
    """The value of a column, or of a part of it: ``question.stem``; `MISSING` without it."""
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    inside = record.get(head)
    return lookup(inside, rest) if dot and isinstance(inside, Mapping) else MISSING


def got(value: object) -> str:
    """A short, terminal-safe rendering of a bad value and its type."""
    return f"got {ascii(value)[:60]} ({type(value).__name__})"


def shown(text: str) -> str:
    """At most 60 characters of a record's own text, on one line."""
    return repr(text[:60])[1:-1]


def columns_of(record: Record) -> str:
    """The names of a record's columns for a message, at most 20 of them; of an object, also those of its parts."""
    names: list[str] = []
    for name, value in record.items():
        names += [name, *(f"{name}.{part}" for part in value)] if isinstance(value, Mapping) else [name]
    named = ", ".join(shown(name) for name in names[:20])
    return named + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def optional_text(record: Record, name: str) -> str | None:
    """The text of a field, or None if it is absent or null."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f'field "{name}": expected text, {got(value)}')
    return value


def required_text(record: Record, name: str) -> str:
    """The text of a required field."""
    if record.get(name) is None:
        state = "null" if name in record else f"missing; the record has {columns_of(record) or 'no field'}"
        raise UserError(f'field "{name}": expected text, got {state}')
    return optional_text(record, name) or ""


def text_or_number(record: Record, name: str) -> str | None:
    """A text or a number as text, or None if it is absent or null; whole numbers lose their ".0"."""
    value = record.get(name)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return optional_text(record, name)


def text_list(record: Record, name: str, *, numbers: bool = False) -> tuple[str, ...] | None:
    """A list of texts, or also of ``numbers``, as a tuple, or None if it is absent or null."""
    value = structured(record.get(name))
    if value is None:
        return None
    if numbers and isinstance(value, list):
        value = [text_or_number({name: item}, name) for item in value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f'field "{name}": expected a list of texts, {got(value)}')
    return tuple(value)


def structured(value: Any) -> Any:
    """The list or object that a text spells in JSON or in Python, as tables hold them; another value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of backslashes, which Python reads as they are
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value.strip())
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
    return value
