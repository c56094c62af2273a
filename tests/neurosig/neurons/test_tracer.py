"""The nnsight trace against plain forward hooks and TransformerLens, and what it must not do."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import ActiveSets
from neurosig.neurons.sites import ffn_sites
from neurosig.neurons.tracer import NeuronTracer
from neurosig.runtime.errors import UserError
from tests.support.hooked import hooked_scores
from tests.support.tiny import ARCHS, CONTEXT, D_MLP, LENGTHS, VOCAB_SIZE, Arch, rollouts, tiny_model

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel

EVERY_NEURON = 10**6


def tracer_of(model: PreTrainedModel, **options: object) -> NeuronTracer:
    return NeuronTracer(model, TraceConfig(**options))  # type: ignore[arg-type]


def dense(sets: ActiveSets) -> Tensor:
    """Mean scores by neuron, when the sets hold every neuron: [n, n_layers, d_mlp]."""
    assert torch.equal(sets.neuron_ids, torch.arange(sets.neuron_ids.shape[1]).int().expand(sets.neuron_ids.shape))
    return sets.contributions.unflatten(1, (-1, D_MLP))


def hooked_means(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    value: str = "gated",
    score: str = "cett",
    positions: Callable[[int, int], slice] = lambda p, c: slice(p, p + c),
) -> Tensor:
    return torch.stack(
        [
            hooked_scores(model, p + c, value, score)[positions(len(p), len(c))].mean(dim=0).float()
            for p, c in zip(prompts, completions, strict=True)
        ]
    )


@pytest.mark.parametrize("score", ["cett", "magnitude", "unembed"])
@pytest.mark.parametrize("value", ["gated", "act"])
@pytest.mark.parametrize("arch", ARCHS)
def test_trace_equals_forward_hooks(
    arch: Arch, value: Literal["gated", "act"], score: Literal["cett", "magnitude", "unembed"]
) -> None:
    """A rollout a batch, so that only fp32 against fp64 rounding is left. `unembed` counts one position earlier."""
    model = tiny_model(arch)
    prompts, completions = rollouts([(p + 1, c) for p, c in LENGTHS])
    shift = 1 if score == "unembed" else 0
    positions = lambda p, c: slice(p - shift, p - shift + c)  # noqa: E731
    expected = hooked_means(model, prompts, completions, value, score, positions)
    tracer = tracer_of(model, value=value, score=score, set_size=EVERY_NEURON, batch_tokens=1)
    torch.testing.assert_close(dense(tracer.trace(prompts, completions)), expected, rtol=1e-5, atol=1e-5)


def test_gate_matters_only_where_there_is_one() -> None:
    prompts, completions = rollouts()
    for arch, same in (("llama", False), ("gpt2", True)):
        model = tiny_model(arch)
        gated, act = (
            dense(tracer_of(model, value=value, set_size=EVERY_NEURON).trace(prompts, completions))
            for value in ("gated", "act")
        )
        assert torch.equal(gated, act) == same


@pytest.mark.parametrize("arch", ARCHS)
def test_trace_equals_transformer_lens(arch: Arch) -> None:
    """To 1e-4 of TransformerBridge's cache: its own attention and norms round differently from ours."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = tiny_model(arch)
    prompts, completions = rollouts()
    traced = dense(tracer_of(model, set_size=EVERY_NEURON).trace(prompts, completions))

    other = tiny_model(arch)  # the bridge replaces submodules in place
    bridge = build_bridge_from_module(other, type(other).__name__, hf_config=other.config)
    for row, prompt, completion in zip(traced, prompts, completions, strict=True):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.tensor([prompt + completion]))
        for layer in range(other.config.num_hidden_layers):
            value = cache[f"blocks.{layer}.mlp.out.hook_in"][0]
            out = cache[f"blocks.{layer}.mlp.out.hook_out"][0]
            weight = model.get_submodule(ffn_sites(model).layers[layer]).weight
            norms = (weight if arch == "gpt2" else weight.T).norm(dim=1)
            expected = (value.abs() * norms / out.norm(dim=-1, keepdim=True))[len(prompt) :].mean(dim=0)
            torch.testing.assert_close(row[layer], expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_padded_batch_equals_single(arch: Arch) -> None:
    """1e-4: batched products add in another order. Gemma3's window of 8 is shorter than the rollouts."""
    model = tiny_model(arch)
    prompts, completions = rollouts()
    together = dense(tracer_of(model, set_size=EVERY_NEURON, batch_tokens=4096).trace(prompts, completions))
    single = dense(tracer_of(model, set_size=EVERY_NEURON, batch_tokens=1).trace(prompts, completions))
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch_tokens", "batches"), [(4096, 1), (46, 2), (28, 4)])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_shared_prompt_is_computed_once_and_changes_nothing(arch: Arch, batch_tokens: int, batches: int) -> None:
    """Prompts longer than gemma3's sliding window, shared over one batch or several, next to one of another length."""
    model = tiny_model(arch)
    prompts, completions = rollouts([(14, 4), (14, 9), (5, 7), (14, 1)])
    prompts = [prompts[0], prompts[0], prompts[2], prompts[0]]
    expected = hooked_means(model, prompts, completions)
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))
    traced = dense(tracer_of(model, set_size=EVERY_NEURON, batch_tokens=batch_tokens).trace(prompts, completions))
    assert shapes[0] == (2, 14)
    assert len(shapes) == 1 + batches and sum(rows for rows, _ in shapes[1:]) == 4
    assert max(width for _, width in shapes[1:]) == 9  # completions only
    torch.testing.assert_close(traced, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda p, c: slice(0, p + c), id="prompt-included"),
        pytest.param(lambda p, c: slice(p - 1, p + c - 1), id="one-early"),
        pytest.param(lambda p, c: slice(p, p + c - 1), id="last-dropped"),
        pytest.param(lambda p, c: slice(p - 1, p + c), id="one-more"),
    ],
)
def test_mask_covers_the_completion_tokens_and_nothing_else(wrong: Callable[[int, int], slice]) -> None:
    """In every row and layer the wrong positions give means that are far from the traced ones."""
    model = tiny_model("llama")
    prompts, completions = rollouts([(6, 4), (3, 9), (7, 7)])
    traced = dense(tracer_of(model, set_size=EVERY_NEURON).trace(prompts, completions))
    right = hooked_means(model, prompts, completions)
    assert (traced - right).abs().max() < 1e-4
    distance = (traced - hooked_means(model, prompts, completions, positions=wrong)).abs().amax(dim=-1)
    assert distance.min() > 1e-2


