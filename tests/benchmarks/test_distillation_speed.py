"""One training step beside TRL's trainers, as ratios within one run; printed, never asserted. Run with ``make bench``.

SmolLM2, LoRA r16 on every linear layer, fp32, no gradient checkpointing, forward KL on rollouts of exactly 64 tokens,
a teacher that is the model before training with a prompt of 362 tokens. Each trainer takes its first step: sampling,
teacher, student and optimizer.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import TrainConfig
from distill.step import learn
from distill.student import make_student, merged
from distill.tasks import Task
from distill.teacher import Teacher
from neurosig.models import LoadedModel
from neurosig.prompts import PromptBuilder, PromptConfig
from neurosig.questions import load_questions
from neurosig.sampling import Prompt, SamplingConfig, sample

pytestmark = [pytest.mark.bench, pytest.mark.smollm2]
TOKENS, TEACHER_TOKENS, RANK = 64, 362, 16
NEVER = "<|unused_end|>"


@pytest.fixture(scope="module")
def texts(smollm2: LoadedModel) -> list[tuple[str, str]]:
    """Student prompt and what the teacher sees before it, so that both together have 362 tokens."""
    tokenizer, builder = smollm2.tokenizer, PromptBuilder(smollm2.tokenizer, PromptConfig())
    questions = load_questions("world-facts:train")
    facts = " ".join(f"{question.question} {question.answer}." for question in questions[8:])
    pairs = []
    for question in questions[:8]:
        student = tokenizer.decode(builder.student(question))
        room = TEACHER_TOKENS - len(tokenizer(student)["input_ids"])
        context = tokenizer.decode(tokenizer(facts)["input_ids"][:room])
        assert len(tokenizer(context + student)["input_ids"]) == TEACHER_TOKENS
        pairs.append((student, context))
    return pairs


class StepTimer:
    """A transformers callback that times the optimizer step, sampling included."""

    def __new__(cls) -> Any:
        from transformers import TrainerCallback

        class Timer(TrainerCallback):
            seconds = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.start = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds = time.perf_counter() - self.start

        return Timer()


def ours(smollm2: LoadedModel, texts: Sequence[tuple[str, str]], k: int) -> dict[str, float]:
    """Seconds of a step's parts."""
    tokenizer = copy.deepcopy(smollm2.tokenizer)
    tokenizer.add_special_tokens({"eos_token": NEVER})
    model = copy.deepcopy(smollm2.model)
    model.generation_config.eos_token_id = None  # nothing ends a rollout
    loaded = replace(smollm2, model=model, tokenizer=tokenizer)
    config = TrainConfig(
        manifest=Path(), out=Path(), lora_r=RANK, lora_alpha=2 * RANK, keep_truncated=True, micro_batch_size=16
    )
    torch.manual_seed(0)
    student, adapter = make_student(config, loaded)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4)
    teacher = Teacher("base", student, adapter)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(smollm2.tokenizer(text)["input_ids"])

    tasks = [Task(f"q{n}", ids(prompt), ids(context + prompt)) for n, (prompt, context) in enumerate(texts)]
    sampling = SamplingConfig(num_generations=k, max_new_tokens=TOKENS)
    start = time.perf_counter()
    with merged(student, adapter):
        groups = list(sample(loaded, [Prompt(task.id, task.student_prompt) for task in tasks], sampling))
    sampled = time.perf_counter()
    by_id = {task.id: task for task in tasks}
    pairs = [(by_id[rollout.question_id], rollout) for group in groups for rollout in group]
    assert {len(rollout.token_ids) for _, rollout in pairs} == {TOKENS}
    metrics = learn(config, student, teacher, optimizer, pairs)
    assert metrics["rollouts_in_loss"] == len(texts) * k and metrics["loss"] > 0
    return {"sampling": sampled - start, "learning": time.perf_counter() - sampled}


def common(folder: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": rows,
        "max_completion_length": TOKENS,
        "generation_kwargs": {"min_new_tokens": TOKENS},  # no end-of-sequence token before
        "learning_rate": 1e-4,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "shuffle_dataset": False,
        "disable_tqdm": True,
    }


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def model_and_tokenizer(smollm2: LoadedModel) -> tuple[Any, Any]:
    tokenizer = copy.deepcopy(smollm2.tokenizer)
    tokenizer.padding_side = "left"
    return copy.deepcopy(smollm2.model), tokenizer


