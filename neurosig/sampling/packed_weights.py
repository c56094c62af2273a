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

WeightOf = Callable[[nn.Linear], Tensor | None]
"""Gives the weight by which a linear layer is to multiply; None for one that is not used."""


def own_weight(linear: nn.Linear) -> Tensor:
    return linear.weight


def packs(module: nn.Module) -> bool:
    """Whether a module's weight is packed: a linear layer that computes in float32 on a CPU with oneDNN."""
    if type(module) is not nn.Linear or module.weight.device.type != "cpu" or module.weight.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")


class PackedWeights(TorchFunctionMode):
    """Inside its ``with`` block, linear layers multiply by packed copies of the weights that they have now.

    Modules and their hooks are unchanged. It costs a second copy of the weights and changes rounding only; it has no
    effect off the CPU, in dtypes other than float32 or without oneDNN, and intercepts nothing then, as every
    interception takes time. No gradient flows.

    Args:
        modules: Modules whose linear layers are packed.
        rows: Rows of most products.
        weight_of: Gives the weight to pack for a layer, its own by default.
    """

    def __init__(self, modules: Iterable[nn.Module], rows: int, weight_of: WeightOf = own_weight):
        super().__init__()
        self._packed: dict[int, Tensor] = {}
        self._weights: list[Tensor] = []  # keeps them alive, so that no other tensor gets one of their ids
        for module in modules:
            if isinstance(module, nn.Linear) and packs(module) and id(module.weight) not in self._packed:
                self._pack(module.weight, weight_of(module), rows)

    def _pack(self, own: Tensor, weight: Tensor | None, rows: int) -> None:
        pack: Any = torch.ops.mkldnn._reorder_linear_weight  # used by torch.compile's freezing; no public name
        if weight is not None:
            self._packed[id(own)] = pack(weight.detach(), rows)
            self._weights.append(own)

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
