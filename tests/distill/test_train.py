from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import distill.step
from distill.config import PRESETS, TrainConfig
from distill.tasks import Task, questions_of_step, replay_tasks
from distill.teacher import Teacher
from distill.train import main
from neurosig.manifest import read_manifest
from neurosig.models.completion_hidden import completion_hidden
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import output_folder
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import interrupted_at, make_manifest, save_tiny
from tests.support.parsers import UNCUT
from tests.support.runs import metrics_of, result_bytes, train, train_config
from tests.support.tiny import ARCHS, Arch, tiny_model

FIELDS = {
    "loss",
    "teacher_entropy",
    "student_entropy",
    "entropy_gap",
    "mean_length",
    "eos_rate",
    "grad_norm",
    "clip_fraction",
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


@pytest.mark.parametrize("options", [{"teacher": "live"}, PRESETS["consistency"]], ids=["live", "consistency"])
def test_no_context_and_a_live_teacher_teach_exactly_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    """And no metric divides by the divergence of 0."""
    manifest = make_manifest(tmp_path, context_policy="none")
    metrics, _ = train(tmp_path, manifest, **{**options, "steps": 4, "save_steps": 2, "max_new_tokens": None})
    for step in metrics:
        assert all(math.isfinite(value) for value in step.values())
        assert step["loss"] == 0.0
        assert step["grad_norm"] == 0.0
        assert step["entropy_gap"] == 0.0
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_a_context_teaches(tmp_path: Path, manifest: Path) -> None:
    metrics, _ = train(tmp_path, manifest, steps=12, num_generations=4)
    assert set(metrics[0]) >= FIELDS
    assert metrics[0]["loss"] > 0.05
    assert sum(step["loss"] for step in metrics[-3:]) < 0.8 * sum(step["loss"] for step in metrics[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "sampled_token", "num_generations": 4, "steps": 20},
        {"topk": 8},
        {"topk": 8, "tail": False, "divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.3, "clip": "entry", "loss_temperature": 1.2},
        {"teacher": "ema", "ema_decay": 0.9},
    ],
    ids=str,
)
def test_every_objective_brings_the_student_nearer(tmp_path: Path, manifest: Path, options: dict[str, Any]) -> None:
    """Judged by its own unclipped divergence, and micro-batches of one give the same trajectory."""
    metrics, _ = train(tmp_path, manifest, **{"steps": 12, "num_generations": 4, **options})
    first, last = (sum(step["divergence"] for step in part) for part in (metrics[:4], metrics[-4:]))
    assert first > 0 and last < 0.8 * first
    again, _ = train(
        tmp_path, manifest, "single", **{**options, "steps": 2, "num_generations": 2, "micro_batch_size": 1}
    )
    whole, _ = train(tmp_path, manifest, "whole", **{**options, "steps": 2, "num_generations": 2})
    for one, other in zip(again, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_every_step_samples_afresh(tmp_path: Path, manifest: Path) -> None:
    """The same questions and, at this learning rate, the same model: what differs are the rollouts."""
    metrics, _ = train(tmp_path, manifest, questions_per_step=8, learning_rate=1e-12, steps=3)
    assert len({step["student_entropy"] for step in metrics}) == 3
    again, _ = train(tmp_path, manifest, "again", questions_per_step=8, learning_rate=1e-12, steps=3)
    other, _ = train(tmp_path, manifest, "other", questions_per_step=8, learning_rate=1e-12, steps=3, seed=1)
    assert metrics == again != other


def test_micro_batches_of_1_give_the_trajectory_of_8(tmp_path: Path, manifest: Path) -> None:
    single, _ = train(tmp_path, manifest, "single", micro_batch_size=1)
    eight, _ = train(tmp_path, manifest, "eight", micro_batch_size=8)
    for one, other in zip(single, eight, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    a, b = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("single", "eight"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_a_finished_run_is_left_alone_and_never_overwritten_by_accident(tmp_path: Path, manifest: Path) -> None:
    train(tmp_path, manifest)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    main(train_config(tmp_path, manifest, resume=True))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="holds an earlier run"):
        main(train_config(tmp_path, manifest))
    notes = tmp_path / "run" / "notes.txt"
    notes.write_text("keep me")
    main(train_config(tmp_path, manifest, overwrite=True, steps=1))
    assert notes.read_text() == "keep me"


def test_the_manifest_of_another_model_is_refused(tmp_path: Path, manifest: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(
        UserError, match=r"made by \S+model, not by \S+other: weights [0-9a-f]{12} against [0-9a-f]{12}"
    ):
        main(train_config(tmp_path, manifest, model=str(other)))
    assert not (tmp_path / "run").exists()
    train(tmp_path, manifest, model=str(other), allow_model_mismatch=True, steps=1)
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record["config"]["allow_model_mismatch"] is True
    assert record["model"]["weights"] == load_model(other).info.weights
    assert record["model"]["weights"] != json.loads((manifest / "manifest.json").read_text())["model"]["weights"]


def test_prompts_that_do_not_fit_stop_before_training(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match=r'question "q\d": the \w+ prompt of \d+ tokens and 500 new tokens exceed'):
        main(train_config(tmp_path, manifest, max_new_tokens=500))
    assert not (tmp_path / "run").exists()


def test_cut_off_rollouts_leave_the_loss(tmp_path: Path, manifest: Path) -> None:
    metrics, _ = train(tmp_path, manifest, keep_truncated=False, num_generations=16, steps=2)
    for step in metrics:
        assert step["rollouts_in_loss"] == pytest.approx(step["eos_rate"] * 3 * 16)
        assert step["rollouts_in_loss"] < 3 * 16
    everything, _ = train(tmp_path, manifest, "all", num_generations=16, steps=2)
    assert everything[0]["rollouts_in_loss"] == 3 * 16
    skipping, _ = train(tmp_path, manifest, "skip", num_generations=16, steps=2, skip_first=1)
    assert skipping[0]["tokens_in_loss"] == everything[0]["tokens_in_loss"] - 3 * 16


def test_a_step_without_a_finished_rollout_is_reported(
    tmp_path: Path, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        metrics, _ = train(tmp_path, manifest, steps=1, skip_first=50)
    assert (metrics[0]["loss"], metrics[0]["grad_norm"], metrics[0]["rollouts_in_loss"]) == (None, None, 0)
    assert "step 1: every rollout was masked (0% finished with EOS)" in caplog.text


@pytest.mark.parametrize(
    ("skip_first", "keep_truncated", "loss_mean", "weight"),
    [(0, True, "token", 1.0), (0, False, "token", 1.0), (2, True, "token", 0.25), (0, True, "sequence", 3.0)],
)
def test_loss_and_gradient_are_those_of_the_plain_mean_kl(
    skip_first: int, keep_truncated: bool, loss_mean: Literal["token", "sequence"], weight: float
) -> None:
    """Against one plain forward per row and a full softmax over the vocabulary."""
    model = tiny_model("qwen3")
    tasks = [Task("a", (5, 6, 7), (9, 8, 5, 6, 7)), Task("b", (11, 12), (3, 4, 10, 11, 12), weight)]
    completions = [(tasks[0], (20, 21, 22, 2), "stop"), (tasks[0], (30, 31, 32), "length"), (tasks[1], (40, 2), "stop")]
    pairs = [(task, Rollout(task.id, i, "", ids, reason)) for i, (task, ids, reason) in enumerate(completions)]  # type: ignore[arg-type]
    config = TrainConfig(
        manifest=Path(),
        out=Path(),
        micro_batch_size=2,
        skip_first=skip_first,
        keep_truncated=keep_truncated,
        loss_mean=loss_mean,
    )
    metrics = distill.step.learn(
        config, model, Teacher("live", model, None), torch.optim.SGD(model.parameters(), lr=0.0), pairs
    )
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def log_p(prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1)[skip_first:]

    divergences, entropies, weights = [], [], []
    for task, ids, reason in completions:
        if reason == "stop" or keep_truncated:
            student, teacher = log_p(task.student_prompt, ids), log_p(task.teacher_prompt, ids).detach()
            divergences.append((teacher.exp() * (teacher - student)).sum(-1))
            entropies.append(-(teacher.exp() * teacher).sum(-1))
            weights.append(task.weight)
    if loss_mean == "token":
        total = sum(weight * len(kl) for weight, kl in zip(weights, divergences, strict=True))
        loss = sum(weight * kl.sum() for weight, kl in zip(weights, divergences, strict=True)) / total
    else:
        loss = sum(weight * kl.mean() for weight, kl in zip(weights, divergences, strict=True)) / sum(weights)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["divergence"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert metrics["teacher_entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    assert metrics["tokens_in_loss"] == len(torch.cat(divergences))
    assert (metrics["mean_length"], metrics["eos_rate"]) == (3.0, pytest.approx(2 / 3))
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    scale = min(1.0, config.max_grad_norm / norm)
    for name, parameter in model.named_parameters():
        if name in gradient and parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad * scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.3},
        {"clip": "entry"},
        {"clip": "token", "clip_value": 0.5},
        {"loss_temperature": 2.0},
    ],
)
def test_every_divergence_trains(tmp_path: Path, manifest: Path, options: dict[str, Any]) -> None:
    metrics, _ = train(tmp_path, manifest, steps=1, **options)
    plain, _ = train(tmp_path, manifest, "plain", steps=1)
    assert metrics[0]["grad_norm"] > 0
    assert metrics[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = distill.step.completion_hidden
    monkeypatch.setattr(distill.step, "completion_hidden", lambda *args: hidden(*args) * torch.nan)
    with pytest.raises(UserError, match=r"step 1: loss is nan \(question ids q\d"):
        main(train_config(tmp_path, manifest))
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tmp_path, manifest, "straight")
    hidden, calls = distill.step.completion_hidden, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return hidden(*args) * (torch.inf if len(calls) > 4 else 1)  # two calls per step, teacher and student

    monkeypatch.setattr(distill.step, "completion_hidden", broken)
    with pytest.raises(UserError, match=r"step 3: loss is nan .*--resume from it"):
        main(train_config(tmp_path, manifest, "broken"))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").glob("step-*")] == ["step-000002"]
    assert len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()) == 2
    assert train(tmp_path, manifest, "broken", resume=True) == straight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"save_steps": 0}, "--save-steps: expected at least 1, got 0"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints: expected at least 1, got 0"),
        ({"skip_first": -1}, "--skip-first: expected at least 0, got -1"),
        ({"lora_r": 0}, "--lora-r: expected at least 1, got 0"),
        ({"learning_rate": math.nan}, "--learning-rate: expected a number above 0, got nan"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm: expected a number above 0"),
        ({"loss_temperature": 0.0}, "--loss-temperature: expected a number above 0, got 0.0"),
        ({"clip_value": -1.0}, "--clip-value: expected a number above 0, got -1.0"),
        ({"divergence": "jsd", "beta": 1.0}, "--beta: expected strictly between 0 and 1, got 1.0"),
        ({"divergence": "sampled_token", "topk": 5}, "--divergence sampled_token scores one entry per token"),
        ({"topk": -1}, "--topk: expected at least 0, got -1"),
        ({"teacher": "ema", "ema_decay": 1.0}, "--ema-decay: expected 0 to below 1, got 1.0"),
        ({"max_new_tokens": 0}, "max-new-tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, manifest: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(train_config(tmp_path, manifest, **change))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path, manifest: Path) -> None:
    with (
        output_folder(tmp_path / "run", finished="train.json", owned=(), resume=False, overwrite=False),
        pytest.raises(UserError, match=r"run: in use by pid \d+"),
    ):
        main(train_config(tmp_path, manifest, resume=True))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill.train", "--manifest", "nowhere", "--out", "run", "--quiet"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: manifest nowhere: no such folder\n"
    assert not (tmp_path / "run").exists()


def test_full_fine_tuning_keeps_the_embeddings(tmp_path: Path, manifest: Path) -> None:
    main(train_config(tmp_path, manifest, full=True, steps=2, learning_rate=1e-3))
    trained = load_model(tmp_path / "run" / "model").model.state_dict()
    before = tiny_model("qwen3").state_dict()
    assert torch.equal(trained["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
    assert not torch.equal(
        trained["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"]
    )


@pytest.mark.parametrize("full", [False, True])
def test_the_base_teacher_stays_the_untrained_model(full: bool) -> None:
    model, reference = tiny_model("llama"), tiny_model("llama")
    adapter = None
    if not full:
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    teacher, live = Teacher("base", model, adapter), Teacher("live", model, adapter)
    if full:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.add_(0.1)
    args = ([(5, 6, 7)], [[8, 9]])
    with torch.no_grad():
        untrained, now = completion_hidden(reference, *args), completion_hidden(model, *args)
    with teacher.active() as base:
        torch.testing.assert_close(completion_hidden(base, *args), untrained)
        assert not completion_hidden(base, *args).requires_grad
    with live.active() as student:
        assert torch.equal(completion_hidden(student, *args), now)
    assert not torch.allclose(now, untrained, atol=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_the_ema_teacher_averages_the_weights_as_they_act(full: bool) -> None:
    """After one update its distance from the start is alpha times the student's, weight by weight, though neither
    factor of the adapter is; after many it follows the recursion; the student is left alone to the bit."""
    model, reference = tiny_model("llama"), tiny_model("llama")
    adapter = None
    if not full:
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    else:
        model.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(False)
    path = "model.layers.0.mlp.down_proj"
    start = reference.get_parameter(f"{path}.weight").detach()
    teacher = Teacher("ema", model, adapter, ema_decay=0.9)

    def student() -> torch.Tensor:
        layer = model.get_submodule(path)
        return (layer.weight if full else layer.base_layer.weight + layer.get_delta_weight("default")).detach().clone()

    def seen() -> torch.Tensor:
        with teacher.active() as averaged:
            layer = averaged.get_submodule(path)
            return (layer.weight if full else layer.base_layer.weight).detach().clone()

    generator = torch.Generator().manual_seed(0)
    expected = start
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        teacher.update()
        expected = 0.9 * expected + 0.1 * student()
        if step == 0:
            assert (student() - start).abs().mean() > 1e-3
            torch.testing.assert_close(seen() - start, 0.1 * (student() - start), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen(), expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    args = ([(5, 6, 7)], [[8, 9]])
    with teacher.active() as averaged:
        outputs = completion_hidden(averaged, *args)
    with torch.no_grad():
        for name, tensor in teacher.average.items():
            reference.get_parameter(name.replace(".base_layer", "")).copy_(tensor)
        torch.testing.assert_close(outputs, completion_hidden(reference, *args))
        assert not torch.allclose(outputs, completion_hidden(model, *args), atol=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_an_interrupted_run_with_an_ema_teacher_resumes_to_the_same_bytes(
    tmp_path: Path, manifest: Path, full: bool
) -> None:
    options: dict[str, Any] = {"teacher": "ema", "ema_decay": 0.5, "full": full, "learning_rate": 1e-3}
    main(train_config(tmp_path, manifest, "straight", **options))
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):
        main(train_config(tmp_path, manifest, "broken", **options))
    main(train_config(tmp_path, manifest, "broken", **options, resume=True))
    weights = "model/model.safetensors" if full else "adapter/adapter_model.safetensors"
    for name in ("metrics.jsonl", weights, "checkpoints/step-000004/averages.safetensors"):
        assert result_bytes(tmp_path / "broken" / name) == result_bytes(tmp_path / "straight" / name)
    plain, _ = train(tmp_path, manifest, "base", **{**options, "teacher": "base", "full": False})
    assert plain[-1] != metrics_of(tmp_path / "straight")[-1]


@pytest.mark.parametrize("arch", ARCHS)
def test_completion_hidden_equals_one_plain_forward_a_row(arch: Arch) -> None:
    """In value and in gradient; prompts are longer than gemma3's sliding window and shared by several rows."""
    model = tiny_model(arch)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (n,), generator=generator).tolist())

    distinct = [draw(14), draw(5), draw(9)]
    prompts = [distinct[index] for index in (0, 0, 1, 2, 2)]
    completions = [draw(n) for n in (3, 7, 1, 5, 4)]
    shared = completion_hidden(model, prompts, completions)
    weight = torch.randn(shared.shape, generator=generator)
    (shared * weight).sum().backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def rows(shift: int) -> torch.Tensor:
        parts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            hidden = model.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
            parts.append(hidden[len(prompt) - 1 + shift : len(prompt) + len(completion) - 1 + shift])
        return torch.cat(parts)

    torch.testing.assert_close(shared, rows(0), rtol=1e-4, atol=1e-5)
    assert (shared - rows(1)).abs().amax(dim=1).min() > 1e-2
    (rows(0) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradient:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_every_epoch_visits_each_question_once() -> None:
    steps = [questions_of_step(10, step, per_step=5, seed=1) for step in range(1, 5)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(10))
    assert steps[0] + steps[1] != steps[2] + steps[3]
    assert sorted(questions_of_step(3, 7, per_step=8, seed=0)) == [0, 1, 2]
    assert questions_of_step(0, 7, per_step=8, seed=0) == []


@pytest.mark.parametrize("n", [1, 5, 7, 8, 9, 15, 16, 29])
def test_all_steps_have_one_size_and_all_questions_their_share(n: int) -> None:
    """Also where an epoch ends inside a step: distinct questions, seen equally often to one, in another order."""
    for per_step in (1, 3, 4, 8, 64):
        seen = dict.fromkeys(range(n), 0)
        batches = [questions_of_step(n, step, per_step=per_step, seed=1) for step in range(1, 3 * n)]
        for batch in batches:
            assert len(batch) == len(set(batch)) == min(n, per_step)
            for index in batch:
                seen[index] += 1
            assert max(seen.values()) - min(seen.values()) <= 1
        if n == 29 and per_step == 8:
            epochs = [[index for batch in batches for index in batch][29 * e : 29 * (e + 1)] for e in range(3)]
            assert all(sorted(epoch) == list(range(29)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_replayed_prompts_are_taught_by_the_model_as_it_was(tmp_path: Path, manifest: Path) -> None:
    """Before training teacher and student agree on them to the bit; afterwards they hold the student back."""
    replay = tmp_path / "general.jsonl"
    replay.write_text('{"id": "g", "question": "Tell me of the sea."}\n{"id": "h", "question": "Sing."}\n')
    loaded = load_model(manifest.parent / "model")
    tasks = replay_tasks(str(replay), read_manifest(manifest).header, loaded, weight=0.5, max_new_tokens=4)
    assert [(task.id, task.weight, task.replay) for task in tasks] == [("replay:g", 0.5, True), ("replay:h", 0.5, True)]
    assert tasks[0].student_prompt == tasks[0].teacher_prompt
    assert "Answer in" not in loaded.tokenizer.decode(tasks[0].student_prompt)

    def drift(out: str, **options: Any) -> float:
        train(tmp_path, manifest, out, steps=10, questions_per_step=4, **options)
        student = PeftModel.from_pretrained(load_model(manifest.parent / "model").model, tmp_path / out / "adapter")
        ids = torch.tensor([tasks[0].student_prompt])
        with torch.no_grad():
            now = student(ids).logits[0, -1].log_softmax(-1)
            with student.disable_adapter():
                then = student(ids).logits[0, -1].log_softmax(-1)
        return float((then.exp() * (then - now)).sum())

    free, replayed = drift("free"), drift("replayed", replay=str(replay), replay_weight=8.0)
    first, *_, last = map(json.loads, (tmp_path / "replayed" / "metrics.jsonl").read_text().splitlines())
    assert abs(first["replay_divergence"]) < 1e-6 < last["replay_divergence"] < first["divergence"]
    alone = json.loads((tmp_path / "free" / "metrics.jsonl").read_text().splitlines()[0])
    for name in ("divergence", "teacher_entropy", "student_entropy"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4)
    assert 0 < replayed < 0.5 * free
    with pytest.raises(UserError, match="--replay teaches nothing with --teacher live"):
        main(train_config(tmp_path, manifest, "live", replay=str(replay), teacher="live"))
