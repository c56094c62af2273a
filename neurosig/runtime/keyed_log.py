"""Append-only logs from which an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import append_line, write_atomic
from neurosig.runtime.provenance import check_same_run


class KeyedLog:
    """Append-only log of JSON lines. The first is the key: everything that determines the others.

    A log with another key is never continued. A torn last line is dropped, and its work done again.

    Raises:
        UserError: The log is damaged or has another key.
    """

    def __init__(self, path: str | Path, key: Mapping[str, Any]):
        self.path = Path(path)
        self.key = json.loads(json.dumps(key))
        if self.path.exists():
            self._reopen()
        else:
            write_atomic(self.path, json.dumps({"key": self.key}) + "\n")

    def read(self, line: Any) -> None:
        """Take in a line of an earlier run; a ValueError, LookupError or TypeError means that it is damaged."""
        raise NotImplementedError

    def write(self, line: Any) -> None:
        """Add a line and flush it to disk."""
        append_line(self.path, json.dumps(line, ensure_ascii=False))

    def _reopen(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        try:
            earlier = json.loads(lines[0])["key"]
            for line in lines[1:-1]:
                self.read(json.loads(line))
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self.path}: damaged, so it cannot be resumed ({error}); use --overwrite") from error
        check_same_run(self.path.parent, earlier, self.key)
        write_atomic(self.path, b"\n".join(lines[:-1]) + b"\n")
