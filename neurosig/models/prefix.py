"""Padding, and the one forward pass over distinct prompts that sampling, tracing and training continue from."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prompts after their forward pass, from which completions continue.

    Attributes:
        cache: Keys and values, one row per prompt.
        mask: Cached positions with a prompt token.
        last_hidden: Hidden state of each prompt's last token, after the final norm: it predicts the first
            completion token.
    """

    cache: Cache
    mask: Bool[Tensor, "rows prefix"]
    last_hidden: Float[Tensor, "rows d_model"]

    def rows(self, index: Int[Tensor, " n"]) -> Prefix:
        """The rows ``index`` in this order, repeats included; this prefix is unchanged and gradients flow."""
        cache = copy.copy(self.cache)
        cache.layers = [_selected(layer, index) for layer in self.cache.layers]
        return Prefix(cache, self.mask[index], self.last_hidden[index])

    def inputs(self, completions: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Keyword arguments of the forward pass that continues each row with its completion, padded on the right."""
        device = self.mask.device
        ids, mask = pad(completions, side="right", device=device)
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([self.mask, mask], dim=1).long(),
            "position_ids": self.mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=device),
            "past_key_values": self.cache,
            "use_cache": True,
        }


def _selected(layer: Any, index: Int[Tensor, " n"]) -> Any:
    """A copy of a cache's layer with these rows; a layer of linear attention writes into its states in place."""
    layer = copy.copy(layer)
    if hasattr(layer, "conv_states"):
        vars(layer).update({name: copy.copy(value) for name, value in vars(layer).items() if isinstance(value, dict)})
        layer.reorder_cache(index)
    else:
        layer.batch_select_indices(index)
    return layer


def has_states(model: PreTrainedModel) -> bool:
    """Whether some of the model's layers keep a state (linear attention, convolutions) instead of keys and values."""
    return any(hasattr(layer, "conv_states") for layer in DynamicCache(config=model.config).layers)


def run_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Prefix:
    """Run prompts through a causal language model, without its head."""
    ids, mask = pad(prompts, side="left", device=model.device)
    cache = DynamicCache(config=model.config)
    hidden = model.base_model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return Prefix(cache, mask, hidden[:, -1])


class _OneLayer(Cache):
    """The cache of one layer, whatever its place."""

    @no_type_check  # checking types at run time would cut the compiled layer in two
    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self.layers[0].update(key_states, value_states, *args, **kwargs)


def on_a_copy(forward: Callable[..., Any], index: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder layer's forward pass that gives the same again, although it adds to a cache.

    It sees a cache of its own layer alone, with what was there before, and what it adds goes into the model's cache
    afterwards. So it can be recomputed, and compiled once for all layers.

    Args:
        forward: The layer's forward pass, or a compiled one.
        index: The layer's place in the cache.
        run: Calls what it gets as ``checkpoint`` does, at once and perhaps again in the backward pass.
    """

    def layer_forward(*args: Any, **kwargs: Any) -> Any:
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if not caches:
            return run(forward, *args, **kwargs)
        before, own = caches[0].layers[index], _OneLayer(layers=[])

        def again(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            own.layers = [copy.copy(before)]
            output = forward(*args, **kwargs)
            return output, own.layers.pop()

        args = tuple(own if value is caches[0] else value for value in args)
        kwargs = {name: own if value is caches[0] else value for name, value in kwargs.items()}
        output, caches[0].layers[index] = run(again, *args, **kwargs)
        return output

    return layer_forward


def max_positions(model: PreTrainedModel) -> int:
    """Longest sequence that the configuration allows; ``sys.maxsize`` where it names no limit, as ALiBi has none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def distinct_rows(prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct prompts in order of first use, and the index of each row's prompt among them."""
    place: dict[tuple[int, ...], int] = {}
    owners = [place.setdefault(prompt, len(place)) for prompt in prompts]
    return list(place), owners


def pad(
    sequences: Sequence[Sequence[int]], *, side: Literal["left", "right"], device: torch.device | str
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Token ids as one tensor, and the mask of positions with a token; padding has id 0."""
    width = max(map(len, sequences))
    fill = [[0] * (width - len(sequence)) for sequence in sequences]
    rows = [[*f, *s] if side == "left" else [*s, *f] for s, f in zip(sequences, fill, strict=True)]
    lengths = torch.tensor([[len(sequence)] for sequence in sequences], device=device)
    position = torch.arange(width, device=device)
    mask = position >= width - lengths if side == "left" else position < lengths
    return torch.tensor(rows, device=device), mask