@pytest.mark.parametrize("arch", ARCHS)
def test_the_head_is_never_computed(arch: Arch) -> None:
    model = tiny_model(arch)
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append("head"))
    last_down = model.get_submodule(ffn_sites(model).layers[-1])
    last_down.register_forward_pre_hook(lambda *_: calls.append("last FFN"))
    tracer_of(model, batch_tokens=20).trace(*rollouts([(6, 4), (5, 5), (4, 6)]))
    assert calls == ["last FFN"] * 4  # two batches, each with its prompts and its completions
    model(torch.tensor([[5, 6]]))
    assert calls[4:] == ["last FFN", "head"]


@pytest.mark.parametrize("score", ["cett", "magnitude"])
def test_no_layer_keeps_its_neuron_values(score: Literal["cett", "magnitude"]) -> None:
    """When a layer's values arrive, those of the layer before are gone; only the active sets are kept."""
    model = tiny_model("gemma3")
    tracer = tracer_of(model, score=score, set_size=15)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    def on_down(module: nn.Module, args: tuple[Tensor]) -> None:
        alive.append([ref() is not None for ref in seen])
        seen.append(weakref.ref(args[0]))

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(on_down)
    sets = tracer.trace(*rollouts())
    assert [len(earlier) for earlier in alive] == list(range(6))  # three layers for the prompts, three for the trace
    assert not any(any(earlier) for earlier in alive)
    assert [ref() for ref in seen] == [None] * 6
    assert sets.neuron_ids.shape == sets.contributions.shape == (len(LENGTHS), 3 * 5)
    assert (sets.neuron_ids.dtype, sets.contributions.dtype) == (torch.int32, torch.float32)
    for kept in sets:
        assert kept.untyped_storage().nbytes() == kept.numel() * 4
        assert not kept.is_inference() and not kept.requires_grad


