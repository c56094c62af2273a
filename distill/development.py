"""A development split watched while training: maj@K that falls is a reason to stop.

The one place where training sees gold answers, only with ``--dev-questions``, and only to stop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neurosig.questions.answers import AnswerFormat, extract_answer, right_winners
from neurosig.questions.load import load_questions
from neurosig.questions.vote import majority_vote
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from neurosig.statistics.metrics import maj_at_k, paired_mean_interval

if TYPE_CHECKING:
    from distill.config import TrainConfig
    from neurosig.manifest import Header
    from neurosig.questions.load import Question
    from neurosig.questions.prompts import PromptBuilder

logger = logging.getLogger(__name__)

DEVELOPMENT = "development.jsonl"
Draw = Callable[[Sequence[Prompt], SamplingConfig, str], Sequence[Sequence[Rollout]]]


class Development:
    """Majority accuracy of each development question, before training and at every save since.

    Args:
        config: Where the questions are, how many to take, and the run's folder.
        sampling: With the K of the vote.
        builder: Makes the bare prompts.
        header: The manifest's, for the answer format.
        draw: Samples prompts from the student as it stands.
        main: Whether this process writes the measurements.

    Raises:
        UserError: A question has no gold answer.
    """

    def __init__(
        self,
        config: TrainConfig,
        sampling: SamplingConfig,
        builder: PromptBuilder,
        header: Header,
        draw: Draw,
        main: bool = True,
    ):
        assert config.dev_questions is not None
        self._questions = load_questions(config.dev_questions, split="dev", limit=config.dev_limit)
        for question in self._questions:
            if question.answer is None:
                raise UserError(f'--dev-questions {config.dev_questions}: question "{question.id}" has no answer')
        self._prompts = [Prompt(question.id, builder.student(question)) for question in self._questions]
        self._sampling, self._draw, self._main = sampling, draw, main
        self._format = header.options["answer_format"]
        self._path = config.out / DEVELOPMENT
        self._measured: list[dict[str, Any]] = []

    def reopen(self, done: int) -> None:
        """Take up the measurements of a run with ``done`` steps behind it, or make the first.

        Raises:
            UserError: They are lost.
        """
        if not done:
            self.measure(0)
            return
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self._measured = [entry for entry in map(json.loads, lines) if entry["step"] <= done]
        if not self._measured:
            raise UserError(f"{self._path}: no measurement before step {done}; use --overwrite")

    def measure(self, step: int) -> None:
        """Sample, vote, compare with the gold answers, and note the result."""
        groups = {group[0].question_id: group for group in self._draw(self._prompts, self._sampling, "development")}
        right = [_majority_is_right(question, groups[question.id], self._format) for question in self._questions]
        self._measured.append({"step": step, "maj_at_k": float(np.mean(right)), "by_question": right})
        if self._main:
            write_atomic(self._path, "".join(json.dumps(entry) + "\n" for entry in self._measured))
        logger.info(
            "step %d: maj@%d %.3f on the development split", step, self._sampling.num_generations, np.mean(right)
        )

    @property
    def fallen(self) -> str | None:
        """Why the newest measurement lies below the first: the paired 95% interval of their difference does."""
        first, last = self._measured[0], self._measured[-1]
        change = paired_mean_interval(np.array(last["by_question"]), np.array(first["by_question"]), seed=0)
        if change.high >= 0:
            return None
        return (
            f"maj@{self._sampling.num_generations} on {len(self._questions)} development questions fell from "
            f"{first['maj_at_k']:.3f} to {last['maj_at_k']:.3f}"
        )


def _majority_is_right(question: Question, group: Sequence[Rollout], answer_format: AnswerFormat) -> float:
    vote = majority_vote([extract_answer(rollout.text, question, answer_format) for rollout in group], question.id)
    return float(maj_at_k(np.array([right_winners(vote, question)]), np.array([len(vote.tied)]))[0])
