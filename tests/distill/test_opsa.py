"""OPSA, the control without a teacher: its tokens and advantages by hand, its step against a plain one, its outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import distill.baselines.opsa
import distill.step
from distill.baselines.opsa import advantages, lowest, n_lowest, opsa_loss
from distill.config import TrainConfig
from distill.tasks import Task, load_student, sampling_config, training_tasks
from distill.teacher import Teacher
from distill.train import main
from neurosig.manifest import read_manifest
from neurosig.models.completion_hidden import completion_hidden
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from tests.support.divergences import VocabularyRows
from tests.support.flow import interrupted_at, make_manifest
from tests.support.manifests import edit_row
from tests.support.parsers import UNCUT
from tests.support.runs import result_bytes, train, train_config
from tests.support.tiny import VOCAB_SIZE, tiny_model

OPSA: dict[str, Any] = {"method": "opsa", "max_new_tokens": 12}
PROMPTS = {"a": (5, 6, 7), "b": (11, 12)}
ROLLOUTS = [("a", range(20, 32)), ("a", range(30, 37)), ("b", range(40, 61)), ("b", (70, 2))]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of its questions are selected."""
    options: Any = {"question_filter": "neuron_only", "keep_fraction": 0.5, "hallucination_score": "random"}
    return make_manifest(tmp_path_factory.mktemp("half"), answer_parser=UNCUT, **options)


def test_the_lowest_tokens_are_those_of_each_rollout_by_itself() -> None:
    logprob = torch.tensor([-1.0, -3, -2, -3, 0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 0])
    assert lowest(logprob, (5, 10), share=0.2).nonzero()[:, 0].tolist() == [1, 5, 6]  # of equal ones the earlier
    assert lowest(logprob, (5, 10), share=0.2, skip_first=2).nonzero()[:, 0].tolist() == [3, 7, 8]
    assert lowest(logprob, (15,), share=1.0).all()
    assert [n_lowest(n, 0.2) for n in (0, 1, 5, 7, 8, 35, 2048)] == [0, 1, 1, 1, 2, 7, 410]


def test_advantages_by_hand() -> None:
    entropy = torch.tensor([1.0, 3.0, 2.0])
    assert advantages(entropy).tolist() == [-0.5, -1.0, -0.75]
    assert advantages(entropy, "centred").tolist() == [-0.25, -0.75, -0.5]
    assert advantages(entropy, "fixed").tolist() == [-0.5] * 3
    for one in (torch.tensor([1.5]), torch.tensor([0.0, 0.0])):  # no lowest and no highest
        assert advantages(one).tolist() == [-0.75] * len(one)
        assert advantages(one, "centred").tolist() == [-0.5] * len(one)


def plain(model: Any, advantage: str, share: float, skip_first: int, weights: dict[str, float]) -> torch.Tensor:
    """The loss of `ROLLOUTS` from one plain forward and all logits of each, in the words of the paper."""
    losses, mass = [], 0.0
    for name, ids in ROLLOUTS:
        prompt = PROMPTS[name]
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 + skip_first : -1]
        log_p = logits.log_softmax(-1)
        sampled = log_p[range(len(log_p)), [*ids][skip_first:]]
        entropy = -(log_p.exp() * log_p).sum(-1)
        if not len(sampled):
            continue
        chosen = sorted(range(len(sampled)), key=lambda i: sampled[i].item())[: max(1, round(share * len(sampled)))]
        high, low = entropy[chosen].max(), entropy[chosen].min()
        terms = []
        for i in chosen:
            r = (2 * (entropy[i] - low) / (high - low) - 1).item() if high > low else 0.0
            a = {"adaptive": -3 / 4 - r / 4, "centred": -1 / 2 - r / 4, "fixed": -1 / 2}[advantage]
            terms.append(-a * sampled[i])
        losses.append(weights[name] * sum(terms) / len(chosen))
        mass += weights[name]
    return torch.stack(losses).sum() / mass


