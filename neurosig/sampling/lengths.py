"""Lengths of completions and of the thoughts in them, and how many were cut off: what every summary reports."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from neurosig.questions.thoughts import thought_of
from neurosig.sampling.rollouts import Rollout

logger = logging.getLogger(__name__)

MOST_TRUNCATED = 0.1
"""Share of rollouts that may be cut off without a warning."""


def completion_lengths(rollouts: Sequence[Rollout], *, prompt_opens_thought: bool = False) -> dict[str, float]:
    """Means over rollouts, of which there is at least one.

    Args:
        rollouts: The rollouts.
        prompt_opens_thought: Their prompt ends inside a thought.

    Returns:
        ``truncated_rate``, the share that was cut off at the token limit; ``unclosed_rate``, the share whose thought is
        not closed, which have no answer; ``mean_thought_length`` and ``mean_answer_length`` in tokens, marks and the
        end-of-sequence token included; a thought that is not closed takes the whole completion.
    """
    n = len(rollouts)
    unclosed = [is_unclosed(rollout, prompt_opens_thought) for rollout in rollouts]
    total = sum(len(rollout.completion_ids) for rollout in rollouts)
    thought = sum(
        len(rollout.completion_ids) if is_open else rollout.answer_start
        for rollout, is_open in zip(rollouts, unclosed, strict=True)
    )
    return {
        "truncated_rate": sum(rollout.finish_reason == "length" for rollout in rollouts) / n,
        "unclosed_rate": sum(unclosed) / n,
        "mean_thought_length": thought / n,
        "mean_answer_length": (total - thought) / n,
    }


def is_unclosed(rollout: Rollout, prompt_opens_thought: bool) -> bool:
    """Whether a rollout ends inside a thought."""
    return thought_of(rollout.text, prompt_opens_thought=prompt_opens_thought).opened is not None


def lengths_text(lengths: Mapping[str, Any]) -> str:
    """`completion_lengths` in words, thoughts only where there are any."""
    text = f"{lengths['truncated_rate']:.1%} of the rollouts cut off"
    if lengths["mean_thought_length"]:
        text += f", {lengths['unclosed_rate']:.1%} inside a thought; "
        text += f"{lengths['mean_thought_length']:.1f} tokens per thought"
    return f"{text}, {lengths['mean_answer_length']:.1f} tokens per answer"


def warn_of_truncation(place: str, lengths: Mapping[str, Any]) -> bool:
    """Warn when more than `MOST_TRUNCATED` of the rollouts were cut off; whether that was so."""
    if lengths["truncated_rate"] <= MOST_TRUNCATED:
        return False
    logger.warning(
        "%s: %.0f%% of the rollouts were cut off at --max-new-tokens%s; raise it, or ask for less in --instruction",
        place, 100 * lengths["truncated_rate"],
        f", {100 * lengths['unclosed_rate']:.0f}% inside a thought" if lengths["unclosed_rate"] else "",
    )  # fmt: skip
    return True
