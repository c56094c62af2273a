"""One way of tracing 32 rollouts of 192 tokens through the embedded model, in a process of its own.

Prints one JSON line: seconds of the second pass over the rollouts, and the growth of the peak resident memory after
loading the model and one plain forward pass. The other ways are rewritten here after their sources.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import nnsight
import torch
from torch import Tensor

from neurosig.models.load import load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.sites import ffn_sites, w_out, w_out_norms
from neurosig.neurons.tracer import NeuronTracer
from tests.benchmarks.resident import resident_mb

ROWS, TOKENS, PROMPT, BATCH = 32, 192, 64, 8


def rollouts(questions: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 64 tokens, shared by ROWS / questions rollouts each, and completions of 128."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40_000, (questions, PROMPT), generator=generator).tolist()
    completions = torch.randint(1000, 40_000, (ROWS, TOKENS - PROMPT), generator=generator).tolist()
    return [prompts[row * questions // ROWS] for row in range(ROWS)], completions


def batches(prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    ids = torch.tensor([p + c for p, c in zip(prompts, completions, strict=True)])
    return list(ids.split(BATCH))


@torch.no_grad()
def plain(model, prompts, completions):  # type: ignore[no-untyped-def]
    """The baseline: a forward pass with logits that reads nothing."""
    for ids in batches(prompts, completions):
        model(ids, use_cache=False)


def ours(model, prompts, completions):  # type: ignore[no-untyped-def]
    NeuronTracer(model, TraceConfig(batch_tokens=BATCH * TOKENS)).trace(prompts, completions)


@torch.no_grad()
def nnsight_save(model, prompts, completions):  # type: ignore[no-untyped-def]
    """nnsight: save every layer's values, reduce them afterwards."""
    sites, envoy = ffn_sites(model), nnsight.NNsight(model)
    norms = w_out_norms(model, sites)
    for ids in batches(prompts, completions):
        with envoy.trace(input_ids=ids, use_cache=False):
            saved = nnsight.save([])
            for down in sites.layers:
                module = envoy.get(down)
                saved.append((module.input, module.output))
        for norm, (value, out) in zip(norms, saved, strict=True):
            score = value.abs() * norm / out.norm(dim=-1, keepdim=True)
            score[:, PROMPT:].mean(dim=1).topk(34)


@torch.no_grad()
def transformer_bridge(model, prompts, completions):  # type: ignore[no-untyped-def]
    """TransformerLens: `run_with_cache` of the FFN hooks."""
    from neurosig.neurons.lens_reader import LensReader

    sites = ffn_sites(model)
    norms = w_out_norms(model, sites)
    bridge = LensReader(model, sites).bridge  # over a copy of the modules that shares the weights
    names = {f"blocks.{layer}.mlp.out.{hook}" for layer in range(sites.n_layers) for hook in ("hook_in", "hook_out")}
    for ids in batches(prompts, completions):
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names)
        for layer, norm in enumerate(norms):
            out = cache[f"blocks.{layer}.mlp.out.hook_out"].norm(dim=-1, keepdim=True)
            score = cache[f"blocks.{layer}.mlp.out.hook_in"].abs() * norm / out
            score[:, PROMPT:].mean(dim=1).topk(34)


@torch.no_grad()
def h_neurons(model, prompts, completions):  # type: ignore[no-untyped-def]
    """One rollout at a time: hooks keep every layer's input and output, which are reduced afterwards."""
    sites = ffn_sites(model)
    norms = w_out_norms(model, sites)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: kept.update({path: (args[0].clone(), out.clone())})
        )
        for path in sites.layers
    ]
    for prompt, completion in zip(prompts, completions, strict=True):
        model(torch.tensor([prompt + completion]), use_cache=False)
        for norm, path in zip(norms, sites.layers, strict=True):
            value, out = kept[path]
            score = value.abs() * norm / out.norm(dim=-1, keepdim=True)
            score[:, PROMPT:].mean(dim=1).topk(34)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def neufs(model, prompts, completions):  # type: ignore[no-untyped-def]
    """One rollout at a time: unembedding scores of every position and neuron, the top 2,000 entries of each layer."""
    sites = ffn_sites(model)
    head = model.get_output_embeddings().weight
    kept: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, out, path=path: kept.update({path: out}))
        for path in sites.acts
    ]
    for prompt, completion in zip(prompts, completions, strict=True):
        model(torch.tensor([prompt + completion]), use_cache=False)
        following = head[torch.tensor(completion)]
        for act, down in zip(sites.acts, sites.layers, strict=True):
            value = kept[act][0, PROMPT - 1 : -1]
            score = value * (following @ w_out(model, down).T)
            (score.flatten().topk(2000).indices % sites.d_mlp).unique()
    for handle in handles:
        handle.remove()


WAYS: dict[str, Callable[..., None]] = {
    way.__name__: way for way in (plain, ours, nnsight_save, transformer_bridge, h_neurons, neufs)
}


def main(name: str, questions: int) -> None:
    model = load_model("smollm2-135m").model
    prompts, completions = rollouts(questions)
    plain(model, prompts, completions)
    before = resident_mb("VmHWM")
    WAYS[name](model, prompts, completions)
    grown = resident_mb("VmHWM") - before
    start = time.perf_counter()
    WAYS[name](model, prompts, completions)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": grown}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
