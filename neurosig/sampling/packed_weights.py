"""Weights laid out once for oneDNN, for decoding on a CPU.

Decoding multiplies few rows by every weight of the model, over and over. From PyTorch's own layout that takes nearly
twice the time of oneDNN's blocked one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class PackedWeights(TorchFunctionMode):
    """In its block, products with the weights of linear layers take packed copies, made of them as they are now.

    Modules and their hooks stay as they are. It costs a second copy of the weights and changes nothing but rounding;
    elsewhere than on a CPU in float32, or where oneDNN is missing, it changes nothing at all. No gradient flows.

    Args:
        modules: Where to look for linear layers.
        rows: How many rows most products will have.
    """

    def __init__(self, modules: Iterable[nn.Module], rows: int):
        super().__init__()
        pack: Any = torch.ops.mkldnn._reorder_linear_weight  # as torch.compile's freezing; there is no public name
        self._packed: dict[int, Tensor] = {}
        self._held: list[Tensor] = []  # so that no other tensor takes an id
        for module in modules:
            weight = module.weight if type(module) is nn.Linear else None
            if weight is not None and _packs(weight) and id(weight) not in self._packed:
                self._packed[id(weight)] = pack(weight.detach(), rows)
                self._held.append(weight)

    @no_type_check  # checked at run time, as in the tests, this would cost more than the operations it looks at
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
