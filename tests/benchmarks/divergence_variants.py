"""One implementation of the divergence of 1,024 tokens and its gradient; prints seconds, floor and memory as JSON.

The floor is the time of the three projections that all implementations need: student, teacher, and the gradient of
the student's hidden states.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tests.benchmarks.resident import resident_mb, restart_peak

TOKENS, VOCAB, D_MODEL, CHUNK = 1024, 49_152, 576, 256


def ours(topk: int, student: Tensor, teacher: Tensor, head: Tensor) -> None:
    from distill.losses import Divergence, chunked_divergence

    chunked_divergence(student, teacher, head, head, Divergence(topk=topk), weights=torch.ones(TOKENS)).loss.backward()


def trl_full(student: Tensor, teacher: Tensor, head: Tensor) -> None:
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    with torch.no_grad():
        teacher_logits = teacher @ head.t()
    losses = compute_full_logit_self_distillation_loss(student @ head.t(), teacher_logits, distillation_alpha=0.0)
    losses.sum().backward()


def trl_topk(student: Tensor, teacher: Tensor, head: Tensor) -> None:
    from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

    with torch.no_grad():
        teacher_logits = teacher @ head.t()
    losses = compute_topk_self_distillation_loss(
        student @ head.t(),
        teacher_logits,
        distillation_topk=100,
        distillation_alpha=0.0,
        distillation_add_tail=True,
    )
    losses.sum().backward()


def trl_chunked(student: Tensor, teacher: Tensor, head: Tensor) -> None:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, TOKENS)
    _chunked_divergence_loss(student[None], teacher[None], head, head, mask, 0.0)[0].backward()


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "ours": lambda *tensors: ours(0, *tensors),
    "ours_topk": lambda *tensors: ours(100, *tensors),
    "trl_full": trl_full,
    "trl_topk": trl_topk,
    "trl_chunked": trl_chunked,
}


def floor(student: Tensor, teacher: Tensor, head: Tensor) -> None:
    logits, gradient = torch.empty(CHUNK, VOCAB), torch.empty(CHUNK, D_MODEL)
    with torch.no_grad():
        for start in range(0, TOKENS, CHUNK):
            for hidden in (student, teacher):
                torch.mm(hidden[start : start + CHUNK], head.t(), out=logits)
            torch.mm(logits, head, out=gradient)


def seconds(call: Callable[[Tensor, Tensor, Tensor], None], tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    times = []
    for _ in range(3):
        tensors[0].grad = None
        start = time.perf_counter()
        call(*tensors)
        times.append(time.perf_counter() - start)
    return min(times)


def main(way: str) -> None:
    small = torch.randn(TOKENS, 8, requires_grad=True), torch.randn(TOKENS, 8), torch.randn(512, 8)
    WAYS[way](*small)  # imports are done
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, D_MODEL, generator=generator) for _ in range(2))
    head = torch.randn(VOCAB, D_MODEL, generator=generator) * D_MODEL**-0.5
    tensors = student.requires_grad_(), teacher, head
    restart_peak()
    before = resident_mb("VmRSS")
    WAYS[way](*tensors)
    peak = resident_mb("VmHWM") - before
    result = {"peak_mb": peak, "seconds": seconds(WAYS[way], tensors), "floor": seconds(floor, tensors)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
