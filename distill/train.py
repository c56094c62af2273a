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
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config import BASELINES, PRESETS, TrainConfig, check_options, resume_key, sampling_config
from distill.metrics_log import check_trackers
from distill.output import RECORD, write_final
from neurosig.runtime.cli import PhaseTimer, progress, run_command
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from distill.distributed import Ranks
    from neurosig.sampling.config import SamplingConfig
    from neurosig.sampling.rollouts import Rollout

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def main(config: TrainConfig) -> None:
    """Run the training described by ``config``."""
    from distill.distributed import launched
    from neurosig.runtime.folder import output_folder

    ranks = launched(config)
    with ranks.together():
        check_options(config)
        check_trackers(config)
        ranks.check(config)
    owned = (METRICS, RECORD, "development.jsonl", "checkpoints", "adapter", "model", ".final", "served")
    with contextlib.ExitStack() as stack:
        folder = output_folder(
            config.out,
            finished=RECORD,
            owned=(*owned, "tensorboard", "wandb"),
            resume=config.resume,
            overwrite=config.overwrite,
        )
        if ranks.on_main(lambda: stack.enter_context(folder)):
            logger.info("%s: already complete", config.out)
        else:
            with PhaseTimer() as timer:
                _run(config, timer, ranks)
        ranks.close()


def _run(config: TrainConfig, timer: PhaseTimer, ranks: Ranks) -> None:
    if config.method in BASELINES:
        from distill.baselines.trl import train_baseline

        train_baseline(config, timer)
    else:
        _train(config, timer, ranks)


def _train(config: TrainConfig, timer: PhaseTimer, ranks: Ranks) -> None:
    import torch

    from distill.baselines.rewards import agreeing, check_majority_context
    from distill.checkpoints import load_before, load_newest, save_checkpoint
    from distill.development import Development
    from distill.metrics_log import trackers
    from distill.served_student import ServedStudent
    from distill.step import learn
    from distill.stopping import collapse
    from distill.student import TrainingForward, make_student, merged, sampling_attention
    from distill.tasks import load_student, manifest_tasks, prompt_builder, replay_tasks, tasks_of_step
    from distill.teacher import Teacher
    from neurosig.manifest import read_manifest
    from neurosig.sampling.sampler import Prompt, sample

    with ranks.together(), timer.phase("load"):
        manifest = read_manifest(config.manifest)
        if config.method == "u-opsd":
            check_majority_context(manifest)
        loaded = load_student(config, manifest, ranks.device or config.device)
        sampling = sampling_config(config, manifest)
        limit = sampling.max_new_tokens
        tasks = manifest_tasks(manifest, loaded, max_new_tokens=limit)
        replayed = (
            []
            if config.replay is None
            else replay_tasks(config.replay, manifest.header, loaded, weight=config.replay_weight, max_new_tokens=limit)
        )

    torch.manual_seed(config.seed)
    model, adapter = make_student(config, loaded)
    teacher = Teacher(config.teacher, model, adapter, config.ema_decay)
    ranks.shard(model)
    teacher.shard(ranks)
    forward = TrainingForward(model, gradient_checkpointing=config.gradient_checkpointing, compile=config.compile)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    key = resume_key(config, manifest, sampling)
    done = load_newest(config.out / "checkpoints", parameters, optimizer, key, averages=teacher.average, ranks=ranks)
    history = ranks.on_main(lambda: reopen_metrics(config.out / METRICS, done))
    log = (config.out / METRICS if ranks.main else Path(os.devnull)).open("a", encoding="utf-8")
    stopped: dict[str, Any] | None = None

    server = config.server(loaded)
    served = ServedStudent(config, server, adapter, done) if server is not None and adapter is not None else None

    def draw(prompts: Sequence[Prompt], sampling: SamplingConfig, salt: str) -> list[list[Rollout]]:
        if served is not None:
            groups = ranks.on_main(lambda: served.sample(prompts, sampling, salt, fresh=salt == "development"))
        else:
            mine = ranks.share(prompts)
            with ranks.whole(model), ranks.together(), merged(model, adapter), sampling_attention(model):
                drawn = list(sample(loaded, mine, sampling, batch_rows=config.batch_rows, salt=salt))
            groups = [group for part in ranks.gather(drawn) for group in part]
        by_id = {group[0].question_id: group for group in groups}
        return [by_id[prompt.question_id] for prompt in sorted(prompts, key=lambda prompt: len(prompt.token_ids))]

    development = None
    if config.dev_questions is not None:
        with timer.phase("development"):
            votes = replace(sampling, num_generations=config.dev_generations)
            builder = prompt_builder(manifest.header, loaded)
            with ranks.together():
                development = Development(config, votes, builder, manifest.header, draw, main=ranks.main)
            development.reopen(done)

    bar = progress(total=config.steps, desc="train", quiet=config.quiet or not ranks.main)
    with log, bar, trackers(config, main=ranks.main) as report:
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
            metrics = learn(config, model, teacher, optimizer, pairs, forward, timer, ranks, left_out)
            policy: dict[str, int] = {}
            if served is not None:
                policy, served.updates = served.record(), step
            metrics = {"step": step, "learning_rate": rate, **policy, **metrics}
            with ranks.together():
                _check_finite(metrics, list(by_id))
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
                with ranks.together():
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
                        ranks=ranks,
                    )
    if served is not None and ranks.main:
        served.close()
    weights = None
    if ranks.sharded:
        trained = ((name, p) for name, p in (adapter or model).named_parameters() if p.requires_grad)
        weights = ranks.whole_tensors(model.state_dict().items() if adapter is None else trained)
    if ranks.main:
        write_final(config, manifest, loaded, model, adapter, history, stopped, weights)


def _check_finite(metrics: Mapping[str, int | float], question_ids: Sequence[str]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise UserError(
                f"step {metrics['step']}: {name} is {metrics[name]} (question ids {', '.join(question_ids)}); the last "
                "checkpoint is kept, lower --learning-rate and --resume from it"
            )


def reopen_metrics(path: Path, done: int) -> list[dict[str, float | int]]:
    """What the metrics file holds, after it is cut back to ``done`` steps."""
    from neurosig.runtime.files import write_atomic

    lines = path.read_text().splitlines(keepends=True)[:done] if path.exists() else []
    if len(lines) < done:
        raise UserError(f"{path}: {len(lines)} lines, but the checkpoint has done {done} steps; use --overwrite")
    write_atomic(path, "".join(lines))
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(run_command(TrainConfig, main, presets=PRESETS, prog="python -m distill.train"))
