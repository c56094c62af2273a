"""Reading questions: every shape, every fault, one clear error that names file, line and field."""

from __future__ import annotations

import gzip
import json
import logging
import unicodedata
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest

from neurosig.questions.load import Question, load_questions, without_answers
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text
from tests.support.paths import REAL_DATA
from tests.support.question_files import GOOD, fails, one, write

# ---- the record ----


def test_text_hash_is_of_nfc_question_and_choices() -> None:
    question = Question(id="a", domain="d", question=" Café? ", choices=("x", "é"), answer="B")
    decomposed = Question(id="b", domain="d", question=unicodedata.normalize("NFD", "Café?"), choices=("x", "é"))
    assert question.question == "Café?"
    assert decomposed.question != question.question
    assert question.text_sha256 == decomposed.text_sha256 == sha256_text("Café?\nx\né")
    assert Question(id="c", domain="d", question="Café?").text_sha256 == sha256_text("Café?\n")


def test_without_answers_removes_only_the_gold() -> None:
    question = Question("a", "d", "q?", ("x", "y"), "A", ("B",), "k", 7)
    assert without_answers([question]) == [Question("a", "d", "q?", ("x", "y"), None, (), "k", 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, 'field "question": expected text, got null'),
        ({"question": ""}, "field \"question\": expected text, got '' (str)"),
        ({"question": "  \t"}, 'field "question": expected text'),
        ({"question": 7}, 'field "question": expected text, got 7 (int)'),
        ({"question": float("nan")}, 'field "question": expected text, got nan (float)'),
        ({"question": ["q"]}, "field \"question\": expected text, got ['q'] (list)"),
        ({"id": True}, 'field "id": expected text, got True (bool)'),
        ({"id": ""}, 'field "id": expected text'),
        ({"domain": ""}, 'field "domain": expected text'),
        ({"question": "a\x00b"}, 'field "question": holds a NUL character at character 2'),
        ({"question": "ab\ud800"}, 'field "question": holds the lone surrogate U+D800 at character 3'),
        ({"answer": "x\udfff"}, 'field "answer": holds the lone surrogate U+DFFF'),
        ({"choices": ["x", "y\x00"], "answer": "A"}, 'field "choices": holds a NUL character'),
        ({"choices": ["x", "y"], "answer": "C"}, "field \"answer\": expected a letter of A-B, got 'C' (str)"),
        ({"choices": ["x", "y"], "answer": "z"}, 'field "answer": expected a letter of A-B'),
        ({"choices": ["x", "y"], "answer": "AB"}, 'field "answer": expected a letter of A-B'),
        (
            {"choices": ["x", "y"], "answer": "A", "aliases": ["D"]},
            'field "aliases": expected a letter of A-B',
        ),
        ({"choices": ["x", "y"], "answer": 2}, 'field "answer": expected a letter of A-B, got 2 (int)'),
        ({"answer": {"value": "x"}}, 'field "answer": expected text, got {'),
        ({"choices": []}, 'field "choices": expected null or 2 to 26 texts, got 0'),
        ({"choices": ["x"]}, 'field "choices": expected null or 2 to 26 texts, got 1'),
        ({"choices": ["x"] * 27}, 'field "choices": expected null or 2 to 26 texts, got 27'),
        ({"choices": "x"}, 'field "choices": expected a list of texts'),
        ({"choices": ["x", 2]}, 'field "choices": expected a list of texts'),
        ({"choices": ["x", " "]}, 'field "choices": expected text'),
        ({"answer": ""}, 'field "answer": expected text'),
        ({"aliases": "x"}, 'field "aliases": expected a list of texts'),
    ],
)
def test_malformed_field_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "set.jsonl", GOOD, {**GOOD, "id": "b", "question": "Why?", **change})
    assert fails(path).startswith(f"{path}:2: {message}")


