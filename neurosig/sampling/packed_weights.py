"""Weights in oneDNN's blocked layout, for decoding on a CPU.

Decoding multiplies few rows by all weights again and again, which takes nearly twice as long from PyTorch's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class PackedWeights(TorchFunctionMode):
    """Inside its ``with`` block, linear layers multiply by packed copies of their current weights.

    Modules and their hooks are unchanged. It costs a second copy of the weights and changes rounding only; it has no
    effect off the CPU, in dtypes other than float32 or without oneDNN, and intercepts nothing then, as every
    interception takes time. No gradient flows.

    Args:
        modules: Modules whose linear layers are packed.
        rows: Rows of most products.
    """

    def __init__(self, modules: Iterable[nn.Module], rows: int):
        super().__init__()
        pack: Any = torch.ops.mkldnn._reorder_linear_weight  # used by torch.compile's freezing; no public name
        self._packed: dict[int, Tensor] = {}
        self._weights: list[Tensor] = []  # keeps them alive, so that no other tensor gets one of their ids
        for module in modules:
            weight = module.weight if type(module) is nn.Linear else None
            if weight is not None and _packs(weight) and id(weight) not in self._packed:
                self._packed[id(weight)] = pack(weight.detach(), rows)
                self._weights.append(weight)

    def __enter__(self) -> PackedWeights:
        if self._packed:
            super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._packed:
            super().__exit__(*raised)

    @no_type_check  # run-time checks, as in the tests, would cost more than the operations themselves
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is linear and (weight := self._packed.get(id(args[1]))) is not None:
            bias = args[2] if len(args) > 2 else None
            return torch.ops.mkldnn._linear_pointwise(args[0], weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _packs(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
