"""One training step, by us and by TRL's trainers, for the benchmarks on a CPU and on a GPU.

Rollouts of exactly ``Step.tokens`` tokens, a teacher that is the model before training, LoRA on every linear layer,
forward KL, no gradient checkpointing. Each trainer takes its first step: sampling, teacher, student and optimizer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.config import TrainConfig
from distill.step import learn
from distill.student import make_student, sampling_weights
from distill.tasks import Task
from distill.teacher import Teacher
from neurosig.models.load import LoadedModel
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample


class Endless(LoadedModel):
    """A model without an end token."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (-1,)


@dataclass(frozen=True)
class Step:
    """Input of a step: a fresh model per trainer, (student prompt, its context) pairs, K, token counts."""

    make: Callable[[], LoadedModel]
    texts: Sequence[tuple[str, str]]
    k: int
    tokens: int
    teacher_tokens: int
    rank: int = 16
    micro: int = 16

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes per step, each of ``micro`` rollouts."""
        return -(-len(self.texts) * self.k // self.micro)


class StepTimer:
    """A transformers callback that times the optimizer step, sampling included."""

    def __new__(cls) -> Any:
        from transformers import TrainerCallback

        class Timer(TrainerCallback):
            seconds = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.start = now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds = now() - self.start

        return Timer()


def ours(step: Step) -> dict[str, float]:
    """Seconds of sampling and of learning."""
    fresh = step.make()
    loaded = Endless(fresh.model, fresh.tokenizer, fresh.info)
    config = TrainConfig(
        manifest=Path(),
        out=Path(),
        lora_r=step.rank,
        lora_alpha=2 * step.rank,
        keep_truncated=True,
        micro_batch_size=step.micro,
    )
    torch.manual_seed(0)
    student, adapter = make_student(config, loaded)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4)
    teacher = Teacher("base", student, adapter)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(fresh.tokenizer(text)["input_ids"])

    tasks = [Task(f"q{n}", ids(prompt), ids(context + prompt)) for n, (prompt, context) in enumerate(step.texts)]
    sampling = SamplingConfig(num_generations=step.k, temperature=1.0, max_new_tokens=step.tokens)
    start = now()
    prompts = [Prompt(task.id, task.student_prompt) for task in tasks]
    with sampling_weights(student, adapter) as weight_of:
        groups = list(sample(loaded, prompts, sampling, weight_of=weight_of))
    sampled = now()
    by_id = {task.id: task for task in tasks}
    pairs = [(by_id[rollout.question_id], rollout) for group in groups for rollout in group]
    assert {len(rollout.completion_ids) for _, rollout in pairs} == {step.tokens}
    metrics = learn(config, student, teacher, optimizer, pairs)
    assert metrics["rollouts_in_loss"] == len(step.texts) * step.k and metrics["loss"] > 0
    return {"sampling": sampled - start, "learning": now() - sampled}


def common(step: Step, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": len(step.texts) * step.k // step.micro_batches,
        "gradient_accumulation_steps": step.micro_batches,
        "max_completion_length": step.tokens,
        "generation_kwargs": {"min_new_tokens": step.tokens},  # no end-of-sequence token before
        "learning_rate": 1e-4,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "shuffle_dataset": False,
        "disable_tqdm": True,
    }


def lora(step: Step) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=step.rank, lora_alpha=2 * step.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def model_and_tokenizer(step: Step) -> tuple[Any, Any]:
    fresh = step.make()
    tokenizer = copy.deepcopy(fresh.tokenizer)
    tokenizer.padding_side = "left"
    return fresh.model, tokenizer


def sdft(step: Step, folder: Path, mode: str) -> float:
    """Seconds of TRL's SDFT: the base model, prompted with privileged context and prompt, is the teacher."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    timer = StepTimer()
    model, tokenizer = model_and_tokenizer(step)
    trainer = SDFTTrainer(
        model=model,
        args=SDFTConfig(
            **common(step, folder),
            num_generations=step.k,
            distillation_mode=mode,
            distillation_alpha=0.0,
            teacher_prompt_template="{privileged_context}{prompt}",
            teacher_model_kind="base",
        ),
        train_dataset=Dataset.from_list([{"prompt": p, "privileged_context": c} for p, c in step.texts]),
        processing_class=tokenizer,
        peft_config=lora(step),
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
    assert sum(rows for rows, _ in widths) == len(step.texts) * step.k
    assert {width for _, width in widths} == {step.teacher_tokens + step.tokens}
    return timer.seconds


def distillation(step: Step, folder: Path) -> float:
    """Seconds of TRL's chunked distillation, changed so that the base model has a prompt of its own as teacher."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    context_of = dict(step.texts)
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
    model, tokenizer = model_and_tokenizer(step)
    rows = [{"prompt": prompt} for prompt, _ in step.texts for _ in range(step.k)]  # it samples once per row
    trainer = Privileged(
        model=model,
        args=DistillationConfig(**common(step, folder), beta=0.0),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(step),
        callbacks=[timer],
    )
    trainer.train()
    assert sum(count for count, _ in widths) == len(rows)
    assert {width for _, width in widths} == {step.teacher_tokens + step.tokens}
    return timer.seconds


def now() -> float:
    """Seconds, after the accelerator has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
