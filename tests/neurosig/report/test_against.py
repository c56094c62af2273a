"""A report on a model before and after training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neurosig.export import main as export
from neurosig.exported import Exported
from neurosig.report.__main__ import ReportConfig, main
from neurosig.runtime.errors import UserError
from tests.support.flow import export_config, make_manifest
from tests.support.runs import train


def test_a_trained_model_is_compared_with_its_base(tmp_path: Path) -> None:
    """The page has both sides of every measure: the numbers are those of the two manifests."""
    before = make_manifest(tmp_path, answer_format="short")
    train(tmp_path, before, steps=4, save_steps=4, learning_rate=0.02, lora_r=4, stop_on_collapse=False)
    config = export_config(
        tmp_path, tmp_path / "model", tmp_path / "questions.jsonl", "after", adapter=tmp_path / "run"
    )
    export(config)
    out = tmp_path / "report"
    main(ReportConfig(manifest=before, against=tmp_path / "after", out=out, permutations=0, resamples=100, quiet=True))
    page = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text())
    both = [Exported(tmp_path / name) for name in ("manifest", "after")]
    rows = [list(one.rows.values()) for one in both]
    changed = sum(a.pseudo_label != b.pseudo_label for a, b in zip(*rows, strict=True))
    assert changed and f"8 questions are in both exports. The majority answer changed in {changed};" in page
    means = [sum(row.vote.count / row.vote.n for row in side if row.vote) / 8 for side in rows]
    assert re.search(
        rf"votes of the winner, share\s+{means[0]:.4f}\s+{means[1]:.4f}\s+[+-]{abs(means[1] - means[0]):.4f} \[", page
    )
    lengths = [
        sum(len(r.completion_ids) for group in one.rollouts.values() for r in group) / len(one.place) for one in both
    ]
    assert re.search(rf"length in tokens\s+{lengths[0]:.4f}\s+{lengths[1]:.4f}", page)
    assert f"adapter {both[1].manifest.header.model['adapter'][:12]}" in page


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    before = make_manifest(tmp_path)
    export(export_config(tmp_path, tmp_path / "model", tmp_path / "questions.jsonl", "larger", set_size=32))
    for name, sentence in (("larger", r"set_size \(16 there, 32 now\)"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=sentence):
            main(ReportConfig(manifest=before, against=tmp_path / name, permutations=0, resamples=100, quiet=True))
    assert not (before / "report").exists()
