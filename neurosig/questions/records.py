"""Read question records from files and data sets.

Readers yield ``(line, record)``: the 1-based line (JSON lines, tables), row (Parquet, data sets) or place (.json) and a
dict. They raise UserError; its message names the place.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from neurosig.questions.columns import Record, got, shown
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import check_installed

log = logging.getLogger(__name__)

Rows = Iterator[tuple[int, Record]]

MAX_LINE_BYTES = 2**20
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {
    b"\x1f\x8b": "gzip data: decompress it first, or end its name with .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard data: decompress it first, or end its name with .zst",
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"PAR1": "Parquet data: name it .parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)


def format_of(path: Path) -> tuple[str, str]:
    """The name of a file without its endings, and the ending that says its format: ``("set", ".jsonl")``."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    return plain.stem, plain.suffix


def read_file(path: Path) -> Rows:
    """Records of a file in one of the `FORMATS`."""
    return FORMATS[format_of(path)[1]](path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A text file, decompressed where its name says so, after its byte order mark.

    Raises:
        UserError: It cannot be read, or is no UTF-8 text by its first bytes.
    """
    compression = COMPRESSED.get(path.suffix)
    try:
        if compression is None:
            handle: BinaryIO = path.open("rb")
        else:
            import pyarrow

            handle = io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))
        with handle:
            head = handle.peek(64)[:64]  # type: ignore[attr-defined]
            for magic, name in MAGIC.items():
                if head.startswith(magic):
                    raise UserError(f"{path}: {name}")
            if b"\x00" in head[:4]:
                raise UserError(f"{path}: UTF-16 or binary data: save it as UTF-8 text")
            if head.startswith(b"\xef\xbb\xbf"):
                log.warning("%s: starts with a UTF-8 byte order mark, which is ignored", path)
                handle.read(3)
            yield handle
    except OSError as error:
        if compression is None:
            raise UserError(f"dataset {path}: cannot be read: {error.strerror}") from None
        raise UserError(f"dataset {path}: cannot be read as {compression} data: {first_line(error)}") from None


def read_jsonl(path: Path) -> Rows:
    """Records of a UTF-8 JSON-lines file; blank lines, CRLF and a leading byte order mark are accepted."""
    with opened(path) as handle:
        number = 0
        while raw := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise UserError(f"{path}:{number}: line longer than 1 MB; one line holds one question")
            if raw.strip():
                yield number, parse_line(raw, f"{path}:{number}", first=number == 1)


def read_json(path: Path) -> Rows:
    """Records of a JSON document that is a list of objects, or of JSON lines under that name."""
    with opened(path) as handle:
        raw = handle.read()
    if raw.lstrip()[:1] != b"[":
        yield from read_jsonl(path)
        return
    text = "".join(utf8(line, f"{path}:{number}") for number, line in enumerate(io.BytesIO(raw), start=1))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: invalid JSON at column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: invalid JSON: {first_line(error)}") from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected a list of objects, {got(record)}")
        yield number, record


def read_table(path: Path, delimiter: str) -> Rows:
    """Records of a table with a header, as CSV; an empty cell is null, a column of whole numbers has numbers."""
    rows: list[tuple[int, list[str]]] = []
    with opened(path) as handle:
        texts = (utf8(raw, f"{path}:{number}") for number, raw in enumerate(handle, start=1))
        reader = csv.reader(texts, delimiter=delimiter, strict=True)
        start = 1
        try:
            for cells in reader:
                rows += [(start, cells)] if any(cells) else []
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{start}: no table: {error}") from None
    if not rows:
        return
    (_, header), *rows = rows
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f'{path}:1: two columns are named "{shown(twice[0])}"')
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{path}:{line}: {len(cells)} cells, but the header has {len(header)}")
    numbers = {
        place
        for place in range(len(header))
        if all(WHOLE_NUMBER.fullmatch(cells[place]) for _, cells in rows if cells[place])
    }
    for line, cells in rows:
        values = ((int(cell) if place in numbers else cell) if cell else None for place, cell in enumerate(cells))
        yield line, dict(zip(header, values, strict=True))


def utf8(raw: bytes, where: str) -> str:
    """The text of a line."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x} at byte {error.start + 1}"
        raise UserError(f"{where}: not UTF-8 ({byte} of the line); save it as UTF-8") from None


def parse_line(raw: bytes, where: str, *, first: bool) -> Record:
    """One JSON object; on the ``first`` line the message guesses which other format the file has."""
    text = utf8(raw, where)
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
            message += "; expected one JSON object a line, not a .json document, which is a list and named .json"
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


def read_hub(name: str, config: str | None, split: str | None) -> Rows:
    """Records of the Hugging Face data set ``ORG/NAME``; no code of the repository is run."""
    where = f"hf:{name}" + (f"/{config}" if config else "") + (f":{split}" if split else "")
    datasets = import_datasets(where)
    try:
        loaded = datasets.load_dataset(name, config, split=split, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        if several := re.search(r"available configs: \[(.*?)\]", str(error)):
            advice = f"several sets, {several[1][:200]}; name one, as in hf:{name}/SET:SPLIT"
            raise UserError(f"dataset {where}: holds {advice}") from None
        raise UserError(f"dataset {where}: not found, or no connection to the hub: {first_line(error)}") from None
    return dataset_rows(loaded, f"dataset {where}", f"{where}:SPLIT")


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


FORMATS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".json": read_json,
    ".csv": lambda path: read_table(path, ","),
    ".tsv": lambda path: read_table(path, "\t"),
}
"""Ending of a file's name -> its reader."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
