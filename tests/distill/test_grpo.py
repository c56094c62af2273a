"""TTRL and Intuitor: their rewards, and what they sample."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import distill.baselines.rewards
import distill.student
import neurosig.questions.reader
from distill.baselines.rewards import self_certainty, vote_rewards
from distill.student import make_student, sampling_weights
from neurosig.manifest import read_manifest
from neurosig.models.completion_hidden import head_logits
from neurosig.models.load import load_model
from neurosig.questions.reader import Reading
from neurosig.questions.vote import majority_vote
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from tests.support.flow import make_manifest
from tests.support.paths import ROOT
from tests.support.runs import baseline_config, metrics_of, train_baseline
from tests.support.tiny import Arch, tiny_model


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[Rollout]]]:
    """The groups that training samples, by salt."""
    seen: dict[str, list[list[Rollout]]] = {}

    def recorded(*args: Any, salt: str = "", **kwargs: Any) -> list[list[Rollout]]:
        seen[salt] = list(sample(*args, salt=salt, **kwargs))
        return seen[salt]

    monkeypatch.setattr(distill.baselines.rewards, "sample", recorded)
    monkeypatch.setattr(distill.student, "sample", recorded)
    return seen


def rewards_of(answers: Sequence[str | None], question_id: str) -> list[float]:
    return vote_rewards(Reading(tuple(answers), tuple(answers), majority_vote(answers, question_id)))


def by_length(text: str, *_: Any, **__: Any) -> str:
    return ("red", "tan")[len(text.encode()) % 2]


@pytest.mark.parametrize("method", ["ttrl", "intuitor"])
def test_the_first_step_draws_what_n_opsd_draws(
    tmp_path: Path, manifest: Path, method: str, sampled: dict[str, list[list[Rollout]]]
) -> None:
    """Same questions, same rollouts, to the token."""
    train_baseline(tmp_path, manifest, "nopsd", method="nopsd", steps=1)
    first = {group[0].question_id: [rollout.completion_ids for rollout in group] for group in sampled["step1"]}
    train_baseline(tmp_path, manifest, method=method, steps=1)
    again = {group[0].question_id: [rollout.completion_ids for rollout in group] for group in sampled["step1"]}
    assert first == again and len(first) == 3


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["a", "b", "a", None], [1, 0, 1, 0]),
        ([None, None, None, "b"], [0, 0, 0, 1]),
        ([None, None], [0, 0]),
        (["a", "a", "b", "b", "b", "b"], [0, 0, 1, 1, 1, 1]),
    ],
)
def test_the_majority_is_rewarded_and_a_non_answer_never(answers: list[str | None], rewards: list[float]) -> None:
    assert rewards_of(answers, "q") == rewards


def test_ties_are_decided_by_the_question_not_by_the_order() -> None:
    for name in ("q0", "q1", "q2", "q3"):
        forwards, backwards = rewards_of(["a", "b", "a", "b"], name), rewards_of(["b", "a", "b", "a"], name)
        assert sum(forwards) == 2 and forwards == backwards[1:] + backwards[:1]
    assert len({tuple(rewards_of(["a", "b"], f"q{i}")) for i in range(8)}) == 2


def test_more_rollouts_can_vote_than_are_trained_on(
    tmp_path: Path, manifest: Path, sampled: dict[str, list[list[Rollout]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    votes: list[tuple[Sequence[str | None], list[float]]] = []

    def recorded(reading: Reading) -> list[float]:
        votes.append((reading.answers, vote_rewards(reading)))
        return votes[-1][1]

    monkeypatch.setattr(distill.baselines.rewards, "vote_rewards", recorded)
    # answers of one letter, so that votes are shared
    monkeypatch.setattr(neurosig.questions.reader, "extract_answer", by_length)
    options: dict[str, Any] = {"steps": 1, "num_generations": 2, "questions_per_step": 8}
    [row] = train_baseline(tmp_path, manifest, vote_generations=7, **options)
    n = len(read_manifest(manifest).selected)  # a random model's rollouts do not all have an answer
    assert n > 4 and [len(answers) for answers, _ in votes] == [7] * n
    assert (row["rollouts"], row["rollouts_in_loss"], row["tokens_in_loss"]) == (7 * n, 2 * n, 8 * n)
    assert row["reward"] == pytest.approx(sum(sum(rewards[:2]) for _, rewards in votes) / (2 * n))
    part = [
        rewards_of(answers[:2], group[0].question_id)
        for (answers, _), group in zip(votes, sampled["step1"], strict=True)
    ]
    assert part != [rewards[:2] for _, rewards in votes]
    monkeypatch.undo()
    [again] = train_baseline(tmp_path, manifest, "again", **options)
    assert again["student_entropy"] == row["student_entropy"]  # the same two rollouts of each question


@pytest.mark.parametrize("arch", ["qwen3", "gemma2"])
def test_self_certainty_is_that_of_the_tokens_own_position(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a full softmax; the position after the token, or another chunk, gives something else, or the same."""
    model = tiny_model(arch)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (n,), generator=generator).tolist())

    prompts = [draw(9), draw(9), draw(5)]
    prompts[1] = prompts[0]
    completions = [draw(6), draw(1), draw(4)]

    def plain(shift: int) -> torch.Tensor:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            with torch.no_grad():
                p = model(torch.tensor([[*prompt, *completion]])).logits[0].softmax(-1)
            own = p[len(prompt) - 1 + shift : len(prompt) + len(completion) - 1 + shift]
            uniform = torch.full_like(own, 1 / own.shape[-1])
            rows.append(torch.nn.functional.kl_div(own.log(), uniform, reduction="none").sum(-1).mean())
        return torch.stack(rows)

    whole = self_certainty(model, prompts, completions)
    torch.testing.assert_close(whole, plain(0), rtol=1e-4, atol=1e-5)
    assert (whole - plain(1)).abs().min() > 1e-2
    rows: list[int] = []

    def counted(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return head_logits(model, hidden)

    monkeypatch.setattr("distill.baselines.rewards.head_logits", counted)
    torch.testing.assert_close(self_certainty(model, prompts, completions, chunk_tokens=2), whole)
    assert rows == [2, 2, 2, 2, 2, 1]


def test_self_certainty_is_what_the_sampler_noted(tmp_path: Path, manifest: Path) -> None:
    """The sampler sees the adapter merged into the weights, the reward sees it next to them."""
    loaded = load_model(manifest.parent / "model")
    model, adapter = make_student(baseline_config(tmp_path, manifest), loaded)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("a", (5, 6, 7, 8)), Prompt("b", (9, 10))]
    with sampling_weights(model, adapter) as weight_of:
        groups = list(sample(loaded, prompts, SamplingConfig(num_generations=3, max_new_tokens=6), weight_of=weight_of))
    by_id = {prompt.question_id: prompt.token_ids for prompt in prompts}
    rollouts = [rollout for group in groups for rollout in group]
    certainty = self_certainty(model, [by_id[r.question_id] for r in rollouts], [r.completion_ids for r in rollouts])
    noted = torch.tensor([rollout.mean_self_certainty for rollout in rollouts])
    torch.testing.assert_close(certainty, noted, rtol=1e-4, atol=1e-4)
    assert noted.unique().numel() == 6


