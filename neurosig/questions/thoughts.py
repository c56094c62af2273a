"""A model's thought before its answer: the marks around it, and where in a text it ends.

`MARKS` is the one table of marks: parsing, decoding, prompts, traced positions and statistics all read it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "reflection", "scratchpad", "seed:think")
MARKS: tuple[tuple[str, str], ...] = (
    *((f"<{name}>", f"</{name}>") for name in _TAGS),  # Qwen3, DeepSeek-R1, EXAONE, Seed-OSS and others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis", "<|channel|>final<|message|>"),  # gpt-oss
)
"""Texts that open and close a thought, in any case. Source: the models' chat templates."""

_MARK = re.compile(
    "|".join(
        f"(?P<{side}>{'|'.join(re.escape(pair[place]) for pair in MARKS)})"
        for place, side in enumerate(("opening", "closing"))
    ),
    re.IGNORECASE,
)
_CHANNEL, _FINAL = "analysis", "assistantfinal"
"""What decoding without special tokens leaves of gpt-oss's marks; only at the start of a text."""


class Thought(NamedTuple):
    """The thoughts of a text.

    Attributes:
        closed: Number of thoughts that are closed.
        end: Characters up to the end of the last closed one, 0 without one.
        opened: Where the one that is not closed begins, its mark included; ``None`` when every thought is closed.
    """

    closed: int
    end: int
    opened: int | None


def is_mark(text: str) -> bool:
    """Whether a text, such as a token, is a mark and nothing else."""
    return _MARK.fullmatch(text) is not None


def thought_of(text: str, *, prompt_opens_thought: bool = False) -> Thought:
    """Where the thoughts of a text begin and end.

    Args:
        text: Any text; marks that belong to no thought count as marks too.
        prompt_opens_thought: The text continues a thought.
    """
    closed, end, opened = 0, 0, 0 if prompt_opens_thought else None
    for mark in _MARK.finditer(text):
        if mark["closing"] is None:
            opened = mark.start()
        else:
            closed, end, opened = closed + 1, mark.end(), None
    if text.lstrip().startswith(_CHANNEL):
        place = text.find(_FINAL)
        if place < 0:
            opened = opened or 0
        else:
            closed, end = closed + 1, max(end, place + len(_FINAL))
    return Thought(closed, end, opened)
