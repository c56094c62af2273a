"""Speed as ratios within one run on the embedded model; printed, never asserted. Run with ``make bench``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch

import neurosig.sampling.sampler
from neurosig.models.load import LoadedModel
from neurosig.neurons.tracer import NeuronTracer
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample

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


def generate(smollm2: LoadedModel, prompts: Sequence[Prompt], k: int, **options: object) -> list[list[int]]:
    """``generate``'s completions, k per prompt, in one batch, up to and with the end token."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    pad = [0] * width
    ids = torch.tensor([(pad + list(prompt.token_ids))[-width:] for prompt in prompts for _ in range(k)])
    mask = torch.tensor([(pad + [1] * len(prompt.token_ids))[-width:] for prompt in prompts for _ in range(k)])
    with torch.no_grad():
        rows = smollm2.model.generate(
            ids, attention_mask=mask, top_p=1.0, top_k=0, max_new_tokens=24, pad_token_id=2, **options
        )[:, width:].tolist()
    ends = [next((n for n, token in enumerate(row) if token in smollm2.eos_token_ids), len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def test_sampling_against_generate(
    smollm2: LoadedModel, prompts: Sequence[Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    """16 questions, 8 rollouts each, 128 rows: the prompt once per question against once per rollout."""
    torch.manual_seed(0)
    generated: list[list[int]] = []
    drawn: list[list[Rollout]] = []
    generate_seconds = seconds(lambda: generated.extend(generate(smollm2, prompts, 8, do_sample=True, temperature=0.8)))
    ours = seconds(lambda: drawn.extend(sample(smollm2, prompts, CONFIG, batch_rows=128)))
    their_rate = sum(map(len, generated)) / generate_seconds
    our_rate = sum(len(rollout.completion_ids) for group in drawn for rollout in group) / ours
    greedy = dict(zip([p.question_id for p in prompts], generate(smollm2, prompts, 1, do_sample=False), strict=True))
    settings = SamplingConfig(num_generations=8, temperature=0.0, max_new_tokens=24)
    rows = [rollout for group in sample(smollm2, prompts, settings, batch_rows=128) for rollout in group]
    same = sum(list(rollout.completion_ids) == greedy[rollout.question_id] for rollout in rows)
    with capsys.disabled():
        print(f"\nsampling: {our_rate / their_rate:.2f}x the tokens per second of generate", end=" ")
        print(f"({our_rate:.0f} against {their_rate:.0f}; {ours:.1f} s against {generate_seconds:.1f} s)")
        print(f"greedy: {same} of {len(rows)} rollouts are those of generate, token for token")


def test_sampling_when_lengths_vary(
    smollm2: LoadedModel, prompts: Sequence[Prompt], capsys: pytest.CaptureFixture[str]
) -> None:
    """128 rollouts of up to 96 tokens, 32 rows at a time: questions start as soon as rows or batches finish."""
    config = SamplingConfig(num_generations=8, temperature=1.0, max_new_tokens=96)
    times = {}
    for name, share in (("refilled", neurosig.sampling.sampler.REFILL_AT), ("batch by batch", 1.0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neurosig.sampling.sampler, "REFILL_AT", share)
            times[name] = seconds(lambda: list(sample(smollm2, prompts, config, batch_rows=32)))
    with capsys.disabled():
        print(f"\nrefilling: {times['batch by batch'] / times['refilled']:.2f}x as fast as batch by batch {times}")


def test_tracing_against_a_plain_forward(
    smollm2: LoadedModel, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rollouts, traced, and run through the model in batches of 64 without reading anything."""
    ids_of = {prompt.question_id: prompt.token_ids for prompt in prompts}
    rows = sorted(([*ids_of[r.question_id], *r.completion_ids_without_eos] for r in rollouts), key=len)

    def plain() -> None:
        for start in range(0, len(rows), 64):
            batch = rows[start : start + 64]
            width = len(batch[-1])
            with torch.no_grad():
                smollm2.model(torch.tensor([row + [0] * (width - len(row)) for row in batch]))

    tracer = NeuronTracer(smollm2.model)
    forward = seconds(plain)
    traced = seconds(
        lambda: tracer.trace(
            [ids_of[r.question_id] for r in rollouts], [r.completion_ids_without_eos for r in rollouts]
        )
    )
    with capsys.disabled():
        print(f"\ntracing: {traced / forward:.2f} of a plain forward ({traced:.1f} s against {forward:.1f} s)")