def test_intuitor_rewards_self_certainty(
    tmp_path: Path, manifest: Path, sampled: dict[str, list[list[Rollout]]]
) -> None:
    [row] = train_baseline(tmp_path, manifest, method="intuitor", steps=1)
    noted = [rollout.mean_self_certainty or 0.0 for group in sampled["step1"] for rollout in group]
    assert row["reward"] == pytest.approx(sum(noted) / len(noted), rel=1e-4)


def test_ttrl_raises_its_reward(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the first byte's parity here: a model that learns from the vote comes to agree with itself."""
    monkeypatch.setattr(neurosig.questions.reader, "extract_answer", by_length)
    rows = train_baseline(tmp_path, manifest, steps=24, questions_per_step=8, num_generations=8)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1


def test_cut_off_rollouts_vote_but_leave_the_loss(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other rollout is marked as ended by itself."""

    def half(*args: Any, **kwargs: Any) -> list[list[Rollout]]:
        groups = sample(*args, **kwargs)
        return [[replace(r, finish_reason="stop") if r.rollout_id % 2 else r for r in group] for group in groups]

    monkeypatch.setattr(distill.baselines.rewards, "sample", half)
    options: dict[str, Any] = {"num_generations": 6, "questions_per_step": 4, "steps": 1, "micro_batch_size": 4}
    [row] = train_baseline(tmp_path, manifest, keep_truncated=False, **options)
    assert (row["rollouts_in_loss"], row["tokens_in_loss"], row["eos_rate"]) == (12, 48, 0.5)
    [everything] = train_baseline(tmp_path, manifest, "all", **options)
    assert (everything["rollouts_in_loss"], everything["tokens_in_loss"]) == (24, 96)
    assert everything["reward"] == row["reward"] and everything["grad_norm"] != row["grad_norm"]
    assert everything["teacher_tokens"] == row["teacher_tokens"] + 12 * 3  # of these, TRL sees one token
    [skipping] = train_baseline(tmp_path, manifest, "skip", skip_first=1, **options)
    assert skipping["tokens_in_loss"] == 72


def test_two_processes_vote_over_whole_groups(tmp_path: Path, manifest: Path) -> None:
    """Three questions of two rollouts on two processes: the second group is split between them."""
    options: dict[str, Any] = {"num_generations": 2, "vote_generations": 3, "steps": 2}
    alone = train_baseline(tmp_path, manifest, "alone", **options)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "distill.train",
    ]
    given = baseline_config(tmp_path, manifest, "both", **options)
    flags = ("method", "manifest", "out", "steps", "questions_per_step", "num_generations", "vote_generations")
    for name in (*flags, "lora_r", "learning_rate", "warmup_steps", "save_steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--keep-truncated", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    both = metrics_of(tmp_path / "both")
    assert len(both) == 2
    assert both[0]["reward"] == alone[0]["reward"]
    for one, two in zip(alone, both, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    first, second = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("alone", "both"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=1e-4)
