"""Last hidden states of completions, every distinct prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def completion_hidden(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]
) -> Float[Tensor, "tokens d_model"]:
    """Hidden states, after the final norm, at the positions that predict each completion token.

    Rows of one prompt share its keys and values, so a few-shot prefix costs once a question instead of once a
    rollout; gradients flow through them. Rows follow one another, each as long as its completion.

    Args:
        model: Causal language model; its head is not computed.
        prompts: Prompt ids of each row.
        completions: Completion ids of each row, at least one.
    """
    from transformers import DynamicCache

    device = model.device
    distinct = list(dict.fromkeys(prompts))
    owner = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
    prompt_ids, prompt_mask = _pad(distinct, device, left=True)
    cache = DynamicCache(config=model.config)
    prefix = model.base_model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=(prompt_mask.long().cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    hidden = prefix[owner, -1:]
    width = max(map(len, completions))
    if width > 1:
        cache.batch_select_indices(owner)
        shown, shown_mask = _pad([completion[:-1] for completion in completions], device)
        offset = prompt_mask.sum(-1, keepdim=True)[owner]
        rest = model.base_model(
            input_ids=shown,
            attention_mask=torch.cat([prompt_mask[owner], shown_mask], dim=1).long(),
            position_ids=offset + torch.arange(width - 1, device=device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        hidden = torch.cat([hidden, rest], dim=1)
    lengths = torch.tensor([[len(completion)] for completion in completions], device=device)
    return hidden[torch.arange(width, device=device) < lengths]


def _pad(
    sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Sequences as one tensor, and which positions hold a token; the others are masked, so any id serves."""
    width = max(map(len, sequences))
    fill = [[0] * (width - len(sequence)) for sequence in sequences]
    ids = [[*f, *s] if left else [*s, *f] for s, f in zip(sequences, fill, strict=True)]
    lengths = torch.tensor([[len(sequence)] for sequence in sequences], device=device)
    position = torch.arange(width, device=device)
    return torch.tensor(ids, device=device), position >= width - lengths if left else position < lengths
