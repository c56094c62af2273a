"""LMSI, TTRL and Intuitor on a manifest's questions, through TRL's trainers.

    python -m distill.train --method ttrl --manifest runs/demo/manifest --out runs/demo/ttrl --num-generations 8

They share N-OPSD's questions of each step, its prompts, parser, sampler, seeds, adapter, optimizer, schedule and output
files; each run's record counts the tokens it spent.
``--questions-of all`` takes every question, as these papers do. Of a manifest's question weights they use one: a
question of weight 0 is left out.

**LMSI** (arXiv 2210.11610): supervised fine-tuning (`trl.SFTTrainer`) on the manifest's rollouts that give the
majority's answer: their exact token ids, the loss on the completion alone. A step takes as many of them as N-OPSD
samples. The paper samples 32 paths at T=0.7 and trains 10,000 steps at 5e-5 with 32 paths per batch.

**TTRL** (arXiv 2504.16084): GRPO (`trl.GRPOTrainer`), reward 1 for the majority's answer. Of the paper's public scripts
(verl, examples/ttrl): vote over 64 samples and train on the first 32 (``--vote-generations``), T=1, clip 0.2, mean over
all tokens of the batch (TRL's ``dapo``), advantages over the group's standard deviation, low-variance KL to the base
with verl's default weight 0.001, learning rate 5e-7. They make several updates on a batch; we make one, as N-OPSD does.

**Intuitor** (arXiv 2505.19590): GRPO, reward self-certainty. Of its public recipes (open-r1 and verl): 8 generations,
KL weight 0.005, clip 0.2, learning rate 3e-6; the token mean is verl's default.

As with N-OPSD, cut-off rollouts leave the loss unless ``--keep-truncated`` is given; they still vote and are rewarded.
Only N-OPSD has stop rules and options of teacher and divergence.

TRL's own checkpoints contain pickles, so `distill.checkpoints` writes them instead. A resumed run gives the same bytes:
the order of the questions and every random number depend on the seed and the step alone.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import huggingface_hub.constants
import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from distill.baselines.rewards import Rollouts, consistent_rollouts
from distill.checkpoints import load_newest, resume_key, save_checkpoint
from distill.config import TrainConfig
from distill.distributed import Ranks
from distill.metrics_log import MetricsLog, rollout_metrics
from distill.optimizer import learning_rates, make_optimizer
from distill.output import describe_checkpoints, write_final
from distill.student import make_student
from distill.tasks import load_student, question_prompts, questions_of_step, read_manifests, sampling_config
from neurosig.manifest import Manifest
from neurosig.models.load import LoadedModel
from neurosig.runtime.cli import PhaseTimer
from neurosig.runtime.errors import UserError

KL_WEIGHT = {"ttrl": 0.001, "intuitor": 0.005}
Metrics = dict[str, Any]
T = TypeVar("T")


def train_baseline(config: TrainConfig, timer: PhaseTimer, ranks: Ranks) -> None:
    """Run LMSI, TTRL or Intuitor as ``config`` says; under a launcher, as one of its processes.

    Raises:
        UserError: Nothing to train on, a batch that the processes cannot share, a prompt that does not fit, a loss
            that is not finite.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports each trainer that is made
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    disable_progress_bars()
    process = PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available())
    with timer.phase("load"):
        manifest = read_manifests(config)
        loaded = load_student(config, manifest, _device(config, process))
    sampling = sampling_config(config, manifest)
    prompts = question_prompts(manifest, loaded, config, max_new_tokens=sampling.max_new_tokens)
    torch.manual_seed(config.seed)
    disable_dropout_in_model(loaded.model)
    model, adapter = make_student(config, loaded, manifest.header.adapter(config.adapter))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(config, parameters.values())
    reference = copy.deepcopy(model).requires_grad_(False) if config.full and config.method != "lmsi" else None
    key = resume_key(config, manifest, sampling, loaded.info.dtype)
    done = load_newest(config.out / "checkpoints", parameters, optimizer, key)
    batches: Consistent | Rollouts
    if config.method == "lmsi":
        batches = Consistent(config, manifest, model if adapter is None else adapter, prompts)
    else:
        plan = plan_steps(config, list(prompts), config.questions_per_step)
        batches = Rollouts(config, manifest, loaded, model, adapter, sampling, prompts, plan, done, timer)
    ranks.on_main(lambda: describe_checkpoints(config, manifest, loaded, model, adapter))
    with MetricsLog(config, done, ranks, timer) as log:
        if done < config.steps:
            trainer = _trainer(config, batches, loaded, optimizer, reference, done)
            trainer.add_callback(_Saver(config, parameters, optimizer, key, batches, done, log, ranks, timer))
            trainer.train()
    question_ids = [[item if isinstance(item, str) else item.question_id for item in step] for step in batches.plan]
    write_final(config, manifest, loaded, model, adapter, log.history, question_ids, ranks)


