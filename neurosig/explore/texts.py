"""What a user passes to be traced, as token ids, and which of the tokens are read.

Special tokens come from the tokenizer once. A prompt gets those that the tokenizer puts before a text (BOS), a text
that begins with BOS already gets no second one, and none that it puts after a text (EOS), since the completion
follows. A completion is tokenised on its own and gets none: a second BOS inside a sequence is a text that the model
never saw. A chat is rendered by the tokenizer's template, which writes the special tokens itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, get_args

from neurosig.neurons.config import NamedPositions, check_positions
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout, answer_start, completion_text
from neurosig.sampling.sampler import Prompt
from neurosig.stages.positions import read_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
EXPECTED = (
    "give a text, a (prompt, completion) pair as a tuple, a chat as a list of {'role': ..., 'content': ...}, "
    "a Rollout with prompts=, or a list of these"
)


@dataclass(frozen=True, slots=True)
class TracedText:
    """One text as the model reads it.

    Attributes:
        prompt: The prompt's text; of a chat its last user message, of a `Prompt` its decoded tokens.
        completion: The completion's text, "" without one.
        prompt_ids: Token ids of the prompt, special tokens included.
        completion_ids: Token ids of the completion without an end-of-sequence token; () without a completion.
        tokens: Text of each token of prompt and completion.
        rollout: The completion as a rollout, from which positions such as ``answer`` are found; None without one.
    """

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    rollout: Rollout | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of prompt and completion."""
        return self.prompt_ids + self.completion_ids


class TextReader:
    """Turns what a user passes into `TracedText` with one tokenizer.

    Args:
        tokenizer: The model's.
        prompts: Prompts of rollouts, by their question ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt] | None = None):
        self.tokenizer = tokenizer
        self._prompts = {prompt.question_id: prompt for prompt in prompts or ()}

    def read(self, texts: Any) -> tuple[TracedText, ...]:
        """One text or many, in order.

        Raises:
            UserError: Something is none of `EXPECTED`, a prompt is empty, or a rollout's prompt is not given.
        """
        if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
            given: list[Any] = [texts]
        else:
            given = [texts] if _is_one(texts) else list(texts)
        if not given:
            raise UserError(f"no text to trace: {EXPECTED}")
        return tuple(self._one(one, f"text {index}") for index, one in enumerate(given))

    def prompt_ids(self, prompt: Any, place: str = "prompt") -> tuple[int, ...]:
        """Token ids of a prompt: a text, a chat or a `Prompt`."""
        return self._prompt(prompt, place)[1]

    def _one(self, given: Any, place: str) -> TracedText:
        if isinstance(given, Rollout):
            if given.question_id not in self._prompts:
                raise UserError(
                    f'{place}: a rollout of question "{given.question_id}", whose prompt is not given; pass prompts=, '
                    "those that sample() got, or (prompt, rollout) pairs"
                )
            return self._text(self._prompts[given.question_id], given, place)
        if isinstance(given, tuple) and _is_one(given):
            return self._text(given[0], given[1], place)
        if _is_chat(given) and given[-1].get("role") == "assistant":
            _check_messages(given, place)
            return self._text(given[:-1], given[-1]["content"], place)
        return self._text(given, None, place)

    def _text(self, prompt: Any, completion: str | Rollout | None, place: str) -> TracedText:
        text, prompt_ids = self._prompt(prompt, place)
        rollout = self._rollout(completion, place)
        ids = () if rollout is None else rollout.completion_ids_without_eos
        written = completion if isinstance(completion, str) else "" if rollout is None else rollout.text
        tokens = tuple(
            str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in (*prompt_ids, *ids)
        )
        return TracedText(text, written, prompt_ids, ids, tokens, rollout)

    def _prompt(self, prompt: Any, place: str) -> tuple[str, tuple[int, ...]]:
        if isinstance(prompt, Prompt):
            text, ids = str(self.tokenizer.decode(list(prompt.token_ids))), tuple(prompt.token_ids)
        elif _is_chat(prompt):
            _check_messages(prompt, place)
            if prompt[-1]["role"] != "user":
                raise UserError(f"{place}: a chat needs a user message before the reply; add one")
            text, ids = prompt[-1]["content"], self._builder.encode(prompt)
        elif isinstance(prompt, str):
            text, ids = prompt, self._with_specials(prompt)
        else:
            raise UserError(f"{place}: got {type(prompt).__name__}; {EXPECTED}")
        if not ids:
            raise UserError(f"{place}: an empty prompt; the model needs a token to begin with")
        return text, ids

    def _rollout(self, completion: str | Rollout | None, place: str) -> Rollout | None:
        if completion is None or isinstance(completion, Rollout):
            return completion
        ids = self._plain(completion)
        if not ids:
            raise UserError(f"{place}: an empty completion; leave it out to trace the prompt alone")
        text = completion_text(self.tokenizer, ids)
        start = answer_start(lambda part: completion_text(self.tokenizer, part), ids, text)
        return Rollout("", 0, text, (*ids, ids[-1]), "stop", answer_start=start)  # its last token counts as the end

    @cached_property
    def _builder(self) -> PromptBuilder:
        return PromptBuilder(self.tokenizer, PromptConfig())

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_specials(self, text: str) -> tuple[int, ...]:
        """The text's tokens after the special tokens that the tokenizer puts before a text."""
        plain, marked = self._plain(text), tuple(self.tokenizer(text)["input_ids"])
        leading = marked[: self._n_special(marked) - self._n_special(plain)]
        return plain if plain[: len(leading)] == leading else leading + plain

    def _n_special(self, ids: Sequence[int]) -> int:
        """Special tokens at the beginning."""
        return sum(1 for _ in takewhile(set(self.tokenizer.all_special_ids).__contains__, ids))


