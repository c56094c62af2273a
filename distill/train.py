"""Train a model on its own rollouts against itself with context (Neuron-OPSD, arXiv 2607.02460).

    python -m distill.train --manifest runs/demo/manifest --out runs/demo/nopsd

Each step: the student answers some of the manifest's selected questions from the bare prompt; the teacher, the same
model before training, reads the same completion after the manifest's solved examples; the student moves towards the
teacher's next-token distribution on the completion's tokens. No label and no reward is used.

Where the paper's body was not available, OPSD (arXiv 2601.18734) and SDFT guide the defaults: forward KL over the full
vocabulary, a frozen base teacher, cut-off rollouts left out of the loss.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from neurosig.cli import CommonConfig, PhaseTimer, config_record, progress, run_command
from neurosig.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

    from neurosig.manifest import Manifest
    from neurosig.models import LoadedModel
    from neurosig.sampling import SamplingConfig

logger = logging.getLogger(__name__)

RECORD, METRICS = "train.json", "metrics.jsonl"


@dataclass(kw_only=True)
class TrainConfig(CommonConfig):
    """Distil a manifest's contexts into the model.

    The student sees the bare question, the teacher also sees the manifest's solved examples; both read the student's
    own completion.
    """

    manifest: Path
    """Folder written by neurosig.export."""
    out: Path
    """Folder of metrics.jsonl, checkpoints/ and the final adapter/ (or model/)."""
    model: str | None = None
    """The manifest's model, if it lies elsewhere here; its weights must be the same."""
    allow_model_mismatch: bool = False
    """Train although the model is not the one that made the manifest; noted in the run record."""
    resume: bool = False
    """Continue from the newest checkpoint; leave a finished run alone."""
    overwrite: bool = False
    """Replace an earlier run in --out."""

    steps: int = 20
    """Optimizer steps."""
    questions_per_step: int = 8
    """Questions sampled a step."""
    num_generations: int = 2
    """Rollouts a question and step."""
    micro_batch_size: int = 16
    """Rollouts in one forward and backward; memory and speed only."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 3
    """Steps of linear warm-up, then constant."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    full: bool = False
    """Full fine-tuning (input and output embeddings stay frozen) instead of LoRA."""
    lora_r: int = 16
    """LoRA rank."""
    lora_alpha: int = 32
    """LoRA scale numerator."""

    teacher: Literal["base", "live", "ema"] = "base"
    """base: the model before training; live: the student as it stands; ema: the average of its past weights."""
    ema_decay: float = 0.99
    """What the ema teacher keeps of itself at each step."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"] = "forward_kl"
    """forward_kl is KL(teacher || student); sampled_token estimates reverse_kl from the student's own tokens."""
    topk: int = 0
    """The student's k likeliest vocabulary entries stand for all; 0 takes the whole vocabulary."""
    tail: bool = True
    """With --topk: the other entries count as one more."""
    beta: float = 0.5
    """Teacher's share of the mixture in jsd."""
    loss_temperature: float = 1.0
    """Divides both logits in the loss."""
    clip: Literal["none", "pointwise", "token"] = "none"
    """Cap on each vocabulary entry's, or each token's, contribution."""
    clip_value: float = 0.05
    """The cap, in nats."""
    loss_mean: Literal["token", "sequence"] = "token"
    """Mean over all completion tokens of the step, or over its rollouts, each with the mean of its tokens."""
    skip_first: int = 0
    """Completion tokens left out at the start of each rollout."""
    keep_truncated: bool = False
    """Learn from rollouts without an end-of-sequence token too."""

    temperature: float | None = None
    """Sampling temperature; default: the manifest's."""
    max_new_tokens: int | None = None
    """Completion tokens of a rollout; default: the manifest's."""
    batch_rows: int = 256
    """Rollouts decoded at a time (memory and speed only)."""
    seed: int = 0
    """Seed of the question order, the rollouts and the adapter."""
    save_steps: int = 10
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    stop_on_collapse: bool = True
    """Stop when lengths change by half, or entropy or distinct trigrams fall below half, and go back to the last
    checkpoint before."""
    collapse_window: int = 10
    """Steps whose mean is compared with that of the first steps."""
    dtype: str = "auto"
    """Parameter dtype; auto: float32 on CPU, bfloat16 on an accelerator."""
    device: str | None = None
    """torch device; default: the first accelerator, else the CPU."""


PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {},
    "organism": {"steps": 20, "learning_rate": 1e-3},
    "qwen3-4b": {
        "steps": 100,
        "questions_per_step": 32,
        "num_generations": 1,
        "micro_batch_size": 4,
        "learning_rate": 5e-6,
        "warmup_steps": 10,
        "lora_r": 64,
        "lora_alpha": 128,
        "clip": "pointwise",
        "save_steps": 25,
    },
}


