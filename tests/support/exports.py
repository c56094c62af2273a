"""An export whose signals are known by construction, for the tests of what reads exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.flow import save_tiny

N, K = 40, 4
BIDI, ANSI = "\u202egpj.exe\u2069", "\x1b[31mred\x1b[0m"
HOSTILE_QUESTION = f'Is <img src="http://evil.test/x.png" onerror="alert(1)"> {BIDI} nice?'
HOSTILE_TEXT = f"<script src=https://evil.test/a.js>alert(2)</script>\n{ANSI} &amp; {{{{ 7 * 7 }}}}\u200b Answer: "


def write_world(folder: Path, first: int = 0) -> Path:
    """A tiny model, questions with gold answers, and rollouts: the more of a question's rollouts agree, the more often
    they are right. The first question and all rollouts of the second are hostile text."""
    save_tiny(folder / "model")
    rng = np.random.default_rng(first)
    questions, rollouts = [], []
    for index in range(first, first + N):
        text = HOSTILE_QUESTION if index == 0 else f"Is number {index} nice?"
        answer = f"gold{index}"
        questions.append({"id": f"q{index:02d}", "domain": "made up", "question": text, "answer": answer})
        known = rng.random() < 0.5
        for rollout in range(K):
            right = rng.random() < (0.9 if known else 0.2)
            answer_text = answer if right else f"guess{rollout}"
            prefix = HOSTILE_TEXT if index == 1 else "I would say. Answer: "
            rollouts.append({"question_id": f"q{index:02d}", "text": prefix + answer_text})
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "rollouts.jsonl", rollouts)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
