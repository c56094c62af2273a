"""Find the module where a model's numbers stop being finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode()
def first_not_finite(model: nn.Module, token_ids: Sequence[int]) -> str:
    """The first module whose output on these tokens is not finite, as words for an error message; empty if none is.

    The words distinguish a module with a non-finite parameter from one whose arithmetic overflows.
    """
    found: list[str] = []

    def check(name: str, module: nn.Module, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if found or not isinstance(values, Tensor) or bool(torch.isfinite(values).all()):
            return
        damaged = [label for label, one in module.named_parameters(recurse=False) if not torch.isfinite(one).all()]
        why = f"its {damaged[0]} holds NaN or infinity" if damaged else f"in {values.dtype}".replace("torch.", "")
        found.append(f"; the first layer is {name} ({why})")

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: check(name, module, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(torch.tensor([list(token_ids)], device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