def plan_steps(config: TrainConfig, items: Sequence[T], per_step: int) -> list[list[T]]:
    """The items of each step: seeded epochs over ``items``, a function of the step alone."""
    return [
        [items[i] for i in questions_of_step(len(items), step, per_step=per_step, seed=config.seed)]
        for step in range(1, config.steps + 1)
    ]


def _device(config: TrainConfig, process: PartialState) -> str:
    """The device that the launcher gave this process."""
    device = "cpu" if process.device.type == "cpu" else str(process.device)  # a launcher says cpu:0
    if config.device not in (None, device, device.split(":")[0]):
        raise UserError(
            f"--device {config.device}: --method {config.method} runs on {device}; set CUDA_VISIBLE_DEVICES"
        )
    return device


def _trainer(
    config: TrainConfig,
    batches: Consistent | Rollouts,
    loaded: LoadedModel,
    optimizer: torch.optim.Optimizer,
    reference: PreTrainedModel | None,
    done: int,
) -> SFTTrainer | GRPOTrainer:
    """TRL's trainer for the steps after ``done``."""
    rate_of_step = learning_rates(config)
    shared: dict[str, Any] = {
        "processing_class": copy.deepcopy(loaded.tokenizer),  # TRL gives it a padding token
        "optimizers": (
            optimizer,
            LambdaLR(optimizer, lambda step: rate_of_step(done + step + 1) / config.learning_rate),
        ),
    }
    trainer: SFTTrainer | GRPOTrainer
    if isinstance(batches, Consistent):
        arguments = _arguments(
            SFTConfig,
            config,
            done,
            len(batches.plan[0]),
            max_length=None,
            completion_only_loss=True,
            train_sampling_strategy="sequential",
        )
        trainer = SFTTrainer(batches.model, args=arguments, train_dataset=batches.dataset(done), **shared)
    else:
        trainer = _grpo_trainer(config, batches, reference, done, shared)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(f"--method {config.method} runs on one device or with DDP; launch it without FSDP or DeepSpeed")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _grpo_trainer(
    config: TrainConfig, rollouts: Rollouts, reference: PreTrainedModel | None, done: int, shared: Mapping[str, Any]
) -> GRPOTrainer:
    def reward(reward: list[float | None], **_: Any) -> list[float | None]:
        return reward

    arguments = _arguments(
        GRPOConfig,
        config,
        done,
        len(rollouts.plan[0]) * config.num_generations,
        num_generations=config.num_generations,
        max_completion_length=rollouts.sampling.max_new_tokens,
        temperature=rollouts.sampling.temperature,
        beta=0.0 if config.full else KL_WEIGHT[config.method],
        num_iterations=1,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        use_bias_correction_kl=False,
        shuffle_dataset=False,
    )
    names = [name for step in rollouts.plan[done:] for name in step]
    trainer = GRPOTrainer(
        rollouts.model if rollouts.adapter is None else rollouts.adapter,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": names}),  # TRL repeats each for its generations
        rollout_func=rollouts,
        **shared,
    )
    if rollouts.adapter is not None:
        rollouts.adapter.delete_adapter("ref")  # TRL's copy of the adapter; without it, the reference is the base
    else:
        assert reference is not None
        add_fused_lm_head(reference, temperature=trainer.temperature)
        trainer.beta, trainer.ref_model = KL_WEIGHT[config.method], reference.eval()
    return trainer


