"""From a question's K completions to its answers and their vote: the one place where commands parse completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from neurosig.questions.answers.extract import AnswerFormat, extract_answer, parser_sha256
from neurosig.questions.answers.grading import is_correct, is_lenient
from neurosig.questions.answers.normal import normalise
from neurosig.questions.vote import Vote, VoteMerge, majority_vote, merge_answers
from neurosig.registry import Function, find
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

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
        answer_parser: ``MODULE:FUNCTION`` that replaces `extract_answer`, with its parameters; it gets the question
            without its gold answer, and what it returns is normalised.
        prompt_opens_thought: The chat template ends the prompt inside a thought, so that a completion without
            ``</think>`` is one.
        answer_parser_sha256: Hash of the source file of ``answer_parser``.

    Raises:
        UserError: See `neurosig.registry.find`.
    """

    answer_format: AnswerFormat = "auto"
    vote_merge: VoteMerge = "containment"
    answer_parser: str | None = None
    prompt_opens_thought: bool = False
    answer_parser_sha256: str | None = field(default=None, init=False)
    _parse: Function | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_config(self)
        if self.answer_parser is not None:
            found = find("answer_parser", self.answer_parser)
            object.__setattr__(self, "_parse", found.function)
            object.__setattr__(self, "answer_parser_sha256", found.sha256)

    def read(self, completions: Sequence[Completion], question: Question) -> Reading:
        """Parse a question's K completions and vote.

        Raises:
            UserError: ``answer_parser`` fails; the message names question and rollout.
        """
        raw = tuple(
            self.extract(completion.text, completion.finish_reason, question, rollout_id=index)
            for index, completion in enumerate(completions)
        )
        answers = tuple(merge_answers(raw, question, self.vote_merge))
        return Reading(raw, answers, majority_vote(answers, question.id))

    def extract(self, text: str, finish_reason: str, question: Question, *, rollout_id: int = 0) -> str | None:
        """The answer of one completion; ``rollout_id`` is for the message of a parser that fails."""
        options: dict[str, Any] = {"finish_reason": finish_reason, "prompt_opens_thought": self.prompt_opens_thought}
        if self._parse is None:
            return extract_answer(text, question, self.answer_format, **options)
        place = f'--answer-parser {self.answer_parser}: question "{question.id}", rollout {rollout_id}'
        try:
            answer = self._parse(text, replace(question, answer=None, aliases=()), self.answer_format, **options)
        except Exception as error:
            raise UserError(f"{place}: {type(error).__name__}: {error}") from error
        if answer is not None and not isinstance(answer, str):
            raise UserError(f"{place}: expected a text or None, got {ascii(answer)[:60]} ({type(answer).__name__})")
        return None if answer is None else normalise(answer) or None

    def agrees(
        self, completion: Completion, question: Question, answers: Sequence[str | None], winner: str | None
    ) -> bool:
        """Whether one more completion would vote for the winner of an earlier vote.

        Args:
            completion: The completion.
            question: Its question.
            answers: The candidates that the earlier completions vote for.
            winner: One of them, or ``None``, with which nothing agrees.
        """
        raw = self.extract(completion.text, completion.finish_reason, question)
        if raw is None or winner is None:
            return False
        merged = merge_answers([raw, *answers], question, self.vote_merge)
        return merged[0] == merged[1 + answers.index(winner)]

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether the parser that wrote ``record`` is this one, in this version."""
        return record.get("parser_sha256") == self.record()["parser_sha256"]

    def grade(self, reading: Reading, completions: Sequence[Completion], question: Question) -> Grades:
        """Which of the completions are right. For evaluation only.

        Raises:
            ValueError: The question has no gold answer.
        """
        strict = tuple(is_correct(answer, question) for answer in reading.raw_answers)
        lenient = tuple(
            right
            or is_lenient(
                completion.text,
                question,
                self.answer_format,
                finish_reason=completion.finish_reason,
                prompt_opens_thought=self.prompt_opens_thought,
            )
            for completion, right in zip(completions, strict, strict=True)
        )
        return Grades(strict, lenient)

    def record(self) -> dict[str, Any]:
        """The reader as JSON values, for `from_record`, with the hash of the parser's source."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "_parse"}
        return values | {"parser_sha256": self.answer_parser_sha256 or parser_sha256()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], answer_parser: str | None = None) -> AnswerReader:
        """The reader that wrote ``record``.

        Args:
            record: See `record`.
            answer_parser: The parser that it must have, if given.

        Raises:
            UserError: It has another parser, or the source of its parser is not here or has changed.
        """
        if answer_parser not in (None, record["answer_parser"]):
            raise UserError(
                f"--answer-parser {answer_parser}: the recorded answers were read by "
                f"{record['answer_parser'] or 'the parser of neurosig'}; leave the option out or parse them again"
            )
        reader = cls(**{field.name: record[field.name] for field in fields(cls) if field.init})
        here, recorded = reader.answer_parser_sha256, record["answer_parser_sha256"]
        if here != recorded:
            raise UserError(
                f"--answer-parser {reader.answer_parser}: its source file has the SHA-256 {here}, on record is "
                f"{recorded}; restore that file"
            )
        return reader
