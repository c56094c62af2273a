from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neurosig.hallucination.scores import BEFORE_CONTEXTS
from neurosig.manifest import (
    FILES,
    HEADER,
    NEURONS,
    QUESTIONS,
    ROLLOUTS,
    SIGNALS,
    DemonstrationRecord,
    QuestionRow,
    VoteRecord,
    read_manifest,
    write_manifest,
)
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import make_manifest
from tests.support.manifests import edit_header, edit_row, rehash


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"))


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "manifest"))


def test_a_manifest_holds_what_was_decided(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert [row.question_id for row in manifest.rows] == [f"q{index}" for index in range(8)]
    for row in manifest.rows:
        assert len(row.answers) == row.vote.n == 3  # type: ignore[union-attr]
        assert set(row.scores) == set(BEFORE_CONTEXTS)
        assert row.as_question().answer is None
        for item in row.context:
            assert manifest.rollouts[item.question_id, item.rollout_id].question_id == item.question_id
    header = manifest.header
    assert header.model["weights"].keys() == {"model.safetensors"}
    assert header.sampling["num_generations"] == header.options["num_generations"] == 3
    assert header.files[QUESTIONS].rows == 8
    assert header.files["rollouts.jsonl"].rows == 24


def test_rehashing_alone_is_accepted(folder: Path) -> None:
    edit_row(folder, 1, lambda row: None)
    read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(seleced=True), r'\$\.seleced: unknown field \(did you mean "selected"\?\)'),
        (lambda row: row["context"][0].update(rolout_id=1), r'\$\.context\[0\]\.rolout_id: .* mean "rollout_id"\?'),
        (lambda row: row.update(line=10**30), r"\$\.line: input should be less than 9223372036854775808, got '10{30}'"),
        (lambda row: row.update(line=True), r"\$\.line: .*integer, got 'True'"),
        (lambda row: row.update(question_id="q0"), r'\$\.question_id: "q0" appears on an earlier line'),
        (lambda row: row.update(question="Is rain nice?"), r"\$\.text_sha256: not the hash of this question"),
        (lambda row: row["context"][0].update(similarity=float("inf")), r"\$\.context\[0\]\.similarity: .*finite"),
        (lambda row: row.update(line=1.0), r"\$\.line: .*integer.*got '1\.0'"),
        (lambda row: row.update(selected="true"), r"\$\.selected: .*boolean.*got 'true'"),
        (lambda row: row["scores"].update(probe_score=float("nan")), r"\$\.scores\.probe_score: .*finite"),
        (lambda row: row.update(reason="fine"), r"\$\.reason: .*'selected'.*got 'fine'"),
        (lambda row: row.pop("vote"), r"\$\.vote: field required"),
        (lambda row: row["context"][0].update(rollout_id=99), r'\$\.context\[0\]: no rollout 99 of question "q'),
        (lambda row: row["context"][0].update(question_id="q9"), r'\$\.context\[0\]: no rollout \d of question "q9"'),
        (lambda row: row.update(reason="tie"), r'\$\.selected: contradicts the reason "tie"; export again'),
        (lambda row: row.update(selected=False), r'\$\.selected: contradicts the reason "selected"'),
        (lambda row: row["raw_answers"].pop(), r"\$\.raw_answers: 2 of 3 answers"),
        (lambda row: row.pop("raw_answers"), r"\$\.raw_answers: 0 of 3 answers"),
        (lambda row: row.update(answer_space="planets"), r'field "answer_space": no such space'),
        (lambda row: row.update(answer_space=[["a"], ["a"]]), r'field "answer_space": "a" is in two members'),
        (lambda row: row.update(answer_space=["a"]), r"\$\.answer_space"),
        (lambda row: row["vote"].update(n=4), r"\$\.vote\.n: 4, but there are 3 answers"),
        (lambda row: row["context"][0].update(question_id="q2"), r"\$\.context\[0\]: a question is its own context"),
    ],
)
def test_a_malformed_row_names_line_and_field(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_row(folder, 3, change)
    with pytest.raises(UserError, match=rf"questions\.jsonl:3: {message}"):
        read_manifest(folder)


def test_a_context_with_the_same_text_under_another_id_is_refused(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / QUESTIONS).read_text().splitlines()]
    shown = rows[2]["context"][0]["question_id"]
    line = next(number for number, row in enumerate(rows, start=1) if row["question_id"] == shown)
    text = {key: rows[2][key] for key in ("question", "text_sha256")}
    edit_row(folder, line, lambda row: row.update(text))
    with pytest.raises(UserError, match=r"questions\.jsonl:\d: \$\.context\[\d\]: a question is its own context"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(schema_version="2.0"), "schema version 2.0, this neurosig reads 1.4; upgrade"),
        (
            lambda header: header.update(schema_version="1.1"),
            "schema version 1.1 has other fields than 1.4; export",
        ),
        (lambda header: header["answers"].pop("vote_merge"), r"\$\.answers\.vote_merge: field missing or unknown"),
        (lambda header: header["answers"].update(merge=1), r"\$\.answers\.merge: field missing or unknown"),
        (lambda header: header.update(extra=1), r"\$\.extra: unknown field"),
        (lambda header: header["files"].update({"../../x": {"sha256": "0", "bytes": 0, "rows": None}}), "leaves the"),
        (lambda header: header["files"].update({"/etc/passwd": {"sha256": "0", "bytes": 0, "rows": None}}), "leaves"),
        (lambda header: header["files"].update({"a\0b": {"sha256": "0", "bytes": 0, "rows": None}}), "leaves the"),
        (
            lambda header: header["files"].update({"gone.csv": {"sha256": "0", "bytes": 0, "rows": 1}}),
            "missing, though",
        ),
        (lambda header: header["options"].pop("template"), r"manifest\.json: \$\.options\.template: field required"),
        (lambda header: header["tokenizer"].pop("sha256"), r"manifest\.json: \$\.tokenizer\.sha256: field required"),
        (lambda header: header["files"].pop(QUESTIONS), r"files: questions\.jsonl missing"),
        (lambda header: header["files"][QUESTIONS].update(rows=9), "8 rows, manifest.json says 9"),
    ],
)
def test_a_malformed_header_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_header(folder, change)
    with pytest.raises(UserError, match=message):
        read_manifest(folder)


