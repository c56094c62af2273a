from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

import distill.baselines.rewards
import neurosig.sampling.sampler
from distill.baselines import trl as baselines
from distill.baselines.rewards import agreeing, consistent_rollouts, self_certainty, vote_rewards
from distill.baselines.trl import batch_of_step, question_prompts
from distill.config import TrainConfig, sampling_config
from distill.step import learn
from distill.student import make_student, merged
from distill.tasks import Task, questions_of_step
from distill.teacher import Teacher
from distill.train import main
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from tests.support.flow import make_manifest
from tests.support.paths import ROOT
from tests.support.tiny import Arch, tiny_model, tiny_tokenizer


def train_config(tmp_path: Path, manifest: Path, out: str = "run", **changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "method": "ttrl",
        "steps": 2,
        "questions_per_step": 3,
        "num_generations": 4,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "keep_truncated": True,
        "save_steps": 2,
        "quiet": True,
    }
    return TrainConfig(manifest=manifest, out=tmp_path / out, **{**defaults, **changes})


def train(tmp_path: Path, manifest: Path, out: str = "run", **changes: Any) -> list[dict[str, float]]:
    main(train_config(tmp_path, manifest, out, **changes))
    return metrics(tmp_path / out)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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
    monkeypatch.setattr(neurosig.sampling.sampler, "sample", recorded)
    return seen


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
    rows = train(tmp_path, manifest, method=method, **changes)
    assert [row["step"] for row in rows] == [1, 2]
    files = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {str(path) for path in files if len(path.parts) == 1} == {"metrics.jsonl", "train.json"}
    assert {path.parts[0] for path in files} == {"metrics.jsonl", "train.json", "checkpoints", model}
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
    plain = train(tmp_path, manifest, "plain")
    checkpointed = train(tmp_path, manifest, "checkpointed", gradient_checkpointing=True)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", ["ttrl", "intuitor"])
def test_the_first_step_draws_what_n_opsd_draws(
    tmp_path: Path, manifest: Path, method: str, sampled: dict[str, list[list[Rollout]]]
) -> None:
    """Same questions, same rollouts, to the token."""
    train(tmp_path, manifest, "nopsd", method="nopsd", steps=1)
    first = {group[0].question_id: [rollout.token_ids for rollout in group] for group in sampled["step1"]}
    train(tmp_path, manifest, method=method, steps=1)
    again = {group[0].question_id: [rollout.token_ids for rollout in group] for group in sampled["step1"]}
    assert first == again and len(first) == 3


