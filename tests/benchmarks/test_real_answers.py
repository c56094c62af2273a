"""Real five-shot outputs of seven models on MMLU-Pro, read by our parser and by the benchmark's own expressions."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import pytest

from neurosig.questions.answers import extract_answer
from neurosig.questions.load import Question
from tests.support.paths import REAL_CASES

pytestmark = [pytest.mark.bench, pytest.mark.skipif(not REAL_CASES.is_dir(), reason="needs the collected completions")]


def test_answers_per_model() -> None:
    """Print accuracy under both readings, where the first expression finds one letter how often ours is it, and every
    output that one reading grades right and the other wrong."""
    accuracy: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    clear: dict[str, list[bool]] = defaultdict(list)
    for line in (REAL_CASES / "mmlu_pro_outputs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = Question("q", "d", row["question"], tuple(row["choices"]))
        letter = (extract_answer(row["text"], question) or "").upper()
        official = next(filter(None, row["official"].values()), None)
        found = set(re.findall(r"answer is \(?([A-J])\)?", row["text"]))
        if len(found) == 1:
            clear[row["model"]].append({letter} == found)
        accuracy[row["model"]].append((official == row["gold"], letter == row["gold"]))
        if (official == row["gold"]) != (letter == row["gold"]):
            print(f"{row['model']} {row['question_id']}: official {row['official']}, ours {letter}, gold {row['gold']}")
            print(f"    ...{row['text'][-160:]!r}")
    print(f"{'model':28} {'n':>4} {'official':>9} {'ours':>7} {'one letter':>11} {'agree':>7}")
    for model, pairs in accuracy.items():
        official, ours = (100 * sum(pair[place] for pair in pairs) / len(pairs) for place in (0, 1))
        same = 100 * sum(clear[model]) / len(clear[model])
        print(f"{model:28} {len(pairs):4} {official:8.2f}% {ours:6.2f}% {len(clear[model]):11} {same:6.2f}%")
    every = [same for values in clear.values() for same in values]
    print(f"one letter throughout: {len(every)}, agree {100 * sum(every) / len(every):.2f}%")