def test_files_changed_after_export_are_noticed(folder: Path) -> None:
    for name in (QUESTIONS, "rollouts.jsonl", "signals.safetensors", "neurons.csv"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b"\n")
        with pytest.raises(UserError, match=rf"{re.escape(name)}: sha256 differs from manifest\.json"):
            read_manifest(folder)
        (folder / name).write_bytes(data)
    header = (folder / HEADER).read_text()
    (folder / HEADER).write_text(header.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="content_sha256 differs"):
        read_manifest(folder)


def test_symbolic_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_bytes((folder / "neurons.csv").read_bytes())
    (folder / "neurons.csv").unlink()
    (folder / "neurons.csv").symlink_to(outside)
    with pytest.raises(UserError, match="path leaves the manifest folder"):
        read_manifest(folder)


def test_an_export_that_was_killed_is_incomplete(folder: Path) -> None:
    (folder / HEADER).unlink()
    with pytest.raises(
        UserError, match=r"incomplete export \(no manifest\.json\); rerun neurosig\.export with --resume"
    ):
        read_manifest(folder)
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(folder / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(txet="x"), r'\$\.txet: unknown field \(did you mean "text"\?\)'),
        (
            lambda row: row.update(completion_ids=[5, -1]),
            r"\$\.completion_ids\[1\]: .*greater than or equal to 0, got '-1'",
        ),
        (lambda row: row.update(completion_ids=[]), r"\$\.completion_ids: .*at least 1"),
        (lambda row: row.update(finish_reason="done"), r"\$\.finish_reason: .*'stop' or 'length', got 'done'"),
        (lambda row: row.update(question_id="q9"), r'\$\.question_id: no question "q9"'),
        (lambda row: row.update(question_id="q0", rollout_id=0), r'\$\.rollout_id: rollout 0 of "q0" appears twice'),
    ],
)
def test_a_malformed_rollout_names_line_and_field(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_row(folder, 5, change, ROLLOUTS)
    with pytest.raises(UserError, match=rf"rollouts\.jsonl:5: {message}"):
        read_manifest(folder)


@pytest.mark.parametrize("line", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_line_that_is_no_object_names_the_line(folder: Path, line: bytes) -> None:
    data = (folder / QUESTIONS).read_bytes().splitlines()
    (folder / QUESTIONS).write_bytes(b"\n".join([*data[:4], line, *data[5:]]) + b"\n")
    rehash(folder)
    with pytest.raises(UserError, match=r"questions\.jsonl:5: \$: "):
        read_manifest(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"schema_version": "1.3"}'])
def test_a_header_that_is_no_header_is_one_error(folder: Path, text: bytes) -> None:
    (folder / HEADER).write_bytes(text)
    with pytest.raises(
        UserError, match=r"manifest\.json: (invalid JSON|schema version none|\$\.format: field required)"
    ):
        read_manifest(folder)


def test_a_path_outside_the_folder_is_never_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6, "rows": None}
    edit_header(folder, lambda header: header["files"].update({"../x": entry}))
    opened: list[str] = []

    def recorded(path: Path) -> str:
        opened.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr("neurosig.manifest.files.sha256_file", recorded)
    with pytest.raises(UserError, match=r'manifest\.json: files\["\.\./x"\]: path leaves the manifest folder'):
        read_manifest(folder)
    assert "x" not in opened


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Every kind of field: choices, an unparsed answer, a question that was too long, text beyond ASCII."""
    questions = [
        Question("a", "d", "Où? \u2028 \x85", kind="k", line=1, answer_space=(("là", "ici"), ("oui",))),
        Question("b", "d", "Which?", ("x", "ÿ"), line=2),
        Question("c", "e", "Long?", line=9, answer_space="continents"),
    ]
    shared = {"selected": False, "context": (), "scores": {}, "answers": (), "pseudo_label": None, "vote": None}
    shared["weight"] = 1.0

    def row(question: Question, **changes: Any) -> QuestionRow:
        fields = {
            name: getattr(question, name) for name in ("domain", "kind", "question", "choices", "line", "answer_space")
        }
        return QuestionRow(question_id=question.id, **fields, text_sha256=question.text_sha256, **{**shared, **changes})

    rows = [
        row(
            questions[0],
            selected=True,
            reason="selected",
            raw_answers=("oui bien", None),
            answers=("oui", None),
            vote=VoteRecord(count=1, n=2, n_tied=1),
            pseudo_label="oui",
            scores={"probe_score": -0.25, "entropy": 1e-7},
            context=(DemonstrationRecord(question_id="b", rollout_id=1, similarity=0.5),),
        ),
        row(
            questions[1],
            reason="tie",
            raw_answers=("A", "B"),
            answers=("A", "B"),
            vote=VoteRecord(count=1, n=2, n_tied=2),
            pseudo_label="A",
        ),
        row(questions[2], reason="too_long"),
    ]
    rollouts = [
        Rollout("a", 0, "oui\n\u2028\r", (5, 2), "stop", -0.5, 0.25),
        Rollout("a", 1, "", (2,), "stop"),
        Rollout("b", 0, "A", (7,), "length", -1.0, 2.0),
        Rollout("b", 1, "\x1b[31mB", (7, 8), "length"),
    ]
    options: dict[str, Any] = dict.fromkeys(
        ("answer_format", "template", "system", "instruction", "choice_instruction", "student_thinking")
    )
    options |= {"teacher_thinking": None, "demonstration_thoughts": False, "keep_truncated": True}
    options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_new_tokens": 4}
    header = {
        "tool": {"name": "neurosig", "version": "0"},
        "model": {"id": "m", "weights": {"w": "0"}},
        "tokenizer": {"sha256": "0", "chat_template_sha256": None},
        "dataset": {"rows": 3},
        "sampling": {"seed": 0},
        "options": options,
        "answers": AnswerReader("letter", prompt_opens_thought=True).record(),
    }
    written = write_manifest(tmp_path, rows, rollouts, signals=b"s", neurons_csv="layer\n1\n2\n", header=header)
    manifest = read_manifest(tmp_path)
    assert manifest.header == written
    assert manifest.header.answer_reader() == AnswerReader("letter", prompt_opens_thought=True)
    assert list(manifest.rows) == rows
    assert list(manifest.rollouts.values()) == rollouts
    assert [row.as_question() for row in manifest.rows] == questions
    assert [row.question_id for row in manifest.selected] == ["a"]
    assert written.counts == {"questions": 3, "selected": 1, "tie": 1, "too_long": 1}
    assert {name: entry.rows for name, entry in written.files.items()} == dict(
        zip((QUESTIONS, ROLLOUTS, SIGNALS, NEURONS), (3, 4, None, 2), strict=True)
    )
    before = {name: (tmp_path / name).read_bytes() for name in (*FILES, HEADER)}
    write_manifest(tmp_path, rows, rollouts, signals=b"s", neurons_csv="layer\n1\n2\n", header=header)
    assert {name: (tmp_path / name).read_bytes() for name in (*FILES, HEADER)} == before