def _arguments(kind: Any, config: TrainConfig, done: int, rows: int, **own: Any) -> Any:
    """TRL's arguments for steps of ``rows`` rollouts, in equal micro-batches on every process."""
    process = PartialState()
    if rows % process.num_processes:
        raise UserError(
            f"a step of {rows} rollouts cannot be shared by {process.num_processes} processes; change "
            "--questions-per-step or --num-generations"
        )
    local = rows // process.num_processes
    micro = max(size for size in range(1, config.micro_batch_size + 1) if local % size == 0)
    on_cpu = process.device.type == "cpu"
    arguments = kind(
        output_dir=str(config.out),
        max_steps=config.steps - done,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=local // micro,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=on_cpu,
        bf16=False,  # the weights' dtype is --dtype, without autocast, as with N-OPSD
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **own,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process drives one device, though it may see more
    return arguments


class Consistent:
    """LMSI's batches: seeded epochs over all consistent rollouts."""

    def __init__(self, config: TrainConfig, manifest: Manifest, model: Any, prompts: Mapping[str, tuple[int, ...]]):
        found = consistent_rollouts(manifest, list(prompts), keep_truncated=config.keep_truncated)
        self.model, self.prompts = model, prompts
        self.opens_thought = manifest.header.answer_reader().prompt_opens_thought
        self.plan = plan_steps(config, found, config.questions_per_step * config.num_generations)

    def dataset(self, done: int) -> Dataset:
        """The examples of the steps after ``done``: token ids as sampled, and which of them are learned."""
        examples = [(self.prompts[r.question_id], r.completion_ids) for rollouts in self.plan[done:] for r in rollouts]
        return Dataset.from_dict(
            {
                "input_ids": [[*prompt, *ids] for prompt, ids in examples],
                "completion_mask": [[0] * len(prompt) + [1] * len(ids) for prompt, ids in examples],
            }
        )

    def metrics(self, step: int) -> Metrics:
        rollouts = self.plan[step - 1]
        tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        return {
            **rollout_metrics(rollouts, self.opens_thought),
            "rollouts_in_loss": len(rollouts),
            "tokens_in_loss": tokens,
            "rollouts": 0,
            "generated_tokens": 0,
            "teacher_tokens": 0,
        }


class _Saver(TrainerCallback):
    """Seeds each step, logs its metrics and writes the checkpoints."""

    _RENAMED: Mapping[str, str] = {
        "reward": "reward",
        "reward_std": "reward_std",
        "frac_reward_zero_std": "groups_without_signal",
        "kl": "kl",
        "entropy": "student_entropy",
    }

    def __init__(
        self,
        config: TrainConfig,
        parameters: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        key: Mapping[str, Any],
        batches: Consistent | Rollouts,
        done: int,
        log: MetricsLog,
        ranks: Ranks,
        timer: PhaseTimer,
    ):
        self.config, self.parameters, self.optimizer, self.key = config, parameters, optimizer, key
        self.batches, self.done, self.log, self.main, self.timer = batches, done, log, ranks.main, timer
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.manual_seed(self.config.seed * 1_000_003 + self.done + state.global_step)  # TRL shuffles a step's rows
        self.started = time.perf_counter() - self.timer.seconds.get("sample", 0.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where every rollout was masked, drop the zero gradients: AdamW's momentum would still move the weights."""
        if not self.batches.metrics(self.done + state.global_step + 1)["tokens_in_loss"]:
            self.optimizer.zero_grad(set_to_none=True)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs: Mapping[str, float] = given["logs"]
        if "grad_norm" not in logs:  # the summary at the end
            return
        step = self.done + state.global_step
        metrics: Metrics = {"step": step, **{name: logs[name] for name in ("learning_rate", "loss", "grad_norm")}}
        metrics |= {ours: logs[theirs] for theirs, ours in self._RENAMED.items() if theirs in logs}
        metrics |= self.batches.metrics(step)
        if not metrics["tokens_in_loss"]:
            metrics |= dict.fromkeys({"loss", "grad_norm", "kl", "student_entropy"} & metrics.keys())
        learned = time.perf_counter() - self.started - self.timer.seconds.get("sample", 0.0)
        self.timer.seconds["learn"] = self.timer.seconds.get("learn", 0.0) + learned
        self.log.add(metrics)
        if self.main and self.config.saves_after(step):
            folder = self.config.out / "checkpoints"
            saving: Any = {"keep": self.config.keep_checkpoints, "every": self.config.save_steps}
            save_checkpoint(folder, step, self.parameters, self.optimizer, self.key, **saving)
