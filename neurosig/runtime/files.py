"""Atomic file writes and SHA-256 helpers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neurosig.runtime.errors import UserError


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to a temporary file next to ``path``, flush it to disk and rename it to ``path``.

    Raises:
        UserError: The disk is full; an earlier file is untouched.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with disk_space(path, len(payload)), aside.open("wb") as handle:
            handle.write(payload)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_parquet(path: str | Path, rows: Sequence[Mapping[str, Any]], *, schema: Any = None, **options: Any) -> None:
    """`write_atomic` for rows as Parquet, of this `pyarrow.Schema` or one found by their values.

    ``options`` are those of `pyarrow.parquet.write_table`.
    """
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema), buffer, **options)
    write_atomic(path, buffer.getvalue())


def append_line(path: str | Path, line: str) -> None:
    """Append a line and flush it to disk.

    Raises:
        UserError: The disk is full; the file is unchanged.
    """
    path = Path(path)
    payload = (line + "\n").encode()
    with path.open("ab", buffering=0) as handle:
        end = handle.tell()
        try:
            with disk_space(path, len(payload)):
                written = handle.write(payload)
                if written < len(payload):  # the next write raises the reason
                    handle.write(payload[written:])
                os.fsync(handle.fileno())
        except BaseException:
            handle.truncate(end)
            raise


@contextlib.contextmanager
def atomic_folder(target: Path, aside: Path | None = None) -> Iterator[Path]:
    """Write a folder that replaces ``target`` when the block ends well and is removed when it fails.

    Args:
        target: An earlier folder there is replaced.
        aside: Where the block makes and fills the folder; default: ``.NAME`` next to ``target``.
    """
    aside = aside or target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


@contextlib.contextmanager
def disk_space(path: Path, needed: int, *, kept: str = "") -> Iterator[None]:
    """Report a full disk in one sentence if writing ``path`` fails in the block.

    Args:
        path: The file, written by any library.
        needed: Its size in bytes.
        kept: For the message: earlier results that are safe.

    Raises:
        UserError: The disk is full; the message names the bytes to write and the bytes free.
    """
    free = shutil.disk_usage(path.parent).free
    try:
        yield
    except Exception as error:
        number = _full_disk(error.__cause__ if isinstance(error, UserError) else error)
        if number is None:
            raise
        safe = f"; {kept}" if kept else ""
        raise UserError(
            f"{path}: {os.strerror(number)} ({needed:,} bytes to write, {free:,} free){safe}; make room, then run again"
        ) from error


def _full_disk(error: BaseException | None) -> int | None:
    """The error number if it means a full disk; safetensors and others put it into their text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return number if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def csv_cell(value: object) -> object:
    """Put an apostrophe before text that a spreadsheet would run as a formula; return other values unchanged."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def read_once(path: Path | None) -> Iterator[str | None]:
    """Hex SHA-256 of a file that the block reads, so that the hash is of what was read; ``None`` for no file.

    Raises:
        UserError: The file changed while the block read it.
    """
    before = None if path is None or not path.is_file() else path.stat()
    yield None if before is None else sha256_file(str(path))
    if before is not None and path is not None:
        after = path.stat()
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise UserError(f"{path}: changed while it was read; run again")


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