def main(config: TrainConfig) -> None:
    """Run the training described by ``config``."""
    from neurosig.outdir import output_folder

    _check(config)
    owned = (METRICS, RECORD, "checkpoints", "adapter", "model", ".final")
    with output_folder(
        config.out, finished=RECORD, owned=owned, resume=config.resume, overwrite=config.overwrite
    ) as complete:
        if complete:
            logger.info("%s: already complete", config.out)
            return
        with PhaseTimer() as timer:
            _train(config, timer)


def _train(config: TrainConfig, timer: PhaseTimer) -> None:
    import torch

    from distill.checkpoints import load_before, load_newest, save_checkpoint
    from distill.collapse import collapse
    from distill.step import learn
    from distill.tasks import check_model, manifest_tasks, questions_of_step
    from distill.teacher import Teacher
    from neurosig.manifest import read_manifest
    from neurosig.models import load_model
    from neurosig.sampling import Prompt, sample

    with timer.phase("load"):
        manifest = read_manifest(config.manifest)
        loaded = load_model(
            config.model or manifest.header.model["id"],
            dtype=config.dtype,
            device=config.device,
            template=manifest.header.options["template"],
        )
        check_model(manifest.header, loaded, allow_mismatch=config.allow_model_mismatch)
    sampling = _sampling_config(config, manifest)
    tasks = manifest_tasks(manifest, loaded, max_new_tokens=sampling.max_new_tokens)

    torch.manual_seed(config.seed)
    model, adapter = _student(config, loaded)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    teacher = Teacher(config.teacher, model, adapter, config.ema_decay)
    key = _resume_key(config, manifest, sampling)
    done = load_newest(config.out / "checkpoints", parameters, optimizer, key, averages=teacher.average)
    log, history = _reopen_metrics(config.out / METRICS, done)
    stopped: dict[str, Any] | None = None

    with log, progress(total=config.steps, desc="train", quiet=config.quiet) as bar:
        bar.update(done)
        for step in range(done + 1, config.steps + 1):
            chosen = questions_of_step(len(tasks), step, per_step=config.questions_per_step, seed=config.seed)
            prompts = [Prompt(tasks[index].id, tasks[index].student_prompt) for index in chosen]
            with timer.phase("sample"):
                groups = list(sample(loaded, prompts, sampling, batch_rows=config.batch_rows, salt=f"step{step}"))
            timer.add_tokens("sample", sum(len(rollout.token_ids) for group in groups for rollout in group))
            by_id = {tasks[index].id: tasks[index] for index in chosen}
            pairs = [(by_id[rollout.question_id], rollout) for group in groups for rollout in group]
            rate = config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with timer.phase("learn"):
                metrics = learn(config, model, teacher, optimizer, pairs)
                teacher.update()
            timer.add_tokens("learn", int(metrics["tokens_in_loss"]))
            metrics = {"step": step, "learning_rate": rate, **metrics}
            _check_finite(metrics, [task.id for task in by_id.values()])
            if not metrics["rollouts_in_loss"]:
                logger.warning(
                    "step %d: no rollout is in the loss (%.0f%% ended by themselves); nothing was learned, raise "
                    "--max-new-tokens or give --keep-truncated", step, 100 * metrics["eos_rate"],
                )  # fmt: skip
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            history.append(metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", gap=f"{metrics['entropy_gap']:.3f}")
            bar.update()
            if step % config.save_steps == 0 or step == config.steps:
                with timer.phase("save"):
                    save_checkpoint(
                        config.out / "checkpoints",
                        step,
                        parameters,
                        optimizer,
                        key,
                        averages=teacher.average,
                        keep=config.keep_checkpoints,
                    )
            reason = collapse(history, config.collapse_window) if config.stop_on_collapse else None
            if reason is not None:
                kept = load_before(config.out / "checkpoints", step - config.collapse_window, parameters)
                if kept is None:
                    raise UserError(
                        f"step {step}: training collapsed ({reason}) before the first checkpoint; lower "
                        "--learning-rate or --save-steps, or give --no-stop-on-collapse"
                    )
                stopped = {"step": step, "reason": reason, "weights_of_step": kept}
                logger.warning("step %d: stopped, %s; the weights are those of step %d", step, reason, kept)
                break
    _write_final(config, manifest, loaded, model, adapter, stopped)


def _check(config: TrainConfig) -> None:
    for name, least in (
        ("steps", 1),
        ("questions_per_step", 1),
        ("num_generations", 1),
        ("micro_batch_size", 1),
        ("warmup_steps", 0),
        ("lora_r", 1),
        ("topk", 0),
        ("skip_first", 0),
        ("save_steps", 1),
        ("keep_checkpoints", 1),
        ("collapse_window", 1),
    ):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(config, name)}")
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"--ema-decay: expected 0 to below 1, got {config.ema_decay}")
    if config.divergence == "jsd" and not 0 < config.beta < 1:
        raise UserError(f"--beta: expected strictly between 0 and 1, got {config.beta}; its ends are the two KLs")
    if config.divergence == "sampled_token" and (config.topk or config.clip != "none"):
        raise UserError("--divergence sampled_token looks at one entry a token; leave out --topk and --clip")
    for name in ("learning_rate", "max_grad_norm", "loss_temperature", "clip_value"):
        if not (getattr(config, name) > 0 and math.isfinite(getattr(config, name))):
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(config, name)}")


