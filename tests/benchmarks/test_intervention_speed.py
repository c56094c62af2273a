"""Cost of scaling neurons through nnsight while decoding; printed, never asserted. Run with ``make bench``."""

from __future__ import annotations

import time

import pytest

from neurosig.intervene.interventions import scale_neurons
from neurosig.models.load import LoadedModel
from neurosig.neurons.nnsight_reader import NeuronScaler
from neurosig.neurons.sites import ffn_sites
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample

pytestmark = [pytest.mark.bench, pytest.mark.smollm2]


def test_decoding_with_scaled_neurons(smollm2: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    """8 questions, 4 rollouts each, in turn: the bare model, and three neurons of every layer scaled by 1."""
    builder = PromptBuilder(smollm2.tokenizer, PromptConfig())
    prompts = [Prompt(q.id, builder.student(q)) for q in load_questions("world-facts:dev", limit=8)]
    config = SamplingConfig(num_generations=4, temperature=0.8, max_new_tokens=24)
    sites = ffn_sites(smollm2.model)
    ids = [layer * sites.d_mlp + index for layer in range(sites.n_layers) for index in range(3)]
    scaled = scale_neurons(smollm2, NeuronScaler(smollm2.model, sites), ids, 1.0)
    seconds = {"bare": 0.0, "scaled": 0.0}
    tokens = 0
    for _ in range(2):
        for name, model in (("bare", smollm2), ("scaled", scaled)):
            start = time.process_time()
            groups = list(sample(model, prompts, config))
            seconds[name] += time.process_time() - start
        tokens += sum(len(rollout.completion_ids) for group in groups for rollout in group)
    with capsys.disabled():
        print(
            f"\nscaling through nnsight: {seconds['scaled'] / seconds['bare']:.2f} of decoding without "
            f"({tokens / seconds['scaled']:.0f} against {tokens / seconds['bare']:.0f} tokens per CPU second)"
        )
