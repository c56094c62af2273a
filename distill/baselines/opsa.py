"""OPSA (arXiv 2608.31046), the control without a teacher: the student's own unlikely tokens are made less likely.

    python -m distill.train --method opsa --manifest runs/demo/manifest --out runs/demo/opsa

Of each rollout by itself, the fifth of its sampled tokens with the lowest log-probabilities is in the loss
(``--opsa-share``), ``-mean(A log p)``: a mean over the chosen tokens of each rollout, then over rollouts (equation 5).
Every advantage A is negative, so probability moves from the tokens that were drawn from the tail to those of the head.
No teacher is run. What a method with a teacher gains beyond this row is what its teacher's context taught.

The paper trains all weights; samples at temperature 1; gives positions of high entropy the larger advantages. It does
not say how the fifth is rounded, nor what happens to rollouts that were cut off: here the nearest whole number and at
least one token, and they leave the loss unless ``--keep-truncated`` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from distill.student import TrainingForward, autocast
from neurosig.models.completion_hidden import completion_hidden, head_logits
from neurosig.runtime.cli import PhaseTimer
from neurosig.runtime.shapes import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from distill.tasks import Task
    from neurosig.sampling.rollouts import Rollout

Advantage = Literal["adaptive", "centred", "fixed"]
CHUNK_TOKENS = 256
"""Tokens whose logits exist at once; memory and speed only."""


class OpsaOutput(NamedTuple):
    """What `opsa_loss` returns; everything but ``loss`` is detached.

    Attributes:
        loss: scalar, the sum over the chosen tokens of share times ``-A log p``, in nats.
        logprob: log-probability of each token, in nats, at temperature 1.
        entropy: entropy of the distribution that each token is drawn from, in nats, at temperature 1.
        chosen: whether each token is in the loss.
    """

    loss: Float[Tensor, ""]
    logprob: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    chosen: Bool[Tensor, " tokens"]


def n_lowest(tokens: int, share: float) -> int:
    """How many of a rollout's tokens are in the loss: the nearest whole number to their share, at least one."""
    return max(1, round(share * tokens)) if tokens > 0 else 0


def lowest(
    logprob: Float[Tensor, " tokens"], lengths: Sequence[int], *, share: float, skip_first: int = 0
) -> Bool[Tensor, " tokens"]:
    """Whether a token has one of the lowest log-probabilities of its rollout; of equal ones the earlier is taken.

    Args:
        logprob: log-probability of each token, rollout after rollout.
        lengths: tokens of each rollout.
        share: share of a rollout's tokens, above 0 and at most 1.
        skip_first: first tokens of each rollout that are never chosen nor counted.
    """
    chosen = torch.zeros_like(logprob, dtype=torch.bool)
    for own, marks in zip(logprob.split(list(lengths)), chosen.split(list(lengths)), strict=True):
        order = own[skip_first:].argsort(stable=True) + skip_first
        marks[order[: n_lowest(len(own) - skip_first, share)]] = True
    return chosen


def advantages(entropy: Float[Tensor, " tokens"], name: Advantage = "adaptive") -> Float[Tensor, " tokens"]:
    """The advantage of each chosen token of one rollout.

    With r from -1 at the lowest to 1 at the highest of these entropies (0 for all where they are equal): ``adaptive``
    is ``-3/4 - r/4``, from -1/2 to -1, the paper's method (equation 5); ``centred`` is ``-1/2 - r/4``, its ablation
    (equation 4); ``fixed`` is -1/2.

    Raises:
        UserError: The name is unknown.
    """
    check_choice("opsa_advantage", name, Advantage)
    fixed = torch.full_like(entropy, -0.5)
    if name == "fixed" or not len(entropy):
        return fixed
    low, high = entropy.aminmax()
    r = torch.where(high > low, 2 * (entropy - low) / (high - low) - 1, torch.zeros_like(entropy))
    return (fixed if name == "centred" else fixed - 0.25) - r / 4


