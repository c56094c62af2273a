"""Which tokens of a traced text are read, as indices into prompt and completion together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from neurosig.neurons.config import NamedPositions, check_positions
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.stages.positions import read_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from neurosig.explore.texts import TracedText


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
