"""Strict pydantic models of files, and the first problem of a malformed one as one clause."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from neurosig.runtime.errors import UserError


class Strict(BaseModel):
    """A model that refuses unknown fields, other types and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


RowT = TypeVar("RowT", bound=Strict)


def read_rows(path: Path, data: bytes, kind: type[RowT], nested: Mapping[str, type[BaseModel]]) -> list[RowT]:
    """The rows of a JSON-lines file.

    Args:
        path: Named in messages.
        data: Its bytes.
        kind: Model of a row.
        nested: Models of its fields, for messages on unknown names inside them.

    Raises:
        UserError: A row is malformed; the message names line and field.
    """
    rows = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            rows.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{path}:{number}: {first_problem(error, kind, nested)}") from error
    return rows


def first_problem(error: ValidationError, model: type[BaseModel], nested: Mapping[str, type[BaseModel]]) -> str:
    """The field and what is wrong with it, with the nearest name for an unknown one."""
    problem = error.errors()[0]
    where = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owner = nested.get(str(problem["loc"][0]), model) if len(problem["loc"]) > 1 else model
        close = difflib.get_close_matches(str(problem["loc"][-1]), owner.model_fields, n=1)
        return f"{where}: unknown field" + (f' (did you mean "{close[0]}"?)' if close else "")
    got = "" if problem["type"] == "missing" else f", got {str(problem['input'])[:60]!r}"
    return f"{where}: {problem['msg'].lower()}{got}"
