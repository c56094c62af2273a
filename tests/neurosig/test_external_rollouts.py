"""Exports of rollouts that were made elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.report.__main__ import ReportConfig
from neurosig.report.__main__ import main as report
from neurosig.runtime.errors import UserError
from neurosig.statistics.metrics import ece_floor
from tests.support.exports import K, N, write_world
from tests.support.flow import export_config
from tests.support.manifests import edit_header


def test_k_is_what_the_rollouts_file_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the record, the report's floor, a gain's samples and a reused export, though --num-generations says 8."""
    folder = write_world(tmp_path)
    files: dict[str, Any] = {"rollouts": folder / "rollouts.jsonl", "num_generations": 8, "question_filter": "neuron"}
    given = export_config(folder, folder / "model", folder / "questions.jsonl", **files)
    with caplog.at_level("INFO", logger="neurosig"):
        export(given)
    assert f"K={K}, as {folder / 'rollouts.jsonl'} holds; --num-generations 8 does not apply" in caplog.text
    manifest = read_manifest(folder / "manifest")
    assert manifest.header.options["num_generations"] == manifest.k == K
    assert {row.vote.n for row in manifest.rows if row.vote} == {K}
    edit_header(folder / "manifest", lambda header: header["options"].update(num_generations=8))  # as a stranger's may
    report(ReportConfig(manifest=folder / "manifest", out=folder / "report", permutations=0, resamples=100, quiet=True))
    page = (folder / "report" / "report.html").read_text()
    assert f"K={K}; a perfectly calibrated sampler" in page and f"about {ece_floor(K, N, seed=0):.3f}" in page
    export(replace(given, out=folder / "again", reuse=folder / "manifest", keep_fraction=1.0))
    assert read_manifest(folder / "again").header.options["num_generations"] == K


def test_only_the_asked_questions_of_a_rollouts_file_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """--limit uses the first questions; the others' rollouts, even a ragged group, are counted."""
    folder = write_world(tmp_path)
    lines = (folder / "rollouts.jsonl").read_text()
    (folder / "more.jsonl").write_text(lines + '{"question_id": "elsewhere", "text": "x"}\n')
    options: dict[str, Any] = {"limit": 10, "question_filter": "all", "hallucination_score": "agreement"}
    (folder / "few.jsonl").write_text("".join(lines.splitlines(keepends=True)[: 10 * K]))
    for name in ("more", "few"):
        with caplog.at_level("INFO", logger="neurosig"):
            export(export_config(folder, folder / "model", folder / "questions.jsonl", name,
                                 rollouts=folder / f"{name}.jsonl", **options))  # fmt: skip
    more, few = (read_manifest(folder / name) for name in ("more", "few"))
    assert more.rows == few.rows and more.rollouts == few.rollouts and len(more.rows) == 10
    assert f"{(N - 10) * K + 1} rollouts of {N - 10 + 1} other questions are left out" in caplog.text
    with pytest.raises(UserError, match=f'no rollouts for {N - 10} of {N} questions, the first is "q10"'):
        export(
            export_config(folder, folder / "model", folder / "questions.jsonl", "short", rollouts=folder / "few.jsonl")
        )
