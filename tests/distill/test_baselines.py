"""What all baselines share: files, resuming, batches and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from distill.baselines import trl as baselines
from distill.tasks import question_prompts, sampling_config
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import baseline_config, metrics_of, result_bytes, train_baseline
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lmsi", {"gradient_checkpointing": True}),
        ("lmsi", {"full": True, "learning_rate": 1e-3}),
        ("ttrl", {}),
        ("ttrl", {"full": True, "learning_rate": 1e-3}),
        ("intuitor", {}),
        ("intuitor", {"micro_batch_size": 5, "questions_of": "all"}),
    ],
    ids=str,
)
def test_every_method_leaves_what_n_opsd_leaves(
    tmp_path: Path, manifest: Path, method: str, changes: dict[str, Any]
) -> None:
    model = "model" if changes.get("full") else "adapter"
    rows = train_baseline(tmp_path, manifest, method=method, **changes)
    assert [row["step"] for row in rows] == [1, 2]
    files = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()}
    records = {"metrics.jsonl", "run.json", "train.json"}
    assert {str(path) for path in files if len(path.parts) == 1} == records
    kept = set() if method == "lmsi" else {"rollouts"}  # LMSI samples nothing
    assert {path.parts[0] for path in files} == {*records, "checkpoints", model, *kept}
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl"}
    assert {path.name for path in files if path.parts[0] == model} >= {"README.md", "train.json"}
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record["config"]["method"] == method
    assert record["budget"] == {
        "manifest_rollouts": 24,
        "manifest_tokens": 96,
        "steps": 2,
        "rollouts": 0 if method == "lmsi" else 24,
        "generated_tokens": 0 if method == "lmsi" else 96,
        "trained_rollouts": sum(row["rollouts_in_loss"] for row in rows),
        "trained_tokens": sum(row["tokens_in_loss"] for row in rows),
        "teacher_tokens": sum(row["teacher_tokens"] for row in rows),
    }
    card = (tmp_path / "run" / model / "README.md").read_text()
    assert {"lmsi": "LMSI", "ttrl": "TTRL", "intuitor": "Intuitor"}[method] in card
    if changes.get("full"):
        trained, before = load_model(tmp_path / "run" / "model").model.state_dict(), tiny_model("qwen3").state_dict()
        assert torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
        changed = "model.layers.0.mlp.down_proj.weight"
        assert not torch.equal(trained[changed], before[changed])
    else:
        assert not (tmp_path / "run" / "adapter" / "ref").exists()
        weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY is True


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, manifest: Path) -> None:
    plain = train_baseline(tmp_path, manifest, "plain")
    checkpointed = train_baseline(tmp_path, manifest, "checkpointed", gradient_checkpointing=True)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", ["lmsi", "ttrl", "intuitor"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tmp_path: Path, manifest: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though TRL shuffles each step's rollouts into micro-batches."""
    options: dict[str, Any] = {"method": method, "steps": 5, "micro_batch_size": 2, "warmup_steps": 4}
    train_baseline(tmp_path, manifest, "straight", **options)
    on_log = baselines._Saver.on_log

    def killed(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.done + state.global_step == 4:
            raise KeyboardInterrupt
        on_log(self, args, state, control, **given)

    monkeypatch.setattr(baselines._Saver, "on_log", killed)
    with pytest.raises(KeyboardInterrupt):
        train_baseline(tmp_path, manifest, "broken", **options)
    monkeypatch.undo()
    assert len(metrics_of(tmp_path / "broken")) == 3
    with pytest.raises(UserError, match="cannot resume, these differ from the interrupted run: method"):
        train_baseline(tmp_path, manifest, "broken", **{**options, "method": "nopsd"}, resume=True)
    train_baseline(tmp_path, manifest, "broken", **options, resume=True)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoints/step-000005/optimizer.safetensors"):
        assert result_bytes(tmp_path / "broken" / name) == result_bytes(tmp_path / "straight" / name)
    rates = [row["learning_rate"] for row in metrics_of(tmp_path / "broken")]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_a_run_killed_after_its_last_step_only_writes_its_end(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    train_baseline(tmp_path, manifest, "straight")
    monkeypatch.setattr(baselines, "write_final", killed)
    with pytest.raises(KeyboardInterrupt):
        train_baseline(tmp_path, manifest, "broken")
    monkeypatch.undo()
    train_baseline(tmp_path, manifest, "broken", resume=True)
    name = "adapter/adapter_model.safetensors"
    assert result_bytes(tmp_path / "broken" / name) == result_bytes(tmp_path / "straight" / name)


@pytest.fixture
def split_manifest(tmp_path: Path) -> Path:
    """Half of its questions are selected."""
    options: Any = {"question_filter": "neuron_only", "keep_fraction": 0.5, "hallucination_score": "random"}
    return make_manifest(tmp_path, "half", answer_parser=UNCUT, **options)


def test_baselines_take_the_questions_of_n_opsd_or_all(tmp_path: Path, split_manifest: Path) -> None:
    read, loaded = read_manifest(split_manifest), load_model(tmp_path / "model")
    config = baseline_config(tmp_path, split_manifest)
    sampling = sampling_config(config, read)
    selected = question_prompts(read, loaded, config, max_new_tokens=sampling.max_new_tokens)
    assert list(selected) == [row.question_id for row in read.selected] and 0 < len(selected) < len(read.rows)
    config.questions_of = "all"
    everything = question_prompts(read, loaded, config, max_new_tokens=sampling.max_new_tokens)
    assert list(everything) == [row.question_id for row in read.rows]
    assert all(everything[name] == prompt for name, prompt in selected.items())


@pytest.mark.parametrize("method", ["ttrl", "intuitor"])
def test_every_method_has_the_questions_of_n_opsd_in_each_step(tmp_path: Path, manifest: Path, method: str) -> None:
    """Over an epoch's edge, too: eight questions, three per step."""
    options: dict[str, Any] = {"steps": 4, "num_generations": 2}
    train_baseline(tmp_path, manifest, "nopsd", method="nopsd", **options)
    train_baseline(tmp_path, manifest, method=method, **options)
    for step in range(1, 5):
        own, others = (
            pd.read_parquet(tmp_path / out / "rollouts" / f"step-{step:06d}.parquet") for out in ("nopsd", "run")
        )
        assert set(own["question_id"]) == set(others["question_id"]) and own["question_id"].nunique() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_generations": 1}, "--num-generations: --method ttrl compares rollouts, expected at least 2"),
        ({"vote_generations": 3}, r"--vote-generations: expected at least --num-generations \(4\), got 3"),
        ({"method": "intuitor", "vote_generations": 8}, "--vote-generations: --method intuitor has no such option"),
        ({"method": "nopsd", "questions_of": "all"}, "--questions-of: --method nopsd has no such option"),
        ({"divergence": "reverse_kl"}, "--divergence: --method ttrl has no such option; leave it out"),
        ({"compile": True}, "--compile: --method ttrl has no such option"),
        ({"dev_questions": "x"}, "--dev-questions: --method ttrl has no such option"),
        ({"temperature": 0.0}, "--temperature: --method ttrl learns from differing rollouts"),
        ({"device": "meta"}, "--device meta: --method ttrl runs on cpu"),
        ({"max_new_tokens": 500}, r'question "q0": the student prompt of \d+ tokens and 500 new tokens exceed'),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, manifest: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_baseline(tmp_path, manifest, **change)
    assert not (tmp_path / "run").exists()


def test_a_missing_trl_is_named(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        UserError, match=r"--method ttrl: trl is not installed; run `pip install 'neurosig\[baselines\]'`"
    ):
        train_baseline(tmp_path, manifest)
    train_baseline(tmp_path, manifest, method="nopsd", steps=1)
