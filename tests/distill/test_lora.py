"""LoRA by PEFT's own options: the modules it is for, its dropout while learning alone, and rank-stabilised scaling."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from distill.config import TrainConfig
from distill.student import TrainingForward, effective_weights, make_student, sampling_weights
from distill.teacher import Teacher
from distill.train import main
from neurosig.models.adapter import LearningDropout, apply_adapter
from neurosig.models.completion_hidden import completion_hidden
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from neurosig.sampling.packed_weights import PackedWeights
from tests.support.flow import interrupted_at, make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import baseline_config, result_bytes, train, train_config

IDS = torch.tensor([[1, 70, 80, 90, 100]])
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


@contextlib.contextmanager
def as_sampled(model: Any, adapter: Any) -> Iterator[None]:
    """The adapter merged while packing."""
    with sampling_weights(model, adapter) as weight_of, PackedWeights(model.modules(), 4, weight_of):
        yield


def student_of(manifest: Path, **options: Any) -> tuple[Any, Any]:
    """A student whose adapter does something."""
    config = TrainConfig(manifest=manifest, out=Path("unused"), lora_r=4, **options)
    torch.manual_seed(0)
    model, adapter = make_student(config, load_model(manifest.parent / "model"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, adapter


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (("all-linear",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("down_proj",), {"down_proj"}),
        ((r".*layers\.0\..*(q|up)_proj",), {"q_proj", "up_proj"}),
    ],
)
def test_the_named_modules_are_trained_and_no_others(
    tmp_path: Path, manifest: Path, targets: tuple[str, ...], modules: set[str]
) -> None:
    """The stored adapter, loaded by PEFT alone, equals the last checkpoint's weights in the student."""
    options: dict[str, Any] = {"lora_targets": targets, "steps": 2, "lora_rslora": True, "lora_alpha": 8}
    train(tmp_path, manifest, **options)
    stored = load_file(tmp_path / "run" / WEIGHTS)
    assert {name.split(".")[-3] for name in stored} == modules
    assert ("layers.1" in " ".join(stored)) == ("layers" not in targets[0])
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["use_rslora"] is True and (written["r"], written["lora_alpha"]) == (4, 8)
    model, adapter = student_of(manifest, lora_targets=targets, lora_rslora=True, lora_alpha=8)
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors")
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)
        live = model(IDS).logits
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
        torch.testing.assert_close(loaded(IDS).logits, live, rtol=0, atol=1e-6)
        whole = load_model(manifest.parent / "model")
        apply_adapter(whole, tmp_path / "run" / "adapter")
        torch.testing.assert_close(whole.model(IDS).logits, live, rtol=1e-4, atol=1e-4)
        with adapter.disable_adapter():
            assert not torch.allclose(model(IDS).logits, live, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), r"--lora-targets q_prj: matches nothing; the model's linear modules are q_proj, k_proj, v_proj, "),
        (("q_proj", "qkv"), "--lora-targets qkv: matches nothing; the model's linear modules are .*down_proj"),
        (("lm_head",), "--lora-targets lm_head: matches lm_head; the model's linear modules are"),
        ((".*norm",), r"--lora-targets \.\*norm: matches model\.layers\.0\.\S*norm; the model's linear"),
        (("(q_proj",), r"--lora-targets \(q_proj: not a regular expression"),
    ],
)
def test_targets_that_are_no_linear_modules_are_refused(
    tmp_path: Path, manifest: Path, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(train_config(tmp_path, manifest, lora_targets=targets))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rslora", [False, True])
def test_effective_weights_have_the_scale_of_the_adapter(manifest: Path, rslora: bool) -> None:
    """alpha / r, or alpha / sqrt(r), by hand; and the merged model is the same function."""
    model, adapter = student_of(manifest, lora_rslora=rslora, lora_alpha=6)
    scale = 6 / (math.sqrt(4) if rslora else 4)
    parameters = dict(model.named_parameters())
    for name, weight in effective_weights(model, adapter):
        a, b = (parameters[name.replace("base_layer", f"lora_{part}.default")] for part in "AB")
        torch.testing.assert_close(weight, parameters[name] + scale * (b @ a), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        adapted = model(IDS).logits
        with as_sampled(model, adapter):
            torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-4)


def test_dropout_is_on_while_learning_alone(manifest: Path) -> None:
    """With gradients the student's outputs vary; sampling, every teacher and a model in any mode are as without."""
    plain, _ = student_of(manifest)
    model, adapter = student_of(manifest, lora_dropout=0.5)
    first, second = model(IDS).logits, model(IDS).logits
    with torch.no_grad():
        expected = plain(IDS).logits
        assert not torch.allclose(first, second, atol=1e-3) and not torch.allclose(first, expected, atol=1e-3)
        for mode in (model.train, model.eval):  # TRL's trainers switch
            mode()
            assert model(IDS).logits.equal(expected)
            with as_sampled(model, adapter):
                torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    for name in ("base", "live", "ema"):
        with Teacher(name, model, adapter).active() as teacher:  # type: ignore[arg-type]
            assert teacher(IDS).logits.equal(teacher(IDS).logits)
    dropped = LearningDropout(0.25)(torch.ones(10_000))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3]) and dropped.mean().item() == pytest.approx(
        1, abs=0.03
    )


def test_dropout_trains_saves_and_resumes_to_the_same_bytes(tmp_path: Path, manifest: Path) -> None:
    options: dict[str, Any] = {"lora_dropout": 0.3, "micro_batch_size": 2}
    straight = train(tmp_path, manifest, "straight", **options)
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):
        train(tmp_path, manifest, "broken", **options)
    assert train(tmp_path, manifest, "broken", resume=True, **options) == straight
    plain, weights = train(tmp_path, manifest, "plain", micro_batch_size=2)
    assert weights != straight[1]
    assert plain[0]["mean_length"] == straight[0][0]["mean_length"]  # its first rollouts are those without dropout
    assert plain[0]["teacher_entropy"] == pytest.approx(straight[0][0]["teacher_entropy"], rel=1e-6)
    written = json.loads((tmp_path / "straight" / "adapter" / "adapter_config.json").read_text())
    assert written["lora_dropout"] == 0.3
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "straight" / "adapter")
    assert loaded(IDS).logits.equal(loaded(IDS).logits)


def test_the_baselines_drop_out_as_well(tmp_path: Path, manifest: Path) -> None:
    """TRL's trainers switch the dropout of the model off, not that of LoRA."""
    found = {}
    for name, options in {"plain": {}, "dropped": {"lora_dropout": 0.3}, "again": {"lora_dropout": 0.3}}.items():
        main(baseline_config(tmp_path, manifest, name, method="lmsi", steps=2, **options))
        found[name] = result_bytes(tmp_path / name / WEIGHTS)
    assert found["dropped"] == found["again"] != found["plain"]


def test_recomputed_activations_have_the_masks_of_the_first_pass(manifest: Path) -> None:
    gradients = []
    for recomputed in (False, True):
        config = train_config(Path(), manifest, lora_dropout=0.5)
        loaded = load_model(manifest.parent / "model")
        torch.manual_seed(0)
        model, _ = make_student(config, loaded)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        forward = TrainingForward(model, gradient_checkpointing=recomputed, dropout=True)
        with forward.active():
            completion_hidden(model, [(5, 6), (7, 8, 9)], [[10, 11], [12, 13, 14]]).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 0
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_dropout_of_everything_is_refused(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match=r"--lora-dropout: expected 0 to below 1, got 1\.0"):
        train_config(tmp_path, manifest, lora_dropout=1.0)