@pytest.mark.parametrize("method", ["lmsi", "ttrl", "intuitor"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    tmp_path: Path, manifest: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though TRL shuffles each step's rollouts into micro-batches."""
    options: dict[str, Any] = {"method": method, "steps": 5, "micro_batch_size": 2, "warmup_steps": 4}
    train(tmp_path, manifest, "straight", **options)
    on_log = baselines._Saver.on_log

    def killed(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.done + state.global_step == 4:
            raise KeyboardInterrupt
        on_log(self, args, state, control, **given)

    monkeypatch.setattr(baselines._Saver, "on_log", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, manifest, "broken", **options)
    monkeypatch.undo()
    assert len(metrics(tmp_path / "broken")) == 3
    with pytest.raises(UserError, match="cannot resume, these differ from the interrupted run: method"):
        train(tmp_path, manifest, "broken", **{**options, "method": "nopsd"}, resume=True)
    train(tmp_path, manifest, "broken", **options, resume=True)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoints/step-000005/optimizer.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    rates = [row["learning_rate"] for row in metrics(tmp_path / "broken")]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_a_run_killed_after_its_last_step_only_writes_its_end(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    train(tmp_path, manifest, "straight")
    monkeypatch.setattr(baselines, "write_final", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, manifest, "broken")
    monkeypatch.undo()
    train(tmp_path, manifest, "broken", resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


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
    assert vote_rewards(answers, "q") == rewards


def test_ties_are_decided_by_the_question_not_by_the_order() -> None:
    for name in ("q0", "q1", "q2", "q3"):
        forwards, backwards = vote_rewards(["a", "b", "a", "b"], name), vote_rewards(["b", "a", "b", "a"], name)
        assert sum(forwards) == 2 and forwards == backwards[1:] + backwards[:1]
    assert len({tuple(vote_rewards(["a", "b"], f"q{i}")) for i in range(8)}) == 2


def test_more_rollouts_can_vote_than_are_trained_on(
    tmp_path: Path, manifest: Path, sampled: dict[str, list[list[Rollout]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    votes: list[tuple[Sequence[str | None], list[float]]] = []

    def recorded(answers: Sequence[str | None], question_id: str) -> list[float]:
        votes.append((answers, vote_rewards(answers, question_id)))
        return votes[-1][1]

    monkeypatch.setattr(distill.baselines.rewards, "vote_rewards", recorded)
    # answers of one letter, so that votes are shared
    monkeypatch.setattr(distill.baselines.rewards, "extract_answer", lambda text, *_: "ab"[len(text.encode()) % 2])
    options: dict[str, Any] = {"steps": 1, "num_generations": 2, "questions_per_step": 8}
    [row] = train(tmp_path, manifest, vote_generations=7, **options)
    assert [len(answers) for answers, _ in votes] == [7] * 8
    assert (row["rollouts"], row["rollouts_in_loss"], row["tokens_in_loss"]) == (56, 16, 64)
    assert row["reward"] == pytest.approx(sum(sum(rewards[:2]) for _, rewards in votes) / 16)
    part = [
        vote_rewards(answers[:2], group[0].question_id)
        for (answers, _), group in zip(votes, sampled["step1"], strict=True)
    ]
    assert part != [rewards[:2] for _, rewards in votes]
    monkeypatch.undo()
    [again] = train(tmp_path, manifest, "again", **options)
    assert again["student_entropy"] == row["student_entropy"]  # the same two rollouts of each question


@pytest.mark.parametrize("arch", ["qwen3", "gemma2"])
def test_self_certainty_is_that_of_the_tokens_own_position(arch: Arch) -> None:
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
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: rows.append(call[1][0].shape[0]))
    torch.testing.assert_close(self_certainty(model, prompts, completions, chunk_tokens=2), whole)
    hook.remove()
    assert rows == [2, 2, 2, 2, 2, 1]


def test_self_certainty_is_what_the_sampler_noted(tmp_path: Path, manifest: Path) -> None:
    """The sampler sees the adapter merged into the weights, the reward sees it beside them."""
    loaded = load_model(manifest.parent / "model")
    model, adapter = make_student(train_config(tmp_path, manifest), loaded)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("a", (5, 6, 7, 8)), Prompt("b", (9, 10))]
    with merged(model, adapter):
        groups = list(sample(loaded, prompts, SamplingConfig(num_generations=3, temperature=1.0, max_new_tokens=6)))
    by_id = {prompt.question_id: prompt.token_ids for prompt in prompts}
    rollouts = [rollout for group in groups for rollout in group]
    certainty = self_certainty(model, [by_id[r.question_id] for r in rollouts], [r.token_ids for r in rollouts])
    noted = torch.tensor([rollout.mean_self_certainty for rollout in rollouts])
    torch.testing.assert_close(certainty, noted, rtol=1e-4, atol=1e-4)
    assert noted.unique().numel() == 6


def test_intuitor_rewards_self_certainty(
    tmp_path: Path, manifest: Path, sampled: dict[str, list[list[Rollout]]]
) -> None:
    [row] = train(tmp_path, manifest, method="intuitor", steps=1)
    noted = [rollout.mean_self_certainty or 0.0 for group in sampled["step1"] for rollout in group]
    assert row["reward"] == pytest.approx(sum(noted) / len(noted), rel=1e-4)


def test_lmsi_learns_the_exact_tokens_of_the_consistent_rollouts(tmp_path: Path, manifest: Path) -> None:
    """The loss of the first step is the plain cross-entropy of the completions, the prompt's labels left out."""
    read, loaded = read_manifest(manifest), load_model(manifest.parent / "model")
    config = train_config(tmp_path, manifest, method="lmsi", steps=1)
    prompts = question_prompts(read, loaded, config, sampling_config(config, read))
    found = consistent_rollouts(read, list(prompts), keep_truncated=True)
    rows = {row.id: row for row in read.rows}
    assert 0 < len(found) < len(read.rollouts)
    for (name, index), rollout in read.rollouts.items():
        assert (rollout in found) == (rows[name].answers[index] == rows[name].pseudo_label is not None)
    tokenizer = tiny_tokenizer()
    assert any(tuple(tokenizer(r.text, add_special_tokens=False)["input_ids"]) != r.token_ids for r in found)
    assert not consistent_or_none(read, list(prompts))  # none of these rollouts ended by itself

    batch = baselines.Consistent(config, read, loaded.model, prompts)
    table = batch.dataset(0)
    losses, whole = [], []
    for ids, mask, rollout in zip(table["input_ids"], table["completion_mask"], batch.plan[0], strict=True):
        prompt = prompts[rollout.question_id]
        assert tuple(ids) == (*prompt, *rollout.token_ids)
        assert mask == [0] * len(prompt) + [1] * len(rollout.token_ids)
        with torch.no_grad():
            log_p = tiny_model("qwen3")(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nll = -log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        losses.append(nll[len(prompt) - 1 :])
        whole.append(nll)
    expected = torch.cat(losses).mean().item()
    assert abs(expected - torch.cat(whole).mean().item()) > 1e-2
    for micro_batch_size in (1, 16):
        [row] = train(
            tmp_path, manifest, f"micro{micro_batch_size}", method="lmsi", steps=1, micro_batch_size=micro_batch_size
        )
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
        assert row["tokens_in_loss"] == len(torch.cat(losses))


def consistent_or_none(read: Any, names: list[str]) -> list[Rollout]:
    try:
        return consistent_rollouts(read, names, keep_truncated=False)
    except UserError as error:
        assert "no finished rollout gives its question's majority answer" in str(error)
        return []


def test_lmsi_learns_what_it_is_shown(tmp_path: Path, manifest: Path) -> None:
    rows = train(tmp_path, manifest, method="lmsi", steps=8)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_ttrl_raises_its_reward(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the first byte's parity here: a model that learns from the vote comes to agree with itself."""
    monkeypatch.setattr(distill.baselines.rewards, "extract_answer", lambda text, *_: "ab"[len(text.encode()) % 2])
    rows = train(tmp_path, manifest, steps=12, questions_per_step=8, num_generations=8)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1


def test_cut_off_rollouts_vote_but_leave_the_loss(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other rollout is said to have ended by itself."""

    def half(*args: Any, **kwargs: Any) -> list[list[Rollout]]:
        groups = sample(*args, **kwargs)
        return [[replace(r, finish_reason="stop") if r.rollout_id % 2 else r for r in group] for group in groups]

    monkeypatch.setattr(distill.baselines.rewards, "sample", half)
    options: dict[str, Any] = {"num_generations": 6, "questions_per_step": 4, "steps": 1, "micro_batch_size": 4}
    [row] = train(tmp_path, manifest, keep_truncated=False, **options)
    assert (row["rollouts_in_loss"], row["tokens_in_loss"], row["eos_rate"]) == (12, 48, 0.5)
    [everything] = train(tmp_path, manifest, "all", **options)
    assert (everything["rollouts_in_loss"], everything["tokens_in_loss"]) == (24, 96)
    assert everything["reward"] == row["reward"] and everything["grad_norm"] != row["grad_norm"]
    assert everything["teacher_tokens"] == row["teacher_tokens"] + 12 * 3  # of these, TRL sees one token
    [skipping] = train(tmp_path, manifest, "skip", skip_first=1, **options)
    assert skipping["tokens_in_loss"] == 72


@pytest.fixture
def split_manifest(tmp_path: Path) -> Path:
    """Half of its questions are selected."""
    return make_manifest(tmp_path, "half", clean_filter="neuron_only", keep_fraction=0.5, hallucination_score="random")


def test_baselines_take_the_questions_of_n_opsd_or_all(tmp_path: Path, split_manifest: Path) -> None:
    read, loaded = read_manifest(split_manifest), load_model(tmp_path / "model")
    config = train_config(tmp_path, split_manifest)
    sampling = sampling_config(config, read)
    selected = question_prompts(read, loaded, config, sampling)
    assert list(selected) == [row.id for row in read.selected] and 0 < len(selected) < len(read.rows)
    config.questions_of = "all"
    everything = question_prompts(read, loaded, config, sampling)
    assert list(everything) == [row.id for row in read.rows]
    assert all(everything[name] == prompt for name, prompt in selected.items())


def test_batches_have_one_size_and_the_order_of_n_opsd() -> None:
    for n, per_step in ((10, 5), (7, 5), (3, 8)):
        for step in range(1, 12):
            chosen = batch_of_step(n, step, per_step=per_step, seed=1)
            theirs = questions_of_step(n, step, per_step=per_step, seed=1)
            assert chosen[: len(theirs)] == theirs
            assert len(chosen) == len(set(chosen)) == min(n, per_step)


def test_u_opsd_learns_from_its_own_majority_where_it_disagrees(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match="u-opsd shows each question its own majority solution, but the contexts"):
        train(tmp_path, manifest, method="u-opsd")
    assert not (tmp_path / "run").exists()
    own = make_manifest(tmp_path, "own", context_policy="majority_solution")
    rows = train(tmp_path, own, method="u-opsd")
    assert len(rows) == 2 and rows[0]["loss"] > 0
    assert "U-OPSD" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_u_opsd_leaves_out_exactly_the_rollouts_that_agree(manifest: Path) -> None:
    read = read_manifest(manifest)
    row = next(row for row in read.rows if row.pseudo_label is not None)
    right = next(read.rollouts[row.id, i].text for i, answer in enumerate(row.answers) if answer == row.pseudo_label)
    texts = {0: right, 1: "Answer: surely something else", 2: ""}
    rollouts = [Rollout(row.id, i, text, (5, 6, 7 + i), "stop") for i, text in texts.items()]
    left_out = agreeing(read, [*rollouts, Rollout("replay:x", 0, right, (5,), "stop")])
    assert left_out == {(row.id, 0)}
    task = Task(row.id, (5, 6, 7), (9, 8, 5, 6, 7))
    config = TrainConfig(manifest=Path(), out=Path())

    def step(pairs: list[tuple[Task, Rollout]], without: set[tuple[str, int]]) -> dict[str, float]:
        model = tiny_model("qwen3")
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        return learn(config, model, Teacher("live", model, None), sgd, pairs, left_out=without)

    masked = step([(task, rollout) for rollout in rollouts], left_out)
    rest = step([(task, rollout) for rollout in rollouts[1:]], set())
    everything = step([(task, rollout) for rollout in rollouts], set())
    assert masked["loss"] == rest["loss"] != everything["loss"]
    assert (masked["rollouts_in_loss"], masked["rollouts"], masked["generated_tokens"]) == (2, 3, 9)


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
        train(tmp_path, manifest, **change)
    assert not (tmp_path / "run").exists()


def test_a_missing_trl_is_named(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        UserError, match=r"--method ttrl: TRL is not installed; run `pip install 'neurosig\[baselines\]'`"
    ):
        train(tmp_path, manifest)
    train(tmp_path, manifest, method="nopsd", steps=1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match=r"step [23]: \w+ is nan; the last checkpoint is kept, lower --learning-rate"):
        train(tmp_path, manifest, method="lmsi", learning_rate=1e30, steps=4)
    assert not (tmp_path / "run" / "adapter").exists()


def test_two_processes_vote_over_whole_groups(tmp_path: Path, manifest: Path) -> None:
    """Three questions of two rollouts on two processes: the second group is split between them."""
    options: dict[str, Any] = {"num_generations": 2, "vote_generations": 3, "steps": 2}
    alone = train(tmp_path, manifest, "alone", **options)
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
    given = train_config(tmp_path, manifest, "both", **options)
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
    both = metrics(tmp_path / "both")
    assert len(both) == 2
    assert both[0]["reward"] == alone[0]["reward"]
    for one, two in zip(alone, both, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    first, second = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("alone", "both"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=1e-4)


def test_baselines_report_to_tensorboard(tmp_path: Path, manifest: Path) -> None:
    train(tmp_path, manifest, method="lmsi", steps=1, report_to=("tensorboard",))
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
