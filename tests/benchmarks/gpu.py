"""Tracing, sampling and a training step at Qwen3's shapes with random weights, against TRL, on one GPU.

    make bench-gpu

bfloat16, no download. Every number is printed and written to a CSV with the device's name, the measured peak next to
the README's memory arithmetic (`memory`). Without a GPU a message says so and nothing is measured; with TEST_DEVICE=cpu
a tiny shape is, to try the script. Beyond torch and transformers it needs accelerate, datasets, einops, jaxtyping,
nnsight, pandas, peft, pydantic, pytest, scikit-learn, trl and tyro.
"""

from __future__ import annotations

import csv
import gc
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.tracer import NeuronTracer
from neurosig.runtime.files import write_atomic
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample
from tests.benchmarks.memory import Arithmetic, gigabytes, peak
from tests.benchmarks.shapes import random_model
from tests.benchmarks.training_step import Endless, Step, distillation, now, ours, sdft
from tests.support.tiny import tiny_tokenizer

DEVICE = os.environ.get("TEST_DEVICE", "cuda")


@dataclass(kw_only=True)
class Options:
    """Sizes of the measurements; the defaults are those of the committed CSV."""

    shapes: tuple[str, ...] = ("tiny",) if DEVICE == "cpu" else ("qwen3-0.6b", "qwen3-4b")
    """Model shapes: tiny, qwen3-0.6b, qwen3-4b."""
    device: str = DEVICE
    """Device; cpu is for trying the script."""
    questions: int = 4
    """Questions per step."""
    k: int = 8
    """Rollouts per question."""
    tokens: int = 128
    """Tokens per rollout."""
    prompt: int = 128
    """Tokens of the bare prompt."""
    teacher_prompt: int = 1024
    """Tokens of the prompt with context."""
    micro: int = 16
    """Rollouts in one forward and backward pass, ours and TRL's."""
    trl: bool = True
    """Also take the step with TRL's trainers."""
    out: Path | None = None
    """CSV for the results."""


def main(options: Options) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: no GPU here, nothing measured")
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        for what, value in measure(shape, options):
            rows.append({"device": name, "shape": shape, "what": what, "value": f"{value:.4g}"})
            print(f"{shape:<12} {what:<52} {rows[-1]['value']}", flush=True)
            if options.out is not None:
                _write(options.out, rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def measure(shape: str, options: Options) -> Iterator[tuple[str, float]]:
    """Names with units, and values, one by one; NaN where memory runs out."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    tokenizer = tiny_tokenizer()
    info = load_model((random_model("tiny", "cpu", dtype), tokenizer)).info

    def make() -> LoadedModel:
        # load_model would hash 8 GB of weights each time
        return LoadedModel(random_model(shape, options.device, dtype), tokenizer, replace(info, id=shape))

    texts = [
        ("b" * options.prompt, chr(99 + n) * (options.teacher_prompt - options.prompt))
        for n in range(options.questions)
    ]
    texts = [(chr(99 + n) + prompt[1:], context) for n, (prompt, context) in enumerate(texts)]
    step = Step(make, texts, options.k, options.tokens, options.teacher_prompt, 64, options.micro)
    loaded = make()
    yield from _tracing(loaded, options)
    yield from _sampling(loaded, options)
    del loaded
    runs: list[dict[str, float]] = []

    def our_step() -> float:
        runs.append(ours(step))
        return sum(runs[-1].values())

    yield from _run("step: ours", our_step)
    parts = min(runs, key=lambda parts: sum(parts.values()), default={})
    yield from ((f"step: ours, {name} (s)", seconds) for name, seconds in parts.items())
    arithmetic = Arithmetic(
        shape=shape, prompt=options.prompt, teacher_prompt=options.teacher_prompt, new_tokens=options.tokens,
        rows=options.questions * options.k, micro=options.micro, rank=64,
        micro_tokens=options.micro * (options.prompt + options.tokens),
    )  # fmt: skip
    yield "step: ours, peak by the README's arithmetic (GB)", peak(gigabytes(arithmetic))
    if options.trl:
        with tempfile.TemporaryDirectory() as folder:
            yield from _run("step: TRL SDFT topk", lambda: sdft(step, Path(folder) / "topk", "topk_logits"))
            yield from _run("step: TRL Distillation", lambda: distillation(step, Path(folder) / "chunked"))


def _run(name: str, call: Callable[[], float]) -> Iterator[tuple[str, float]]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = min(call(), call())  # the first also warms up
    except torch.OutOfMemoryError:
        seconds = float("nan")
    peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else float("nan")
    yield f"{name} (s)", seconds
    yield f"{name}, peak (GB)", peak_bytes / 1e9


def _prompts(options: Options) -> list[tuple[int, ...]]:
    return [tuple([3 + n] + [5] * (options.prompt - 1)) for n in range(options.questions)]


def _tracing(loaded: LoadedModel, options: Options) -> Iterator[tuple[str, float]]:
    """Tracing K rollouts per prompt against a plain forward pass over the same tokens."""
    prompts = [prompt for prompt in _prompts(options) for _ in range(options.k)]
    completions = [[7] * options.tokens for _ in prompts]
    tracer = NeuronTracer(loaded.model, TraceConfig(set_size=100))

    @torch.no_grad()
    def plain() -> None:
        for start in range(0, len(prompts), 8):
            part = [[*p, *c] for p, c in zip(prompts[start : start + 8], completions[start : start + 8], strict=True)]
            loaded.model(torch.tensor(part, device=loaded.model.device))

    def trace() -> None:
        tracer.trace(prompts, completions)

    plain_seconds, traced = _best(plain), _best(trace)
    yield "tracing / plain forward", traced / plain_seconds
    yield "tracing (s)", traced


def _sampling(loaded: LoadedModel, options: Options) -> Iterator[tuple[str, float]]:
    """Our sampler against transformers' `generate`, which gets all rows in one batch."""
    endless = Endless(loaded.model, loaded.tokenizer, loaded.info)
    prompts = [Prompt(str(n), ids) for n, ids in enumerate(_prompts(options) * 4)]
    config = SamplingConfig(num_generations=options.k, temperature=1.0, max_new_tokens=options.tokens)
    lengths: list[int] = []

    def run(*, compiled: bool = False) -> None:
        groups = sample(endless, prompts, config, compile_decoding=compiled)
        lengths[:] = [len(r.completion_ids) for group in groups for r in group]

    rows = len(prompts) * options.k
    seconds, compiled_seconds = _best(run), _best(lambda: run(compiled=True))
    yield f"sampling, {rows} rows (tokens/s)", sum(lengths) / seconds
    yield f"sampling, compiled, {rows} rows (tokens/s)", sum(lengths) / compiled_seconds
    ids = torch.tensor([prompt.token_ids for prompt in prompts], device=loaded.model.device)

    def generate() -> None:
        loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, num_return_sequences=options.k,
            min_new_tokens=options.tokens, max_new_tokens=options.tokens, pad_token_id=0,
        )  # fmt: skip

    yield f"generate, {rows} rows (tokens/s)", rows * options.tokens / _best(generate)


def _best(call: Callable[[], None], runs: int = 2) -> float:
    """Seconds of the faster of two runs; the first warms up."""
    times: Sequence[float] = []
    for _ in range(runs):
        start = now()
        call()
        times = [*times, now() - start]
    return min(times)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
