"""The metrics of a training run: ``metrics.jsonl``, the progress bar, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.runtime.cli import PhaseTimer, config_record, peak_memory_gb, progress
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.sampling.lengths import completion_lengths, warn_of_truncation

if TYPE_CHECKING:
    from distill.config import TrainConfig
    from distill.distributed import Ranks
    from neurosig.sampling.rollouts import Rollout

logger = logging.getLogger(__name__)

Metrics = Mapping[str, Any]
"""Name -> number; ``None`` where the step has nothing to measure, as when every rollout was masked."""
METRICS, WANDB_ID = "metrics.jsonl", "wandb/run_id"
LEARNING = ("teacher", "student", "optimizer", "learn")
"""Phases of a step that learn from its rollouts; ``learn`` is all of them, in TRL's trainers."""
SAMPLER_KL = 0.01
"""Nats per token by which sampler and student may differ without a warning."""
PROJECT = "neurosig"


class MetricsLog(contextlib.ExitStack):
    """Checks the metrics of each step and, on the main process, writes them to ``metrics.jsonl`` and the trackers.

    Use it as a context manager: leaving the block closes file, progress bar and trackers.

    Args:
        config: The run's folder, trackers and number of steps.
        done: Steps done by the interrupted run; the file is cut back to them.
        ranks: The processes of the run, all of which must make one.
        timer: The run's; each line has the seconds of its phases since the line before.

    Attributes:
        history: The metrics of every step so far.

    Raises:
        UserError: The file has fewer than ``done`` lines.
    """

    def __init__(self, config: TrainConfig, done: int, ranks: Ranks, timer: PhaseTimer):
        super().__init__()
        self._timer = timer
        timer.lap()
        path = config.out / METRICS
        self.history: list[Metrics] = ranks.on_main(lambda: reopen_metrics(path, done))
        self._main, self._warned = ranks.main, False
        bar = progress(total=config.steps, desc=config.method, quiet=config.quiet or not ranks.main)
        self._bar = self.enter_context(bar)
        self._bar.update(done)
        if ranks.main:
            self._file = self.enter_context(path.open("a", encoding="utf-8"))
            self._trackers = [_tracker(name, config, done, self) for name in config.report_to]

    def add(self, metrics: Metrics, question_ids: Sequence[str] = ()) -> None:
        """Add the metrics of a step, sampled from ``question_ids``.

        Raises:
            UserError: Loss or gradient norm is not finite; nothing is written.
        """
        check_finite(metrics, question_ids)
        metrics = {**metrics, **self._spent(metrics)}
        self.history.append(metrics)
        if not self._main:
            return
        if not metrics["tokens_in_loss"]:
            logger.warning(
                "step %d: every rollout was masked (%.0f%% finished with EOS); no update was made; raise "
                "--max-new-tokens or pass --keep-truncated", metrics["step"], 100 * metrics["eos_rate"],
            )  # fmt: skip
        self._warned = self._warned or warn_of_truncation(f"step {metrics['step']}", metrics)
        if abs(metrics.get("sampler_kl") or 0.0) > SAMPLER_KL:
            logger.warning(
                "step %d: sampler_kl %.3f: the rollouts came from another model than the student; check --dtype, the "
                "server's weights and --max-staleness", metrics["step"], metrics["sampler_kl"],
            )  # fmt: skip
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        measured = {name: value for name, value in metrics.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(measured, step=int(metrics["step"]))
        self._bar.set_postfix({name: f"{measured[name]:.3f}" for name in ("loss", "entropy_gap") if name in measured})
        self._bar.update()

    def _spent(self, metrics: Metrics) -> dict[str, float]:
        """Seconds by phase, tokens per second and peak memory of this process, left out by `untimed`."""
        seconds = self._timer.lap()
        spent = {f"seconds_{phase}": round(passed, 4) for phase, passed in seconds.items()}
        phases = {"sample": ("generated_tokens", ("sample",)), "learn": ("tokens_in_loss", LEARNING)}
        for name, (tokens, parts) in phases.items():
            passed = sum(seconds.get(part, 0.0) for part in parts)
            spent |= {f"tokens_per_second_{name}": round(metrics[tokens] / passed, 1)} if passed else {}
        return {**spent, "peak_memory_gb": round(peak_memory_gb(), 3)}


def reopen_metrics(path: Path, done: int) -> list[Metrics]:
    """Cut the metrics file back to ``done`` steps and return their metrics.

    Raises:
        UserError: It has fewer.
    """
    lines = path.read_text().splitlines(keepends=True)[:done] if path.exists() else []
    if len(lines) < done:
        raise UserError(f"{path}: {len(lines)} lines, but the checkpoint has done {done} steps; use --overwrite")
    write_atomic(path, "".join(lines))
    return [json.loads(line) for line in lines]


def check_finite(metrics: Metrics, question_ids: Sequence[str]) -> None:
    """Refuse a step whose loss or gradient norm is not finite.

    Raises:
        UserError: Naming the step and its questions.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name] or 0.0):
            questions = f" (question ids {', '.join(question_ids)})" if question_ids else ""
            raise UserError(
                f"step {metrics['step']}: {name} is {metrics[name]}{questions}; the last checkpoint is kept, lower "
                "--learning-rate and --resume from it"
            )


def rollout_metrics(rollouts: Sequence[Rollout], prompt_opens_thought: bool = False) -> dict[str, float | int]:
    """Mean length in tokens, share of distinct trigrams and share finished with an end-of-sequence token; and see
    `neurosig.sampling.lengths.completion_lengths`."""
    return {
        **completion_lengths(rollouts, prompt_opens_thought=prompt_opens_thought),
        "mean_length": sum(len(rollout.completion_ids) for rollout in rollouts) / len(rollouts),
        "distinct_3": distinct_3([rollout.completion_ids for rollout in rollouts]),
        "eos_rate": sum(rollout.finish_reason == "stop" for rollout in rollouts) / len(rollouts),
    }


def distinct_3(completions: Sequence[Sequence[int]]) -> float:
    """Distinct token trigrams over all trigrams of a step's completions, each counted by itself; 1 without any."""
    trigrams = [list(zip(ids, ids[1:], ids[2:], strict=False)) for ids in completions]
    total = sum(map(len, trigrams))
    return sum(len(set(own)) for own in trigrams) / total if total else 1.0


def _tracker(name: str, config: TrainConfig, done: int, stack: contextlib.ExitStack) -> Any:
    """One of accelerate's trackers, which ``stack`` finishes; a resumed run goes on where the interrupted one was.

    TensorBoard writes into the folder ``tensorboard`` of the run; wandb follows its own environment variables
    (``WANDB_MODE=offline``, say), names the run after its folder and finds its id there.

    Raises:
        UserError: The tracker cannot start.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    options: dict[str, Any]
    if name == "tensorboard":
        options = {"run_name": name, "logging_dir": config.out, "purge_step": done + 1}
    else:
        path = config.out / WANDB_ID
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, secrets.token_hex(4))
        options = {"run_name": PROJECT, "name": config.out.name, "dir": str(config.out), "id": path.read_text()}
        options |= {"resume": "allow", "config": config_record(config)}
    tracker = LOGGER_TYPE_TO_CLASS[name](**options)
    try:
        tracker.start()
    except Exception as error:  # each library has its own
        raise UserError(f"--report-to {name}: cannot start ({type(error).__name__}: {error})") from error
    stack.callback(tracker.finish)
    return tracker