def _is_chat(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(message, Mapping) for message in given)


def _is_one(given: Any) -> bool:
    """Whether this is one text, and not several."""
    if isinstance(given, tuple) and len(given) == 2:
        return (isinstance(given[0], str | Prompt) or _is_chat(given[0])) and isinstance(given[1], str | Rollout)
    return isinstance(given, str) or _is_chat(given)


def _check_messages(messages: Sequence[Mapping[str, Any]], place: str) -> None:
    for number, message in enumerate(messages):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise UserError(
                f"{place}: message {number} of the chat: expected a role ({', '.join(ROLES)}) and a text as content"
            )


def positions_name(positions: Any) -> str:
    """Positions as the option ``--positions`` writes them; numbers may be given as such.

    Raises:
        UserError: They are neither a name nor numbers and ranges.
    """
    if isinstance(positions, int) and not isinstance(positions, bool):
        return str(positions)
    if isinstance(positions, list | tuple | range) and positions and all(type(one) is int for one in positions):
        return ",".join(map(str, positions))
    try:
        if positions != "prompt":
            check_positions(positions)
    except (UserError, TypeError, AttributeError):
        names = ", ".join(("prompt", *get_args(NamedPositions)))
        raise UserError(
            f"positions: expected {names}, or tokens of the completion such as 0, -1, [0, 3] or '0:3', got "
            f"{positions!r}"
        ) from None
    return str(positions)


def find_positions(
    texts: Sequence[TracedText], positions: str, tokenizer: PreTrainedTokenizerBase, *, about_next: bool
) -> tuple[list[Sequence[int]], tuple[str, ...]]:
    """The tokens of each text that are read, and notes on the texts that lack what was asked for.

    The first token of a sequence is never read: it is BOS, or sees nothing but itself, so that its neurons are the same
    whatever follows, and in most models they are far larger than those of any other token.

    Args:
        texts: The texts.
        positions: See `positions_name`. A text without a completion is read at its prompt instead, save ``prompt_end``.
        tokenizer: The model's.
        about_next: The score is about the token that comes next (``unembed``), so that a token's is read one earlier.

    Returns:
        Of each text indices into ``prompt_ids + completion_ids``, ascending; and the notes.

    Raises:
        UserError: A text has no token that can be read.
    """
    first = 2 if about_next else 1
    found: list[Sequence[int]] = [()] * len(texts)
    completed = [i for i, text in enumerate(texts) if text.completion_ids]
    notes: list[str] = []
    if positions in ("prompt", "prompt_end"):
        completed = []
    elif len(completed) < len(texts):
        lacking = len(texts) - len(completed)
        notes.append(f"{lacking} of {len(texts)} texts have no completion and are read at their prompts")
    if completed:
        groups = {str(i): [rollout] for i in completed if (rollout := texts[i].rollout) is not None}
        questions = [Question(name, "text", _question(texts[int(name)])) for name in groups]
        indices, note = read_positions(positions, groups, questions, AnswerReader(), tokenizer)
        notes += [note] if note else []
        for i in completed:
            n = len(texts[i].prompt_ids)
            found[i] = [n + index for index in indices[str(i)][0]]
    for i in set(range(len(texts))) - set(completed):
        n = len(texts[i].prompt_ids)
        if positions == "prompt_end":
            n += about_next  # the score about the completion's first token is read at the prompt's end
            found[i] = range(max(n - 1, first), min(n, len(texts[i].ids)))
        else:
            found[i] = range(first, n)
    for i, at in enumerate(found):
        if not at or at[0] < first:
            raise UserError(f"text {i}: {_too_short(texts[i], about_next)}")
    return found, tuple(notes)


def _question(text: TracedText) -> str:
    return text.prompt.replace("\0", " ").strip() or "?"


def _too_short(text: TracedText, about_next: bool) -> str:
    n = len(text.prompt_ids)
    if about_next:
        return f"the score is about the next token, and a prompt of {n} tokens leaves none to read; give a longer text"
    return f"a prompt of {n} token, and the first token of a sequence is not read; give a longer text"
