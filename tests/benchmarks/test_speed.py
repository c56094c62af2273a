"""Speed as ratios within one run on the embedded model; printed, never asserted. Run with ``make bench``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from neurosig.models import LoadedModel
from neurosig.prompts import PromptBuilder, PromptConfig
from neurosig.questions import load_questions
from neurosig.rollouts import Rollout
from neurosig.sampling import Prompt, SamplingConfig, sample
from neurosig.tracing import NeuronTracer

pytestmark = [pytest.mark.bench, pytest.mark.smollm2]
CONFIG = SamplingConfig(num_generations=8, temperature=0.8, max_new_tokens=24)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def prompts(smollm2: LoadedModel) -> list[Prompt]:
    builder = PromptBuilder(smollm2.tokenizer, PromptConfig())
    return [Prompt(q.id, builder.student(q)) for q in load_questions("world-facts:train", limit=16)]


@pytest.fixture(scope="module")
def rollouts(smollm2: LoadedModel, prompts: Sequence[Prompt]) -> list[Rollout]:
    return [rollout for group in sample(smollm2, prompts, CONFIG) for rollout in group]


def test_sampling_against_generate(
    smollm2: LoadedModel, prompts: Sequence[Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    """16 questions, 8 rollouts each: the prompt once a question against `generate`, which runs it for every rollout."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    pad = [0] * width
    ids = torch.tensor([(pad + list(prompt.token_ids))[-width:] for prompt in prompts for _ in range(8)])
    mask = torch.tensor([(pad + [1] * len(prompt.token_ids))[-width:] for prompt in prompts for _ in range(8)])
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = seconds(
            lambda: smollm2.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=0.8,
                top_p=1.0,
                top_k=0,
                max_new_tokens=24,
                pad_token_id=2,
            )
        )
    ours = seconds(lambda: list(sample(smollm2, prompts, CONFIG)))
    with capsys.disabled():
        print(f"\nsampling: {theirs / ours:.2f}x as fast as generate ({ours:.1f} s against {theirs:.1f} s)")


def test_tracing_against_a_plain_forward(
    smollm2: LoadedModel, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rollouts: traced, and run through the model once each in batches of 64 without reading anything."""
    ids_of = {prompt.question_id: prompt.token_ids for prompt in prompts}
    rows = sorted(([*ids_of[r.question_id], *r.body_ids] for r in rollouts), key=len)

    def plain() -> None:
        for start in range(0, len(rows), 64):
            batch = rows[start : start + 64]
            width = len(batch[-1])
            with torch.no_grad():
                smollm2.model(torch.tensor([row + [0] * (width - len(row)) for row in batch]))

    tracer = NeuronTracer(smollm2.model)
    forward = seconds(plain)
    traced = seconds(lambda: tracer.trace([ids_of[r.question_id] for r in rollouts], [r.body_ids for r in rollouts]))
    with capsys.disabled():
        print(f"\ntracing: {traced / forward:.2f} of a plain forward ({traced:.1f} s against {forward:.1f} s)")