def _sampling_config(config: TrainConfig, manifest: Manifest) -> SamplingConfig:
    from neurosig.sampling import SamplingConfig

    options = manifest.header.options
    return SamplingConfig(
        num_generations=config.num_generations,
        temperature=options["temperature"] if config.temperature is None else config.temperature,
        top_p=options["top_p"],
        top_k=options["top_k"],
        repetition_penalty=options["repetition_penalty"],
        max_new_tokens=options["max_new_tokens"] if config.max_new_tokens is None else config.max_new_tokens,
        seed=config.seed,
    )


def _student(config: TrainConfig, loaded: LoadedModel) -> tuple[Any, PeftModel | None]:
    """The trainable model in place: LoRA layers on all linear projections, or every weight but the embeddings."""
    model = loaded.model
    if config.full:
        model.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
        return model, None
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapter = get_peft_model(model, lora)
    adapter.eval()
    return model, adapter


def _check_finite(metrics: Mapping[str, int | float], question_ids: Sequence[str]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise UserError(
                f"step {metrics['step']}: {name} is {metrics[name]} (question ids {', '.join(question_ids)}); the last "
                "checkpoint is kept, lower --learning-rate and --resume from it"
            )


def _resume_key(config: TrainConfig, manifest: Manifest, sampling: SamplingConfig) -> dict[str, Any]:
    import torch

    free = {
        "preset",
        "config",
        "manifest",
        "out",
        "model",
        "resume",
        "overwrite",
        "save_steps",
        "keep_checkpoints",
    }
    record = {name: value for name, value in config_record(config).items() if name not in free}
    return {
        **record,
        **sampling.as_dict(),
        "manifest": manifest.header.content_sha256,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _reopen_metrics(path: Path, done: int) -> tuple[TextIO, list[dict[str, float | int]]]:
    """The metrics file cut back to ``done`` steps, open for appending, and what it holds."""
    from neurosig.fsio import write_atomic

    lines = path.read_text().splitlines(keepends=True)[:done] if path.exists() else []
    if len(lines) < done:
        raise UserError(f"{path}: {len(lines)} lines, but the checkpoint has done {done} steps; use --overwrite")
    write_atomic(path, "".join(lines))
    return path.open("a", encoding="utf-8"), [json.loads(line) for line in lines]


def _write_final(
    config: TrainConfig,
    manifest: Manifest,
    loaded: LoadedModel,
    model: Any,
    adapter: PeftModel | None,
    stopped: dict[str, Any] | None,
) -> None:
    """The adapter (or model) and then the run record, whose presence means that the run is complete."""
    from neurosig.fsio import sha256_file, write_atomic
    from neurosig.provenance import run_record

    name = "model" if adapter is None else "adapter"
    aside, target = config.out / ".final", config.out / name
    shutil.rmtree(aside, ignore_errors=True)
    (model if adapter is None else adapter).save_pretrained(str(aside))
    if adapter is None:
        loaded.tokenizer.save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    metrics = [json.loads(line) for line in (config.out / METRICS).read_text().splitlines()]
    record = {
        "config": config_record(config),
        "manifest_sha256": manifest.header.content_sha256,
        "domains": sorted({row.domain for row in manifest.rows}),
        "questions_selected": len(manifest.selected),
        "model": loaded.info.as_dict(),
        "weights": {file.name: sha256_file(file) for file in sorted(target.glob("*.safetensors"))},
        "first": metrics[0],
        "last": metrics[-1],
        "stopped": stopped,
        "run": run_record(),
    }
    write_atomic(config.out / RECORD, json.dumps(record, indent=1) + "\n")
    logger.info(
        "%s: %d steps on %d questions, entropy gap %.3f -> %.3f nats",
        target, len(metrics), len(manifest.selected), metrics[0]["entropy_gap"], metrics[-1]["entropy_gap"],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(TrainConfig, main, presets=PRESETS, prog="python -m distill.train"))
