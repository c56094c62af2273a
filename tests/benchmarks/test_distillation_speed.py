"""One training step against TRL's trainers, as ratios within one run; printed, never asserted. Run with ``make bench``.

SmolLM2, LoRA r16 on every linear layer, fp32, no gradient checkpointing, forward KL on rollouts of exactly 64 tokens,
a teacher that is the model before training with a prompt of 362 tokens. Each trainer takes its first step: sampling,
teacher, student and optimizer. The trainers take turns, and the best of two turns counts.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from neurosig.models.load import LoadedModel
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from tests.benchmarks.training_step import Step, distillation, ours, sdft

pytestmark = [pytest.mark.bench, pytest.mark.smollm2]
TOKENS, TEACHER_TOKENS = 64, 362


@pytest.fixture(scope="module")
def texts(smollm2: LoadedModel) -> list[tuple[str, str]]:
    """Student prompts and their contexts, 362 tokens together."""
    tokenizer, builder = smollm2.tokenizer, PromptBuilder(smollm2.tokenizer, PromptConfig())
    questions = load_questions("world-facts:train")
    facts = " ".join(f"{question.question} {question.answer}." for question in questions[8:])
    pairs = []
    for question in questions[:8]:
        student = tokenizer.decode(builder.student(question))
        room = TEACHER_TOKENS - len(tokenizer(student)["input_ids"])
        context = tokenizer.decode(tokenizer(facts)["input_ids"][:room])
        assert len(tokenizer(context + student)["input_ids"]) == TEACHER_TOKENS
        pairs.append((student, context))
    return pairs


@pytest.fixture(params=[(2, 8), (8, 1)], ids=["2x8", "8x1"])
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    yield request.param
    gc.collect()


def test_a_training_step_against_trl(
    smollm2: LoadedModel,
    texts: Sequence[tuple[str, str]],
    shape: tuple[int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions, k = shape

    def make() -> LoadedModel:
        return replace(smollm2, model=copy.deepcopy(smollm2.model))

    step = Step(make, texts[:questions], k, TOKENS, TEACHER_TOKENS)
    turns = [
        {
            "ours": ours(step),
            "SDFT topk": {"step": sdft(step, tmp_path / f"topk{turn}", "topk_logits")},
            "SDFT full logits": {"step": sdft(step, tmp_path / f"full{turn}", "full_logits")},
            "Distillation with a privileged prompt": {"step": distillation(step, tmp_path / f"distillation{turn}")},
        }
        for turn in range(2)
    ]
    best = {name: min((turn[name] for turn in turns), key=lambda parts: sum(parts.values())) for name in turns[0]}
    parts = best.pop("ours")
    our_seconds = sum(parts.values())
    with capsys.disabled():
        print(f"\ntraining step, {questions} questions x {k} rollouts x {TOKENS} tokens: {our_seconds:.1f} s")
        print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()))
        for name, other in best.items():
            print(f"{our_seconds / other['step']:.2f} of TRL's {name} ({other['step']:.1f} s)")
