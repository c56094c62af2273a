"""When training stops early, by collapse or a fall of maj@K on a development split, and which step is kept.

Collapse means answers that grow or shrink, sharpen or repeat themselves. Source: the stop rules of public on-policy
distillation recipes; the thresholds are a reconstruction. The development split is the one place where training reads
gold answers, only with ``--dev-questions``, and only to stop and to choose the step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.metrics_log import Metrics
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import PromptBuilder
from neurosig.questions.vote import vote_accuracy
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from neurosig.statistics.metrics import paired_mean_interval

if TYPE_CHECKING:
    from distill.config import TrainConfig
    from neurosig.manifest import Header
    from neurosig.models.load import LoadedModel
    from neurosig.runtime.cli import PhaseTimer

logger = logging.getLogger(__name__)

LENGTH_RATIO = 1.5
ENTROPY_RATIO = 0.5
DISTINCT_RATIO = 0.5
DEVELOPMENT = "development.jsonl"
Draw = Callable[[Sequence[Prompt], SamplingConfig, str], Sequence[Sequence[Rollout]]]


def stop_reason(
    config: TrainConfig, step: int, history: Sequence[Metrics], development: Development | None
) -> tuple[str, int] | None:
    """Why to stop after ``step`` and the last step whose weights are good; ``None`` to go on.

    Args:
        config: Which rules apply, and when the run is saved.
        step: Steps done.
        history: The metrics of each.
        development: The development split, measured whenever the run is saved.
    """
    reason = collapse(history, config.collapse_window) if config.stop_on_collapse else None
    good = 0 if reason is None else int(_with_loss(history)[-config.collapse_window]["step"]) - 1
    if reason is None and development is not None and config.saves_after(step):
        reason, good = development.fallen, step - 1
    return None if reason is None else (reason, good)


def collapse(metrics: Sequence[Metrics], window: int) -> str | None:
    """Why the last ``window`` steps count as collapsed; ``None`` when they do not.

    Lengths and distinct trigrams are compared with those of the first ``window`` steps, the student's entropy with the
    teacher's in the same steps: a student that follows a sharp teacher is no collapse. Without a teacher (OPSA) it is
    compared with the student's own in the first ``window`` steps. Steps differ in their questions,
    so means over windows are compared, from the time two windows are complete. Steps in which every rollout was masked
    do not count.

    Args:
        metrics: ``mean_length``, ``student_entropy``, ``teacher_entropy`` (``None`` without a teacher) and
            ``distinct_3`` of every step so far.
        window: Steps per mean.
    """
    metrics = _with_loss(metrics)
    if len(metrics) < 2 * window:
        return None

    def means(name: str) -> tuple[float, float]:
        first, last = ([step[name] for step in part] for part in (metrics[:window], metrics[-window:]))
        return sum(first) / window, sum(last) / window

    start, now = means("mean_length")
    if not start / LENGTH_RATIO <= now <= start * LENGTH_RATIO:
        return f"the mean length went from {start:.1f} to {now:.1f} tokens"
    start, now = means("student_entropy")
    has_teacher = metrics[-1]["teacher_entropy"] is not None
    target, whose = (means("teacher_entropy")[1], "the teacher's") if has_teacher else (start, "in its first steps")
    if now < ENTROPY_RATIO * target:
        return f"the student's entropy is {now:.3f} nats, {whose} {target:.3f}"
    start, now = means("distinct_3")
    if now < DISTINCT_RATIO * start:
        return f"the share of distinct trigrams fell from {start:.2f} to {now:.2f}"
    return None


def _with_loss(metrics: Sequence[Metrics]) -> list[Metrics]:
    """The steps that had a rollout in the loss."""
    return [step for step in metrics if step["student_entropy"] is not None]


class Development:
    """Majority accuracy on each development question, before training and at every save since.

    ``draw`` samples prompts from the student as it is now; only the ``main`` process writes the measurements.

    Raises:
        UserError: A question has no gold answer.
    """

    def __init__(
        self,
        config: TrainConfig,
        sampling: SamplingConfig,
        header: Header,
        loaded: LoadedModel,
        draw: Draw,
        timer: PhaseTimer,
        main: bool,
    ):
        assert config.dev_questions is not None
        self._questions = load_questions(
            config.dev_questions, split="dev", limit=config.dev_limit, fields=config.fields
        )
        for question in self._questions:
            if question.answer is None:
                raise UserError(f'--dev-questions {config.dev_questions}: question "{question.id}" has no answer')
        builder = PromptBuilder(loaded.tokenizer, header.prompt_config())
        self._prompts = [Prompt(question.id, builder.student(question)) for question in self._questions]
        self._sampling = replace(sampling, num_generations=config.dev_generations)
        self._draw, self._timer, self._main = draw, timer, main
        self._reader = header.answer_reader()
        self._path, self._every, self._keep = config.out / DEVELOPMENT, config.save_steps, config.keep_step
        self._measured: list[dict[str, Any]] = []

    def reopen(self, done: int) -> None:
        """Read the measurements of an interrupted run of ``done`` steps, or make the first.

        Raises:
            UserError: They are lost.
        """
        if not done:
            self.measure(0)
            return
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        found = [entry for entry in map(json.loads, lines) if entry["step"] <= done]
        self._measured = [entry for entry in found if entry["step"] % self._every == 0]  # a longer run has no others
        if not self._measured:
            raise UserError(f"{self._path}: no measurement before step {done}; use --overwrite")

    def measure(self, step: int) -> None:
        """Sample, vote, compare with the gold answers, and write the result."""
        with self._timer.phase("development"):
            drawn = self._draw(self._prompts, self._sampling, "development")
        groups = {group[0].question_id: group for group in drawn}
        right = [vote_accuracy(self._reader.read(groups[q.id], q).vote, q) for q in self._questions]
        self._measured.append({"step": step, "maj_at_k": float(np.mean(right)), "by_question": right})
        if self._main:
            write_atomic(self._path, "".join(json.dumps(entry) + "\n" for entry in self._measured))
        k = self._sampling.num_generations
        logger.info("step %d: maj@%d %.3f on the development split", step, k, np.mean(right))

    @property
    def fallen(self) -> str | None:
        """Why the newest measurement is below the first, judged by the 95% interval of their paired difference."""
        first, last = self._measured[0], self._measured[-1]
        change = paired_mean_interval(np.array(last["by_question"]), np.array(first["by_question"]), seed=0)
        if change.high >= 0:
            return None
        return (
            f"maj@{self._sampling.num_generations} on {len(self._questions)} development questions fell from "
            f"{first['maj_at_k']:.3f} to {last['maj_at_k']:.3f}"
        )

    def choose(self, saved: Sequence[int]) -> tuple[int, str]:
        """The saved step with the highest maj@K, the latest of several, and its and the untrained model's in words."""
        values = {entry["step"]: round(entry["maj_at_k"], 9) for entry in self._measured}
        best = max(saved, key=lambda step: (values.get(step, -1.0), step))
        k, n = self._sampling.num_generations, len(self._questions)
        found = f"{values[best]:.3f}" if best in values else "unknown"
        return best, f"the best maj@{k} on {n} development questions, {found} ({values[0]:.3f} before training)"

    @property
    def best_saved(self) -> int | None:
        """With ``--keep-step best``, the best step so far whose checkpoint a longer run would have, too."""
        steps = [entry["step"] for entry in self._measured if entry["step"] and entry["step"] % self._every == 0]
        return self.choose(steps)[0] if steps and self._keep == "best" else None
