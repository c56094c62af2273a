"""Random hidden states and heads, the divergence between them, and how many rows of logits it holds at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses import Divergence, DivergenceOutput, chunked_divergence

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def divergence_of(
    *tensors: Tensor,
    divergence: Any = "forward_kl",
    token_ids: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> DivergenceOutput:
    return chunked_divergence(*tensors, Divergence(divergence, **options), token_ids=token_ids, weights=weights)


def inputs(
    tokens: int = 13,
    d_model: int = 8,
    vocab: int = 37,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.5,
    seed: int = 0,
) -> list[Tensor]:
    """Student hidden, teacher hidden, student head, teacher head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, d_model), (tokens, d_model), (vocab, d_model), (vocab, d_model)
    hidden, teacher, head, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    hidden, head = scale * hidden / math.sqrt(d_model), head.requires_grad_()
    return [hidden.requires_grad_(), scale * teacher / math.sqrt(d_model), head, teacher_head]


class VocabularyRows(TorchDispatchMode):
    """Records how many rows of vocabulary width each operation's tensors hold."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.vocab:
                self.rows = max(self.rows, tensor.numel() // self.vocab)
        return result
