"""Last hidden states of completions, every distinct prompt computed once, and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neurosig.models.load import logit_softcap
from neurosig.models.prefix import distinct_rows, has_states, pad, run_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def completion_hidden(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Sequence[int]],
    share_prompts: bool = True,
) -> Float[Tensor, "tokens d_head"]:
    """Hidden states, after the final norm, at the positions that predict each completion token, as `head_weight`
    takes them.

    A few-shot prefix is computed once per question instead of once per rollout; gradients flow through it. The rows are
    concatenated, each as long as its completion. Every call makes two forward passes, or one without sharing, so that
    ranks stay in step.

    Args:
        model: Causal language model; its head is not computed.
        prompts: Prompt ids of each row.
        completions: Completion ids of each row, at least one.
        share_prompts: Off where a KV cache is not possible; each row then contains its prompt. So it is for a model
            with linear attention, whose state is overwritten in place, while gradients are recorded.
    """
    lengths = torch.tensor([[len(completion)] for completion in completions], device=model.device)
    if share_prompts and not (torch.is_grad_enabled() and has_states(model)):
        distinct, owners = distinct_rows(prompts)
        prefix = run_prompts(model, distinct).rows(torch.tensor(owners, device=model.device))
        shown = [completion[:-1] or completion for completion in completions]
        rest = model.base_model(**prefix.inputs(shown)).last_hidden_state
        hidden = torch.cat([prefix.last_hidden[:, None], rest], dim=1)
        first = torch.zeros_like(lengths)
    else:
        rows = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
        ids, mask = pad(rows, side="right", device=model.device)
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        first = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=model.device)
    position = torch.arange(hidden.shape[1], device=hidden.device)
    hidden = hidden[(position >= first) & (position < first + lengths)] * logit_scale(model)
    return hidden if model.get_output_embeddings().bias is None else nn.functional.pad(hidden, (0, 1), value=1)


def head_weight(model: PreTrainedModel) -> Float[Tensor, "vocab d_head"]:
    """What gives the logits, before a softcap, of `completion_hidden`: the head's weight, its bias as last column."""
    head = model.get_output_embeddings()
    return head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)


def logit_scale(model: PreTrainedModel) -> float:
    """By what the head's logits are multiplied: ``logit_scale`` of Cohere's configuration, ``1 / logits_scaling`` of
    Granite's."""
    config = model.config.get_text_config()
    return float(getattr(config, "logit_scale", 1) or 1) / float(getattr(config, "logits_scaling", 1) or 1)


def head_logits(model: PreTrainedModel, hidden: Float[Tensor, "tokens d_head"]) -> Float[Tensor, "tokens vocab"]:
    """Float32 logits of `completion_hidden`, after the model's softcap if it has one."""
    logits = nn.functional.linear(hidden, head_weight(model)).float()
    cap = logit_softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)
