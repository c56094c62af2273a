"""What decoding one token costs: operations, kernels and waits for the device, and tokens per second.

    python -m tests.benchmarks.decoding                                  # a deep, narrow Qwen3 on the CPU: a minute
    python -m tests.benchmarks.decoding --device cuda --shape qwen3-4b   # one GPU

The model's own forward pass (transformers' `DynamicCache`) beside our decoding, with and without fixed shapes. Every
count is the difference between two lengths, per token, so prompts and loading cancel. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from neurosig.models.load import LoadedModel, load_model
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.packed_weights import PackedWeights
from neurosig.sampling.sampler import Prompt, sample
from tests.benchmarks.shapes import random_model
from tests.benchmarks.training_step import Endless, now
from tests.support.tiny import tiny_tokenizer

K = 8
SHORT, LONG = 4, 12
"""Decoded tokens of the two runs whose difference is counted."""
READS = {"cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__int__", "__float__", "__index__"}
"""Functions that make the host wait for a GPU."""
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
"""Operations that do, because their result's shape depends on values."""


@dataclass(kw_only=True)
class Options:
    """Sizes of the measurements."""

    shape: str = "deep"
    """Model shape: deep (36 narrow layers), tiny, qwen3-0.6b, qwen3-4b."""
    device: str = "cpu"
    """Device: cpu or cuda."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Parameter dtype; on a CPU, weights are packed in float32 only."""
    rows: int = 32
    """Rollouts decoded at once, a multiple of 8."""
    prompt: int = 32
    """Tokens of the longest prompt; every other prompt is one token shorter."""
    tokens: int = 64
    """Tokens per rollout where time is measured."""
    batched: bool | None = None
    """Also time transformers' own continuous batching; by default on a GPU only, as it takes minutes on a CPU."""


@dataclass(frozen=True)
class Counts:
    """Counts per decoded token."""

    aten: float
    """ATen operations that run no other one, views included."""
    intercepted: float
    """Calls that `PackedWeights` intercepts."""
    waits: float
    """Times that the host waits for the device; on a CPU: for which it would wait on a GPU."""
    kernels: float
    """CUDA kernels and copies; 0 on a CPU."""
    launches: float
    """Calls that start kernels, a graph being one; 0 on a CPU."""

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) - getattr(other, name) for name in self.__annotations__))

    def per(self, tokens: int) -> Counts:
        """These counts over that many tokens."""
        return Counts(*(getattr(self, name) / tokens for name in self.__annotations__))


class _WouldWait(TorchDispatchMode):
    """Counts operations after which the host would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.count += masked or name in SIZED_BY_VALUES
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Counts the functions that bring values to the host; one that calls another counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # what `cpu` has brought is on the host: reading it as an array waits no more
        self.count += name in READS - {"numpy"}
        return func(*args, **(kwargs or {}))


def counted(call: Callable[[], object], device: str) -> Counts:
    """What a call costs in all."""
    intercept, calls = PackedWeights.__torch_function__, [0]

    def counting(self: PackedWeights, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return intercept(self, *args, **kwargs)

    PackedWeights.__torch_function__ = counting  # type: ignore[method-assign]
    try:
        cuda = device == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
            call()
            if cuda:
                torch.cuda.synchronize()
    finally:
        PackedWeights.__torch_function__ = intercept  # type: ignore[method-assign]
    events = list(profiler.events())
    leaves = sum(
        event.name.startswith("aten::") and not any(child.name.startswith("aten::") for child in event.cpu_children)
        for event in events
    )
    if cuda:
        # pageable copies to the host end in a wait of their own, so each of them is one
        waits = sum("cudaStreamSynchronize" in event.name or "cudaEventSynchronize" in event.name for event in events)
        kernels = sum(str(event.device_type).endswith("CUDA") for event in events)
        launches = sum("LaunchKernel" in event.name or "GraphLaunch" in event.name for event in events)
        return Counts(leaves, calls[0], waits, kernels, launches)
    with _Reads() as reads, _WouldWait() as would:
        call()
    return Counts(leaves, calls[0], reads.count + would.count, 0, 0)


def per_token(call: Callable[[int], object], device: str) -> Counts:
    """What one token costs a function of the number of tokens to decode."""
    call(SHORT)
    short = counted(lambda: call(SHORT), device)
    return (counted(lambda: call(LONG), device) - short).per(LONG - SHORT)


@torch.inference_mode()
def own_forward(model: PreTrainedModel, rows: int, prompt: int, tokens: int) -> None:
    """The model's own forward passes and nothing else: the last token again and again, without any padding or mask."""
    ids = torch.full((rows, prompt), 5, device=model.device)
    cache = DynamicCache(config=model.config)
    for new in (ids, *(ids[:, :1] for _ in range(tokens - 1))):
        model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)


