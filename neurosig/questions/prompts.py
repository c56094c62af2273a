"""Chat messages of student and teacher, as token ids.

The student sees the bare question; the teacher first sees demonstrations as earlier turns of the chat. Nothing is ever
truncated, and text that looks like a special token stays text.
"""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from neurosig.questions.chat_template import ADVICE, TemplateRenderer
from neurosig.questions.thoughts import is_mark, thought_of
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from neurosig.questions.load import Question

logger = logging.getLogger(__name__)

Message = Mapping[str, str]
PROBE = "contentmark"
"""Content of messages that only show where the template puts contents."""

PRIVILEGED_WORDING = (
    "Here is material about the question below. Use it to answer, but do not mention it."
    "\n\n{privileged_context}\n\n{question}"
)
"""How the teacher is asked a question that has a ``privileged_context``."""


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """Wording of a prompt.

    Attributes:
        system: System message of questions without one; ``None`` keeps the chat template's own default.
        instruction: Line after a free-form question.
        choice_instruction: Line after the lettered choices of a multiple-choice question.
        enable_thinking: Passed to the chat template (Qwen3); ``None`` passes nothing.
        demonstration_thoughts: Demonstrations show the thought before their answer, also where the chat template drops
            those of earlier turns.
    """

    system: str | None = None
    instruction: str = "Answer in one short sentence."
    choice_instruction: str = "Reply with the letter of the right choice, as in: Answer: A"
    enable_thinking: bool | None = None
    demonstration_thoughts: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def teacher_config(student: PromptConfig, thinking: bool | None, demonstration_thoughts: bool) -> PromptConfig:
    """Wording of the teacher's prompts; ``thinking`` ``None`` is the student's mode."""
    enabled = student.enable_thinking if thinking is None else thinking
    return replace(student, enable_thinking=enabled, demonstration_thoughts=demonstration_thoughts)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A question and the model's own response to it, its thought included, for the teacher's context."""

    question: Question
    response: str


def question_text(question: Question, config: PromptConfig) -> str:
    """Text of the user turn: question, lettered choices, instruction; of a question sent as it is, its text alone."""
    if question.as_is:
        return question.question
    lines = [question.question]
    if question.choices:
        lines += [
            f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, question.choices, strict=False)
        ]
        lines.append(config.choice_instruction)
    else:
        lines.append(config.instruction)
    return "\n".join(line for line in lines if line)


def check_privileged_wording(wording: str) -> None:
    """Check that a wording has both places of `PRIVILEGED_WORDING` once.

    Raises:
        UserError: It has not.
    """
    for place in ("{privileged_context}", "{question}"):
        if wording.count(place) != 1:
            raise UserError(f"--privileged-wording: expected {place} once in it, found it {wording.count(place)} times")


def privileged_question(question: Question, config: PromptConfig, wording: str) -> Question:
    """The question as the teacher is asked it: with its ``privileged_context``, if it has one.

    Args:
        question: The question.
        config: Wording of the student's prompt, which is the ``{question}`` of ``wording``.
        wording: See `PRIVILEGED_WORDING`.
    """
    if question.privileged_context is None:
        return question
    places = {"{privileged_context}": question.privileged_context, "{question}": question_text(question, config)}
    text = re.sub("|".join(map(re.escape, places)), lambda place: places[place[0]], wording)
    return replace(question, question=text, as_is=True)


def check_same_stream(student: PromptBuilder, teacher: PromptBuilder) -> None:
    """Check that the student's completion makes sense after the teacher's prompt, which scores its tokens.

    A student whose prompt closes the thought may learn from a teacher whose prompt opens none: that teacher expects a
    thought at the first tokens, which is logged.

    Raises:
        UserError: One prompt ends inside a thought and the other does not; or the teacher's alone closes it.
    """
    if student.generation_prompt == teacher.generation_prompt:
        return
    endings = f"the student's prompt ends {student.ending}, the teacher's {teacher.ending}"
    if student.opens_thought != teacher.opens_thought or teacher.closes_thought > student.closes_thought:
        raise UserError(
            f"--student-thinking and --teacher-thinking: {endings}, but the teacher scores the student's completion; "
            "give both the same mode"
        )
    if student.closes_thought > teacher.closes_thought:
        logger.warning(
            "%s: the teacher expects a thought where the student answers; give --teacher-thinking False, or leave the "
            "first tokens out of the loss with --skip-first", endings,
        )  # fmt: skip


def _earlier_turns(question: Question) -> list[Message]:
    return [{"role": role, "content": text} for role, text in question.earlier_turns]


class PromptBuilder:
    """Turns questions into prompt ids with one tokenizer and one wording.

    Raises:
        UserError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig):
        if tokenizer.chat_template is None:
            raise UserError(f"the tokenizer has no chat template; {ADVICE}")
        self.tokenizer = tokenizer
        self.config = config
        self._template = TemplateRenderer(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._special = sorted({*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)})

    def student(self, question: Question) -> tuple[int, ...]:
        """Prompt ids of the bare question."""
        return self.teacher(question, ())

    def without_question(self, question: Question) -> tuple[int, ...]:
        """Prompt ids of the chat whose user turn is only the instruction: what a reply's prior is conditioned on."""
        instruction = self.config.choice_instruction if question.choices else self.config.instruction
        instruction = "" if question.as_is else instruction
        return self.encode([*self.messages(question)[:-1], {"role": "user", "content": instruction}])

    def teacher(self, question: Question, context: Sequence[Demonstration]) -> tuple[int, ...]:
        """Prompt ids of the question after its demonstrations, in the order given."""
        return self.encode(self.messages(question, context))

    @cached_property
    def generation_prompt(self) -> str:
        """What the chat template writes after the last user turn."""
        return self._render([{"role": "user", "content": PROBE}]).rpartition(PROBE)[2]

    @property
    def opens_thought(self) -> bool:
        """Whether the generation prompt ends inside a thought, which the completion then continues."""
        return thought_of(self.generation_prompt).opened is not None

    @property
    def closes_thought(self) -> bool:
        """Whether the generation prompt ends after an empty thought, so that the completion is an answer alone."""
        return not self.opens_thought and thought_of(self.generation_prompt).closed > 0

    @property
    def ending(self) -> str:
        """How the generation prompt ends, in words."""
        without = "after an empty thought" if self.closes_thought else "without a thought"
        return "inside a thought" if self.opens_thought else without

    def messages(self, question: Question, context: Sequence[Demonstration] = ()) -> list[Message]:
        """The chat that `student` and `teacher` encode."""
        system = self.config.system if question.system is None else question.system
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        for demonstration in context:
            messages += _earlier_turns(demonstration.question)
            messages.append({"role": "user", "content": question_text(demonstration.question, self.config)})
            messages.append({"role": "assistant", "content": self.shown(demonstration.response)})
        messages += _earlier_turns(question)
        messages.append({"role": "user", "content": question_text(question, self.config)})
        return messages

    def shown(self, response: str) -> str:
        """What a demonstration shows of a response: its answer, or also its thought, with the mark that opens it."""
        text = response.strip()
        thought = thought_of(text)
        if not thought.closed:
            return text
        if not self.config.demonstration_thoughts:
            return text[thought.end :].strip()
        opening = self.generation_prompt[thought_of(self.generation_prompt).opened :] if self.opens_thought else ""
        return text if text.startswith(opening.strip()) else opening + text

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat that ends with the generation prompt.

        Raises:
            UserError: The template fails, or leaves out the text of a turn.
        """
        hostile = any(token in message["content"] for message in messages for token in self._special)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not hostile:
            text = self._render(messages)
            if not answers or (self._before_answers is not None and all(answer in text for answer in answers)):
                self._check_thoughts(answers)
                return self._tokenise(text)
        ids = self._encode_pieces(messages)  # where the template sees no thought, it leaves none out
        self._check_thoughts(answers)
        return ids

    def _check_thoughts(self, answers: Sequence[str]) -> None:
        written = thought_of(self._before_answers or "").closed if answers else 0
        if written and any(thought_of(answer).closed for answer in answers):
            raise UserError(
                "the chat template writes an empty thought before earlier answers, so demonstrations cannot show "
                f"theirs; leave out --demonstration-thoughts, or {ADVICE}"
            )

    @cached_property
    def _before_answers(self) -> str | None:
        """What the template writes between an earlier question and its answer; ``None`` if it leaves answers out."""
        turns = [("user", PROBE), ("assistant", f"{PROBE}x"), ("user", PROBE)]
        text = self._render([{"role": role, "content": content} for role, content in turns])
        before, shown, _ = text.partition(f"{PROBE}x")
        return before.rpartition(PROBE)[2] if shown else None

    def _render(self, messages: Sequence[Message]) -> str:
        options: dict[str, Any] = (
            {} if self.config.enable_thinking is None else {"enable_thinking": self.config.enable_thinking}
        )
        text = self._template(messages, **options)
        turns = [message["content"].strip() for message in messages if message["role"] == "user"]
        if not all(content in text for content in turns):
            what = "the question" if turns[-1] not in text else "the examples before the question"
            raise UserError(f"the chat template leaves out {what}; {ADVICE}")
        return text

    def _tokenise(self, text: str, *, split_special_tokens: bool = False) -> tuple[int, ...]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
        return tuple(encoded["input_ids"])

    def _encode_pieces(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode template and contents separately, so that ``<|im_end|>`` inside a question is no special token."""
        marks = [f"{PROBE}{index:04d}x" for index in range(len(messages))]
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        rest, ids = self._render(marked), []
        for mark, message in zip(marks, messages, strict=True):
            before, here, rest = rest.partition(mark)
            if not here:
                raise UserError(f"the chat template leaves out a message; {ADVICE}")
            content = message["content"].strip()
            ids += [*self._tokenise(before), *self._tokenise_content(content, message["role"])]
        return (*ids, *self._tokenise(rest))

    def _tokenise_content(self, content: str, role: str) -> list[int]:
        """Token ids of a message, in which nothing is special but the marks of the model's own thoughts."""
        kept = {token for token in self._special if role == "assistant" and is_mark(token)}
        parts = re.split(f"({'|'.join(map(re.escape, kept))})", content) if kept else [content]
        return [
            token for part in parts if part for token in self._tokenise(part, split_special_tokens=part not in kept)
        ]
