"""Scaling neurons through nnsight against plain hooks and edited weights; their controls; likelihoods."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neurosig.intervene.interventions
from neurosig.intervene.interventions import (
    activity_matched,
    choose_neurons,
    completion_nll,
    layer_matched,
    mean_contributions,
    scale_neurons,
    strongest,
)
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.nnsight_reader import NeuronScaler
from neurosig.neurons.signals_file import Signals
from neurosig.neurons.sites import FFNSites, ffn_sites, w_out
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from tests.support.tiny import ALL_ARCHS, ARCHS, EOS_ID, VOCAB_SIZE, Arch, OtherArch, tiny_model, tiny_tokenizer

COLUMNS = {0: [3, 17, 40], 1: [5]}
SAMPLING = SamplingConfig(num_generations=4, temperature=1.0, max_new_tokens=10)


def loaded(arch: Arch | OtherArch = "qwen3") -> LoadedModel:
    """A model that ends some completions early, so that rows leave the batch."""
    model = tiny_model(arch)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS_ID] *= 3
    return load_model((model, tiny_tokenizer()))


def flat(model: LoadedModel) -> list[int]:
    return [layer * ffn_sites(model.model).d_mlp + index for layer, indices in COLUMNS.items() for index in indices]


def scaled(model: LoadedModel, factor: float) -> LoadedModel:
    return scale_neurons(model, NeuronScaler(model.model, ffn_sites(model.model)), flat(model), factor)


@contextmanager
def hooked(model: LoadedModel, factor: float) -> Iterator[None]:
    """The oracle: plain PyTorch hooks that scale the same columns."""

    def scale(layer: int) -> Callable[..., tuple[torch.Tensor]]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            value = inputs[0].clone()
            value[..., COLUMNS[layer]] = value[..., COLUMNS[layer]] * factor
            return (value,)

        return hook

    sites = ffn_sites(model.model)
    handles = [
        model.model.get_submodule(sites.layers[layer]).register_forward_pre_hook(scale(layer)) for layer in COLUMNS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reweighted(model: LoadedModel, factor: float) -> LoadedModel:
    """The third oracle: the same columns of W_down scaled in a copy of the model."""
    other = copy.deepcopy(model.model)
    sites = ffn_sites(other)
    with torch.no_grad():
        for layer, indices in COLUMNS.items():
            w_out(other, sites.layers[layer])[indices] *= factor
    return load_model((other, model.tokenizer))


def prompts(lengths: tuple[int, ...] = (5, 12, 9, 12, 3)) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(f"q{index}", tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()))
        for index, n in enumerate(lengths)
    ]


def drawn(model: LoadedModel) -> list[Rollout]:
    return [rollout for group in sample(model, prompts(), SAMPLING) for rollout in group]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("factor", [0.0, 4.0])
@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_logits_equal_those_of_hooks_and_of_edited_weights(arch: Arch | OtherArch, factor: float) -> None:
    model = loaded(arch)
    ids = torch.tensor([prompt.token_ids for prompt in prompts((9, 9, 9))])
    before = logits(model.model, ids)
    ours = logits(scaled(model, factor).model, ids)
    with hooked(model, factor):
        assert torch.equal(ours, logits(model.model, ids))
    torch.testing.assert_close(ours, logits(reweighted(model, factor).model, ids), rtol=1e-4, atol=1e-4)
    assert (ours - before).abs().max() > 1e-2
    assert torch.equal(before, logits(model.model, ids))  # the model itself stays as it was


@pytest.mark.parametrize("arch", ARCHS)
def test_samples_equal_those_of_hooks_and_of_edited_weights(arch: Arch) -> None:
    """Prompt and decoding, in batches of mixed lengths whose rows end at different times."""
    model = loaded(arch)
    unscaled, ours = drawn(model), drawn(scaled(model, 4.0))
    with hooked(model, 4.0):
        assert ours == drawn(model)
    assert [r.completion_ids for r in ours] == [r.completion_ids for r in drawn(reweighted(model, 4.0))]
    assert [r.completion_ids for r in ours] != [r.completion_ids for r in unscaled]
    assert len({len(r.completion_ids) for r in ours}) > 1


@pytest.mark.parametrize("arch", ARCHS)
def test_factor_one_changes_nothing_to_the_bit(arch: Arch) -> None:
    model = loaded(arch)
    assert drawn(scaled(model, 1.0)) == drawn(model)


def test_scaling_reaches_the_decoding_steps() -> None:
    """Hooks that stand down after the prompt give other samples."""
    model = loaded()
    handles: list[Any] = []

    def once(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        for handle in handles:
            handle.remove()
        return (inputs[0] * 0,)

    path = ffn_sites(model.model).layers[0]
    handles.append(model.model.get_submodule(path).register_forward_pre_hook(once))
    prompt_only = drawn(model)
    scaler = NeuronScaler(model.model, ffn_sites(model.model))
    everywhere = drawn(scale_neurons(model, scaler, range(scaler.sites.d_mlp), 0.0))
    assert [r.completion_ids for r in prompt_only] != [r.completion_ids for r in everywhere]


def test_two_stand_ins_of_one_model_keep_apart() -> None:
    model = loaded()
    scaler = NeuronScaler(model.model, ffn_sites(model.model))
    none, four = (scale_neurons(model, scaler, flat(model), factor) for factor in (0.0, 4.0))
    ids = torch.tensor([prompts()[0].token_ids])
    first = logits(none.model, ids)
    assert not torch.equal(first, logits(four.model, ids))
    assert torch.equal(first, logits(none.model, ids))
    with pytest.raises(AttributeError):
        _ = four.model.base_model  # running it would go around the scaling


# What is scaled


def sites(n_layers: int = 3, d_mlp: int = 20) -> FFNSites:
    layers = ("a",) * n_layers
    return FFNSites(layers=layers, acts=layers, blocks=layers, head="h", d_mlp=d_mlp, d_model=4, gated=True)


LOCATED = [1, 2, 3, 45]  # three in layer 0, none in layer 1, one in layer 2


def profile(ids: list[int]) -> list[int]:
    return np.bincount(np.array(ids) // 20, minlength=3).tolist()


def test_neurons_are_chosen_by_sign(tmp_path: Path) -> None:
    path = tmp_path / "neurons.csv"
    path.write_text("layer,index,weight,active_share\n2,5,1.5,0.5\n0,1,-0.25,0.1\n0,3,0.5,0\n1,0,0,0.5\n")
    assert choose_neurons(path, sites(), "positive") == ([3, 45], [1, 3, 20, 45])
    assert choose_neurons(path, sites(), "negative") == ([1], [1, 3, 20, 45])
    assert choose_neurons(path, sites(), "all") == ([1, 3, 20, 45], [1, 3, 20, 45])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("layer,index\n0,1\n", "expected the columns layer, index and weight"),
        ("layer,index,weight\n0,1,heavy\n", "expected the columns layer, index and weight"),
        ("layer,index,weight\n0,1,1\n3,1,1\n", r"neurons\.csv:3: neuron 1 of layer 3 is outside the model"),
        ("layer,index,weight\n0,1,1\n0,20,1\n", r"neurons\.csv:3: neuron 20 of layer 0 is outside the model"),
        ("layer,index,weight\n0,1,1\n0,1,1\n", "neuron L0/1 appears twice"),
        ("layer,index,weight\n", "no neuron with a positive weight"),
        ("layer,index,weight\n0,1,-1\n1,1,0\n", "no neuron with a positive weight"),
    ],
)
def test_bad_neurons_are_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "neurons.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        choose_neurons(path, sites(), "positive")
    with pytest.raises(UserError, match="no such file"):
        choose_neurons(tmp_path / "other.csv", sites(), "positive")


def test_mean_contributions_count_absence_as_zero() -> None:
    ids = torch.tensor([[0, 2, -1], [2, 1, 3]], dtype=torch.int32)
    values = torch.tensor([[1.0, 0.5, 0.0], [1.5, -2.0, 0.25]], dtype=torch.float16)
    signals = Signals(ids, values, torch.zeros(2, 1).half(), torch.zeros(2), torch.zeros(2, 1), n_layers=1, d_mlp=5)
    assert mean_contributions(signals).tolist() == [0.5, 1.0, 1.0, 0.125, 0.0]


def test_layer_matched_controls_have_the_profile_and_never_a_located_neuron() -> None:
    excluded = [*LOCATED, 10, 50]
    draws = [layer_matched(LOCATED, excluded, sites(), np.random.default_rng(seed)) for seed in range(40)]
    assert all(profile(draw) == [3, 0, 1] and len(set(draw)) == 4 for draw in draws)
    assert {neuron for draw in draws for neuron in draw}.isdisjoint(excluded)
    assert {neuron for draw in draws for neuron in draw if neuron < 20} == {*range(20)} - {1, 2, 3, 10}
    assert draws[7] == layer_matched(LOCATED, excluded, sites(), np.random.default_rng(7))


def test_activity_matched_controls_contribute_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    contributions = np.zeros(60)
    contributions[[1, 2, 3, 45]] = 8.0, 4.0, 1.0, 5.0
    contributions[[10, 11, 12, 59]] = 7.5, 4.5, 1.25, 3.0
    monkeypatch.setattr(neurosig.intervene.interventions, "NEAREST", 1)
    rng = np.random.default_rng(0)
    assert activity_matched(LOCATED, LOCATED, contributions, sites(), rng) == [10, 11, 12, 59]
    assert activity_matched(LOCATED, [*LOCATED, 10], contributions, sites(), rng) == [0, 11, 12, 59]
    monkeypatch.setattr(neurosig.intervene.interventions, "NEAREST", 3)
    draws = [activity_matched(LOCATED, LOCATED, contributions, sites(), np.random.default_rng(s)) for s in range(20)]
    assert all(profile(draw) == [3, 0, 1] and len(set(draw)) == 4 for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 5


def test_the_strongest_are_the_largest_contributors_of_each_layer() -> None:
    contributions = np.zeros(60)
    contributions[[2, 5, 6, 7, 25, 41, 42]] = 9.0, 5.0, 6.0, 7.0, 8.0, 1.0, 2.0
    assert strongest(LOCATED, LOCATED, contributions, sites()) == [5, 6, 7, 42]


def test_a_layer_without_enough_others_is_named() -> None:
    with pytest.raises(UserError, match="layer 0: 11 neurons are scaled but only 9 others are left"):
        layer_matched(range(11), range(11), sites(), np.random.default_rng(0))


# Likelihoods


def test_the_likelihood_of_completions_is_that_of_one_plain_forward_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded()
    groups: dict[str, list[Rollout]] = {}
    for rollout in drawn(model):
        groups.setdefault(rollout.question_id, []).append(rollout)
    ours = completion_nll(model, prompts(), groups)
    for prompt in prompts():
        nats, tokens = 0.0, 0
        for rollout in groups[prompt.question_id]:
            ids = torch.tensor([[*prompt.token_ids, *rollout.completion_ids]])
            log_p = logits(model.model, ids)[0].log_softmax(-1)
            start = len(prompt.token_ids)
            nats -= sum(float(log_p[start + i - 1, token]) for i, token in enumerate(rollout.completion_ids))
            tokens += len(rollout.completion_ids)
        assert ours[prompt.question_id] == pytest.approx(nats / tokens, abs=1e-4)
    monkeypatch.setattr(neurosig.intervene.interventions, "LOGITS_AT_ONCE", 1)
    assert completion_nll(model, prompts(), groups) == pytest.approx(ours, abs=1e-4)
    monkeypatch.undo()
    with hooked(model, 4.0):
        hooks = completion_nll(model, prompts(), groups)
    assert completion_nll(scaled(model, 4.0), prompts(), groups) == hooks != ours


def test_logits_after_a_completion_change_no_likelihood() -> None:
    """A completion of one token next to a long one: what the head says over its padding is infinite."""
    model = loaded()
    completions = {"short": [(5,)], "long": [(5, 6, 7, 8)]}
    two_prompts = [Prompt(name, (9, 10)) for name in completions]
    groups = {name: [Rollout(name, 0, "", ids[0], "length")] for name, ids in completions.items()}
    plain = completion_nll(model, two_prompts, groups)

    def spoil(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] > 1:
            logits[0, 1:] = math.nan
        return logits

    handle = model.model.get_output_embeddings().register_forward_hook(spoil)
    spoilt = completion_nll(model, two_prompts, groups)
    handle.remove()
    assert spoilt == plain


@pytest.mark.smollm2
def test_scaling_moves_the_embedded_model_in_batches(smollm2: LoadedModel) -> None:
    """Factor 1 samples the same tokens as the bare model; silencing one whole layer makes its own samples unlikely."""
    builder = PromptBuilder(smollm2.tokenizer, PromptConfig())
    prompts = [Prompt(q.id, builder.student(q)) for q in load_questions("world-facts:dev", limit=4)]
    sampling = SamplingConfig(num_generations=3, temperature=0.8, max_new_tokens=8)
    bare = {group[0].question_id: group for group in sample(smollm2, prompts, sampling)}
    scaler = NeuronScaler(smollm2.model, ffn_sites(smollm2.model))
    layer = range(scaler.sites.d_mlp)
    one = {g[0].question_id: g for g in sample(scale_neurons(smollm2, scaler, layer, 1.0), prompts, sampling)}
    assert one == bare
    before = completion_nll(smollm2, prompts, bare)
    after = completion_nll(scale_neurons(smollm2, scaler, layer, 0.0), prompts, bare)
    assert all(after[name] > before[name] + 0.5 for name in before)
