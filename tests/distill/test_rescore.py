"""Kept rollouts, graded again without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from distill.compare import CompareConfig
from distill.compare import main as compare
from distill.evaluate import main as evaluate
from distill.rescore import RescoreConfig, main
from neurosig.runtime.errors import UserError
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support.commands import loaded_after
from tests.support.flow import make_manifest
from tests.support.runs import evaluate_config


def rescore(*folders: Path, **changes: Any) -> None:
    main(RescoreConfig(folders=folders, **changes))


@pytest.mark.parametrize("reading", [{"answer_format": "letter"}, {"answer_format": "number", "vote_merge": "exact"}])
def test_rows_are_those_of_evaluating_anew(
    tmp_path: Path, reading: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(evaluate_config(tmp_path, max_new_tokens=12))
    evaluate(evaluate_config(tmp_path, "anew", max_new_tokens=12, **reading))
    before = {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()}
    rescore(tmp_path / "eval", **reading)
    new = tmp_path / "eval-rescored"
    for name in ("results.parquet", "rollouts.jsonl"):
        assert (new / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()
    assert (new / "results.parquet").read_bytes() != before["results.parquet"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()} == before
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (new, tmp_path / "anew")]
    assert summaries[0]["domains"] == summaries[1]["domains"] and summaries[0]["answers"] == summaries[1]["answers"]
    assert {**summaries[0]["config"], "out": ""} == {**summaries[1]["config"], "out": ""}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| folder | domain | reading | n | avg@K | maj@K | ece | avg@K lenient |")
    recorded = json.loads(before["summary.json"])["domains"]["colour"]["parse_rate"]
    parsed = summaries[1]["domains"]["colour"]["parse_rate"]
    assert [line.split(" | ")[2] for line in lines[2:]] == ["recorded", "new"]
    assert [line.split(" | ")[10] for line in lines[2:]] == [f"{recorded:.3f}", f"{parsed:.3f}"] and parsed < recorded
    verify(VerifyConfig(folder=new))
    compare(CompareConfig(base=new, trained=tmp_path / "anew", out=tmp_path / "report", resamples=100))


def test_an_evaluation_of_an_earlier_version_is_upgraded(tmp_path: Path) -> None:
    """Its summary has no lenient grades and no reader; its rollouts have all that both need."""
    evaluate(evaluate_config(tmp_path, vote_merge="exact"))
    evaluate(evaluate_config(tmp_path, "anew", vote_merge="exact"))
    path = tmp_path / "eval" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["answers"], summary["config"]["vote_merge"], summary["config"]["answer_parser"]
    for name in ("avg_at_k_lenient", "parse_rate"):
        del summary["domains"]["colour"][name]
    path.write_text(json.dumps(summary))
    columns = ["question_id", "k", "answers", "n_correct"]
    table = pyarrow.parquet.read_table(tmp_path / "eval" / "results.parquet").select(columns)
    pyarrow.parquet.write_table(table, tmp_path / "eval" / "results.parquet")
    config = CompareConfig(base=tmp_path / "eval", trained=tmp_path / "anew", out=tmp_path / "report", resamples=100)
    with pytest.raises(UserError, match=r"columns of an earlier version; .*python -m distill\.rescore \S+eval"):
        compare(config)
    rescore(tmp_path / "eval", out=tmp_path / "new")
    read = [(tmp_path / folder / "results.parquet").read_bytes() for folder in ("new/eval", "anew")]
    assert read[0] == read[1]


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    evaluate(evaluate_config(tmp_path))
    rescore(tmp_path / "eval")
    with pytest.raises(UserError, match="eval-rescored: exists; give --overwrite"):
        rescore(tmp_path / "eval")
    rescore(tmp_path / "eval", overwrite=True)
    with pytest.raises(UserError, match="is another's or given itself"):
        rescore(tmp_path / "eval", out=tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"no finished evaluation .* and no manifest"):
        rescore(tmp_path / "eval", tmp_path / "model", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rollouts_are_graded_by_the_questions_they_answered(tmp_path: Path) -> None:
    """Changed texts or gold answers are refused; named by hand they are taken."""
    evaluate(evaluate_config(tmp_path))
    file = tmp_path / "questions.jsonl"
    file.write_text(file.read_text().replace("GOLD3", "blue"))
    with pytest.raises(UserError, match="texts or gold answers of its questions are not those that were evaluated"):
        rescore(tmp_path / "eval")
    rescore(tmp_path / "eval", questions=(str(file),))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(UserError, match=r'question "q5" is not in \S+questions\.jsonl; give its --questions'):
        rescore(tmp_path / "eval", out=tmp_path / "new")
    (tmp_path / "eval" / "rollouts.jsonl").write_text('{"question_id": "q0"}\n')
    with pytest.raises(UserError, match=r"rollouts\.jsonl:1: no rollout"):
        rescore(tmp_path / "eval", out=tmp_path / "new")


def test_a_manifest_says_how_many_pseudo_labels_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_manifest(tmp_path, max_new_tokens=8)
    rescore(manifest)
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 0.000 |")  # the recorded reading, once more
    rescore(manifest, answer_format="number", overwrite=True)
    rows = pyarrow.parquet.read_table(tmp_path / "manifest-rescored" / "answers.parquet").to_pylist()
    assert len(rows) == 8 and all(len(row["answers"]) == len(row["recorded_answers"]) == 3 for row in rows)
    assert all(row["changed"] == (row["winner"] != row["recorded_pseudo_label"]) for row in rows)
    share = sum(row["changed"] for row in rows) / 8
    assert share > 0 and f"| {share:.3f} |" in capsys.readouterr().out


def test_no_model_is_loaded() -> None:
    assert loaded_after("import distill.rescore", "torch", "transformers") == set()