def sdft(smollm2: LoadedModel, texts: Sequence[tuple[str, str]], k: int, folder: Path, mode: str) -> float:
    """TRL's SDFT: the teacher is the base model, its prompt is made of the privileged context and the prompt."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    timer = StepTimer()
    model, tokenizer = model_and_tokenizer(smollm2)
    trainer = SDFTTrainer(
        model=model,
        args=SDFTConfig(
            **common(folder, len(texts) * k),
            num_generations=k,
            distillation_mode=mode,
            distillation_alpha=0.0,
            teacher_prompt_template="{privileged_context}{prompt}",
            teacher_model_kind="base",
        ),
        train_dataset=Dataset.from_list([{"prompt": p, "privileged_context": c} for p, c in texts]),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[timer],
    )
    widths = []
    build = trainer.teacher_context_builder.build

    def recorded(*args: Any) -> Any:
        built = build(*args)
        widths.append(built["teacher_input_ids"].shape)
        return built

    trainer.teacher_context_builder.build = recorded
    trainer.train()
    assert widths == [(len(texts) * k, TEACHER_TOKENS + TOKENS)]
    return timer.seconds


def distillation(smollm2: LoadedModel, texts: Sequence[tuple[str, str]], k: int, folder: Path) -> float:
    """TRL's chunked distillation, its teacher given a prompt of its own: the base model under the adapter."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    context_of = dict(texts)
    widths = []

    class Privileged(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            prompts = [context_of[row["prompt"]] + row["prompt"] for row in inputs]
            encoded = self.processing_class(text=prompts, padding=True, return_tensors="pt")
            return {
                **output,
                "teacher_ids": torch.cat([encoded["input_ids"], output["completion_ids"]], dim=1),
                "teacher_mask": torch.cat([encoded["attention_mask"], output["completion_mask"]], dim=1),
            }

        def _compute_loss(self, student: Any, inputs: Any, num_items_in_batch: Any) -> Any:
            widths.append(inputs["teacher_ids"].shape)
            completion = inputs["completion_ids"].shape[1]
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            learned = self._get_last_hidden_state(student, ids, mask, completion)
            with torch.no_grad(), student.disable_adapter():
                target = self._get_last_hidden_state(student, inputs["teacher_ids"], inputs["teacher_mask"], completion)
            head = student.get_output_embeddings()
            loss, entropy, valid = _chunked_divergence_loss(
                learned, target, head.weight, head.weight, inputs["completion_mask"], self.beta, num_items_in_batch
            )
            return loss, entropy.detach(), valid

    timer = StepTimer()
    model, tokenizer = model_and_tokenizer(smollm2)
    rows = [{"prompt": prompt} for prompt, _ in texts for _ in range(k)]  # it samples once a row
    trainer = Privileged(
        model=model,
        args=DistillationConfig(**common(folder, len(rows)), beta=0.0),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[timer],
    )
    trainer.train()
    assert [tuple(shape) for shape in widths] == [(len(rows), TEACHER_TOKENS + TOKENS)]
    return timer.seconds


@pytest.fixture(params=[(2, 8), (8, 1)], ids=["2x8", "8x1"])
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    yield request.param
    gc.collect()


def test_a_training_step_against_trl(
    smollm2: LoadedModel,
    texts: Sequence[tuple[str, str]],
    shape: tuple[int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions, k = shape
    texts = texts[:questions]
    parts = ours(smollm2, texts, k)
    theirs = {
        "SDFT topk": sdft(smollm2, texts, k, tmp_path / "topk", "topk_logits"),
        "SDFT full logits": sdft(smollm2, texts, k, tmp_path / "full", "full_logits"),
        "Distillation with a privileged prompt": distillation(smollm2, texts, k, tmp_path / "distillation"),
    }
    mine = sum(parts.values())
    with capsys.disabled():
        print(f"\ntraining step, {questions} questions x {k} rollouts x {TOKENS} tokens: {mine:.1f} s")
        print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()))
        for name, seconds in theirs.items():
            print(f"{mine / seconds:.2f} of TRL's {name} ({seconds:.1f} s)")
