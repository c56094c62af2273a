"""The same numbers on a GPU as on the CPU, and every command whole on it; run by make bench-gpu.

TEST_DEVICE=cpu python -m pytest -m gpu tests/promises/test_gpu.py    tries the tests without a GPU
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import distill.step
from distill.config import TrainConfig
from distill.evaluate import main as evaluate
from distill.tasks import Task
from distill.teacher import Teacher
from distill.train import main as train
from neurosig.intervene.interventions import completion_nll, scale_neurons
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.nnsight_reader import NeuronScaler
from neurosig.neurons.sites import ffn_sites
from neurosig.neurons.tracer import NeuronTracer
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import interrupted_at, make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import evaluate_config, write_choices
from tests.support.sampling import draw, prompts, tokens
from tests.support.tiny import ARCHS, Arch, rollouts, tiny_model, tiny_tokenizer

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.parametrize("arch", ARCHS)
def test_active_sets_are_those_of_the_cpu(arch: Arch) -> None:
    for score in ("cett", "magnitude"):
        here, there = (
            NeuronTracer(tiny_model(arch).to(device), TraceConfig(set_size=16, score=score)).trace(*rollouts())  # type: ignore[arg-type]
            for device in ("cpu", DEVICE)
        )
        assert torch.equal(here.neuron_ids, there.neuron_ids)
        torch.testing.assert_close(here.contributions, there.contributions, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_rollouts_are_those_of_the_cpu(arch: Arch) -> None:
    here, there = (
        tokens(draw(load_model((tiny_model(arch).to(device), tiny_tokenizer())), prompts(), temperature=0.0))
        for device in ("cpu", DEVICE)
    )
    assert here == there


def test_sampled_rollouts_take_the_seeds_of_the_cpu() -> None:
    here, there = (
        tokens(draw(load_model((tiny_model("qwen3").to(device), tiny_tokenizer())), prompts()))
        for device in ("cpu", DEVICE)
    )
    assert here == there


@pytest.mark.parametrize("arch", ARCHS)
def test_scaled_neurons_act_as_on_the_cpu(arch: Arch) -> None:
    results = []
    for device in ("cpu", DEVICE):
        loaded = load_model((tiny_model(arch).to(device), tiny_tokenizer()))
        scaled = scale_neurons(loaded, NeuronScaler(loaded.model, ffn_sites(loaded.model)), range(12), 0.0)
        groups = draw(scaled, prompts(), temperature=0.0)
        results.append((tokens(groups), list(completion_nll(scaled, prompts(), groups).values())))
    (here, here_nll), (there, there_nll) = results
    assert here == there
    assert here_nll == pytest.approx(there_nll, rel=1e-4)


OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "clip": "entry"},
    {"divergence": "sampled_token"},
    {"topk": 8},
    {"clip": "token", "loss_temperature": 2.0},
    {"gradient_checkpointing": True},
    {"method": "opsa"},
]


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda options: "-".join(map(str, options.values())) or "default")
def test_a_step_of_learning_is_that_of_the_cpu(options: dict[str, Any]) -> None:
    results = []
    for device in ("cpu", DEVICE):
        model = tiny_model("qwen3").to(device)
        tasks = [Task("a", (5, 6, 7), (9, 8, 5, 6, 7)), Task("b", (11, 12), (3, 4, 10, 11, 12))]
        rows = [(tasks[0], (20, 21, 22, 2)), (tasks[0], (30, 31, 2)), (tasks[1], (40, 2))]
        pairs = [(task, Rollout(task.id, i, "", ids, "stop")) for i, (task, ids) in enumerate(rows)]
        config = TrainConfig(manifest=Path(), out=Path(), micro_batch_size=2, **options)
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        metrics = distill.step.learn(config, model, Teacher("live", model, None), still, pairs)
        gradient = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append((metrics, gradient))
    (here, gradient), (there, expected) = results
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-4) and here["loss"] != 0
    assert gradient.keys() == expected.keys() and gradient
    for name in gradient:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_commands_run_whole(tmp_path: Path, dtype: str) -> None:
    """Export, training, and evaluation of the adapter, sampled and by log-likelihood."""
    manifest = make_manifest(tmp_path, device=DEVICE, dtype=dtype)
    assert read_manifest(manifest).header.model["dtype"] == dtype
    train(_config(tmp_path, manifest, dtype, "run"))
    common: dict[str, Any] = {"adapter": tmp_path / "run" / "adapter", "device": DEVICE, "dtype": dtype}
    evaluate(evaluate_config(tmp_path, **common))
    choices = write_choices(tmp_path / "choices.jsonl")
    evaluate(evaluate_config(tmp_path, "choices", questions=(str(choices),), scoring="loglikelihood", **common))
    for out in ("eval", "choices"):
        assert json.loads((tmp_path / out / "summary.json").read_text())["model"]["dtype"] == dtype


@pytest.mark.parametrize(
    "options",
    [{"full": True, "teacher": "ema"}, {"teacher": "live"}, {"gradient_checkpointing": True}],
    ids=["full-ema", "live", "gradient_checkpointing"],
)
def test_an_interrupted_run_goes_on_as_one_that_was_not(tmp_path: Path, options: dict[str, Any]) -> None:
    manifest = make_manifest(tmp_path, device=DEVICE, dtype="float32")
    train(_config(tmp_path, manifest, "float32", "straight", **options))
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):
        train(_config(tmp_path, manifest, "float32", "broken", **options))
    train(_config(tmp_path, manifest, "float32", "broken", resume=True, **options))
    straight, broken = (
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "broken")
    )
    assert len(straight) == 4 and straight == pytest.approx(broken, rel=1e-3)


def test_a_compiled_step_is_that_of_a_plain_one(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, device=DEVICE, dtype="float32")
    losses = []
    for out, compiled in (("plain", False), ("compiled", True)):
        train(_config(tmp_path, manifest, "float32", out, steps=1, compile=compiled))
        losses.append(json.loads((tmp_path / out / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("method", ["lmsi", "ttrl", "intuitor", "u-opsd", "opsa"])
def test_the_baselines_train(tmp_path: Path, method: str) -> None:
    manifest = make_manifest(
        tmp_path,
        device=DEVICE,
        context_policy="majority_solution" if method == "u-opsd" else "random",
        answer_parser=UNCUT,
    )
    train(_config(tmp_path, manifest, "auto", "run", method=method))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def _config(tmp_path: Path, manifest: Path, dtype: str, out: str, **changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 4, "questions_per_step": 4, "save_steps": 2, "lora_r": 4, "quiet": True}
    options = {**defaults, "keep_truncated": True, "learning_rate": 1e-3, **changes}
    return TrainConfig(manifest=manifest, out=tmp_path / out, device=DEVICE, dtype=dtype, **options)
