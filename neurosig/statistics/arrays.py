"""Arrays from whatever holds numbers: lists, arrays of another type, torch tensors, pandas columns."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from neurosig.runtime.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
_TYPES: dict[str, tuple[type, type, str]] = {
    "Bool": (np.bool_, np.bool_, "True and False, or 1 and 0"),
    "Int": (np.integer, np.int64, "whole numbers"),
    "Float": (np.floating, np.float64, "numbers"),
}
_ARRAY = re.compile(r"^(Bool|Int|Float)\[np\.ndarray, ")


def takes_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to convert what it gets for the arguments that it annotates as numpy arrays.

    ``Bool`` takes 0 and 1 too, ``Int`` booleans and whole numbers of any type, ``Float`` all numbers. An array of the
    annotated type is passed on as it is.

    Raises:
        UserError: Naming the argument: it holds something else.
    """
    signature = inspect.signature(function)
    kinds = {
        name: found[1] for name, p in signature.parameters.items() if (found := _ARRAY.match(str(p.annotation).strip()))
    }

    @functools.wraps(function)
    def converted(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, kind in kinds.items():
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = _array(name, bound.arguments[name], kind)
        return function(*bound.args, **bound.kwargs)

    return converted


def _array(name: str, value: Any, kind: str) -> Any:
    accepted, target, expected = _TYPES[kind]
    if type(value).__module__ == "torch":
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.itemsize == 2 else value).numpy()
    array = np.asarray(value)
    if np.issubdtype(array.dtype, accepted):
        return array
    if array.dtype.kind not in "biuf":
        raise UserError(f"{name}: expected {expected}, got {array.dtype.name} values such as {array.flat[0]!r}")
    same: Any = array.astype(target)
    if (same != array).any():
        raise UserError(f"{name}: expected {expected}, got {array[same != array].flat[0]}")
    return same
