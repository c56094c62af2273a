from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flow import make_manifest

from neurosig.errors import UserError
from neurosig.manifest import HEADER, QUESTIONS, read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_manifest(tmp_path)


def rehash(folder: Path, header: dict[str, Any] | None = None) -> None:
    """Make header and hashes fit the files as they now are, so that only the content itself can be at fault."""
    header = header or json.loads((folder / HEADER).read_text())
    for name, entry in header["files"].items():
        if (folder / name).exists():
            data = (folder / name).read_bytes()
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    header.pop("content_sha256", None)
    header["content_sha256"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (folder / HEADER).write_text(json.dumps(header))


def edit_row(folder: Path, line: int, change: Callable[[dict[str, Any]], Any]) -> None:
    lines = (folder / QUESTIONS).read_text().splitlines()
    row = json.loads(lines[line - 1])
    change(row)
    lines[line - 1] = json.dumps(row)
    (folder / QUESTIONS).write_text("\n".join(lines) + "\n")
    rehash(folder)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header = json.loads((folder / HEADER).read_text())
    change(header)
    rehash(folder, header)


def test_a_manifest_holds_what_was_decided(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert [row.id for row in manifest.rows] == [f"q{index}" for index in range(8)]
    for row in manifest.rows:
        assert len(row.answers) == row.vote.n == 3  # type: ignore[union-attr]
        assert set(row.scores) == {"probe", "agreement", "vote_share", "mean_logprob", "entropy"}
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
        (lambda row: row.update(line=1.0), r"\$\.line: .*integer.*got '1\.0'"),
        (lambda row: row.update(selected="true"), r"\$\.selected: .*boolean.*got 'true'"),
        (lambda row: row["scores"].update(probe=float("nan")), r"\$\.scores\.probe: .*finite"),
        (lambda row: row.update(reason="fine"), r"\$\.reason: .*'selected'.*got 'fine'"),
        (lambda row: row.pop("vote"), r"\$\.vote: field required"),
        (lambda row: row["context"][0].update(rollout_id=99), r'\$\.context\[0\]: no rollout 99 of question "q'),
        (lambda row: row["context"][0].update(question_id="q9"), r'\$\.context\[0\]: no rollout \d of question "q9"'),
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
    line = next(number for number, row in enumerate(rows, start=1) if row["id"] == shown)
    edit_row(folder, line, lambda row: row.update(text_sha256=rows[2]["text_sha256"]))
    with pytest.raises(UserError, match=r"questions\.jsonl:\d: \$\.context\[\d\]: a question is its own context"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(schema_version="2.0"), "schema version 2.0, this neurosig reads 1.0; upgrade"),
        (lambda header: header.update(extra=1), r"\$\.extra: unknown field"),
        (lambda header: header["files"].update({"../../x": {"sha256": "0", "bytes": 0, "rows": None}}), "leaves the"),
        (lambda header: header["files"].update({"/etc/passwd": {"sha256": "0", "bytes": 0, "rows": None}}), "leaves"),
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
