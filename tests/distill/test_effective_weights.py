"""Rollouts, teachers and evaluations come from the weights that the student has, in bfloat16 too."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import TrainConfig
from distill.student import effective_weights, make_student, sampling_weights
from distill.teacher import Teacher
from neurosig.models.adapter import apply_adapter
from neurosig.models.completion_hidden import completion_hidden
from neurosig.models.load import LoadedModel, load_model
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.packed_weights import PackedWeights
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import sample
from tests.support.flow import make_manifest, save_tiny
from tests.support.parsers import UNCUT
from tests.support.runs import metrics_of, train, train_config
from tests.support.sampling import prompts
from tests.support.tiny import ARCHS, Arch

IDS = torch.tensor([[1, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


def student_of(model: Path, dtype: str, change: float, **options: Any) -> tuple[LoadedModel, Any]:
    """A tiny student whose adapter changes its weights by about ``change``."""
    loaded = load_model(model, dtype=dtype)
    _, adapter = make_student(TrainConfig(manifest=Path(), out=Path(), lora_r=4, **options), loaded)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(change * torch.randn(parameter.shape, generator=generator))
    return loaded, adapter


def drawn(loaded: LoadedModel, adapter: Any, **changes: Any) -> list[Rollout]:
    config = SamplingConfig(**{"num_generations": 8, "max_new_tokens": 12, "temperature": 1.0, **changes})
    with sampling_weights(loaded.model, adapter) as weight_of:
        return [rollout for group in sample(loaded, prompts(), config, weight_of=weight_of) for rollout in group]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_sampler_gives_tokens_the_students_log_probabilities(tmp_path: Path, arch: Arch, dtype: str) -> None:
    loaded, adapter = student_of(save_tiny(tmp_path / "model", arch), dtype, 0.1)
    by_id = {prompt.question_id: prompt.token_ids for prompt in prompts()}
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    for rollout in drawn(loaded, adapter):
        ids = torch.tensor([[*by_id[rollout.question_id], *rollout.completion_ids]])
        with torch.no_grad():
            log_p = torch.log_softmax(loaded.model(ids).logits[0].float(), dim=-1)
        n = len(rollout.completion_ids)
        own = log_p[-n - 1 : -1].gather(1, torch.tensor(rollout.completion_ids)[:, None]).mean()
        assert rollout.mean_logprob == pytest.approx(own.item(), abs=1e-4 if dtype == "float32" else 0.03)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_packing_merges_one_layer_at_a_time(tmp_path: Path) -> None:
    """Beside the model a CPU sampler holds one packed copy of its linear weights, and no merged one."""
    loaded, adapter = student_of(save_tiny(tmp_path / "model"), "float32", 0.1)
    merged: list[weakref.ref[Tensor]] = []
    with sampling_weights(loaded.model, adapter) as weight_of:

        def watched(linear: torch.nn.Linear) -> Tensor | None:
            assert not any(reference() is not None for reference in merged)
            weight = weight_of(linear)
            if weight is not None and weight is not linear.weight:
                merged.append(weakref.ref(weight))
            return weight

        packed = PackedWeights(loaded.model.modules(), 8, watched)
        with torch.no_grad(), packed:
            inside = loaded.model(IDS).logits
    assert len(merged) == len(dict(effective_weights(loaded.model, adapter))) > 0
    assert len(packed._packed) == len(merged) + 1  # and the head
    with torch.no_grad():
        torch.testing.assert_close(inside, loaded.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_sampler_sees_a_change_far_below_the_weights_spacing(tmp_path: Path) -> None:
    """Adapters after eight steps at 5e-6 and at 1e-12 are nearly one model once merged and rounded."""
    model = save_tiny(tmp_path / "model")
    merged, noted = [], []
    for rate in (5e-6, 1e-12):
        torch.manual_seed(0)
        loaded, adapter = student_of(model, "bfloat16", 8 * rate)
        merged.append([weight.bfloat16() for _, weight in effective_weights(loaded.model, adapter)])
        noted.append([rollout.mean_logprob for rollout in drawn(loaded, adapter, num_generations=64)])
    same = torch.cat([(one == other).flatten() for one, other in zip(*merged, strict=True)])
    assert same.float().mean() > 0.9
    assert sum(one != other for one, other in zip(*noted, strict=True)) > 0.5 * len(noted[0])


@pytest.mark.parametrize("options", [{}, {"full": True}, {"teacher": "ema"}], ids=["lora", "full", "ema"])
def test_sampler_and_student_agree_while_training_in_bfloat16(
    tmp_path: Path, manifest: Path, options: dict[str, Any]
) -> None:
    rate = 1e-3 if options.get("full") else 1e-2
    metrics, _ = (
        train(tmp_path, manifest, dtype="bfloat16", steps=6, learning_rate=rate, **options)
        if not options.get("full")
        else (_train_full(tmp_path, manifest, rate), b"")
    )
    assert len(metrics) == 6
    assert all(abs(step["sampler_kl"]) <= 0.01 for step in metrics)


def _train_full(tmp_path: Path, manifest: Path, rate: float) -> list[dict[str, float]]:
    from distill.train import main

    main(train_config(tmp_path, manifest, dtype="bfloat16", steps=6, learning_rate=rate, full=True))
    return metrics_of(tmp_path / "run")


def test_a_small_step_moves_every_float32_master_weight(tmp_path: Path, manifest: Path) -> None:
    """In bfloat16 a learning rate of 5e-6 leaves nearly all weights where they are."""
    from distill.train import main

    options: dict[str, Any] = {"full": True, "dtype": "bfloat16", "learning_rate": 5e-6, "steps": 1, "warmup_steps": 0}
    main(train_config(tmp_path, manifest, **options))
    start = load_model(manifest.parent / "model").model.state_dict()
    end = load_model(tmp_path / "run" / "model").model.state_dict()
    trained = [name for name in start if name.endswith("proj.weight")]
    moved = torch.cat([(start[name] != end[name]).flatten() for name in trained]).float().mean()
    rounded = torch.cat([(start[name].bfloat16() != end[name].bfloat16()).flatten() for name in trained]).float().mean()
    assert moved > 0.95 and rounded < 0.2
    assert json.loads((tmp_path / "run" / "train.json").read_text())["model"]["dtype"] == "float32"


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_an_averaged_teacher_moves_in_steps_smaller_than_bfloat16_has(tmp_path: Path, arch: Arch) -> None:
    loaded, adapter = student_of(save_tiny(tmp_path / "model", arch), "bfloat16", 0.0)
    teacher = Teacher("ema", loaded.model, adapter, ema_decay=0.999)
    args = ([(5, 6, 7), (8, 9)], [[8, 9, 10], [11, 12, 13]])
    with teacher.active() as model:
        start = completion_hidden(model, *args)
        torch.testing.assert_close(start.float(), _reference(loaded, teacher, args), rtol=0.05, atol=0.05)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    teacher.update()
    with teacher.active() as model:
        assert not torch.equal(completion_hidden(model, *args), start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert {tensor.dtype for tensor in teacher.average.values()} == {torch.float32}


def _reference(loaded: LoadedModel, teacher: Teacher, args: Any) -> Tensor:
    """The hidden states of the average, all in float32."""
    model = copy.deepcopy(loaded.model).float()
    with torch.no_grad():
        for name, tensor in teacher.average.items():
            model.get_parameter(name).copy_(tensor)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        return completion_hidden(model, *args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_saved_adapter_is_the_student_that_was_measured(tmp_path: Path, manifest: Path, dtype: str) -> None:
    """Rollouts of the live student and of its loaded adapter, token by token and number by number."""
    loaded, adapter = student_of(manifest.parent / "model", dtype, 0.1)
    adapter.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    live = drawn(loaded, adapter)
    again = load_model(manifest.parent / "model", dtype=dtype)
    apply_adapter(again, tmp_path / "adapter")
    config = SamplingConfig(num_generations=8, max_new_tokens=12, temperature=1.0)
    assert [rollout for group in sample(again, prompts(), config) for rollout in group] == live
