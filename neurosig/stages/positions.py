"""Which tokens' neurons are read: the option ``--positions`` applied to each rollout.

Positions name tokens of the completion; the value of a neuron at a token is computed while the model reads that token,
and the score ``unembed``, which is about the token that comes next, is read one position earlier
(`neurosig.neurons.tracer`). ``prompt_end`` names a position and not a token: the prompt's last, from which the first
token of the completion is predicted. There ``unembed`` is about that token, as at position 0.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from neurosig.neurons.config import CHOSEN_TOKENS
from neurosig.neurons.signals_file import Traced
from neurosig.questions.reader import AnswerReader
from neurosig.questions.statement import answer_place
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout, completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from neurosig.questions.load import Question
    from neurosig.sampling.sampler import Prompt

PROMPT_END = range(-1, 0)
"""The position before the completion's first token."""


def read_positions(
    positions: str,
    groups: Mapping[str, Sequence[Rollout]],
    questions: Sequence[Question],
    reader: AnswerReader,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, list[Sequence[int]]], str]:
    """The tokens of each rollout whose neurons are read, as indices into `Rollout.completion_ids_without_eos`.

    A rollout without such a token is read at its answer, one without a thought as a whole.

    Args:
        positions: The option (`neurosig.neurons.config.check_positions`).
        groups: Question id -> its rollouts.
        questions: Their questions.
        reader: How answers are parsed, for `PARSED`.
        tokenizer: Decodes completions, for `PARSED`.

    Returns:
        Question id -> indices of each rollout, ascending and at least one, or `PROMPT_END`; and a note on how many
        rollouts have no such token, "" where all have one.
    """
    by_id = {question.id: question for question in questions}
    indices: dict[str, list[Sequence[int]]] = {}
    lacking = 0
    otherwise: Literal["all", "answer"] = "all" if positions == "thought" else "answer"
    for name, group in groups.items():
        found = [_indices(positions, rollout, by_id[name], reader, tokenizer) for rollout in group]
        lacking += sum(not tokens for tokens in found)
        indices[name] = [tokens or rollout.positions(otherwise) for tokens, rollout in zip(found, group, strict=True)]
    total = sum(map(len, groups.values()))
    read = "whole" if otherwise == "all" else "at their answers"
    return indices, f"positions {positions}: {lacking} of {total} rollouts have none and are read {read}" * bool(
        lacking
    )


def traced_at(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], indices: Sequence[int], *, about_next: bool
) -> Traced:
    """Prompt, completion and indices as the tracer takes them, which counts tokens of the completion alone.

    Args:
        prompt_ids: The prompt.
        completion_ids: The completion.
        indices: See `read_positions`.
        about_next: The score is about the next token (``unembed``).

    Raises:
        UserError: `PROMPT_END` of a prompt of one token.
    """
    if indices != PROMPT_END:
        return prompt_ids, completion_ids, indices
    if about_next:
        return prompt_ids, completion_ids[:1], range(1)
    if len(prompt_ids) < 2:
        raise UserError("--positions prompt_end: a prompt of one token; it needs two")
    return prompt_ids[:-1], prompt_ids[-1:], range(1)


def all_traced_at(
    prompts: Mapping[str, Prompt],
    groups: Mapping[str, Sequence[Rollout]],
    read_at: Mapping[str, Sequence[Sequence[int]]],
    *,
    about_next: bool,
) -> list[Traced]:
    """`traced_at` of all rollouts in the order of ``groups``, read at what `read_positions` found."""
    return [
        traced_at(prompts[name].token_ids, rollout.completion_ids_without_eos, indices, about_next=about_next)
        for name, group in groups.items()
        for rollout, indices in zip(group, read_at[name], strict=True)
    ]


def _indices(
    positions: str,
    rollout: Rollout,
    question: Question,
    reader: AnswerReader,
    tokenizer: PreTrainedTokenizerBase,
) -> Sequence[int]:
    """The indices, () where the rollout has no such token."""
    n = len(rollout.completion_ids_without_eos)
    start = min(rollout.answer_start, n)
    match positions:
        case "all":
            return range(n)
        case "answer":
            return range(start, n)
        case "thought":
            return range(start)
        case "answer_start":
            return range(start, n)[:1]
        case "prompt_end":
            return PROMPT_END
        case "statement" | "answer_words":
            return _place(positions, rollout, question, reader, tokenizer)
    chosen: set[int] = set()
    for part in positions.split(","):
        found = CHOSEN_TOKENS.fullmatch(part)
        assert found is not None, part
        if found["at"] is not None:
            chosen |= {*range(n)} & {int(found["at"]), int(found["at"]) + n}
        else:
            chosen |= {*range(n)[slice(*(None if end is None else int(end) for end in found.group("start", "stop")))]}
    return sorted(chosen)


def _place(
    positions: str,
    rollout: Rollout,
    question: Question,
    reader: AnswerReader,
    tokenizer: PreTrainedTokenizerBase,
) -> Sequence[int]:
    ids = rollout.completion_ids_without_eos
    answer = reader.extract(rollout.text, rollout.finish_reason, question, rollout_id=rollout.rollout_id)
    text = completion_text(tokenizer, ids)
    place = answer_place(text, answer, question, reader)
    span = place and (place.statement if positions == "statement" else place.words)
    return () if span is None else token_span(tokenizer, ids, text, *span)


def token_span(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], text: str, start: int, end: int) -> range:
    """Indices of the tokens that hold the characters ``start`` to ``end``, the end not included, of their text.

    Found by decoding prefixes, so that a character of several tokens has all of them, and a token that reaches over an
    end of the span belongs to it.

    Args:
        tokenizer: The model's.
        token_ids: The tokens.
        text: What `completion_text` makes of all of them.
        start: The first character.
        end: The character after the last.
    """

    @cache
    def characters(count: int) -> int:
        """Characters of the text that the first ``count`` tokens complete."""
        pairs = zip(completion_text(tokenizer, token_ids[:count]), text, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    counts = range(len(token_ids) + 1)
    before = characters(max(0, bisect_right(counts, start, key=characters) - 1))
    return range(bisect_left(counts, before, key=characters), bisect_left(counts, end, key=characters))
