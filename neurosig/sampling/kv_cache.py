"""A key-value cache for continuous batching: rows are replaced while the batch decodes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from neurosig.runtime.errors import UserError

ROOM = 32
"""Columns allocated in advance, so that a step writes in place and rarely copies."""
BLOCK = 128
"""With fixed shapes, columns are allocated in multiples of this number."""
GROWTH = 1.5
"""With fixed shapes, a full cache grows by this factor: attention reads every allocated column."""

Mask = Tensor | dict[str, Tensor | None] | None
"""What a model takes as ``attention_mask``; a dict has one mask per kind of layer, None masks nothing."""

_versions = itertools.count()


class RowCache(Cache):
    """Keys and values of rows that all end at the same column; a shorter row begins further right.

    The caller masks the columns before a row's beginning. Attention receives the written columns only, so the cost of a
    step depends on the current length of the rows, not on the largest possible one. After `fix` it receives all columns
    and each step has the same shapes and addresses, which a CUDA graph needs.

    Attributes:
        version: A number that is new whenever keys and values have moved to other addresses.

    Raises:
        UserError: The model has other layers than full, sliding and linear attention, or no attention.
    """

    def __init__(self, config: PreTrainedConfig):
        kinds = DynamicCache(config=config).layers
        for kind in kinds:
            if type(kind) not in (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer):
                raise UserError(
                    f"{config.model_type}: sampling supports full, sliding-window and linear attention, this model has "
                    f"a {type(kind).__name__}; sample elsewhere and pass the rollouts as a file"
                )
        layers: list[Any] = [
            _States(kind.number_of_states)
            if isinstance(kind, LinearAttentionLayer)
            else _Layer(getattr(kind, "sliding_window", None))
            for kind in kinds
        ]
        self._layers = [layer for layer in layers if isinstance(layer, _Layer)]
        self._states = [layer for layer in layers if isinstance(layer, _States)]
        if not self._layers:
            raise UserError(f"{config.model_type}: sampling needs a model with attention; pass the rollouts as a file")
        text = config.get_text_config()
        # without a limit of positions, or where it says so, a model derives ALiBi from the two-dimensional mask
        alibi = getattr(text, "alibi", False) or not getattr(text, "max_position_embeddings", None)
        self._takes_masks = not alibi and str(config._attn_implementation) in ("sdpa", "eager")
        self._column: Tensor | None = None
        self.version = next(_versions)
        super().__init__(layers=layers)

    @property
    def end(self) -> int:
        """Columns written."""
        return self._layers[0].end

    @property
    def fixed(self) -> bool:
        """Whether `fix` was called and succeeded."""
        return self._column is not None

    @property
    def full(self) -> bool:
        """Whether the next token needs a larger allocation."""
        return self._layers[0].end == self._layers[0].capacity

    def fix(self) -> bool:
        """Keep shapes and addresses from one token to the next; False if the model does not allow it."""
        devices = {layer.keys.device for layer in self._layers}
        if not self._takes_masks or len(devices) > 1:
            return False
        self._column = torch.zeros(1, dtype=torch.long, device=devices.pop())
        for layer in self._layers:
            layer.column = self._column
        self._reallocate(0)
        return True

    def positions(self, begins: Int[Tensor, " rows"]) -> Int[Tensor, "rows 1"]:
        """Positions of the next token of rows that begin at these columns."""
        return (self.end if self._column is None else self._column) - begins[:, None]

    def masks(self, begins: Int[Tensor, " rows"], *, padded: bool) -> Mask:
        """The masks of the next token, in the form that the attention adds: no layer has to convert it.

        Args:
            begins: First column of each row.
            padded: Whether any row begins after the first column.
        """
        if not self._takes_masks:
            return (torch.arange(self.end + 1, device=begins.device) >= begins[:, None]).long()
        windows = dict.fromkeys(layer.window for layer in self._layers)
        masks: dict[str, Tensor | None] = {
            "full_attention" if window is None else "sliding_attention": self._mask(window, begins, padded)
            for window in windows
        }
        if self._states:
            masks["linear_attention"] = None  # the next token of a row is no padding
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, window: int | None, begins: Tensor, padded: bool) -> Float[Tensor, "rows 1 1 columns"] | None:
        keys = self._layers[0].keys
        if self._column is not None:
            columns = torch.arange(keys.shape[2], device=begins.device)
            hidden = (columns < begins[:, None]) | (columns > self._column)
            if window is not None:
                hidden |= columns <= self._column - window
            width = keys.shape[2]
        else:
            first = 0 if window is None else max(0, self.end - window + 1)
            width = self.end + 1 - first
            if not padded and (window is None or width < window):
                return None  # as transformers skips it: the kernels without a mask are faster
            aligned = -(-width // 8) * 8  # CUDA's kernels copy a mask whose rows are not aligned, in every layer
            hidden = torch.arange(first, first + aligned, device=begins.device) < begins[:, None]
        mask = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None, :width]

    def begin_token(self) -> None:
        """With fixed shapes: tell the device the column of the next token."""
        if self._column is not None:
            self._column.fill_(self.end)

    def end_token(self) -> None:
        """With fixed shapes: count the token, which the device has written without a word to the host."""
        if self._column is not None:
            for layer in self._layers:
                layer.end += 1

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order and as often as they occur."""
        self.version = next(_versions)
        for layer in self._layers:
            layer.keep(rows)
        for states in self._states:
            states.keep(rows)

    def shift(self, columns: int) -> None:
        """Move every row to the right, or (negative) to the left, which drops the first columns."""
        if self._column is not None and self.end + columns + ROOM <= self._layers[0].capacity:
            for layer in self._layers:
                layer.move(columns)
        else:
            self._reallocate(columns)

    def put(self, slots: Int[Tensor, " slots"], other: RowCache, rows: Int[Tensor, " slots"]) -> None:
        """Overwrite ``slots`` with ``rows`` of a cache that is not longer, aligned at the last column."""
        for target, source in zip(self._layers, other._layers, strict=True):
            columns = slice(target.end - source.end, target.end)
            target.keys[slots, :, columns] = source.keys[rows, :, : source.end]
            target.values[slots, :, columns] = source.values[rows, :, : source.end]
        for states, others in zip(self._states, other._states, strict=True):
            states.put(slots, others, rows)

    def _reallocate(self, columns: int) -> None:
        end = self.end + columns
        wanted = end + ROOM if self._column is None else max(int(GROWTH * end), end + ROOM)
        capacity = wanted if self._column is None else -(-wanted // BLOCK) * BLOCK
        self.version = next(_versions)
        for layer in self._layers:
            layer.resize(columns, capacity - end)


class _States(LinearAttentionLayer):
    """The states of a layer of linear attention or convolution: they have no columns."""

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: state[rows] for index, state in states.items() if state is not None})

    def put(self, slots: Int[Tensor, " slots"], other: _States, rows: Int[Tensor, " slots"]) -> None:
        for states, others in (
            (self.conv_states, other.conv_states),
            (self.recurrent_states, other.recurrent_states),
        ):
            for index, state in states.items():
                new = others[index]
                if state is not None and new is not None:
                    state[slots] = new[rows]


