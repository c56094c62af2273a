"""Last hidden states of completions, every distinct prompt computed once, and their logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neurosig.models.prefix import Prefix, distinct_rows, has_states, pad, run_prompts
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE_TOLERANCE = 0.05
"""Largest share by which rounding to bfloat16 moves logits."""

HEAD_ROWS = 256
"""Positions whose logits are computed at once."""
_SCALES: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


def completion_hidden(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Sequence[int]],
    prefix: Prefix | None = None,
) -> Float[Tensor, "tokens d_head"]:
    """Hidden states, after the final norm, at the positions that predict each completion token, as `head_weight`
    takes them.

    A few-shot prefix is computed once per question instead of once per rollout; gradients flow through it. The rows are
    concatenated, each as long as its completion. Every call makes two forward passes, so that
    ranks stay in step; with linear attention and gradients one, where each row contains its prompt.

    Args:
        model: Causal language model; its head is not computed.
        prompts: Prompt ids of each row.
        completions: Completion ids of each row, at least one.
        prefix: Of the distinct prompts, in order of first use, if they were run before.
    """
    lengths = torch.tensor([[len(completion)] for completion in completions], device=model.device)
    if torch.is_grad_enabled() and has_states(model):  # linear attention overwrites its state in place
        rows = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
        ids, mask = pad(rows, side="right", device=model.device)
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        first = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=model.device)
    else:
        distinct, owners = distinct_rows(prompts)
        prefix = run_prompts(model, distinct) if prefix is None else prefix
        prefix = prefix.rows(torch.tensor(owners, device=model.device))
        shown = [completion[:-1] or completion for completion in completions]
        rest = model.base_model(**prefix.inputs(shown)).last_hidden_state
        hidden = torch.cat([prefix.last_hidden[:, None], rest], dim=1)
        first = torch.zeros_like(lengths)
    position = torch.arange(hidden.shape[1], device=hidden.device)
    return for_head(model, hidden[(position >= first) & (position < first + lengths)])


def for_head(model: PreTrainedModel, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_head"]:
    """Hidden states after the final norm as `head_weight` and `head_logits` take them."""
    hidden = hidden * logit_scale(model)
    return hidden if model.get_output_embeddings().bias is None else nn.functional.pad(hidden, (0, 1), value=1)


@torch.inference_mode()
def completion_entropies(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Sequence[int]],
    prefix: Prefix | None = None,
) -> list[float]:
    """Mean next-token entropy along each completion at temperature 1, in nats.

    Args:
        model: Causal language model.
        prompts: Prompt ids of each row.
        completions: Completion ids of each row, at least one.
        prefix: See `completion_hidden`.
    """
    hidden = completion_hidden(model, prompts, completions, prefix)
    parts = []
    for block in hidden.split(HEAD_ROWS):
        log_p = head_logits(model, block).log_softmax(-1)
        parts.append(-(log_p.exp() * log_p).sum(-1).cpu())
    return [float(part.mean()) for part in torch.cat(parts).split([len(ids) for ids in completions])]


def head_weight(model: PreTrainedModel) -> Float[Tensor, "vocab d_head"]:
    """What gives the logits, before a softcap, of `completion_hidden`: the head's weight, its bias as last column."""
    head = model.get_output_embeddings()
    return head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)


def logit_softcap(model: PreTrainedModel) -> float | None:
    """``final_logit_softcapping`` of Gemma's configuration: the head's logits are ``cap * tanh(logits / cap)``."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def logit_scale(model: PreTrainedModel) -> float:
    """By what the model multiplies its head's output, as Cohere's ``logit_scale`` or one over Granite's
    ``logits_scaling``: some divide by that number, others multiply, so a few tokens are run, once per model.

    Raises:
        UserError: None of the numbers of its configuration explains its logits.
    """
    config = model.config.get_text_config()
    numbers = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    named = {float(number) for number in numbers if isinstance(number, int | float) and number not in (0, 1)}
    if named and model not in _SCALES:
        _SCALES[model] = _measured_scale(model, {1.0, *named, *(1 / number for number in named)})
    return _SCALES.get(model, 1.0)


@torch.no_grad()
def _measured_scale(model: PreTrainedModel, scales: Collection[float]) -> float:
    ids = torch.arange(1, 6, device=model.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    raw = model.get_output_embeddings()(hidden).float()
    errors = {scale: float((_capped(model, raw * scale) - logits).norm() / logits.norm()) for scale in scales}
    best = min(errors, key=lambda scale: errors[scale])
    if not errors[best] <= SCALE_TOLERANCE:
        raise UserError(
            f"model type {model.config.model_type!r}: its logits are not its head's output times a number of its "
            "configuration; learning and scoring need that"
        )
    return best


def _capped(model: PreTrainedModel, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    cap = logit_softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def head_logits(model: PreTrainedModel, hidden: Float[Tensor, "tokens d_head"]) -> Float[Tensor, "tokens vocab"]:
    """Float32 logits of `completion_hidden`, after the model's softcap if it has one."""
    return _capped(model, nn.functional.linear(hidden, head_weight(model)).float())
