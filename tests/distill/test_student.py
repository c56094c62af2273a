"""How the student's forward pass may run: recomputed, compiled, in bfloat16, with other attention kernels."""

from __future__ import annotations

import copy
import functools
import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile
from transformers import AutoModelForCausalLM

from distill.config import TrainConfig
from distill.distributed import decoder_layers
from distill.step import learn
from distill.student import TrainingForward, sampling_attention
from distill.tasks import Task
from distill.teacher import Teacher
from distill.train import main
from neurosig.models.completion_hidden import completion_hidden
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import make_manifest
from tests.support.runs import train, train_config
from tests.support.tiny import ALL_ARCHS, Arch, OtherArch, tiny_model

PAIRS = [
    (Task("a", tuple(range(5, 17)), (9, 8, *range(5, 17))), Rollout("a", 0, "", (20, 21, 22, 2), "stop", -1.0)),
    (Task("a", tuple(range(5, 17)), (9, 8, *range(5, 17))), Rollout("a", 1, "", (30,), "stop", -1.0)),
    (Task("b", (11, 12), (3, 4, 10, 11, 12)), Rollout("b", 0, "", (40, 41, 2), "stop", -1.0)),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"))


def step_of(arch: Arch | OtherArch, **options: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model = tiny_model(arch)
    config = TrainConfig(manifest=Path(), out=Path(), max_grad_norm=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    forward = TrainingForward(model, **options)
    metrics = learn(config, model, Teacher("live", model, None), optimizer, PAIRS, forward)
    return metrics, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(arch: Arch | OtherArch, **options: bool) -> None:
    found, gradients = step_of(arch, **options)
    plain, expected = step_of(arch)
    assert found == pytest.approx(plain, rel=1e-6, abs=1e-6)
    assert plain["loss"] > 0.01 and set(gradients) == set(expected)
    for name, gradient in expected.items():
        largest = max(gradient.abs().max().item(), 1e-2)
        assert (gradients[name] - gradient).abs().max() <= 1e-6 * largest, name


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_gradient_checkpointing_changes_no_gradient(arch: Arch | OtherArch, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT and GPT-2 have dropout, which the models' own switch would turn on."""
    layer = type(decoder_layers(tiny_model(arch))[0])
    forward, calls = layer.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", counted)
    assert_equal_steps(arch, gradient_checkpointing=True)
    layers = len(decoder_layers(tiny_model(arch)))
    # the student's passes over prompts and completions, both again in the backward pass, and without recomputation
    assert calls.count(True) == (2 + 2 + 2) * layers


def kept_bytes(recomputed: bool) -> int:
    """What remains allocated after the student's forward pass over 4 rollouts of one prompt."""
    model = tiny_model("qwen3")
    prompts, completions = [tuple(range(3, 67))] * 4, [[*range(5, 69)]] * 4
    gc.collect()
    forward = TrainingForward(model, gradient_checkpointing=recomputed)
    with profile(profile_memory=True) as profiled, forward.active():
        hidden = completion_hidden(model, prompts, completions)
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def test_recomputed_layers_keep_a_fraction_of_the_activations() -> None:
    assert 0 < kept_bytes(True) < kept_bytes(False) / 4


def test_compiled_layers_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    assert_equal_steps("qwen3", compile=True)
    assert_equal_steps("qwen3", compile=True, gradient_checkpointing=True)


def test_layers_share_their_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    graphs = []
    for n_layers in (2, 4):
        config = copy.deepcopy(tiny_model("qwen3").config)
        config.num_hidden_layers, config.layer_types = n_layers, ["full_attention"] * n_layers
        model = AutoModelForCausalLM.from_config(config)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with TrainingForward(model, compile=True).active():
            for length in (3, 4, 5):
                completion_hidden(model, [(5, 6, 7)] * 2, [[8] * length] * 2)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 3


@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "gpt2"])
def test_rows_with_their_own_prompt_have_the_shared_hidden_states(arch: Arch) -> None:
    model = tiny_model(arch)
    prompts = [(5, 6, 7), (5, 6, 7), tuple(range(10, 24))]
    completions = [(8, 9, 10), (11,), (12, 13)]
    with torch.no_grad():
        shared = completion_hidden(model, prompts, completions)
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(shared[: len(completion)], alone, rtol=1e-4, atol=1e-5)
            shared = shared[len(completion) :]
    assert shared.shape[0] == 0


@pytest.mark.bench  # minutes of C++ compilation
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_run_goes_as_a_plain_one(tmp_path: Path, manifest: Path) -> None:
    torch._dynamo.reset()
    plain, _ = train(tmp_path, manifest, "plain", steps=2)
    compiled, _ = train(tmp_path, manifest, "compiled", steps=2, compile=True, gradient_checkpointing=True)
    for one, other in zip(compiled, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_bfloat16_keeps_the_adapter_in_float32(tmp_path: Path, manifest: Path) -> None:
    metrics, _ = train(tmp_path, manifest, steps=2, dtype="bfloat16", gradient_checkpointing=True)
    plain, _ = train(tmp_path, manifest, "plain", steps=2)
    assert metrics[0]["loss"] != plain[0]["loss"]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in metrics)
    for folder, name in (("adapter", "adapter_model"), ("checkpoints/step-000002", "optimizer")):
        tensors = load_file(tmp_path / "run" / folder / f"{name}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_attention_implementations(tmp_path: Path, manifest: Path) -> None:
    eager, _ = train(tmp_path, manifest, "eager", steps=2, attn_implementation="eager")
    sdpa, _ = train(tmp_path, manifest, "sdpa", steps=2)
    for one, other in zip(eager, sdpa, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    record = json.loads((tmp_path / "eager" / "train.json").read_text())
    assert record["model"]["attn_implementation"] == "eager"
    with pytest.raises(UserError, match="flash_attention_2: the package flash-attn is not installed; use sdpa"):
        main(train_config(tmp_path, manifest, "flash", attn_implementation="flash_attention_2"))
    assert not (tmp_path / "flash").exists()


def test_flash_attention_gives_way_while_sampling() -> None:
    model = tiny_model("qwen3")
    with sampling_attention(model):
        assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "flash_attention_2"
    with pytest.MonkeyPatch.context() as patch:  # the package is not here, so the switch back is only noted
        patch.setattr(
            model, "set_attn_implementation", lambda name: setattr(model.config, "_attn_implementation", name)
        )
        with sampling_attention(model):
            assert model.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "flash_attention_2"


PROMPT, CONTEXT = (5, 6, 7), (9, 5, 6, 7)


def passes(lengths: list[int], **options: Any) -> list[int]:
    """Token positions of the student's and the teacher's passes, in order; a rollout of each length, one per task."""
    tasks = [Task(str(n), PROMPT, CONTEXT) for n in range(len(lengths))]
    pairs = [
        (task, Rollout(task.id, 0, "", (*range(20, 20 + n), 2), "stop", -1.0))
        for task, n in zip(tasks, lengths, strict=True)
    ]
    model, widths = tiny_model("qwen3"), []
    model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    config = TrainConfig(manifest=Path(), out=Path(), **options)
    learn(config, model, Teacher("live", model, None), torch.optim.SGD(model.parameters(), lr=0.0), pairs)
    return widths


def test_micro_batches_hold_rollouts_of_like_length() -> None:
    """Long and short rollouts in turn, in micro-batches of 2: only the pair of a long and a short one is padded."""
    widths = passes([3, 11, 3, 11, 3, 11], micro_batch_size=2)
    prompts = 3 * (len(PROMPT) + len(CONTEXT))  # once per micro-batch, as all are alike
    assert sum(widths) - prompts == 2 * (2 * 3 + 2 * 11 + 2 * 11)


def test_micro_batches_hold_as_many_rollouts_as_their_tokens_allow() -> None:
    """24 tokens: four short rollouts after their prompts, or one long one; a longer one goes alone."""
    widths = passes([29, 2, 2, 2, 2, 14], micro_batch_tokens=24)
    assert widths == [4, 4 * 2, 3, 4 * 2, 4, 14, 3, 14, 4, 29, 3, 29]
    with pytest.raises(UserError, match="--micro-batch-tokens: expected at least 1, got 0"):
        passes([2], micro_batch_tokens=0)