def test_smaller_sets_hold_the_largest_of_each_layer() -> None:
    model = tiny_model("qwen3")
    prompts, completions = rollouts()
    every = dense(tracer_of(model, set_size=EVERY_NEURON).trace(prompts, completions))
    some = tracer_of(model, set_size=9).trace(prompts, completions)
    top = every.topk(5, dim=-1)  # 9 over 2 layers, rounded up
    expected = (top.indices.sort(dim=-1).values + torch.tensor([[0], [D_MLP]])).flatten(1)
    assert torch.equal(some.neuron_ids, expected.int())
    assert torch.equal(some.contributions, every.flatten(1).gather(1, expected))


def test_global_sets_hold_the_largest_over_all_layers() -> None:
    model = tiny_model("gemma3")
    prompts, completions = rollouts()
    every = dense(tracer_of(model, set_size=EVERY_NEURON).trace(prompts, completions)).flatten(1)
    some = tracer_of(model, active="global", set_size=20).trace(prompts, completions)
    assert torch.equal(some.neuron_ids.long(), every.topk(20).indices.sort(dim=-1).values)
    per_layer = torch.stack(
        [row.long().div(D_MLP, rounding_mode="floor").bincount(minlength=3) for row in some.neuron_ids]
    )
    assert (per_layer != 20 / 3).any()


@pytest.mark.parametrize("active", ["per_token", "entries"])
def test_sets_of_single_tokens_follow_the_oracle(active: Literal["per_token", "entries"]) -> None:
    """Each rollout's own positions and no others, though it is padded and shares a batch; sets of many sizes."""
    model = tiny_model("llama")
    prompts, completions = rollouts()
    sets = tracer_of(model, active=active, set_size=6).trace(prompts, completions)
    assert sets.neuron_ids[:, -1].min() == -1 < sets.neuron_ids[:, -1].max()
    for row, prompt, completion in zip(range(len(prompts)), prompts, completions, strict=True):
        scores = hooked_scores(model, prompt + completion)[len(prompt) :]  # [seq, 2, d_mlp]
        chosen = set()
        for layer in range(2):
            if active == "per_token":
                top = scores[:, layer].topk(3, dim=-1).indices.flatten()  # 6 per token, half of them in each layer
            else:
                top = scores[:, layer].flatten().topk(6).indices % D_MLP
            chosen |= {layer * D_MLP + neuron for neuron in top.tolist()}
        mask = sets.neuron_ids[row] >= 0
        assert sets.neuron_ids[row][mask].tolist() == sorted(chosen)
        mean = scores.mean(dim=0).flatten().float()
        torch.testing.assert_close(
            sets.contributions[row][mask], mean[sets.neuron_ids[row][mask]], rtol=1e-4, atol=1e-4
        )
        assert not sets.contributions[row][~mask].any()


def test_positive_only_leaves_out_what_lowers_the_logit() -> None:
    model = tiny_model("qwen3")
    prompts, completions = rollouts([(6, 4), (4, 9)])
    every = dense(tracer_of(model, score="unembed", set_size=EVERY_NEURON).trace(prompts, completions)).flatten(1)
    some = tracer_of(model, score="unembed", set_size=EVERY_NEURON, positive_only=True).trace(prompts, completions)
    for row, mean in zip(some.neuron_ids, every, strict=True):
        assert row[row >= 0].tolist() == (mean > 0).nonzero()[:, 0].tolist()
    assert (every < 0).any()