def test_missing_field_lists_the_fields_there(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", {"id": "a", "text": "q?", "meta": {"source": "web"}})
    assert fails(path) == (
        f'{path}:1: field "question": expected text, got missing; the record has id, text, meta, meta.source; name the '
        "column that asks it: --fields question=COLUMN"
    )


def test_message_about_a_huge_value_is_short(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", {**GOOD, "question": ["x" * 10_000]})
    assert len(fails(path)) < 200 + len(str(path))


# ---- files ----


def test_crlf_blank_lines_and_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    first, second = (json.dumps({**GOOD, "id": key, "question": f"{key}?"}) for key in "ab")
    path.write_bytes(f"\r\n{first}\r\n\r\n   \r\n{second}".encode())
    assert [(question.id, question.line) for question in load_questions(path)] == [("a", 2), ("b", 5)]


def test_unicode_line_separators_and_emoji_stay_in_the_text(tmp_path: Path) -> None:
    text = "مرحبا 🌍\u2028next\x85?"
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({**GOOD, "question": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_questions(path)[0].question == text


def test_paired_surrogate_escapes_are_one_character(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"id": "a", "domain": "d", "question": "\\ud83d\\ude00?"}\n')
    assert load_questions(path)[0].question == "😀?"


def test_byte_order_mark_is_accepted_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    with caplog.at_level(logging.WARNING):
        assert load_questions(path)[0].id == "a"
    assert "byte order mark" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(json.dumps(GOOD).encode(encoding))
    assert "UTF-16" in fails(path)


def test_invalid_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", GOOD)
    with path.open("ab") as handle:
        handle.write(b'{"id": "caf\xe9"}\n')
    assert fails(path).startswith(f"{path}:2: not UTF-8 (0xe9 at byte 12 of the line)")


def test_invalid_json_names_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", GOOD)
    with path.open("a") as handle:
        handle.write('{"id": "b",, "x": 1}\n')
    message = fails(path)
    assert message.startswith(f"{path}:2: invalid JSON at column 12: ")
    assert "cut off" not in message


def test_torn_last_line_is_an_error_even_if_a_limit_leaves_it_out(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", GOOD)
    with path.open("a") as handle:
        handle.write('{"id": "b", "quest')
    message = fails(path, limit=1)
    assert message.startswith(f"{path}:2: invalid JSON at column ")
    assert "the last line may be cut off" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"id": ' + "9" * 5_000 + "}", "invalid JSON: "),
        ("[1, 2]", "expected one JSON object a line, got [1, 2] (list)"),
        ('"text"', "expected one JSON object a line"),
        ("[", "expected one JSON object a line, not a .json document"),
        ("id,domain,question", "looks like CSV"),
        ("<!doctype html>", "looks like HTML"),
        ("hello", "looks like plain text"),
        ("\u00a0", "invalid JSON at column 1"),
    ],
)
def test_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    answer = fails(path)
    assert answer.startswith(f"{path}:1: ")
    assert message in answer


def test_line_limit_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", GOOD, {**GOOD, "id": "b", "question": "x" * 10_000_000})
    assert fails(path).startswith(f"{path}:2: line longer than 1 MB")


def test_line_just_below_the_limit_is_read(tmp_path: Path) -> None:
    assert len(one(tmp_path, {**GOOD, "question": "x" * 1_000_000}).question) == 1_000_000


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (gzip.compress(json.dumps(GOOD).encode(), mtime=0), "gzip"),
        (b"\x28\xb5\x2f\xfd....", "Zstandard"),
        (b"PK\x03\x04....", "ZIP"),
        (b"PAR1....", "Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_other_format_under_a_jsonl_name_is_named(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(data)
    message = fails(path)
    assert message.startswith(f"{path}: ")
    assert name in message


@pytest.mark.parametrize("content", ["", "\n\r\n  \n"])
def test_empty_file_has_0_questions(tmp_path: Path, content: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    assert fails(path) == f"dataset {path}: 0 questions"


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    assert fails(tmp_path / "no.jsonl").startswith(f"dataset {tmp_path / 'no.jsonl'}: no such file")
    assert "geography" in fails("geografy:train")
    (tmp_path / "set.xlsx").write_text("id,question\n")
    assert 'unknown format ".xlsx"; expected .jsonl, .parquet, .json, .csv, .tsv' in fails(tmp_path / "set.xlsx")


# ---- several sources, ids, folders, splits ----


def test_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", GOOD, {**GOOD, "id": "b", "question": "b?"}, {**GOOD, "question": "c?"})
    assert fails(path).startswith(f'{path}:3: id "a" already on line 1')


def test_duplicate_id_across_sources_names_both_files(tmp_path: Path) -> None:
    first = write(tmp_path / "x.jsonl", GOOD)
    second = write(tmp_path / "y.jsonl", {**GOOD, "question": "c?"})
    assert fails([first, second]).startswith(f'{second}:1: id "a" already in {first}:1')
    assert "already" in fails(["world-facts", "geography"])


def test_same_text_under_two_ids_warns_with_the_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "set.jsonl", *({**GOOD, "id": key} for key in "abc"))
    with caplog.at_level(logging.WARNING):
        assert len(load_questions(path)) == 3
    assert "2 questions repeat the text of another id (first: a and b)" in caplog.text


def test_same_text_with_other_choices_is_another_question(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    choices = [["x", "y"], ["x", "z"]]
    records = [{**GOOD, "id": "".join(c), "choices": c, "answer": "A"} for c in choices]
    with caplog.at_level(logging.WARNING):
        load_questions(write(tmp_path / "set.jsonl", *records))
    assert "repeat" not in caplog.text


def test_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/a", "b", "a"):
        write(tmp_path / f"{name}.jsonl", {"id": name, "question": f"{name}?"})
    (tmp_path / "notes.txt").write_text("not a data set")
    questions = load_questions(str(tmp_path))
    assert [question.id for question in questions] == ["a", "b", "sub/a"]
    assert questions[1].domain == "b"


def test_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fails(tmp_path) == f"dataset {tmp_path}: is a directory without .jsonl, .parquet, .csv, .tsv files"


def test_a_table_in_a_folder_is_read_only_where_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("question\nWhy?\n")
    assert [question.question for question in load_questions(tmp_path)] == ["Why?"]
    write(tmp_path / "set.jsonl", GOOD)
    assert [question.id for question in load_questions(tmp_path)] == ["a"]


def test_limit_takes_the_first_over_all_sources(tmp_path: Path) -> None:
    first = write(tmp_path / "x.jsonl", GOOD)
    both = load_questions([first, "geography"], limit=3)
    assert len(both) == 3
    assert [question.id for question in both] == ["a", *(q.id for q in load_questions("geography", limit=2))]


def test_split_applies_to_bundled_sources_that_name_none(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", GOOD)
    mixed = load_questions([path, "geography", "language:test"], split="dev")
    assert mixed == [
        *load_questions(path),
        *load_questions("geography:dev"),
        *load_questions("language:test"),
    ]
    assert load_questions("geography:all", split="dev") == load_questions("geography")


def test_bundled_name_wins_over_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "geography.jsonl", GOOD)
    (tmp_path / "geography").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(load_questions("geography")) > 400
    assert len(load_questions("./geography.jsonl")) == 1


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("geography:valid", {}, 'split "valid" is not one of train, dev, test, all'),
        ("geography", {"split": "validation"}, 'split "validation" is not one of'),
        ("geography", {"limit": 0}, "limit must be at least 1, got 0"),
        ([], {}, "no dataset"),
        ("hf:MMLU", {}, "expected hf:ORG/NAME"),
    ],
)
def test_bad_argument(source: Any, options: dict[str, Any], message: str) -> None:
    assert message in fails(source, **options)


# ---- the real sets ----

REAL_FILES = sorted(REAL_DATA.glob("*/*.jsonl"))


@pytest.mark.skipif(not REAL_FILES, reason=f"no data sets in {REAL_DATA}; set NEUROSIG_REAL_DATA")
def test_real_sets_load_as_they_are() -> None:
    lines = [line for path in REAL_FILES for line in path.read_text(encoding="utf-8").split("\n") if line]
    questions = load_questions(REAL_DATA)
    assert len(questions) == len(lines)
    for question, line in zip(questions, lines, strict=True):
        record = json.loads(line)
        assert question.id == record["id"]
        assert question.question.endswith(record["question"].strip())
        assert question.answer == record["answer"]
        given = record["choices"] or []
        lettered = [f"({letter}) {text}" for letter, text in zip(ascii_uppercase, question.choices or (), strict=False)]
        assert given in (lettered, [*(question.choices or ())])  # some carry their letters, which are taken off


def test_a_records_own_words_stay_on_the_line(tmp_path: Path) -> None:
    strange = {f"line\nbreak\x1b[31m{index}": index for index in range(25)}
    path = tmp_path / "strange.jsonl"
    path.write_text(json.dumps(strange) + "\n")
    with pytest.raises(UserError) as raised:
        load_questions(path)
    text = str(raised.value)
    assert r"the record has line\nbreak\x1b[31m0, " in text and " and 5 more; " in text
    assert "\n" not in text and "\x1b" not in text
    path.write_text(json.dumps({"id": "a\nb", "question": "q?"}) + "\n" + json.dumps({"id": "a\nb", "question": "p?"}))
    with pytest.raises(UserError, match=r'strange.jsonl:2: id "a\\nb" already on line 1'):
        load_questions(path)
