"""Last hidden states of completions, every distinct prompt computed once, and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.models.load import logit_softcap
from neurosig.models.prefix import distinct_rows, run_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def completion_hidden(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]
) -> Float[Tensor, "tokens d_model"]:
    """Hidden states, after the final norm, at the positions that predict each completion token.

    A few-shot prefix is computed once per question instead of once per rollout; gradients flow through it. The rows are
    concatenated, each as long as its completion. Every call makes two forward passes, so that ranks stay in step.

    Args:
        model: Causal language model; its head is not computed.
        prompts: Prompt ids of each row.
        completions: Completion ids of each row, at least one.
    """
    distinct, owners = distinct_rows(prompts)
    prefix = run_prompts(model, distinct).rows(torch.tensor(owners, device=model.device))
    shown = [completion[:-1] or completion for completion in completions]
    rest = model.base_model(**prefix.inputs(shown)).last_hidden_state
    hidden = torch.cat([prefix.last_hidden[:, None], rest], dim=1)
    lengths = torch.tensor([[len(completion)] for completion in completions], device=model.device)
    return hidden[torch.arange(hidden.shape[1], device=hidden.device) < lengths]


def head_logits(model: PreTrainedModel, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocab"]:
    """Float32 logits of hidden states, after the model's softcap if it has one."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = logit_softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)
