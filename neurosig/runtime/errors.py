"""Errors of the user: one sentence each."""

from __future__ import annotations

import sys


class UserError(ValueError):
    """A problem the user can fix, in input, model, folder or option: what is wrong, where, and what to do.

    The commands print it as one line, ``error: ...``, and end with exit code 2.
    """


def os_text(fault: OSError, *, named: bool = False) -> str:
    """The system's message, after the file's name if ``named``."""
    text = fault.strerror or " ".join(str(fault).split()) or type(fault).__name__
    return f"{fault.filename}: {text}" if named and fault.filename is not None else text


def one_line(fault: BaseException) -> str:
    """The first line of a message of a library, or the fault's type."""
    return next(iter(str(fault).splitlines()), type(fault).__name__)


def check_platform() -> None:
    """Refuse Windows, which cannot fork a process or lock a folder as Linux and macOS do.

    Raises:
        UserError: Naming WSL.
    """
    if sys.platform == "win32":
        raise UserError("Windows itself is not supported: install WSL (`wsl --install`) and run this command in it")
