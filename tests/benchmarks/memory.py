"""The README's memory arithmetic: the memory of a training run on one device, term by term.

    python -m tests.benchmarks.memory --shape qwen3-4b

Weights, adapter, optimizer and caches follow from the shape. The student's activations are counted: a one-layer and a
two-layer model of the real width run one short micro-batch on the CPU, the bytes of all tensors that autograd saves are
added up, and the difference of the two sums is one layer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from neurosig.models.completion_hidden import completion_hidden
from tests.benchmarks.shapes import config, random_model

SCALE = 16
"""Sequences are shorter by this factor while counting: without an attention matrix all terms are linear in length."""


@dataclass(kw_only=True)
class Arithmetic:
    """Gigabytes of each term for a LoRA run in bfloat16 on one device."""

    shape: str = "qwen3-4b"
    """tiny, qwen3-0.6b or qwen3-4b."""
    prompt: int = 256
    """Tokens of the bare prompt."""
    teacher_prompt: int = 2304
    """Tokens of the prompt with context."""
    new_tokens: int = 1024
    """Tokens of a completion."""
    rows: int = 32
    """Rollouts sampled together, as in the qwen3-4b preset."""
    dev_rows: int = 256
    """Rollouts of --dev-questions sampled together: 64 questions x 8, at most --batch-rows."""
    micro: int = 8
    """Most rollouts in one forward and backward pass, as in the preset."""
    micro_tokens: int = 5120
    """Most tokens of the student in it, as in the preset."""
    rank: int = 64
    """LoRA rank, as in the preset."""


def gigabytes(options: Arithmetic) -> dict[str, float]:
    """Term -> GB (10^9 bytes)."""
    shape = config(options.shape)
    rows = options.rows
    heads, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    d, d_mlp, layers, vocab = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.vocab_size
    linear = [(d, heads), (d, kv), (d, kv), (heads, d), (d, d_mlp), (d, d_mlp), (d_mlp, d)]
    projections = layers * sum(a * b for a, b in linear)
    adapter = layers * sum(options.rank * (a + b) for a, b in linear)
    cached = layers * 2 * kv * 2
    student, learned = options.micro_tokens, options.micro_tokens // (options.prompt + options.new_tokens)
    most_context = options.micro * (options.teacher_prompt - options.prompt) + options.micro_tokens
    teacher = max(learned * (options.teacher_prompt + options.new_tokens), most_context)
    checkpointed = layers * student * d * 2 + 2 * cached * learned * options.prompt
    return {
        "weights": 2 * (projections + vocab * d) / 1e9,
        "adapter, gradient, Adam": 16 * adapter / 1e9,
        "sampling: keys and values": cached * rows * (options.prompt + options.new_tokens) / 1e9,
        "measuring: keys and values": cached * options.dev_rows * (options.prompt + options.new_tokens) / 1e9,
        "learning: teacher's keys and values": cached * teacher / 1e9,
        "learning: student's activations": layers * activations(options) / 1e9,
        "learning: with --gradient-checkpointing": (checkpointed + activations(options)) / 1e9,
        "loss: two chunks of logits": 2 * 256 * vocab * 4 / 1e9,
    }


def activations(options: Arithmetic) -> float:
    """Bytes that one layer of the student saves for the backward pass of a micro-batch."""
    one, two = (_saved_bytes(options, layers) for layers in (1, 2))
    return (two - one) * SCALE


def _saved_bytes(options: Arithmetic, layers: int) -> int:
    from peft import LoraConfig, get_peft_model

    model = random_model(options.shape, "cpu", torch.bfloat16, num_hidden_layers=layers, vocab_size=512)
    get_peft_model(model, LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def weigh(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            saved[place] = tensor  # a reference keeps later tensors from its address
        return tensor

    rows = options.micro_tokens // (options.prompt + options.new_tokens)
    prompts = [tuple(range(row, row + options.prompt // SCALE)) for row in range(rows)]
    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
        hidden = completion_hidden(model, prompts, [[1] * (options.new_tokens // SCALE)] * rows)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) if hidden.requires_grad else 0


def peak(terms: dict[str, float]) -> float:
    """The larger of both peaks, sampling and learning, without gradient checkpointing or development questions."""
    always = terms["weights"] + terms["adapter, gradient, Adam"]
    sampling = sum(value for name, value in terms.items() if name.startswith("sampling"))
    learning = terms["learning: teacher's keys and values"] + terms["learning: student's activations"]
    return always + max(sampling, learning + terms["loss: two chunks of logits"])


def main(options: Arithmetic) -> None:
    terms = gigabytes(options)
    for name, value in terms.items():
        print(f"{name:<42} {value:6.1f} GB")
    print(f"{'peak, without gradient checkpointing':<42} {peak(terms):6.1f} GB")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arithmetic)))
