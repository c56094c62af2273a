"""Training that continues an adapter: where it starts, what its teacher is, and what its records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from distill.tasks import load_student
from distill.teacher import Teacher
from distill.train import main
from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.models.completion_hidden import completion_hidden
from neurosig.runtime.errors import UserError
from tests.support.flow import export_config, interrupted_at, make_manifest, write_questions
from tests.support.processes import exit_codes, run_training, start_ranks, train_arguments
from tests.support.runs import metrics_of, train, train_config
from tests.support.tiny import tiny_model

ROUND: dict[str, Any] = {"steps": 4, "save_steps": 2, "learning_rate": 0.02, "lora_r": 4, "lora_alpha": 8}
SECOND: dict[str, Any] = {"steps": 3, "save_steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model, and manifests of it: with contexts and without, on other questions than the first round's."""
    folder = tmp_path_factory.mktemp("rounds")
    train(folder, make_manifest(folder), "first", **ROUND)
    others = write_questions(folder / "others.jsonl", n=12)
    adapter = folder / "first"
    export(export_config(folder, folder / "model", others, "second", adapter=adapter))
    export(export_config(folder, folder / "model", others, "bare", adapter=adapter, context_policy="none"))
    return folder


def test_the_base_teacher_of_a_continued_adapter_is_the_model_before_this_training() -> None:
    """Not the model without it; and the student has its own weights again, to the bit."""
    model, start = tiny_model("llama"), tiny_model("llama")
    for one in (model, start):
        torch.manual_seed(0)
        adapter = get_peft_model(one, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    teacher = Teacher("base", model, adapter, continued=True)
    args = ([(5, 6, 7)], [[8, 9]])
    with torch.no_grad():
        wanted = completion_hidden(start, *args)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1)
    now = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with teacher.active() as base:
        found = completion_hidden(base, *args)
        assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert all(torch.equal(parameter, now[name]) for name, parameter in model.named_parameters())
    assert not torch.allclose(completion_hidden(model, *args), wanted, atol=1e-3)
    assert not torch.allclose(completion_hidden(tiny_model("llama"), *args), wanted, atol=1e-3)


def test_a_second_round_starts_at_the_first_ones_model(folder: Path) -> None:
    """With the student's own prompt the teacher teaches nothing at first: both are the model of the first round."""
    metrics, _ = train(folder, folder / "bare", "nothing", **SECOND)
    assert metrics[0]["divergence"] == pytest.approx(0, abs=1e-9)
    first = load_file(folder / "first" / "adapter" / "adapter_model.safetensors")
    result = load_file(folder / "nothing" / "adapter" / "adapter_model.safetensors")
    assert result.keys() == first.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-6)

    metrics, _ = train(folder, folder / "second", **SECOND)
    assert metrics[0]["divergence"] > 1e-4
    moved = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    steps = [(moved[name] - tensor).abs().max().item() for name, tensor in first.items()]
    assert 1e-4 < max(steps) <= 3 * 1e-3 * 1.01  # AdamW's first steps are at most the learning rate


def test_its_records_name_both_trainings(folder: Path) -> None:
    if not (folder / "run").exists():
        train(folder, folder / "second", **SECOND)
    record = json.loads((folder / "run" / "train.json").read_text())
    first = json.loads((folder / "first" / "train.json").read_text())
    assert record["model"]["adapter"] == first["weights"]["adapter_model.safetensors"]
    assert json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    used = [set((folder / run / "adapter" / "trained_on.txt").read_text().split()) for run in ("first", "run")]
    assert len(used[0]) == 8 and len(used[1]) == 12 and used[0] < used[1]
    assert "Training continued the adapter" in (folder / "run" / "adapter" / "README.md").read_text()


def test_a_killed_second_round_resumes_to_the_same_bytes(folder: Path) -> None:
    straight = train(folder, folder / "second", "straight", **SECOND)
    with interrupted_at(3), pytest.raises(KeyboardInterrupt):
        main(train_config(folder, folder / "second", "broken", **SECOND))
    assert train(folder, folder / "second", "broken", resume=True, **SECOND) == straight


def test_full_training_starts_from_the_merged_model(folder: Path) -> None:
    main(train_config(folder, folder / "bare", "full", full=True, **SECOND))
    metrics = [json.loads(line) for line in (folder / "full" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert metrics[0]["student_entropy"] == pytest.approx(
        json.loads((folder / "nothing" / "metrics.jsonl").read_text().splitlines()[0])["student_entropy"], rel=1e-3
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora_r": 8}, "--lora-r: training continues .*, which has 4; leave it out"),
        ({"lora_targets": ("q_proj",)}, "--lora-targets: training continues .*; leave it out"),
        ({"adapter": Path("nowhere")}, "--adapter nowhere: no adapter_model.safetensors there"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        main(train_config(folder, folder / "second", "refused", **SECOND, **options))
    assert not (folder / "refused").exists()


def test_grpo_has_no_reference_with_an_adapter(folder: Path) -> None:
    config = train_config(folder, folder / "second", method="ttrl", num_generations=4)
    with pytest.raises(UserError, match="--method ttrl: its KL reference is the model without an adapter"):
        load_student(config, read_manifest(folder / "second"), None)


def test_another_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"the manifest was made by .*: adapter [0-9a-f]{12} against [0-9a-f]{12}; give"
    ):
        early = folder / "first" / "checkpoints" / "step-000002"
        main(train_config(folder, folder / "second", "refused", adapter=early, **SECOND))


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [None, "model"])
def test_two_processes_with_fsdp2_have_the_teacher_of_one(folder: Path, teacher: str | None) -> None:
    """The adapter of the round before is exchanged in sharded weights; another model is sharded, too."""
    name = f"sharded-{teacher}"
    changes = {**SECOND, **({} if teacher is None else {"teacher_model": str(folder / teacher)})}
    words = train_arguments(folder / "second", folder / name, **changes)
    assert exit_codes(start_ranks(folder / f"log-{name}", 2, run_training, words, fsdp=True)) == [0, 0], (
        folder / f"log-{name}" / "rank0.log"
    ).read_text()
    alone, _ = train(folder, folder / "second", f"alone-{teacher}", **changes)
    for step, expected in zip(metrics_of(folder / name), alone, strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