@pytest.mark.parametrize("score", ["cett", "unembed"])
def test_token_masks_choose_the_positions(score: Literal["cett", "unembed"]) -> None:
    model = tiny_model("llama")
    prompts, completions = rollouts([(6, 4), (4, 9), (6, 1)])
    masks = [[False, True, True, False], [True] + [False] * 8, [True]]
    shift = 1 if score == "unembed" else 0
    traced = tracer_of(model, score=score, set_size=EVERY_NEURON).trace(prompts, completions, token_masks=masks)
    for row, prompt, completion, mask in zip(dense(traced), prompts, completions, masks, strict=True):
        where = [len(prompt) + i - shift for i, keep in enumerate(mask) if keep]
        expected = hooked_scores(model, prompt + completion, score=score)[where].mean(dim=0).float()
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_hidden_states_are_the_mean_residual_two_thirds_up(arch: Arch) -> None:
    """Against `output_hidden_states`, whose last entry is normed: so the last block is read by a hook."""
    model = tiny_model(arch)
    prompts, completions = rollouts()
    tracer = tracer_of(model)
    traced = tracer.trace(prompts, completions).hidden_states
    seen: list[Tensor] = []
    block = model.get_submodule(tracer.sites.blocks[model.config.num_hidden_layers * 2 // 3])
    handle = block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for row, prompt, completion in zip(traced, prompts, completions, strict=True):
        with torch.no_grad():
            model(torch.tensor([prompt + completion]), use_cache=False)
        torch.testing.assert_close(row, seen.pop()[0, len(prompt) :].mean(dim=0), rtol=1e-4, atol=1e-4)
    handle.remove()


def test_the_same_call_gives_the_same_bits() -> None:
    model = tiny_model("qwen3")
    prompts, completions = rollouts()
    tracer = tracer_of(model, set_size=40)
    first = tracer.trace(prompts, completions)
    for again in (tracer, tracer_of(model, set_size=40)):
        other = again.trace(prompts, completions)
        assert torch.equal(first.neuron_ids, other.neuron_ids)
        assert torch.equal(first.contributions, other.contributions)


def test_rows_follow_the_input_order() -> None:
    model = tiny_model("llama")
    prompts, completions = rollouts()
    tracer = tracer_of(model, set_size=EVERY_NEURON, batch_tokens=30)
    straight = dense(tracer.trace(prompts, completions))
    reverse = dense(tracer.trace(prompts[::-1], completions[::-1])).flip(0)
    torch.testing.assert_close(straight, reverse, rtol=1e-4, atol=1e-4)
    between_rows = [(a - b).abs().max() for a, b in itertools.combinations(straight, 2)]
    assert min(between_rows) > 1e-2


def test_batches_cover_every_rollout_within_the_token_budget() -> None:
    model = tiny_model("llama")
    prompts, completions = rollouts([*LENGTHS, (30, 20)])
    tracer = tracer_of(model, set_size=20, batch_tokens=32)
    batches = list(tracer.trace_batches(prompts, completions))
    assert sorted(index for indices, _ in batches for index in indices) == list(range(7))
    for indices, _ in batches:
        longest = max(len(prompts[index]) + len(completions[index]) for index in indices)
        assert len(indices) * longest <= 32 or indices == [6]  # 50 tokens exceed the budget: a batch of its own
    assert len(batches) < 7
    merged = tracer.trace(prompts, completions)
    for indices, sets in batches:
        assert torch.equal(merged.neuron_ids[indices], sets.neuron_ids)
        assert torch.equal(merged.hidden_states[indices], sets.hidden_states)
        assert torch.equal(merged.contributions[indices], sets.contributions)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("qwen3")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
    config = model.config.to_dict()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    NeuronTracer(model).trace(*rollouts())

    assert model.config.to_dict() == config
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    model(ids).logits.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_progress_bar_counts_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    tracer = tracer_of(tiny_model("llama"))
    tracer.trace(*rollouts())
    assert capsys.readouterr() == ("", "")
    tracer.trace(*rollouts(), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and f"{len(LENGTHS)}/{len(LENGTHS)}" in err


def test_no_rollouts() -> None:
    sets = tracer_of(tiny_model("llama"), set_size=10).trace([], [])
    assert len(sets.neuron_ids) == len(sets.contributions) == 0
    assert sets.hidden_states.shape == (0, 32)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[5], [6], [7]], [[8], [], [9]], "rollout 1: the completion is empty"),
        ([[5], []], [[8], [9]], "rollout 1: the prompt is empty"),
        ([[5], [6]], [[8]], "2 prompts but 1 completions"),
        (
            [[5], [6] * CONTEXT],
            [[8], [9]],
            f"rollout 1: {CONTEXT + 1} tokens; .*{CONTEXT}",
        ),
        ([[5]], [[VOCAB_SIZE]], f"rollout 0: an id outside 0..{VOCAB_SIZE - 1}"),
        ([[-1]], [[5]], f"rollout 0: an id outside 0..{VOCAB_SIZE - 1}"),
    ],
)
def test_bad_rollouts_are_refused_before_anything_runs(
    prompts: list[list[int]], completions: list[list[int]], message: str
) -> None:
    model = tiny_model("gpt2")
    tracer = tracer_of(model)
    calls = []
    model.transformer.wte.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=message):
        tracer.trace_batches(prompts, completions)  # not iterated
    with pytest.raises(UserError, match=message):
        tracer.trace(prompts, completions)
    assert not calls