def ours(loaded: LoadedModel, options: Options, tokens: int, *, compiled: bool) -> int:
    """Decode that many tokens of every row; their number."""
    config = SamplingConfig(num_generations=K, temperature=1.0, max_new_tokens=tokens)
    prompts = [
        Prompt(str(n), tuple([3 + n % 200] + [5] * (options.prompt - 1 - n % 2))) for n in range(options.rows // K)
    ]
    groups = sample(loaded, prompts, config, batch_rows=options.rows, compile_decoding=compiled)
    return sum(len(rollout.completion_ids) for group in groups for rollout in group)


def make(options: Options) -> LoadedModel:
    """The random model without an end token."""
    dtype = getattr(torch, options.dtype)
    tokenizer = tiny_tokenizer()
    info = load_model((random_model("tiny", "cpu", dtype), tokenizer)).info
    changes = {"num_hidden_layers": 36} if options.shape == "deep" else {}
    model = random_model("tiny" if options.shape == "deep" else options.shape, options.device, dtype, **changes)
    return Endless(model, tokenizer, replace(info, id=options.shape))


def counts(loaded: LoadedModel, options: Options) -> dict[str, Counts]:
    """Counts per token of the model's own forward pass and of our two ways to decode."""
    return {
        "own forward": per_token(
            lambda tokens: own_forward(loaded.model, options.rows, options.prompt, tokens), options.device
        ),
        "ours": per_token(lambda tokens: ours(loaded, options, tokens, compiled=False), options.device),
        "ours, compiled": per_token(lambda tokens: ours(loaded, options, tokens, compiled=True), options.device),
    }


def speeds(loaded: LoadedModel, options: Options) -> Iterator[tuple[str, float]]:
    """Tokens per second, the better of two runs of each."""
    ids = torch.full((options.rows, options.prompt), 5, device=loaded.model.device)
    sampled: dict[str, Any] = {"do_sample": True, "max_new_tokens": options.tokens, "pad_token_id": 0}

    def generate() -> int:
        mask = torch.ones_like(ids)
        loaded.model.generate(ids, attention_mask=mask, min_new_tokens=options.tokens, top_k=0, **sampled)
        return options.rows * options.tokens

    def batched() -> int:
        config = GenerationConfig(**sampled, eos_token_id=-1)
        replies = loaded.model.generate_batch(inputs=ids.tolist(), generation_config=config)  # type: ignore[operator]
        return sum(len(reply.generated_tokens) for reply in replies.values())

    yield "generate", _rate(generate)
    yield "ours", _rate(lambda: ours(loaded, options, options.tokens, compiled=False))
    yield "ours, compiled", _rate(lambda: ours(loaded, options, options.tokens, compiled=True))
    if options.batched or (options.batched is None and options.device == "cuda"):
        yield "transformers' continuous batching", _rate(batched)
    if options.device == "cuda" and importlib.util.find_spec("vllm") is not None:
        yield "vLLM", _vllm(loaded, options, ids)


def _rate(call: Callable[[], int]) -> float:
    rates = []
    for _ in range(2):
        start = now()
        made = call()
        rates.append(made / (now() - start))
    return max(rates)


def _vllm(loaded: LoadedModel, options: Options, ids: Tensor) -> float:
    import tempfile

    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        engine = LLM(folder, dtype=options.dtype, gpu_memory_utilization=0.4, enable_prefix_caching=True)
        settings = SamplingParams(temperature=1.0, max_tokens=options.tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": row} for row in ids.tolist()]
        return _rate(lambda: sum(len(reply.outputs[0].token_ids) for reply in engine.generate(inputs, settings)))


def main(options: Options) -> None:
    """Print the two tables."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("decoding: no GPU here, nothing measured")
        return
    loaded = make(options)
    print(f"{options.shape} on {options.device}, {options.rows} rows, per decoded token:")
    found = counts(loaded, options)
    for name, count in found.items():
        cells = (f"{getattr(count, kind):.1f} {kind}" for kind in Counts.__annotations__)
        print(f"  {name:<34} {', '.join(cells)}; {count.aten / found['own forward'].aten - 1:+.1%} aten", flush=True)
    print(f"tokens per second, {options.rows} rows of {options.tokens} tokens:")
    for name, rate in speeds(loaded, options):
        print(f"  {name:<34} {rate:.0f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
