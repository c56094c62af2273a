"""Train a model on its own rollouts against itself with context (Neuron-OPSD, arXiv 2607.02460).

    python -m distill.train --manifest runs/demo/manifest --out runs/demo/nopsd

``--method`` names a baseline instead: U-OPSD here, the others in `distill.baselines`.

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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from distill.config import BASELINES, PRESETS, TrainConfig, check_options, resume_key, sampling_config
from distill.output import RECORD, write_final
from distill.trackers import check_trackers
from neurosig.cli import PhaseTimer, progress, run_command
from neurosig.errors import UserError

if TYPE_CHECKING:
    from neurosig.rollouts import Rollout
    from neurosig.sampling import SamplingConfig

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def main(config: TrainConfig) -> None:
    """Run the training described by ``config``."""
    from neurosig.outdir import output_folder

    check_options(config)
    check_trackers(config)
    if int(os.environ.get("RANK", "0")) and config.method in BASELINES:  # the first process holds the folder for all
        with PhaseTimer() as timer:
            _run(config, timer)
        return
    owned = (METRICS, RECORD, "development.jsonl", "checkpoints", "adapter", "model", ".final", "tensorboard", "wandb")
    with output_folder(
        config.out, finished=RECORD, owned=owned, resume=config.resume, overwrite=config.overwrite
    ) as complete:
        if complete:
            logger.info("%s: already complete", config.out)
            return
        with PhaseTimer() as timer:
            _run(config, timer)


def _run(config: TrainConfig, timer: PhaseTimer) -> None:
    if config.method in BASELINES:
        from distill.baselines import train_baseline

        train_baseline(config, timer)
    else:
        _train(config, timer)


def _train(config: TrainConfig, timer: PhaseTimer) -> None:
    import torch

    from distill.checkpoints import load_before, load_newest, save_checkpoint
    from distill.collapse import collapse
    from distill.development import Development
    from distill.rewards import agreeing, check_majority_context
    from distill.step import learn
    from distill.student import make_student, merged
    from distill.tasks import check_model, manifest_tasks, prompt_builder, replay_tasks, tasks_of_step
    from distill.teacher import Teacher
    from distill.trackers import trackers
    from neurosig.manifest import read_manifest
    from neurosig.models import load_model
    from neurosig.sampling import Prompt, sample

    with timer.phase("load"):
        manifest = read_manifest(config.manifest)
        if config.method == "u-opsd":
            check_majority_context(manifest)
        loaded = load_model(
            config.model or manifest.header.model["id"],
            dtype=config.dtype,
            device=config.device,
            template=manifest.header.options["template"],
        )
        check_model(manifest.header, loaded, allow_mismatch=config.allow_model_mismatch)
    sampling = sampling_config(config, manifest)
    tasks = manifest_tasks(manifest, loaded, max_new_tokens=sampling.max_new_tokens)
    replayed = (
        []
        if config.replay is None
        else replay_tasks(
            config.replay, manifest.header, loaded, weight=config.replay_weight, max_new_tokens=sampling.max_new_tokens
        )
    )

    torch.manual_seed(config.seed)
    model, adapter = make_student(config, loaded)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    teacher = Teacher(config.teacher, model, adapter, config.ema_decay)
    key = resume_key(config, manifest, sampling)
    done = load_newest(config.out / "checkpoints", parameters, optimizer, key, averages=teacher.average)
    log, history = reopen_metrics(config.out / METRICS, done)
    stopped: dict[str, Any] | None = None

    def draw(prompts: Sequence[Prompt], sampling: SamplingConfig, salt: str) -> list[list[Rollout]]:
        with merged(model, adapter):
            return list(sample(loaded, prompts, sampling, batch_rows=config.batch_rows, salt=salt))

    development = None
    if config.dev_questions is not None:
        with timer.phase("development"):
            votes = replace(sampling, num_generations=config.dev_generations)
            builder = prompt_builder(manifest.header, loaded)
            development = Development(config, votes, builder, manifest.header, draw)
            development.reopen(done)

    bar = progress(total=config.steps, desc="train", quiet=config.quiet)
    with log, bar, trackers(config) as report:
        bar.update(done)
        for step in range(done + 1, config.steps + 1):
            chosen = tasks_of_step(tasks, step, per_step=config.questions_per_step, seed=config.seed)
            chosen += tasks_of_step(replayed, step, per_step=config.replay_per_step, seed=config.seed)
            prompts = [Prompt(task.id, task.student_prompt) for task in chosen]
            with timer.phase("sample"):
                groups = draw(prompts, sampling, f"step{step}")
            timer.add_tokens("sample", sum(len(rollout.token_ids) for group in groups for rollout in group))
            by_id = {task.id: task for task in chosen}
            pairs = [(by_id[rollout.question_id], rollout) for group in groups for rollout in group]
            left_out = agreeing(manifest, [rollout for _, rollout in pairs]) if config.on_disagreeing else set()
            rate = config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with timer.phase("learn"):
                metrics = learn(config, model, teacher, optimizer, pairs, left_out)
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
            report(metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", gap=f"{metrics['entropy_gap']:.3f}")
            bar.update()
            saving = step % config.save_steps == 0 or step == config.steps
            reason, good = None, step - config.collapse_window
            if config.stop_on_collapse:
                reason = collapse(history, config.collapse_window)
            if saving and development is not None:
                with timer.phase("development"):
                    development.measure(step)
                if reason is None:
                    reason, good = development.fallen, step - 1
            if reason is not None:  # decided before saving, so that a resumed run decides again
                kept = load_before(config.out / "checkpoints", good, parameters)
                if kept is None:
                    raise UserError(
                        f"step {step}: training collapsed ({reason}) before the first checkpoint; lower "
                        "--learning-rate or --save-steps, or leave out the rule that stopped it"
                    )
                stopped = {"step": step, "reason": reason, "weights_of_step": kept}
                logger.warning("step %d: stopped, %s; the weights are those of step %d", step, reason, kept)
                break
            if saving:
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
    write_final(config, manifest, loaded, model, adapter, history, stopped)


def _check_finite(metrics: Mapping[str, int | float], question_ids: Sequence[str]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise UserError(
                f"step {metrics['step']}: {name} is {metrics[name]} (question ids {', '.join(question_ids)}); the last "
                "checkpoint is kept, lower --learning-rate and --resume from it"
            )


def reopen_metrics(path: Path, done: int) -> tuple[TextIO, list[dict[str, float | int]]]:
    """The metrics file cut back to ``done`` steps, open for appending, and what it holds."""
    from neurosig.fsio import write_atomic

    lines = path.read_text().splitlines(keepends=True)[:done] if path.exists() else []
    if len(lines) < done:
        raise UserError(f"{path}: {len(lines)} lines, but the checkpoint has done {done} steps; use --overwrite")
    write_atomic(path, "".join(lines))
    return path.open("a", encoding="utf-8"), [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(run_command(TrainConfig, main, presets=PRESETS, prog="python -m distill.train"))