def step(
    config: TrainConfig, model: Any, weights: dict[str, float], learning_rate: float = 0.0
) -> dict[str, float | None]:
    tasks = {name: Task(name, prompt, prompt, weights[name]) for name, prompt in PROMPTS.items()}
    pairs = [(tasks[name], Rollout(name, i, "", tuple(ids), "stop")) for i, (name, ids) in enumerate(ROLLOUTS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return distill.step.learn(config, model, Teacher("live", model, None), optimizer, pairs)


@pytest.mark.parametrize("arch", ["qwen3", "gpt_neox", "gemma2"])
@pytest.mark.parametrize(
    ("advantage", "share", "skip_first"), [("adaptive", 0.2, 0), ("centred", 0.4, 2), ("fixed", 1.0, 0)]
)
def test_loss_and_gradient_are_those_of_the_formula(arch: Any, advantage: Any, share: float, skip_first: int) -> None:
    """Against all logits in float64, with questions of unequal weights."""
    weights = {"a": 1.0, "b": 0.25}
    options: Any = {"opsa_share": share, "opsa_advantage": advantage, "skip_first": skip_first}
    config = TrainConfig(manifest=Path(), out=Path(), method="opsa", max_grad_norm=1e9, micro_batch_size=3, **options)
    model = tiny_model(arch)
    metrics = step(config, model, weights)
    exact = tiny_model(arch).double()
    expected = plain(exact, advantage, share, skip_first, weights)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    lengths = [len(ids) - skip_first for _, ids in ROLLOUTS if len(ids) > skip_first]
    assert metrics["tokens_in_loss"] == sum(n_lowest(n, share) for n in lengths)
    wanted = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        if "embed" not in name and parameter.grad is not None:  # a tied embedding, never trained, also has the head's
            scale = wanted[name].grad.abs().max()
            torch.testing.assert_close(parameter.grad.double(), wanted[name].grad, rtol=1e-3, atol=1e-5 * scale)


def test_a_step_reports_no_teacher_and_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Teacher) -> None:
        raise AssertionError("the teacher was run")

    monkeypatch.setattr(Teacher, "active", run)
    metrics = step(TrainConfig(manifest=Path(), out=Path(), method="opsa"), tiny_model("qwen3"), {"a": 1.0, "b": 1.0})
    assert [metrics[name] for name in ("divergence", "teacher_entropy", "entropy_gap")] == [None] * 3
    assert metrics["teacher_tokens"] == 0 and metrics["rollouts_in_loss"] == 4
    assert metrics["tokens_in_loss"] == 2 + 1 + 4 + 1
    assert metrics["lowest_logprob"] < metrics["student_logprob"] < 0 < metrics["student_entropy"]


def test_no_tensor_holds_more_rows_of_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the chunk changes nothing."""
    model, ids = tiny_model("qwen3"), [*range(20, 212)]
    hidden = completion_hidden(model, [(5, 6)], [ids]).detach().requires_grad_()
    found = []
    for chunk in (256, 40):
        monkeypatch.setattr(distill.baselines.opsa, "CHUNK_TOKENS", chunk)
        with VocabularyRows(VOCAB_SIZE) as recorded:
            output = opsa_loss(model, hidden, torch.tensor(ids), [192], [1 / 96], share=0.5)
            (gradient,) = torch.autograd.grad(output.loss, hidden)
        assert recorded.rows == min(chunk, 192)
        found.append((output.loss, gradient, output.logprob, output.entropy))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_micro_batches_of_1_give_the_trajectory_of_8(tmp_path: Path, manifest: Path) -> None:
    runs = {out: {"micro_batch_size": size} for out, size in (("single", 1), ("eight", 8))}
    single, eight = (train(tmp_path, manifest, out, **OPSA, **changes)[0] for out, changes in runs.items())
    for one, other in zip(single, eight, strict=True):
        one, other = ({k: v for k, v in step.items() if v is not None} for step in (one, other))
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    a, b = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in runs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"full": True, "learning_rate": 1e-3, "gradient_checkpointing": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, manifest: Path, changes: dict[str, Any]) -> None:
    options = {**OPSA, **changes, "steps": 4}
    main(train_config(tmp_path, manifest, "straight", **options))
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):
        main(train_config(tmp_path, manifest, "broken", **options))
    main(train_config(tmp_path, manifest, "broken", resume=True, **options))
    place = "model/model.safetensors" if changes else "adapter/adapter_model.safetensors"
    for name in ("metrics.jsonl", place):
        assert result_bytes(tmp_path / "broken" / name) == result_bytes(tmp_path / "straight" / name)


def test_a_run_leaves_what_n_opsd_leaves(tmp_path: Path, manifest: Path) -> None:
    metrics, _ = train(tmp_path, manifest, **OPSA)
    train(tmp_path, manifest, "nopsd", max_new_tokens=12)
    files = [{str(p.relative_to(tmp_path / run)) for p in (tmp_path / run).rglob("*")} for run in ("run", "nopsd")]
    assert files[0] == files[1]
    own, others = (pd.read_parquet(tmp_path / run / "rollouts" / "step-000001.parquet") for run in ("run", "nopsd"))
    assert own["text"].tolist() == others["text"].tolist() and own["in_loss"].all()
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record["budget"]["teacher_tokens"] == 0
    assert record["budget"]["trained_tokens"] == sum(step["tokens_in_loss"] for step in metrics)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "(OPSA, [arXiv 2608.31046]" in card and "| student_logprob | -" in card and "divergence |" not in card


def test_it_trains_on_the_questions_of_n_opsd_or_on_all(half: Path) -> None:
    contents = read_manifest(half)
    found = {}
    for which in ("selected", "all"):
        config = train_config(half, half, **OPSA, questions_of=which)
        sampling = sampling_config(config, contents)
        loaded = load_student(config, contents, None)
        found[which] = training_tasks(config, contents, loaded, max_new_tokens=sampling.max_new_tokens)
    assert [task.id for task in found["selected"]] == [row.question_id for row in contents.selected]
    assert [task.id for task in found["all"]] == [row.question_id for row in contents.rows]
    assert 0 < len(found["selected"]) < len(found["all"])
    assert all(task.teacher_prompt == task.student_prompt for task in found["all"])


def test_a_question_of_weight_0_is_left_out(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, answer_parser=UNCUT)
    edit_row(manifest, 1, lambda row: row.update(weight=0.0))
    config = train_config(tmp_path, manifest, **OPSA, questions_of="all")
    loaded = load_student(config, read_manifest(manifest), None)
    tasks = training_tasks(config, read_manifest(manifest), loaded, max_new_tokens=12)
    assert [task.id for task in tasks] == [f"q{index}" for index in range(1, 8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: value}, f"--{name.replace('_', '-')}: --method opsa has no such option; leave it out")
            for name, value in {
                **{"teacher": "ema", "teacher_model": "x", "ema_decay": 0.5, "divergence": "jsd", "topk": 4},
                **{"tail": False, "beta": 0.1, "loss_temperature": 2.0, "clip": "token", "clip_value": 0.1},
                **{"loss_mean": "sequence", "loss_on": "disagreeing", "replay": "x", "replay_weight": 2.0},
                **{"replay_per_step": 1, "vote_generations": 8},
            }.items()
        ),
        ({"method": "nopsd", "opsa_share": 0.3}, "--opsa-share: --method nopsd has no such option"),
        ({"method": "ttrl", "opsa_advantage": "fixed"}, "--opsa-advantage: --method ttrl has no such option"),
        ({"opsa_share": 0.0}, "--opsa-share: expected above 0 and at most 1, got 0.0"),
        ({"opsa_share": 1.5}, "--opsa-share: expected above 0 and at most 1, got 1.5"),
    ],
)
def test_options_that_it_ignores_are_refused(
    tmp_path: Path, manifest: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(train_config(tmp_path, manifest, **{**OPSA, **change}))
    assert not (tmp_path / "run").exists()


def test_it_stops_when_the_entropy_is_half_of_its_own_first_steps(tmp_path: Path, manifest: Path) -> None:
    options = {"steps": 30, "learning_rate": 2e-2, "collapse_window": 2, "save_steps": 1, "num_generations": 4}
    metrics, _ = train(tmp_path, manifest, **OPSA, **options)
    stopped = json.loads((tmp_path / "run" / "train.json").read_text())["stopped"]
    entropies = [step["student_entropy"] for step in metrics]
    first, last = sum(entropies[:2]) / 2, sum(entropies[-2:]) / 2
    assert stopped["reason"] == f"the student's entropy is {last:.3f} nats, in its first steps {first:.3f}"
    assert last < first / 2 and stopped["weights_of_step"] == len(metrics) - 2


def test_an_update_makes_the_chosen_tokens_less_likely() -> None:
    """Of the same rollouts, and the tokens that it leaves out likelier."""
    model = tiny_model("qwen3")
    ids = [id for _, completion in ROLLOUTS for id in completion]

    def logprob() -> torch.Tensor:
        with torch.no_grad():
            hidden = completion_hidden(model, [PROMPTS[name] for name, _ in ROLLOUTS], [[*c] for _, c in ROLLOUTS])
        return distill.baselines.opsa.token_scores(model, hidden, torch.tensor(ids))[0]

    before = logprob()
    chosen = lowest(before, [len(completion) for _, completion in ROLLOUTS], share=0.2)
    step(TrainConfig(manifest=Path(), out=Path(), method="opsa"), model, {"a": 1.0, "b": 1.0}, learning_rate=0.05)
    change = logprob() - before
    assert change[chosen].mean() < -0.05 < change[~chosen].mean()


@pytest.mark.parametrize("advantage", ["adaptive", pytest.param("fixed", marks=pytest.mark.slow)])
def test_mass_moves_from_the_tail_to_the_head(tmp_path: Path, manifest: Path, advantage: str) -> None:
    """Fresh samples of the trained student have less entropy, and their tokens are likelier to it."""
    options = {"steps": 16, "num_generations": 4, "questions_per_step": 8, "learning_rate": 5e-3}
    metrics, _ = train(tmp_path, manifest, **OPSA, **options, opsa_advantage=advantage, stop_on_collapse=False)
    assert metrics[-1]["student_entropy"] < 0.8 * metrics[0]["student_entropy"]
    assert metrics[-1]["student_logprob"] > 0.8 * metrics[0]["student_logprob"]