def test_bad_masks_and_a_prompt_without_a_position_before_are_refused() -> None:
    model = tiny_model("gpt2")
    for masks, message in (
        ([[True]], "1 token masks but 2 completions"),
        ([[True], [True]], "rollout 1: a token mask of 1 with 1 tokens for a completion of 2"),
        ([[True], [False, False]], "rollout 1: a token mask of 2 with 0 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            tracer_of(model).trace([[5, 6], [5, 6]], [[7], [8, 9]], token_masks=masks)
    with pytest.raises(UserError, match="rollout 0: a prompt of one token; the score unembed needs two"):
        tracer_of(model, score="unembed").trace([[5]], [[7]])


def test_training_mode_is_refused() -> None:
    model = tiny_model("gpt2")
    tracer = tracer_of(model)
    model.train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        tracer.trace(*rollouts())


def test_scores_that_are_not_finite_name_rollout_and_layer() -> None:
    """The embedding of one token is NaN: only the rollout that holds it is named, by its input index."""
    model = tiny_model("llama")
    prompts, completions = [[5, 6], [5, 7, 8], [5]], [[9, 9], [9], [9]]
    with torch.no_grad():
        model.model.embed_tokens.weight[6] = torch.nan
    with pytest.raises(UserError, match=r"rollout 0: the neuron scores of layer 0 are not finite"):
        tracer_of(model).trace(prompts, completions)
    with torch.no_grad():
        model.model.embed_tokens.weight[6] = 0.1
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    with pytest.raises(UserError, match=r"rollout \d: the neuron scores of layer 1 are not finite"):
        tracer_of(model).trace(prompts, completions)


def test_bad_options_are_refused() -> None:
    for name in ("set_size", "batch_tokens"):
        with pytest.raises(UserError, match=f"TraceConfig.{name} is 0"):
            TraceConfig(**{name: 0})


def test_half_precision_model_is_close_to_fp32() -> None:
    """bfloat16 carries 8 bits: means within a few per cent of the fp32 ones, and kept in fp32."""
    prompts, completions = rollouts()
    full, half = (
        dense(tracer_of(model, set_size=EVERY_NEURON).trace(prompts, completions))
        for model in (tiny_model("llama"), tiny_model("llama").bfloat16())
    )
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.03 * full.mean()
    assert not torch.equal(half, full)


@pytest.mark.smollm2
def test_smollm2_trace_equals_forward_hooks(smollm2: LoadedModel) -> None:
    """The same parity on a trained model of 30 layers, padded; fp32 sums in another order differ by 1e-3."""
    texts = [("The capital of France is", " Paris."), ("Water boils at", " a hundred degrees Celsius.")]
    prompts = [smollm2.tokenizer.encode(prompt) for prompt, _ in texts]
    completions = [smollm2.tokenizer.encode(completion) for _, completion in texts]
    sets = NeuronTracer(smollm2.model).trace(prompts, completions)
    assert sets.neuron_ids.shape == (2, 30 * 34)
    top = hooked_means(smollm2.model, prompts, completions).topk(34)
    values = top.values.gather(-1, top.indices.argsort(dim=-1)).flatten(1)
    torch.testing.assert_close(sets.contributions, values, rtol=1e-3, atol=1e-5)
    ids = (top.indices.sort(dim=-1).values + 1536 * torch.arange(30)[:, None]).flatten(1)
    assert (sets.neuron_ids == ids).float().mean() > 0.99
