"""What a server answers, checked and turned into rollouts.

No answer is trusted: sizes, types and token ids are checked. A rollout that the server did not finish is cut off.
Reasoning that a chat server took out of the text is put back as a thought, so that answers are parsed as usual.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from neurosig.questions.answers.markup import answer_part
from neurosig.questions.chat_template import TemplateRenderer
from neurosig.questions.thoughts import is_mark
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout, completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from neurosig.models.load import LoadedModel
    from neurosig.sampling.config import SamplingConfig
    from neurosig.sampling.http import Endpoint
    from neurosig.sampling.sampler import Prompt

FINISHED = ("stop", "length")


class Answer(NamedTuple):
    """What an answer holds.

    Attributes:
        rollouts: The rollouts that were asked for.
        logprobs: Log-probability of each token of the first, in nats, if the server gave them.
        unfinished: Number of rollouts that the server did not finish, by its reason.
    """

    rollouts: list[Rollout]
    logprobs: list[float] | None
    unfinished: Counter[str]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)


class _Logprobs(_Answer):
    token_logprobs: list[FiniteFloat]


class _Numbered(_Answer):
    index: int
    finish_reason: str | None


class _Choice(_Numbered):
    token_ids: list[int]
    logprobs: _Logprobs | None = None


class _Completion(_Answer):
    choices: list[_Choice]


class _Message(_Answer):
    content: str | None
    reasoning_content: Any = None
    reasoning: Any = None

    @property
    def thought(self) -> str:
        """The reasoning that the server took out of the text, under either name."""
        fields = self.reasoning_content, self.reasoning
        return next((field.strip() for field in fields if isinstance(field, str) and field.strip()), "")


class _ChatChoice(_Numbered):
    message: _Message


class _Chat(_Answer):
    choices: list[_ChatChoice]


_AnswerT = TypeVar("_AnswerT", _Completion, _Chat)
_ChoiceT = TypeVar("_ChoiceT", _Choice, _ChatChoice)


class ServedAnswers:
    """Reads the answers of one server.

    Args:
        endpoint: The server, for messages.
        loaded: The model it serves, for its tokenizer, end-of-sequence tokens and vocabulary.
    """

    def __init__(self, endpoint: Endpoint, loaded: LoadedModel):
        self._endpoint, self._loaded = endpoint, loaded
        self._eos = frozenset(loaded.eos_token_ids)
        self._longest_token = max(map(len, loaded.tokenizer.get_vocab()))
        self._vocabulary = loaded.model.get_input_embeddings().get_parameter("weight").shape[0]

    def completion(self, content: bytes, prompt: Prompt, config: SamplingConfig, wanted: int) -> Answer:
        """Read K rollouts with token ids.

        Args:
            content: The answer.
            prompt: What was asked.
            config: How it was to be sampled.
            wanted: Choices asked for: K, or one that is used K times.

        Raises:
            UserError: The answer does not fit the request; the message names server, question and field.
        """
        about = _about(prompt)
        choices = self._ordered(self._parse(_Completion, content, about).choices, wanted, about)
        first = choices[0].logprobs
        if wanted < config.num_generations:
            choices = choices * config.num_generations
        group = [self._from_ids(prompt, number, choice, config, about) for number, choice in enumerate(choices)]
        unfinished = Counter(
            str(choice.finish_reason)
            for choice, rollout in zip(choices, group, strict=True)
            if choice.finish_reason not in FINISHED and rollout.finish_reason == "length"
        )
        return Answer(group, None if first is None else first.token_logprobs, unfinished)

    def chat(self, content: bytes, prompt: Prompt, config: SamplingConfig, number: int) -> Answer:
        """Read rollout ``number``, whose text is encoded again.

        Raises:
            UserError: See `completion`.
        """
        about, where = _about(prompt), "choices.0.message.content"
        (choice,) = self._ordered(self._parse(_Chat, content, about).choices, 1, about)
        reason, message = choice.finish_reason, choice.message
        size = len(message.content or "") + len(message.thought)
        if size > self._longest_token * config.max_new_tokens:
            problem = f"{size} characters, more than {config.max_new_tokens} tokens can spell"
            raise self._endpoint.fault(about, where, problem)
        empty = reason == "stop" and message.content is None
        unfinished = Counter(["no content"] if empty else [] if reason in FINISHED else [str(reason)])
        ended, text, eos = reason == "stop" and not empty, self._text(prompt, message), self._loaded.eos_token_ids[0]
        ids = self._encode(text)
        if ended or not ids:  # a rollout has at least one token
            ids.append(eos)
        if len(prompt.token_ids) + len(ids) > self._loaded.max_length:  # more than were sampled
            raise self._endpoint.fault(about, where, f"{len(ids)} tokens, more than the model has positions for")
        rollout = Rollout(prompt.question_id, number, text, tuple(ids), "stop" if ended else "length")
        return Answer([rollout], None, unfinished)

    def _from_ids(self, prompt: Prompt, number: int, choice: _Choice, config: SamplingConfig, about: str) -> Rollout:
        ids, where = choice.token_ids, f"choices.{choice.index}."
        if not 1 <= len(ids) <= config.max_new_tokens:
            raise self._endpoint.fault(about, where + "token_ids", f"{len(ids)} of at most {config.max_new_tokens} ids")
        if not all(0 <= token < self._vocabulary for token in ids):
            raise self._endpoint.fault(
                about, where + "token_ids", f"an id outside the vocabulary of {self._vocabulary}"
            )
        if not self._eos.isdisjoint(ids[:-1]):
            raise self._endpoint.fault(about, where + "token_ids", "it continues after an end-of-sequence token")
        ended = ids[-1] in self._eos  # vLLM calls it `length` when that token was also the last allowed
        if choice.finish_reason == "stop" and not ended:
            raise self._endpoint.fault(
                about, where + "finish_reason", "stop, without one of the model's end-of-sequence tokens"
            )
        if choice.finish_reason == "length" and not ended and len(ids) < config.max_new_tokens:
            raise self._endpoint.fault(
                about, where + "finish_reason", f"length, after {len(ids)} of {config.max_new_tokens} tokens"
            )
        mean_logprob = None
        if self._endpoint.config.logprobs:
            if choice.logprobs is None or len(choice.logprobs.token_logprobs) != len(ids):
                raise self._endpoint.fault(about, where + "logprobs", f"expected one for each of {len(ids)} tokens")
            if max(choice.logprobs.token_logprobs) > 1e-3:
                raise self._endpoint.fault(about, where + "logprobs", "a log-probability above 0")
            mean_logprob = sum(choice.logprobs.token_logprobs) / len(ids)
        text = completion_text(self._loaded.tokenizer, ids[:-1] if ended else ids)
        reason: Literal["stop", "length"] = "stop" if ended else "length"
        return Rollout(prompt.question_id, number, text, tuple(ids), reason, mean_logprob)

    def _text(self, prompt: Prompt, message: _Message) -> str:
        """The completion as the model wrote it after the prompt: its thought, which the content closes, and content."""
        content, thought = message.content or "", message.thought
        if not thought:
            return content
        opening, closing = self._marks
        prompted = str(self._loaded.tokenizer.decode(list(prompt.token_ids))).rstrip()
        start = "" if prompted.endswith(opening.strip()) else opening
        return start + thought + (closing + content.lstrip() if content else "")

    @cached_property
    def _marks(self) -> tuple[str, str]:
        return thought_marks(self._loaded.tokenizer)

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text, in which nothing but the marks of a thought is a special token."""

        def plain(part: str) -> list[int]:
            return list(self._loaded.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"])

        marks = {mark: token for token, mark in self._special_marks.items()}
        if not marks:
            return plain(text)
        parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        return [token for part in parts if part for token in ([marks[part]] if part in marks else plain(part))]

    @cached_property
    def _special_marks(self) -> dict[int, str]:
        added = self._loaded.tokenizer.added_tokens_decoder
        return {token: str(name) for token, name in added.items() if is_mark(str(name))}

    def _parse(self, kind: type[_AnswerT], content: bytes, about: str) -> _AnswerT:
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "answer"
            hint = (
                "; vLLM 0.10.2 and newer returns it, for other servers give --server-api chat"
                if field.endswith("token_ids")
                else ""
            )
            raise self._endpoint.fault(about, field, first["msg"] + hint) from error

    def _ordered(self, choices: Sequence[_ChoiceT], wanted: int, about: str) -> list[_ChoiceT]:
        ordered = sorted(choices, key=lambda choice: choice.index)
        if [choice.index for choice in ordered] != list(range(wanted)):
            raise self._endpoint.fault(about, "choices", f"expected {wanted}, numbered from 0, got {len(choices)}")
        return ordered


def _about(prompt: Prompt) -> str:
    return f'question "{prompt.question_id}"'


def thought_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    r"""What a model's chat template writes before and after the reasoning of an answer.

    Returns:
        Its two marks with their line breaks, such as ``<think>\n`` and ``\n</think>\n\n``: these where the template
        writes no reasoning, or marks that `answer_part` does not know.
    """
    reasoning, content = "reasoningmark", "contentmark"
    greeting = {"role": "user", "content": "Hello"}
    answered = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    try:
        before, _, after = TemplateRenderer(tokenizer)([greeting, answered]).partition(reasoning)
    except UserError:
        before = after = ""
    opening = before[max(map(before.rfind, "<[\u25c1"), default=0) :]
    closing, found, _ = after.partition(content)
    cut_off, whole = (
        answer_part(text, "", prompt_opens_thought=False) for text in (opening + "a", f"{opening}a{closing}b")
    )
    return (opening, closing) if found and (cut_off, whole) == (None, "b") else ("<think>\n", "\n</think>\n\n")
