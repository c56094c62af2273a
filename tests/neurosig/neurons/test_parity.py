"""One set of neurons, read four ways: nnsight, plain PyTorch hooks, TransformerLens, and nnsight's remote path.

The oracle runs each rollout alone and whole, under plain forward hooks, and adds up in fp64 what the traces reduce on
the way, from prompt caches and padded batches. Tolerances: fp32 sums of another order give 1e-5 at most here;
TransformerBridge's own attention and norms 1e-4. A set may differ only in neurons whose means are that close.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neurosig.neurons.backends import Backend, trace_neurons
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import ActiveSets
from neurosig.neurons.lens_reader import LensTracer
from neurosig.neurons.sites import ffn_sites
from neurosig.neurons.tracer import NeuronTracer
from neurosig.runtime.errors import UserError
from tests.support.flow import save_tiny
from tests.support.paths import ROOT
from tests.support.tiny import ARCHS, D_MLP, EOS_ID, N_LAYERS, VOCAB_SIZE, Arch, OtherArch, tiny_model

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel

EVERY_NEURON = 10**6
LENGTHS = [(6, 4), (11, 2), (3, 9), (2, 2), (12, 3)]  # prompt and completion tokens; gemma's window is 8


def rollouts() -> tuple[list[list[int]], list[list[int]]]:
    """Random rollouts; the last two share a prompt."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()

    prompts, completions = zip(*((draw(p), [*draw(c - 1), EOS_ID]) for p, c in LENGTHS), strict=True)
    return [*prompts, prompts[-1]], [*completions, draw(5)]


