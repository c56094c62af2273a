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

import contextlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import BASELINES, PRESETS, TrainConfig, check_options, resume_key
from distill.metrics_log import METRICS, MetricsLog
from distill.output import write_final
from neurosig.models.trained import RECORD
from neurosig.runtime.cli import PhaseTimer, run_command
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from distill.distributed import Ranks

logger = logging.getLogger(__name__)


def main(config: TrainConfig) -> None:
    """Run the training described by ``config``."""
    from distill.distributed import launched
    from neurosig.runtime.folder import command_folder

    ranks = launched(config)
    with ranks.together():
        check_options(config)
        ranks.check(config)
    owned = [METRICS, RECORD, "development.jsonl", "checkpoints", "adapter", "model", ".final", "served"]
    owned += ["tensorboard", "wandb"]
    with contextlib.ExitStack() as stack:
        folder = command_folder(config, finished=RECORD, owned=owned)
        if ranks.on_main(lambda: stack.enter_context(folder)):
            logger.info("%s: already complete", config.out)
        else:
            if config.method in BASELINES:
                from distill.baselines.trl import train_baseline as run
            else:
                run = _distil
            with PhaseTimer() as timer:
                run(config, timer, ranks)
        ranks.close()


def _distil(config: TrainConfig, timer: PhaseTimer, ranks: Ranks) -> None:
    import torch

    from distill.checkpoints import load_newest, save_checkpoint
    from distill.step import learn
    from distill.stopping import Development, stop_reason
    from distill.student import StudentSampler, TrainingForward, make_student
    from distill.tasks import (
        agreeing,
        check_majority_context,
        load_student,
        sampling_config,
        tasks_of_step,
        training_tasks,
    )
    from distill.teacher import Teacher
    from neurosig.manifest import read_manifest

    with ranks.together(), timer.phase("load"):
        manifest = read_manifest(config.manifest)
        if config.method == "u-opsd":
            check_majority_context(manifest)
        loaded = load_student(config, manifest, ranks.device or config.device)
        sampling = sampling_config(config, manifest)
        tasks = training_tasks(config, manifest, loaded, max_new_tokens=sampling.max_new_tokens)
    torch.manual_seed(config.seed)
    model, adapter = make_student(config, loaded)
    teacher = Teacher(config.teacher, model, adapter, config.ema_decay)
    ranks.shard(model)
    teacher.shard(ranks)
    forward = TrainingForward(model, gradient_checkpointing=config.gradient_checkpointing, compile=config.compile)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    folder, key = config.out / "checkpoints", resume_key(config, manifest, sampling, loaded.info.dtype)
    saving: Any = {"keep": config.keep_checkpoints, "every": config.save_steps}
    state: Any = {"averages": teacher.average, "ranks": ranks}
    done = load_newest(folder, parameters, optimizer, key, **state)
    sampler = StudentSampler(config, loaded, model, adapter, ranks, done)

    with MetricsLog(config, done, ranks) as log:
        development, stopped = None, None
        if config.dev_questions is not None:
            with ranks.together():
                development = Development(config, sampling, manifest.header, loaded, sampler.draw, timer, ranks.main)
            development.reopen(done)
        for step in range(done + 1, config.steps + 1):
            batch = tasks_of_step(config, tasks, step)
            with timer.phase("sample"):
                rollouts = sampler.rollouts(batch.values(), sampling, step)
            timer.add_tokens("sample", sum(len(rollout.completion_ids) for rollout in rollouts))

            rate = config.learning_rate * min(1.0, step / max(1, config.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pairs = [(batch[rollout.question_id], rollout) for rollout in rollouts]
            left_out = agreeing(manifest, rollouts) if config.on_disagreeing else set()
            metrics = learn(config, model, teacher, optimizer, pairs, forward, timer, ranks, left_out)
            with ranks.together():
                log.add({"step": step, "learning_rate": rate, **sampler.updated(step), **metrics}, list(batch))

            stop = stop_reason(config, step, log.history, development)
            if stop is not None:  # decided before saving, so that a resumed run decides again
                with ranks.together():
                    stopped = _go_back(step, *stop, folder, parameters, config.save_steps)
                break
            if config.saves_after(step):
                with timer.phase("save"):
                    save_checkpoint(folder, step, parameters, optimizer, key, **saving, **state)
    sampler.close()
    question_ids = [
        [name for name, task in tasks_of_step(config, tasks, step).items() if not task.replay]
        for step in range(1, len(log.history) + 1)
    ]
    write_final(config, manifest, loaded, model, adapter, log.history, question_ids, stopped, ranks)


def _go_back(
    step: int, reason: str, good: int, folder: Path, parameters: Mapping[str, Tensor], every: int
) -> dict[str, Any]:
    """Put the weights of the last checkpoint up to step ``good`` in place; what the run's record says of it.

    Raises:
        UserError: There is no checkpoint yet.
    """
    from distill.checkpoints import load_before

    kept = load_before(folder, good, parameters, every=every)
    if kept is None:
        raise UserError(
            f"step {step}: training collapsed ({reason}) before the first checkpoint; lower --learning-rate or "
            "--save-steps, or pass --no-stop-on-collapse"
        )
    logger.warning("step %d: stopped, %s; the weights are those of step %d", step, reason, kept)
    return {"step": step, "reason": reason, "weights_of_step": kept}


if __name__ == "__main__":
    sys.exit(run_command(TrainConfig, main, presets=PRESETS, prog="python -m distill.train"))