class _Layer(CacheLayerMixin):
    keys: Tensor
    values: Tensor

    def __init__(self, window: int | None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.end = 0
        self.column: Tensor | None = None
        # views of the free columns, the next one last: cheaper than a slice at each token
        self._free: list[tuple[Tensor, Tensor]] = []

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        self._free.clear()
        self.keys, self.values = self.keys[rows], self.values[rows]

    def resize(self, left: int, right: int) -> None:
        self._free.clear()
        written = self.keys[:, :, : self.end], self.values[:, :, : self.end]
        self.keys, self.values = (torch.nn.functional.pad(tensor, (0, 0, left, right)) for tensor in written)
        self.end += left

    def move(self, columns: int) -> None:
        source = slice(max(0, -columns), self.end)
        target = slice(source.start + columns, self.end + columns)
        for tensor in (self.keys, self.values):
            tensor[:, :, target] = tensor[:, :, source].clone()
        self.end += columns

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
        if self.column is not None:
            self.keys.index_copy_(2, self.column, key_states)
            self.values.index_copy_(2, self.column, value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.end + new > self.capacity:
            self.resize(0, new + ROOM)
        first = self.get_mask_sizes(new)[1]
        keys, values = self._columns(new)
        keys.copy_(key_states)
        values.copy_(value_states)
        self.end += new
        return self.keys[:, :, first : self.end], self.values[:, :, first : self.end]

    def _columns(self, new: int) -> tuple[Tensor, Tensor]:
        if new > 1:
            return self.keys[:, :, self.end : self.end + new], self.values[:, :, self.end : self.end + new]
        if not self._free:
            free = (tensor[:, :, self.end :].split(1, dim=2) for tensor in (self.keys, self.values))
            self._free = list(zip(*free, strict=True))[::-1]
        return self._free.pop()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = 0 if self.window is None else max(0, self.end - self.window + 1)
        return self.end + query_length - first, first

    def get_seq_length(self) -> int:
        return self.end

    def get_max_length(self) -> int:
        return -1