def oracle(
    model: PreTrainedModel, prompt: list[int], completion: list[int], value: str = "gated", score: str = "cett"
) -> tuple[Tensor, Tensor]:
    """Scores [position, layer, neuron] and residual stream [position, d_model] of one rollout, in fp64."""
    sites = ffn_sites(model)
    seen: dict[str, Tensor] = {}
    handles = []
    for path in (*sites.layers, *sites.acts, *sites.blocks):

        def keep(module: nn.Module, args: tuple, out: Any, path: str = path) -> None:
            seen[path] = (out[0] if isinstance(out, tuple) else out).double().squeeze(0)
            if args:
                seen[f"{path}.input"] = args[0].double().squeeze(0)

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    ids = prompt + completion
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    head = model.get_output_embeddings().weight.double()
    first = len(prompt) - 1 if score == "unembed" else len(prompt)
    positions = range(first, first + len(completion))
    scores = torch.empty(len(positions), sites.n_layers, sites.d_mlp, dtype=torch.float64)
    for layer, (down, act) in enumerate(zip(sites.layers, sites.acts, strict=True)):
        module = model.get_submodule(down)
        w_out = module.weight.double() if isinstance(module, Conv1D) else module.weight.double().T
        for place, t in enumerate(positions):
            a = seen[f"{down}.input"][t] if value == "gated" else seen[act][t]
            if score == "unembed":
                scores[place, layer] = a * (w_out @ head[ids[t + 1]])
            else:
                norm = seen[down][t].square().sum().sqrt() if score == "cett" else 1
                scores[place, layer] = a.abs() * w_out.square().sum(dim=1).sqrt() / norm
    hidden = seen[sites.blocks[len(sites.blocks) * 2 // 3]][first : first + len(completion)]
    return scores.detach(), hidden


def oracle_set(scores: Tensor, active: str, size: int, rounding: float) -> set[int]:
    """One rollout's active set by plain loops: flat ids. Sizes as in `TraceConfig`, so shared out over the layers.

    Above zero, ``rounding`` leaves its members beyond doubt, that much above the first left out; below zero, all the
    possible ones, down to that much below the last that belongs.
    """
    n_layers, d_mlp = scores.shape[1:]
    share = -(-size // n_layers)
    members = set()
    for layer in range(n_layers):
        by_position = scores[:, layer]
        match active:
            case "layer_mean":
                groups, k = by_position.mean(dim=0, keepdim=True), share
            case "per_token":
                groups, k = by_position, share
            case "entries":
                groups, k = by_position.flatten()[None], size
        for group in groups:
            threshold = group.topk(k + 1).values[-1 if rounding > 0 else -2] * (1 + rounding)
            members |= {layer * d_mlp + int(entry) % d_mlp for entry in (group > threshold).nonzero()}
    return members


def assert_same_sets(sets: ActiveSets, expected: ActiveSets, tolerance: float) -> None:
    """The same neurons and values, but for neurons at a set's edge that are as close to it as rounding."""
    torch.testing.assert_close(sets.hidden_states, expected.hidden_states, rtol=tolerance, atol=tolerance)
    for row_of_sets, row_expected in zip(range(len(sets.neuron_ids)), range(len(expected.neuron_ids)), strict=True):
        a, b = (
            {i: v for i, v in zip(s.neuron_ids[row].tolist(), s.contributions[row].tolist(), strict=True) if i >= 0}
            for s, row in ((sets, row_of_sets), (expected, row_expected))
        )
        assert len(a.keys() & b.keys()) > 0.9 * len(b)
        edge = min(abs(v) for v in b.values())
        for neuron in a.keys() ^ b.keys():
            assert abs(abs(a.get(neuron, b.get(neuron, 0.0))) - edge) < tolerance
        for neuron in a.keys() & b.keys():
            assert a[neuron] == pytest.approx(b[neuron], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("score", ["cett", "magnitude", "unembed"])
@pytest.mark.parametrize("value", ["gated", "act"])
@pytest.mark.parametrize("arch", [*ARCHS, "opt", "phi3"])
def test_both_backends_equal_plain_hooks(arch: Arch | OtherArch, value: Any, score: Any) -> None:
    """Every neuron's mean score and the hidden state, for each value and score; the other architectures are in
    tests/promises/test_architectures.py."""
    model = tiny_model(arch)
    prompts, completions = rollouts()
    seen = [oracle(model, p, c, value, score) for p, c in zip(prompts, completions, strict=True)]
    means = torch.stack([scores.mean(dim=0) for scores, _ in seen]).float()
    hidden = torch.stack([stream.mean(dim=0) for _, stream in seen]).float()
    config = TraceConfig(value=value, score=score, set_size=EVERY_NEURON)
    for tracer, tolerance in ((NeuronTracer(model, config), 2e-5), (LensTracer(model, config), 1e-4)):
        sets = tracer.trace(prompts, completions)
        n_layers = model.config.num_hidden_layers
        assert torch.equal(sets.neuron_ids, torch.arange(n_layers * D_MLP).int().expand(len(prompts), -1))
        every = sets.contributions.unflatten(1, (n_layers, D_MLP))
        torch.testing.assert_close(every, means, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sets.hidden_states, hidden, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("active", "size"), [("layer_mean", 20), ("per_token", 6), ("entries", 30)])
@pytest.mark.parametrize("arch", [*ARCHS, "opt", "phi3"])
def test_active_sets_are_those_of_plain_hooks(arch: Arch | OtherArch, active: Any, size: int) -> None:
    """Up to 1e-4 at a threshold, where the order of sums decides; that leaves few neurons open."""
    model = tiny_model(arch)
    prompts, completions = rollouts()
    scores = [oracle(model, p, c)[0] for p, c in zip(prompts, completions, strict=True)]
    sure, possible = ([oracle_set(rows, active, size, rounding) for rows in scores] for rounding in (1e-4, -1e-4))
    assert sum(map(len, sure)) > 0.98 * sum(map(len, possible))
    for backend in ("nnsight", "transformer_lens"):
        sets = trace_neurons(model, prompts, completions, TraceConfig(active=active, set_size=size), backend=backend)
        for row, inner, outer in zip(sets.neuron_ids, sure, possible, strict=True):
            assert inner <= set(row.tolist()) - {-1} <= outer


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"set_size": 20}, id="layer_mean"),
        pytest.param({"active": "global", "set_size": 20}, id="global"),
        pytest.param({"active": "per_token", "set_size": 6}, id="per_token"),
        pytest.param({"active": "entries", "set_size": 30}, id="entries"),
        pytest.param({"score": "unembed", "positive_only": True, "set_size": 60}, id="positive_only"),
    ],
)
def test_the_backends_find_the_same_sets(arch: Arch, options: dict[str, Any]) -> None:
    """One near tie at one position can decide who belongs by ``per_token`` and ``entries``: there 98% are shared."""
    model = tiny_model(arch)
    config = TraceConfig(**options)
    nnsight, lens = (
        trace_neurons(model, *rollouts(), config, backend=name) for name in ("nnsight", "transformer_lens")
    )
    assert 0 < nnsight.neuron_ids.shape[1] < N_LAYERS * D_MLP
    if config.active in ("per_token", "entries"):
        assert overlap(nnsight, lens) > 0.98
    else:
        assert_same_sets(lens, nnsight, 1e-4)


def overlap(a: ActiveSets, b: ActiveSets) -> float:
    """Mean Jaccard similarity of the sets of each rollout."""
    pairs = [(set(x.tolist()) - {-1}, set(y.tolist()) - {-1}) for x, y in zip(a.neuron_ids, b.neuron_ids, strict=True)]
    return sum(len(x & y) / len(x | y) for x, y in pairs) / len(pairs)


