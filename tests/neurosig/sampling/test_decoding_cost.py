"""What a decoded token costs beside the model's own forward pass, and decoding with fixed shapes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, FalconConfig, FalconForCausalLM

import neurosig.sampling.kv_cache
from neurosig.models.load import load_model
from neurosig.sampling.kv_cache import RowCache, _Layer
from neurosig.sampling.step_graph import WARM_UP, StepGraph
from tests.benchmarks.decoding import Options, ours, own_forward, per_token
from tests.benchmarks.shapes import random_model
from tests.benchmarks.training_step import Endless
from tests.support.architectures import model_of
from tests.support.sampling import draw, prompts, tokens
from tests.support.tiny import EOS_ID, Arch, OtherArch, tiny_model, tiny_tokenizer

DRAWING = 110
"""ATen operations that draw a token and note it, whatever the number of layers."""


def deep(layers: int) -> Endless:
    """In bfloat16, as on a GPU: no weight is packed."""
    model = random_model("tiny", "cpu", torch.bfloat16, num_hidden_layers=layers)
    tokenizer = tiny_tokenizer()
    return Endless(model, tokenizer, load_model((model, tokenizer)).info)


def test_a_token_costs_the_models_own_forward_pass_and_one_wait() -> None:
    """Rows begin at different columns, the model's own pass has no padding; three operations more per layer fail."""
    options = Options(rows=16, prompt=8)
    own, plain, compiled = [], [], []
    for layers in (3, 7):
        model = deep(layers)
        own.append(per_token(lambda n, model=model: own_forward(model.model, 16, 8, n), "cpu").aten)
        for costs, fixed in ((plain, False), (compiled, True)):
            cost = per_token(lambda n, model=model, fixed=fixed: ours(model, options, n, compiled=fixed), "cpu")
            assert 0 < cost.waits <= 1
            assert cost.intercepted == 0
            assert cost.aten <= 1.05 * own[-1] + DRAWING
            costs.append(cost.aten)
    for costs in (plain, compiled):
        assert costs[1] - costs[0] <= 1.05 * (own[1] - own[0])


def ending(arch: str) -> Any:
    """A model that ends about one completion in eight at every step."""
    model = model_of(arch)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS_ID] *= 3
    return load_model((model, tiny_tokenizer()))


@pytest.mark.parametrize(
    "arch", ["qwen3", "llama", "gemma3_text", "gpt2", "gpt_neox", "mistral", "opt", "qwen3_5_text"]
)
def test_fixed_shapes_draw_the_same_tokens(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches that are refilled, moved in place, grown and shrunk."""
    monkeypatch.setattr(neurosig.sampling.kv_cache, "ROOM", 2)
    monkeypatch.setattr(neurosig.sampling.kv_cache, "BLOCK", 8)
    seen = {"keep": 0, "put": 0, "move": 0, "_reallocate": 0}
    for owner, name in ((RowCache, "keep"), (RowCache, "put"), (_Layer, "move"), (RowCache, "_reallocate")):
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name), seen, name))
    model, todo = ending(arch), prompts((4, 5, 6, 6, 7, 7, 9, 9, 20, 30))
    happened = dict.fromkeys(seen, 0)
    for changes in ({}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.5}):
        options: dict[str, Any] = {"max_new_tokens": 40, "batch_rows": 12, **changes}
        plain = draw(model, todo, **options)
        seen.update(dict.fromkeys(seen, 0))
        fixed = draw(model, todo, compile_decoding=True, **options)
        happened = {name: happened[name] + seen[name] for name in seen}
        assert tokens(fixed) == tokens(plain)
        for name, group in plain.items():
            for one, other in zip(group, fixed[name], strict=True):
                assert one.mean_entropy == pytest.approx(other.mean_entropy, abs=1e-4)
    assert min(happened.values()) > 0, happened


def recorded(method: Any, seen: dict[str, int], name: str) -> Any:
    def call(self: Any, *args: Any) -> Any:
        seen[name] += 1
        return method(self, *args)

    return call


@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "mistral"])
@torch.inference_mode()
def test_every_column_beyond_the_rows_is_hidden(arch: Arch | OtherArch) -> None:
    """Whatever the unused columns of fixed shapes hold, logits are those of transformers' own cache."""
    model = tiny_model(arch)
    ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(0))
    begins = torch.tensor([0, 3])
    mask = (torch.arange(14) >= begins[:, None]).long()
    own = DynamicCache(config=model.config)
    cache = RowCache(model.config)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for one in (own, cache):
        model(input_ids=ids[:, :10], attention_mask=mask[:, :10], position_ids=positions[:, :10], past_key_values=one)
    assert cache.fix()
    for layer in cache.layers:
        layer.keys[:, :, 10:] = layer.values[:, :, 10:] = 1e4
    for column in range(10, 14):
        new = ids[:, column : column + 1]
        expected = model(
            input_ids=new, attention_mask=mask[:, : column + 1], position_ids=positions[:, column : column + 1],
            past_key_values=own,
        ).logits  # fmt: skip
        cache.begin_token()
        found = model(
            input_ids=new, attention_mask=cache.masks(begins, padded=True), position_ids=cache.positions(begins),
            past_key_values=cache,
        ).logits  # fmt: skip
        cache.end_token()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_needs_the_two_dimensional_mask_is_decoded_without_fixed_shapes() -> None:
    """Falcon can derive position biases from it."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    falcon = FalconForCausalLM(config).eval()
    falcon.generation_config.eos_token_id = EOS_ID
    model = load_model((falcon, tiny_tokenizer()))
    plain = draw(model, prompts(), temperature=0.0)
    assert tokens(draw(model, prompts(), temperature=0.0, compile_decoding=True)) == tokens(plain)
    for prompt in prompts():
        row = falcon.generate(torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=10, pad_token_id=0)
        assert plain[prompt.question_id][0].completion_ids == tuple(row[0, len(prompt.token_ids) :].tolist())


def test_without_cuda_steps_run_as_they_are_and_a_note_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="neurosig"):
        graph = StepGraph(torch.device("cpu"))
        values = [graph.run(lambda n=n: torch.tensor(n), version=0).item() for n in range(WARM_UP + 3)]
    assert values == list(range(WARM_UP + 3))
    assert [record.message for record in caplog.records] == [
        "--compile-decoding: no CUDA graphs on cpu, so it saves no time here"
    ]
