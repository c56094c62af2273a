"""Train a model on its own rollouts against itself with context (Neuron-OPSD, arXiv 2607.02460).

    python -m distill.train --manifest runs/demo/manifest --out runs/demo/nopsd
    accelerate launch --num_processes 8 -m distill.train --manifest runs/demo/manifest --out runs/demo/nopsd

``--method`` names a baseline instead: U-OPSD here, the others in `distill.baselines.trl`.

Each step: the student answers some of the manifest's selected questions from the bare prompt; the teacher, the same
model before training, reads the same completion after the manifest's solved examples; the student moves towards the
teacher's next-token distribution on the completion's tokens. No label and no reward is used.

Where the paper's body was not available, OPSD (arXiv 2601.18734) and SDFT guide the defaults: forward KL over the full
vocabulary, a frozen base teacher, cut-off rollouts left out of the loss.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import BASELINES, BASIS, PRESETS, TrainConfig, check_options
from distill.metrics_log import METRICS, MetricsLog, check_finite
from distill.output import describe_checkpoints, write_final
from neurosig.models.run_folder import RECORD
from neurosig.runtime.cli import run_command
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from distill.distributed import Ranks
    from distill.stopping import Development
    from neurosig.runtime.cli import PhaseTimer

logger = logging.getLogger(__name__)


def main(config: TrainConfig) -> None:
    """Run the training described by ``config``."""
    from distill.distributed import launched
    from neurosig.runtime.folder import run_in_folder

    ranks = launched(config)
    with ranks.together():
        check_options(config)
        ranks.check(config)
        if basis := BASIS.get(config.preset or ""):
            logger.info("preset %s: %s", config.preset, basis)
    owned = [METRICS, RECORD, "development.jsonl", "checkpoints", "adapter", "model", ".final", "served"]
    owned += ["rollouts", "tensorboard", "wandb"]
    if config.method in BASELINES:
        from distill.baselines.trl import train_baseline as run
    else:
        run = _distil
    run_in_folder(config, partial(run, ranks=ranks), finished=RECORD, owned=owned, ranks=ranks)
    ranks.close()


def _distil(config: TrainConfig, timer: PhaseTimer, ranks: Ranks) -> None:
    import torch

    from distill.checkpoints import load_newest, resume_key, save_checkpoint
    from distill.optimizer import learning_rates, make_optimizer
    from distill.step import learn
    from distill.stopping import Development, stop_reason
    from distill.student import StudentSampler, TrainingForward, make_student
    from distill.tasks import (
        agreeing,
        keep_rollouts,
        load_student,
        question_ids,
        read_manifests,
        sampling_config,
        tasks_of_step,
        training_tasks,
    )
    from distill.teacher import Teacher, load_teacher

    with ranks.together(), timer.phase("load"):
        manifest = read_manifests(config)
        loaded = load_student(config, manifest, ranks.device or config.device)
        sampling, opens = sampling_config(config, manifest), bool(manifest.header.answers["prompt_opens_thought"])
        tasks = training_tasks(config, manifest, loaded, max_new_tokens=sampling.max_new_tokens)
        other = load_teacher(config, loaded, tasks, sampling.max_new_tokens)
        torch.manual_seed(config.seed)
        model, adapter = make_student(config, loaded, manifest.header.adapter(config.adapter))
    teacher = Teacher.of(config, loaded, adapter, other)
    ranks.shard(model)
    teacher.shard(ranks)
    forward = TrainingForward.of(config, model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, rate_of_step = make_optimizer(config, parameters.values()), learning_rates(config)
    folder, key = config.out / "checkpoints", resume_key(config, manifest, sampling, loaded.info.dtype)
    saving: Any = {"keep": config.keep_checkpoints, "every": config.save_steps}
    state: Any = {"averages": teacher.average, "ranks": ranks}
    done = load_newest(folder, parameters, optimizer, key, **state)
    sampler = StudentSampler(config, loaded, model, adapter, ranks, done)

    ranks.on_main(lambda: describe_checkpoints(config, manifest, loaded, model, adapter))
    with MetricsLog(config, done, ranks, timer) as log:
        development, stop = None, None
        if config.dev_questions is not None:
            with ranks.together():
                development = Development(config, sampling, manifest.header, loaded, sampler.draw, timer, ranks.main)
            development.reopen(done)
        for step in range(done + 1, config.steps + 1):
            batch = tasks_of_step(config, tasks, step)
            with timer.phase("sample"):
                rollouts = sampler.rollouts(batch.values(), sampling, step)
            timer.add_tokens("sample", sum(len(rollout.completion_ids) for rollout in rollouts))
            for group in optimizer.param_groups:
                group["lr"] = rate_of_step(step)
            torch.manual_seed((config.seed * 1_000_003 + step) * ranks.world + ranks.rank)  # LoRA's dropout
            pairs = [(batch[rollout.question_id], rollout) for rollout in rollouts]
            left_out = agreeing(manifest, rollouts) if config.on_disagreeing else set()
            learned = learn(config, model, teacher, optimizer, pairs, forward, timer, ranks, left_out, opens)
            metrics: dict[str, Any] = {"step": step, "learning_rate": rate_of_step(step), **sampler.updated(step)}
            metrics |= learned | manifest.counts(batch)
            with ranks.together():
                check_finite(metrics, list(batch))
            if development is not None and config.saves_after(step):
                development.measure(step)
            with ranks.together():
                log.add(metrics)
                if ranks.main:
                    keep_rollouts(config, manifest, step, rollouts, left_out)
            stop = stop_reason(config, step, log.history, development)
            if stop:  # decided before saving, so that a resumed run decides again
                break
            if config.saves_after(step):
                saving["best"] = development and development.best_saved
                with timer.phase("save"):
                    save_checkpoint(folder, step, parameters, optimizer, key, **saving, **state)
    sampler.close()
    with ranks.together():
        chosen = _choose_weights(config, len(log.history), stop, development, folder, parameters)
    seen = question_ids(config, tasks, len(log.history))
    write_final(config, manifest, loaded, model, adapter, log.history, seen, ranks, teacher=other, **chosen)


def _choose_weights(
    config: TrainConfig,
    steps: int,
    stop: tuple[str, int] | None,
    development: Development | None,
    folder: Path,
    parameters: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Put the weights to keep in place, after ``steps`` steps; what the run's record says of it, for `write_final`.

    Raises:
        UserError: Training stopped before the first checkpoint; or the checkpoint is damaged.
    """
    from distill.checkpoints import load_weights, saved_steps

    development = development if config.keep_step == "best" else None
    if stop is None and development is None:
        return {}
    reason, good = stop or ("", steps)
    if not (saved := saved_steps(folder)):
        raise UserError(
            f"step {steps}: training collapsed ({reason}) before the first checkpoint; lower --learning-rate or "
            "--save-steps, or pass --no-stop-on-collapse"
        )
    saved = [step for step in saved if config.saves_after(step)] or saved  # a longer run has no others
    saved = [step for step in saved if step <= good] or saved[:1]
    step, why = (saved[-1], "the last good checkpoint") if development is None else development.choose(saved)
    load_weights(folder, step, parameters)
    if stop is not None:
        logger.warning("step %d: stopped, %s; the weights are those of step %d", steps, reason, step)
    else:
        logger.info("the weights are those of step %d, %s", step, why)
    stopped = None if stop is None else {"step": steps, "reason": reason, "weights_of_step": step}
    return {"kept": {"step": step, "reason": why}, "stopped": stopped}


if __name__ == "__main__":
    sys.exit(run_command(TrainConfig, main, presets=PRESETS, prog="python -m distill.train"))