def test_transformer_lens_leaves_the_model_as_it_was() -> None:
    """The bridge takes over a copy of the modules; weights are shared, not copied."""
    model = tiny_model("phi3")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    modules = [type(module) for module in model.modules()]
    tracer = LensTracer(model)
    tracer.trace(*rollouts())
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(model(ids).logits, before)
    twin = tracer.reader.bridge.original_model
    assert twin is not model
    assert twin.lm_head.weight is model.lm_head.weight


def test_transformer_lens_holds_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is reduced, the values of the one before are gone."""
    import neurosig.neurons.tracer

    seen: list[weakref.ref[Tensor]] = []
    reduce = neurosig.neurons.tracer.reduce_layer

    def watched(layer: int, value: Tensor, *args: Any, **options: Any) -> Any:
        assert all(ref() is None for ref in seen)
        seen.append(weakref.ref(value))
        return reduce(layer, value, *args, **options)

    monkeypatch.setattr(neurosig.neurons.tracer, "reduce_layer", watched)
    LensTracer(tiny_model("gemma3"), TraceConfig(batch_tokens=10**6)).trace(*rollouts())
    assert len(seen) == 3


def test_the_head_reads_one_position_only() -> None:
    """So that no [batch, seq, vocab] tensor is made."""
    tracer = LensTracer(tiny_model("llama"))
    shapes = []
    tracer.reader.bridge.original_model.lm_head.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    tracer.trace([[5, 6, 7]], [[8, 9]])
    assert shapes == [(1, 1, VOCAB_SIZE)]


def test_a_remote_trace_finds_the_same_sets(tmp_path: Path) -> None:
    """As nnsight's dry run, and on a server's process that has no neurosig, from a client that has no weights.

    In processes of their own: the tests' shape checker wraps our functions, and the wrappers do not travel.
    """
    models = [str(save_tiny(tmp_path / arch, arch)) for arch in ("qwen3", "gpt2", "opt")]
    client = [sys.executable, str(ROOT / "tests" / "remote" / "client.py"), *models]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(client, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.stdout.startswith("largest request"), done.stderr
    assert int(done.stdout.split()[-1]) < 100_000  # no weights in it


def test_what_remote_needs() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="by its hub id"):
        NeuronTracer(model, remote=True)
    with pytest.raises(UserError, match="nnsight backend"):
        trace_neurons(model, *rollouts(), backend="transformer_lens", remote=True)


@pytest.mark.parametrize(("backend", "other"), [("nnsight", "transformer_lens"), ("transformer_lens", "nnsight")])
def test_a_backend_loads_its_library_only(tmp_path: Path, backend: Backend, other: str) -> None:
    model = save_tiny(tmp_path / "model")
    code = f"""
import sys, neurosig
from neurosig.neurons.backends import trace_neurons
loaded = neurosig.load_model({str(model)!r})
sets = trace_neurons(loaded, [[5, 6]], [[7, 8]], backend={backend!r})
print(sets.neuron_ids.shape[0], {backend!r} in sys.modules, {other!r} in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "1 True False\n", done.stderr


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(
        UserError, match=r"backend transformer_lens: transformer_lens is not installed.*neurosig\[explore\]"
    ):
        trace_neurons(tiny_model("llama"), *rollouts(), backend="transformer_lens")


def test_unembed_needs_a_head_as_wide_as_the_stream() -> None:
    model = OPTForCausalLM(
        tiny_model("opt").config.__class__(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            ffn_dim=D_MLP,
            num_hidden_layers=1,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
        )
    ).eval()
    with pytest.raises(UserError, match="head reads 16 dimensions, the residual stream has 32"):
        NeuronTracer(model, TraceConfig(score="unembed"))
    assert trace_neurons(model, [[5, 6]], [[7, 8]], TraceConfig(set_size=9)).neuron_ids.shape == (1, 9)


@pytest.mark.smollm2
def test_smollm2_both_backends(smollm2: LoadedModel) -> None:
    """30 layers of trained weights: fp32 differences grow to 1e-3 of a value, and reach no set but at its edge."""
    texts = [("The capital of France is", " Paris."), ("Water boils at", " a hundred degrees Celsius.")]
    prompts = [smollm2.tokenizer.encode(prompt) for prompt, _ in texts]
    completions = [smollm2.tokenizer.encode(completion) for _, completion in texts]
    nnsight, lens = (
        trace_neurons(smollm2, prompts, completions, backend=name) for name in ("nnsight", "transformer_lens")
    )
    assert nnsight.neuron_ids.shape == (2, 30 * 34)
    assert_same_sets(lens, nnsight, 1e-3)
