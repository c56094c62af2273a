"""Read question records from files and data sets.

Readers yield ``(line, record)``: the 1-based line (JSONL) or row (Parquet, data sets) and a dict. They raise UserError;
its message names the place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neurosig.questions.formats import Record, got
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import check_installed

log = logging.getLogger(__name__)

Rows = Iterator[tuple[int, Record]]

MAX_LINE_BYTES = 2**20
MAGIC = {
    b"\x1f\x8b": "gzip data: decompress it first",
    b"\x28\xb5\x2f\xfd": "Zstandard data: decompress it first",
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"PAR1": "Parquet data: name it .parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


def read_jsonl(path: Path) -> Rows:
    """Records of a UTF-8 JSON-lines file; blank lines, CRLF and a leading byte order mark are accepted."""
    try:
        handle = path.open("rb")
    except OSError as error:
        raise UserError(f"dataset {path}: cannot be read: {error.strerror}") from None
    with handle:
        head = handle.read(64)
        for magic, name in MAGIC.items():
            if head.startswith(magic):
                raise UserError(f"{path}: {name}")
        if b"\x00" in head[:4]:
            raise UserError(f"{path}: UTF-16 or binary data: save it as UTF-8 text, one JSON object a line")
        handle.seek(0)
        if head.startswith(b"\xef\xbb\xbf"):
            log.warning("%s: starts with a UTF-8 byte order mark, which is ignored", path)
            handle.seek(3)
        number = 0
        while raw := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise UserError(f"{path}:{number}: line longer than 1 MB; one line holds one question")
            if raw.strip():
                yield number, parse_line(raw, f"{path}:{number}", first=number == 1)


def parse_line(raw: bytes, where: str, *, first: bool) -> Record:
    """One JSON object; on the ``first`` line the message guesses which other format the file has."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x} at byte {error.start + 1}"
        raise UserError(f"{where}: not UTF-8 ({byte} of the line); save it as UTF-8") from None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        if first and text.lstrip()[:1] not in '{["':
            html, table = text.lstrip().startswith("<"), "," in text or "\t" in text
            guess = "HTML" if html else "CSV" if table else "plain text"
            raise UserError(f"{where}: looks like {guess}; expected one JSON object a line") from None
        hint = "" if raw.endswith(b"\n") else " (the last line may be cut off)"
        message = f"invalid JSON at column {error.colno}: {error.msg}{hint}"
        if first and text.strip() in ("[", "{"):
            message += "; expected one JSON object a line, not a .json document"
        raise UserError(f"{where}: {message}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected one JSON object a line, {got(record)}")
    return record


def read_parquet(path: Path) -> Rows:
    """Records of a Parquet file, batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable Parquet after row {number}: {first_line(error)}") from None


def read_saved_dataset(folder: Path) -> Rows:
    """Records of a folder written by ``datasets.save_to_disk``; of several splits, the path must name one."""
    datasets = import_datasets(str(folder))
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"dataset {folder}: unreadable: {first_line(error)}") from None
    return dataset_rows(loaded, f"dataset {folder}", f"{folder}/SPLIT")


def read_hub(name: str, split: str | None) -> Rows:
    """Records of the Hugging Face data set ``ORG/NAME``; no code of the repository is run."""
    where = f"hf:{name}" + (f":{split}" if split else "")
    datasets = import_datasets(where)
    try:
        loaded = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"dataset {where}: not found, or no connection to the hub: {first_line(error)}") from None
    return dataset_rows(loaded, f"dataset {where}", f"hf:{name}:SPLIT")


def import_datasets(where: str) -> Any:
    """The ``datasets`` package, or the advice to install it."""
    check_installed(where, "datasets")
    import datasets

    return datasets


def dataset_rows(loaded: Any, where: str, example: str) -> Rows:
    """Rows of a Dataset, or of a DatasetDict that has exactly one split."""
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise UserError(f"{where}: has the splits {', '.join(loaded)}; name one, as in {example}")
        (loaded,) = loaded.values()
    return enumerate(loaded, start=1)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