@torch.no_grad()
def token_scores(
    model: PreTrainedModel, hidden: Float[Tensor, "tokens d_head"], token_ids: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-probability of each token and entropy of the distribution that it is drawn from, in nats, at temperature 1.

    Args:
        model: Gives the head.
        hidden: `neurosig.models.completion_hidden.completion_hidden` of the tokens.
        token_ids: the tokens.
    """
    logprob, entropy = [], []
    for part, ids in zip(hidden.split(CHUNK_TOKENS), token_ids.split(CHUNK_TOKENS), strict=True):
        log_p = head_logits(model, part).log_softmax(-1)
        logprob.append(log_p.gather(1, ids[:, None])[:, 0])
        entropy.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprob), torch.cat(entropy)


def opsa_loss(
    model: PreTrainedModel,
    hidden: Float[Tensor, "tokens d_head"],
    token_ids: Int[Tensor, " tokens"],
    lengths: Sequence[int],
    shares: Sequence[float],
    *,
    share: float = 0.2,
    advantage: Advantage = "adaptive",
    skip_first: int = 0,
) -> OpsaOutput:
    """The loss of whole rollouts; its gradient reaches ``hidden`` and is computed a few rows of logits at a time.

    Args:
        model: Gives the head.
        hidden: `neurosig.models.completion_hidden.completion_hidden` of the tokens, rollout after rollout.
        token_ids: the sampled tokens.
        lengths: tokens of each rollout.
        shares: weight in the loss of each chosen token of a rollout; they sum to 1 over the chosen tokens of a step.
        share: share of a rollout's tokens that is chosen.
        advantage: see `advantages`.
        skip_first: first tokens of each rollout to leave out.

    Raises:
        UserError: The advantage is unknown.
    """
    logprob, entropy = token_scores(model, hidden, token_ids)
    chosen = lowest(logprob, lengths, share=share, skip_first=skip_first)
    parts = zip(entropy.split(list(lengths)), chosen.split(list(lengths)), shares, strict=True)
    weights = torch.cat([own_share * advantages(own[marks], advantage) for own, marks, own_share in parts])
    kept = chosen.nonzero().squeeze(1)

    def surprise(part: Tensor, ids: Tensor) -> Tensor:
        return cross_entropy(head_logits(model, part), ids, reduction="none")

    chunks = zip(hidden[kept].split(CHUNK_TOKENS), token_ids[kept].split(CHUNK_TOKENS), strict=True)
    surprises = [checkpoint(surprise, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return OpsaOutput(torch.dot(weights, torch.cat(surprises)), logprob, entropy, chosen)


def opsa_backward(
    config: TrainConfig,
    model: PreTrainedModel,
    batch: Sequence[tuple[Task, Rollout, float]],
    forward: TrainingForward,
    timer: PhaseTimer,
    read: int,
    total: int,
) -> dict[str, float]:
    """Accumulate the gradient of a micro-batch and return its part of the step's sums.

    The batch has tasks, rollouts and the shares of `opsa_loss`. Of the ``read`` tokens of the whole step's rollouts,
    without those skipped, ``total`` are in the loss.
    """
    tasks, rollouts, shares = zip(*batch, strict=True)
    completions = [rollout.completion_ids for rollout in rollouts]
    with timer.phase("student", synchronize=True):
        with forward.active(), autocast(config, model):
            hidden = completion_hidden(model, [task.student_prompt for task in tasks], completions)
        output = opsa_loss(
            model,
            hidden,
            torch.tensor([token for ids in completions for token in ids], device=hidden.device),
            [len(ids) for ids in completions],
            shares,
            share=config.opsa_share,
            advantage=config.opsa_advantage,
            skip_first=config.skip_first,
        )
        output.loss.backward()
        # a row of share 0 is a rank's without work, under FSDP2
        skipped = [config.skip_first if share else len(ids) for ids, share in zip(completions, shares, strict=True)]
        marks = [place >= first for ids, first in zip(completions, skipped, strict=True) for place in range(len(ids))]
        scored, loss = torch.tensor(marks, device=hidden.device), float(output.loss.detach())
        sampled = sum(len(rollout.completion_ids) * (rollout.mean_logprob or 0.0) for rollout in rollouts)
        return {
            "loss": loss,
            "unclipped_loss": loss,
            "sampler_kl": (sampled - float(output.logprob[scored].sum())) / max(1, read),
            "divergence": 0.0,
            "teacher_entropy": 0.0,
            "student_entropy": float(output.entropy[scored].sum()) / max(1, read),
            "student_logprob": float(output.logprob[scored].sum()) / max(1, read),
            "lowest_logprob": float(output.logprob[output.chosen & scored].sum()) / max(1, total),
        }
