"""The one exception that stands for something the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, model, folder or option: one sentence saying what is wrong, where, and what to do.

    The commands print it as ``error: ...`` and leave with exit code 2.
    """
