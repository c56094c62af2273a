"""Last hidden states of completions, every distinct prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.batching import distinct_rows, run_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def completion_hidden(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]
) -> Float[Tensor, "tokens d_model"]:
    """Hidden states, after the final norm, at the positions that predict each completion token.

    A few-shot prefix costs once a question instead of once a rollout; gradients flow through it. Rows follow one
    another, each as long as its completion.

    Args:
        model: Causal language model; its head is not computed.
        prompts: Prompt ids of each row.
        completions: Completion ids of each row, at least one.
    """
    distinct, owners = distinct_rows(prompts)
    prefix = run_prompts(model, distinct).rows(torch.tensor(owners, device=model.device))
    hidden = prefix.last_hidden[:, None]
    width = max(map(len, completions))
    if width > 1:
        shown = [completion[:-1] for completion in completions]
        rest = model.base_model(**prefix.inputs(shown)).last_hidden_state
        hidden = torch.cat([hidden, rest], dim=1)
    lengths = torch.tensor([[len(completion)] for completion in completions], device=hidden.device)
    return hidden[torch.arange(width, device=hidden.device) < lengths]
