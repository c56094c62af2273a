"""Question files besides plain JSON lines: .json, tables, compressed files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard

from neurosig.questions.load import Question, load_questions
from tests.support.question_files import GOOD, fails

HEADER = "id,question,A,B,answer\n"


def text(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


@pytest.mark.parametrize("name", ["set.json", "set.json.gz", "set.json.zst", "set.jsonl.gz", "set.jsonl.zst"])
def test_json_and_compressed_files_equal_json_lines(tmp_path: Path, name: str) -> None:
    records = [GOOD, {**GOOD, "id": "b", "question": "b?"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    data = (json.dumps(records, indent=1) if ".jsonl" not in name else lines).encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = zstandard.compress(data)
    (tmp_path / name).write_bytes(data)
    read = load_questions(tmp_path / name)
    assert [(question.id, question.domain, question.question) for question in read] == [
        ("a", "d", "What is it?"),
        ("b", "d", "b?"),
    ]
    assert load_questions(text(tmp_path / "lines.json", lines))[1].line == 2


def test_the_domain_of_a_compressed_file_is_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "set.v2.jsonl.gz").write_bytes(gzip.compress(b'{"question": "Why?"}\n'))
    assert load_questions(tmp_path / "set.v2.jsonl.gz")[0].domain == "set.v2"
    assert len(load_questions(tmp_path)) == 1  # a folder has it, too


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_a_table_has_a_header_nulls_and_numbers(tmp_path: Path, suffix: str, delimiter: str) -> None:
    """A cell may hold the delimiter and lines; the line of a record is its first. Only whole columns are numbers."""
    rows = ["id,question,A,B,answer", '007,"Which, of\nthese?",7,x y,1', "", "8,Who?,5,08,0", "9,No gold?,5,6,"]
    quoted = "\n".join(rows).replace(",", delimiter).replace(f"Which{delimiter}", "Which,")
    path = text(tmp_path / f"set{suffix}", "\ufeff" + quoted.replace("\n", "\r\n").replace("of\r\n", "of\n"))
    assert load_questions(path, fields=("choices=A,B",)) == [
        Question("007", "set", "Which, of\nthese?", ("7", "x y"), "B", line=2),
        Question("8", "set", "Who?", ("5", "08"), "A", line=5),
        Question("9", "set", "No gold?", ("5", "6"), line=6),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", HEADER + "a,Why?,x,y\n", ":2: 4 cells, but the header has 5"),
        ("a.csv", HEADER + "a,Why, oh why?,x,y,A\n", ":2: 6 cells, but the header has 5"),
        ("a.csv", HEADER + 'a,"Why?,x,y,A\nb,Who?,x,y,B\n', ":2: no table: unexpected end of data"),
        ("a.csv", HEADER + f'a,"{"x" * 200_000}",x,y,A\n', ":2: no table: field larger than field limit"),
        ("a.csv", "question,A,A\nWhy?,x,y\n", ':1: two columns are named "A"'),
        ("a.csv", "Why?,x,y,A\nWho?,x,y,B\n", ':2: field "question": expected text, got missing; the record has Why?'),
        ("a.json", '[{"question": "Why?"},\n "x"]', ":2: expected a list of objects, got 'x' (str)"),
        ("a.json", '[{"question": "Why?"},\n {"question"]', ":2: invalid JSON at column 13: "),
        ("a.json", "[" * 100_000, "invalid JSON: "),
        ("a.json", '{"data": [{"question": "Why?"}]}', ':1: field "question": expected text, got missing; the record '),
        ("a.json", '{\n"data": []}', ":1: invalid JSON at column 1: Expecting property name"),
        ("a.json.gz", "[]", "cannot be read as gzip data"),
        ("a.jsonl.zst", "{}", "cannot be read as zstd data"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = text(tmp_path / name, content)
    problem = fails(path)
    assert str(path) in problem and message in problem


def test_encodings_and_cut_off_streams_are_named(tmp_path: Path) -> None:
    row = "a,Café?,x,y,A\n"
    assert ":2: not UTF-8 (0xe9 at byte 6 of the line)" in fails(text(tmp_path / "a.csv", HEADER + row, "cp1252"))
    assert "UTF-16 text: save it as UTF-8" in fails(text(tmp_path / "b.csv", HEADER + row, "utf-16"))
    assert ":1: not UTF-8 (0xe9 at byte" in fails(
        text(tmp_path / "c.json", f'[{{"question": "{row.strip()}"}}]', "cp1252")
    )
    records: list[dict[str, Any]] = [{**GOOD, "id": f"q{n}", "question": f"{n} {n * n} {n**3}?"} for n in range(2000)]
    whole = gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert re.search(r"cut\.jsonl\.gz: cannot be read|cut\.jsonl\.gz:\d+: .*cut off", fails(tmp_path / "cut.jsonl.gz"))
