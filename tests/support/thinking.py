"""Chat templates of thinking models, and rollouts with thoughts made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.exports import write_lines
from tests.support.flow import save_tiny, write_questions
from tests.support.tiny import CHAT_TEMPLATE

KEEPS = CHAT_TEMPLATE
"""Leaves messages as they are; the completion opens its thought itself, unless ``enable_thinking`` is false."""
DROPS = CHAT_TEMPLATE.replace(
    "message.content +",
    "(message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' else message.content) +",
)
"""Drops the thoughts of assistant turns, as Qwen3's does before the last question."""
OPENS = CHAT_TEMPLATE.removesuffix("{%- endif %}\n{%- endif %}") + (
    "{%- else %}\n{{- '<think>\\n' }}\n{%- endif %}\n{%- endif %}"
)
"""Opens the thought in the prompt, as the thinking-only Qwen3 models do."""
DROPS_AND_OPENS = OPENS.replace(CHAT_TEMPLATE.splitlines()[1], DROPS.splitlines()[1])

THOUGHT = "It is a colour that people like.\nOr do they? I have seen it often, on walls and on flowers, so yes.\n"
CUT = "Let me think about walls, and about flowers, and about"
K = 3


def write_world(folder: Path, template: str, *, opens: bool = False, n: int = 5) -> dict[str, Any]:
    """A tiny model with ``template``, questions, and K rollouts of each; the options of an export of them.

    Of each question two answer yes after a thought; of q1 only cut-off ones do; the third ends inside its thought.
    """
    save_tiny(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(template)
    opening = "" if opens else "<think>\n"
    lines = []
    for index in range(n):
        reason = "length" if index == 1 else "stop"
        for k in range(2):
            text = f"{opening}{THOUGHT[k * index :]}</think>\n\nAnswer: yes. {'So ' * k}"
            lines.append({"question_id": f"q{index}", "text": text, "finish_reason": reason})
        lines.append({"question_id": f"q{index}", "text": opening + CUT, "finish_reason": "length"})
    write_questions(folder / "questions.jsonl", n)
    return {"rollouts": write_lines(folder / "rollouts.jsonl", lines), "max_new_tokens": 200, "keep_truncated": False}
