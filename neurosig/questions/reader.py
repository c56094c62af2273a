"""From a question's K completions to its answers and their vote: the one place where commands parse completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from neurosig.questions.answers.extract import AnswerFormat, extract_answer
from neurosig.questions.answers.grading import is_correct, is_lenient
from neurosig.questions.vote import Vote, VoteMerge, majority_vote, merge_answers

if TYPE_CHECKING:
    from neurosig.questions.load import Question


@runtime_checkable
class Completion(Protocol):
    """What of a rollout is parsed: decoded text, and ``stop`` or ``length``."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """The answers of a question's K completions.

    Attributes:
        raw_answers: What the parser reads in each completion, ``None`` without an answer.
        answers: The candidate that each completion votes for: its raw answer, or the answer of the same meaning.
        vote: The majority vote over ``answers``.
    """

    raw_answers: tuple[str | None, ...]
    answers: tuple[str | None, ...]
    vote: Vote


@dataclass(frozen=True, slots=True)
class Grades:
    """Which of K completions are right. ``strict``: the raw answer equals the gold answer; ``lenient``: see
    `neurosig.questions.answers.grading.is_lenient`."""

    strict: tuple[bool, ...]
    lenient: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class AnswerReader:
    """How completions are parsed and which answers count as one.

    Attributes:
        answer_format: See `extract_answer`.
        vote_merge: See `neurosig.questions.vote.merge_answers`.
        answer_parser: ``MODULE:FUNCTION`` that replaces `extract_answer`, with its parameters.
        prompt_opens_thought: The chat template ends the prompt inside a thought, so that a completion without
            ``</think>`` is one.
    """

    answer_format: AnswerFormat = "auto"
    vote_merge: VoteMerge = "containment"
    answer_parser: str | None = None
    prompt_opens_thought: bool = False

    def read(self, completions: Sequence[Completion], question: Question) -> Reading:
        """Parse a question's K completions and vote."""
        raw = tuple(self.extract(completion.text, completion.finish_reason, question) for completion in completions)
        answers = tuple(merge_answers(raw, question, self.vote_merge))
        return Reading(raw, answers, majority_vote(answers, question.id))

    def extract(self, text: str, finish_reason: str, question: Question) -> str | None:
        """The answer of one completion."""
        return extract_answer(
            text,
            question,
            self.answer_format,
            finish_reason=finish_reason,
            prompt_opens_thought=self.prompt_opens_thought,
        )

    def grade(self, reading: Reading, completions: Sequence[Completion], question: Question) -> Grades:
        """Which of the completions are right. For evaluation only.

        Raises:
            ValueError: The question has no gold answer.
        """
        return Grades(
            tuple(is_correct(answer, question) for answer in reading.raw_answers),
            tuple(
                is_lenient(
                    completion.text,
                    question,
                    self.answer_format,
                    finish_reason=completion.finish_reason,
                    prompt_opens_thought=self.prompt_opens_thought,
                )
                for completion in completions
            ),
        )

    def record(self) -> dict[str, Any]:
        """The reader as JSON values, for `from_record`; of a custom parser, also the hash of its source file."""
        return {
            "answer_format": self.answer_format,
            "vote_merge": self.vote_merge,
            "answer_parser": self.answer_parser,
            "answer_parser_sha256": None,
            "prompt_opens_thought": self.prompt_opens_thought,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> AnswerReader:
        """The reader that wrote ``record``."""
        values = {name: record[name] for name in cls.__slots__ if name in record}
        return cls(**values)
