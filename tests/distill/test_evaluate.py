from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config import TrainConfig
from distill.evaluate import main
from distill.train import main as train
from neurosig.models.trained import load_as_trained
from neurosig.runtime.errors import UserError
from tests.support.flow import decoded_windows, killed_while_sampling, make_manifest, write_questions
from tests.support.runs import evaluate_config


def test_results_are_written_question_by_question(tmp_path: Path) -> None:
    main(evaluate_config(tmp_path))
    table = pyarrow.parquet.read_table(tmp_path / "eval" / "results.parquet").to_pylist()
    assert [row["question_id"] for row in table] == [f"q{index}" for index in range(8)]
    assert all(len(row["answers"]) == row["k"] == 4 for row in table)
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["domains"]["colour"]["n"] == 8
    assert summary["config"]["temperature"] == 0.8
    kinds = summary["domains"]["colour"]["by_kind"]
    assert {kind: block["n"] for kind, block in kinds.items()} == {"k0": 4, "k1": 4}
    rollouts = [json.loads(line) for line in (tmp_path / "eval" / "rollouts.jsonl").read_text().splitlines()]
    assert [r["question_id"] for r in rollouts[::4]] == [row["question_id"] for row in table]


def test_an_interrupted_evaluation_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosig.sampling.sampler.WINDOW", 1)
    main(evaluate_config(tmp_path, "straight", batch_rows=8))
    with killed_while_sampling(3):
        main(evaluate_config(tmp_path, "broken", batch_rows=8))
    assert not (tmp_path / "broken" / "summary.json").exists()
    with pytest.raises(UserError, match=r"differ from the interrupted run: seed .*temperature .* now.; use"):
        main(evaluate_config(tmp_path, "broken", batch_rows=8, resume=True, temperature=0.5, seed=4))
    with decoded_windows() as decoded:
        main(evaluate_config(tmp_path, "broken", batch_rows=8, resume=True))
    assert len(decoded) == 3  # of 4 windows, one was done
    for name in ("results.parquet", "rollouts.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_merged_adapter_is_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    from neurosig.models.load import load_model

    manifest = make_manifest(tmp_path)
    train(
        TrainConfig(
            manifest=manifest, out=tmp_path / "run", steps=2, keep_truncated=True, learning_rate=0.05, quiet=True
        )
    )
    adapter = tmp_path / "run" / "adapter"
    merged = load_as_trained(evaluate_config(tmp_path, adapter=adapter), None)
    assert merged.info.adapter is not None
    plain = load_model(tmp_path / "model").model
    applied = PeftModel.from_pretrained(load_model(tmp_path / "model").model, adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, applied(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged.model(ids).logits, plain(ids).logits, atol=1e-3)
    main(evaluate_config(tmp_path, adapter=adapter))
    main(evaluate_config(tmp_path, "base"))
    read = [(tmp_path / out / "rollouts.jsonl").read_bytes() for out in ("eval", "base")]
    assert read[0] != read[1]


def test_the_adapter_of_another_run_is_not_resumed_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(tmp_path)
    train(TrainConfig(manifest=manifest, out=tmp_path / "run", steps=1, keep_truncated=True, quiet=True))
    adapter = tmp_path / "run" / "adapter"
    monkeypatch.setattr("distill.results.summarise", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(evaluate_config(tmp_path, adapter=adapter))
    monkeypatch.undo()
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="differ from the interrupted run: adapter"):
        main(evaluate_config(tmp_path, adapter=adapter, resume=True))


def test_questions_without_gold_answers_are_refused(tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.jsonl", answer=None)
    with pytest.raises(UserError, match=r'question "q0" \(line 1\) has no answer'):
        main(evaluate_config(tmp_path))
    assert not (tmp_path / "eval").exists()


def test_limits_are_one_for_all_or_one_a_source(tmp_path: Path) -> None:
    sources = ("language:test", "chemistry:test")
    for limit, expected in (((2,), {"language": 2, "chemistry": 2}), ((1, 3), {"language": 1, "chemistry": 3})):
        out = f"eval{len(limit)}"
        main(evaluate_config(tmp_path, out, questions=sources, limit=limit))
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        assert {domain: block["n"] for domain, block in summary["domains"].items()} == expected
    with pytest.raises(UserError, match="--limit: 3 numbers for 2 --questions"):
        main(evaluate_config(tmp_path, "third", questions=sources, limit=(1, 2, 3)))


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors there"):
        main(evaluate_config(tmp_path, adapter=tmp_path))


def test_the_columns_of_the_results(tmp_path: Path) -> None:
    """Counts add up to what the rollouts say, and a finished evaluation is left alone."""
    main(evaluate_config(tmp_path))
    path = tmp_path / "eval" / "results.parquet"
    table = pyarrow.parquet.read_table(path)
    texts = ["question_id", "domain", "kind", "raw_answers", "answers", "strict", "lenient", "winner"]
    counts = ["k", "votes", "n_tied", "n_tied_right", "n_correct", "unparsed", "distinct", "truncated", "unclosed"]
    counts += ["n_tied_right_lenient", "n_correct_lenient"]
    means = ["mean_length", "mean_thought_length", "mean_answer_length", "mean_entropy", "mean_logprob"]
    assert set(table.column_names) == {*texts, *counts, *means}
    assert all(str(table.schema.field(name).type) == "int64" for name in counts)
    assert all(str(table.schema.field(name).type) == "double" for name in means)
    rollouts = [json.loads(line) for line in (tmp_path / "eval" / "rollouts.jsonl").read_text().splitlines()]
    for row in table.to_pylist():
        of_question = [rollout for rollout in rollouts if rollout["question_id"] == row["question_id"]]
        assert row["k"] == len(of_question) == len(row["answers"]) == 4
        assert row["unparsed"] == row["answers"].count(None) == row["raw_answers"].count(None)
        assert row["n_correct"] == sum(row["strict"]) and row["n_correct_lenient"] == sum(row["lenient"])
        assert row["votes"] == max((row["answers"].count(answer) for answer in row["answers"] if answer), default=0)
        assert row["truncated"] == sum(rollout["finish_reason"] == "length" for rollout in of_question)
        assert row["mean_length"] == sum(len(rollout["completion_ids"]) for rollout in of_question) / 4
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    main(evaluate_config(tmp_path, resume=True))
    with pytest.raises(UserError, match="holds an earlier run"):
        main(evaluate_config(tmp_path))
    assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


def test_a_set_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is in two of the --questions sources"):
        main(evaluate_config(tmp_path, questions=("language:test", "language:test"), limit=(2,)))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    arguments = ["--model", "m", "--questions", "nowhere.jsonl", "--out", "run", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "distill.evaluate", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "nowhere.jsonl: no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
