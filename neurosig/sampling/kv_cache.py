"""A key-value cache for continuous batching: rows are replaced while the batch decodes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from neurosig.runtime.errors import UserError

ROOM = 32
"""Columns allocated in advance, so that a step writes in place and rarely copies."""


class RowCache(Cache):
    """Keys and values of rows that all end at the same column; a shorter row begins further right.

    The caller masks the columns before a row's beginning. Attention receives the written columns only, so the cost of a
    step depends on the current length of the rows, not on the largest possible one.

    Raises:
        UserError: The model has layers that are neither full nor sliding attention.
    """

    def __init__(self, config: PreTrainedConfig):
        layers = DynamicCache(config=config).layers
        for layer in layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise UserError(
                    f"{config.model_type}: sampling supports full and sliding-window attention, this model has a "
                    f"{type(layer).__name__}; sample elsewhere and pass the rollouts as a file"
                )
        self._layers = [_Layer(getattr(layer, "sliding_window", None)) for layer in layers]
        super().__init__(layers=list(self._layers))

    @property
    def end(self) -> int:
        """Columns written."""
        return self._layers[0].end

    @property
    def full(self) -> bool:
        """Whether the next token needs a larger allocation."""
        return self._layers[0].end == self._layers[0].capacity

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order and as often as they occur."""
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def shift(self, columns: int) -> None:
        """Move every row to the right, or (negative) to the left, which drops the first columns."""
        for layer in self._layers:
            layer.resize(columns, ROOM)

    def put(self, slots: Int[Tensor, " slots"], other: RowCache, rows: Int[Tensor, " slots"]) -> None:
        """Overwrite ``slots`` with ``rows`` of a cache that is not longer, aligned at the last column."""
        for target, source in zip(self._layers, other._layers, strict=True):
            columns = slice(target.end - source.end, target.end)
            target.keys[slots, :, columns] = source.keys[rows, :, : source.end]
            target.values[slots, :, columns] = source.values[rows, :, : source.end]


class _Layer(CacheLayerMixin):
    keys: Tensor
    values: Tensor

    def __init__(self, window: int | None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.end = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def resize(self, left: int, right: int) -> None:
        written = self.keys[:, :, : self.end], self.values[:, :, : self.end]
        self.keys, self.values = (torch.nn.functional.pad(tensor, (0, 0, left, right)) for tensor in written)
        self.end += left

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "rows heads new d_key"],
        value_states: Float[Tensor, "rows heads new d_value"],
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.end + new > self.capacity:
            self.resize(0, new + ROOM)
        first = self.get_mask_sizes(new)[1]
        columns = slice(self.end, self.end + new)
        self.keys[:, :, columns], self.values[:, :, columns] = key_states, value_states
        self.end += new
        return self.keys[:, :, first : self.end], self.values[:, :, first : self.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = 0 if self.window is None else max(0, self.end - self.window + 1)
        return self.end + query_length - first, first

    def get_seq_length(self) -> int:
        return self.end

    def get_max_length(self) -> int:
        return -1
