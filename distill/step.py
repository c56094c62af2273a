"""One optimizer step: teacher and student read the same completions, and the student moves towards the teacher."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from distill.baselines.opsa import n_lowest, opsa_backward
from distill.distributed import ALONE, Ranks, whole_tensor
from distill.losses import Divergence, chunked_divergence, cut_share
from distill.metrics_log import rollout_metrics
from distill.student import TrainingForward, autocast
from distill.tasks import Task, is_in_loss
from neurosig.models.completion_hidden import completion_hidden, head_weight, logit_softcap
from neurosig.runtime.cli import PhaseTimer
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from distill.teacher import Teacher


class _Row(NamedTuple):
    """A rollout in the loss, and the weight of each of its tokens; the weights of all tokens sum to 1."""

    task: Task
    rollout: Rollout
    share: float


_IDLE = _Row(Task("", (0,), (0,)), Rollout("", 0, "", (0,), "stop", mean_logprob=0.0), 0.0)
"""Computed under FSDP2 by a rank without work, which must run as many batches as the others."""


def learn(
    config: TrainConfig,
    model: PreTrainedModel,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[tuple[Task, Rollout]],
    forward: TrainingForward | None = None,
    timer: PhaseTimer | None = None,
    ranks: Ranks = ALONE,
    left_out: Collection[tuple[str, int]] = (),
    prompt_opens_thought: bool = False,
) -> dict[str, float | None]:
    """One optimizer step on a global batch; without a rollout in the loss, neither student nor teacher is updated.

    The loss is a weighted mean of the divergence: over all completion tokens that are in it, each with its question's
    weight (``token``), or over its rollouts, each with the mean of its tokens (``sequence``); for OPSA see
    `distill.baselines.opsa`. Each rank computes the part of it, and of its gradient, that belongs to its questions.

    Args:
        config: Loss, masking and batch options.
        model: The student.
        teacher: Gives the target distribution; OPSA never runs it.
        optimizer: Holds the trained parameters.
        pairs: Every rollout of the step, the other ranks' too, with its question's prompts.
        forward: How the student's layers run; plainly by default.
        timer: Its phases ``teacher``, ``student`` and ``optimizer``.
        ranks: The processes of the run.
        left_out: (question id, rollout id) of rollouts that are counted but not learned from.
        prompt_opens_thought: The student's prompts end inside a thought, for the metrics.

    Returns:
        The step's metrics. Divergence and entropies, in nats, are unweighted means over the tokens in the loss, without
        those of replayed prompts, whose divergence is a metric of its own; ``None`` without any such token. Questions
        of weight 0 are in no metric. ``sampler_kl`` is the mean over the tokens in the loss of their log-probability
        when they were sampled minus the student's, an estimate of KL(sampler || student); ``None`` with
        ``skip_first`` or for rollouts without log-probabilities. OPSA has no divergence, teacher's entropy nor gap
        (``None``); its other means are over all tokens of the rollouts in the loss, but for ``lowest_logprob``, that of
        the chosen tokens, next to ``student_logprob`` of all.

    Raises:
        UserError: Every question has weight 0.
    """
    pairs = [(task, rollout) for task, rollout in pairs if task.weight]
    if not pairs:
        raise UserError("every question of the step has weight 0; leave such questions out")
    forward = forward or TrainingForward(model)
    timer = timer or PhaseTimer()
    rows = _rows_in_loss(config, pairs, left_out)
    counts = _token_counts(config, rows)
    total, taught = counts["loss"], counts["divergence"]
    counts |= {"replay_divergence": total - taught} if any(task.replay for task, _ in pairs) else {}
    sums = dict.fromkeys(counts, 0.0)
    optimizer.zero_grad(set_to_none=True)
    for batch in _micro_batches(config, rows, ranks):
        for name, value in _backward(config, model, teacher, batch, forward, timer, counts).items():
            sums[name] += value
    with timer.phase("optimizer", synchronize=True):
        norm = _update(config, teacher, optimizer, ranks) if rows else None
    for phase in ("student", "optimizer") if config.method == "opsa" else ("teacher", "student", "optimizer"):
        timer.add_tokens(phase, total)

    parts = ranks.gather(sums)
    sums = {name: math.fsum(part[name] for part in parts) for name in counts}
    means = {name: value if counts[name] else None for name, value in sums.items() if name != "unclipped_loss"}
    rollouts = [rollout for _, rollout in pairs]
    return {
        **means,
        "clip_fraction": cut_share(sums["loss"], sums["unclipped_loss"]) if total else None,
        "entropy_gap": sums["student_entropy"] - sums["teacher_entropy"] if taught else None,
        "grad_norm": norm,
        **rollout_metrics(rollouts, prompt_opens_thought),
        "rollouts_in_loss": float(len(rows)),
        "tokens_in_loss": float(total),
        "rollouts": len(rollouts),
        "generated_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        "teacher_tokens": 0 if config.method == "opsa" else _teacher_tokens(rows),
    }


def _rows_in_loss(
    config: TrainConfig, pairs: Sequence[tuple[Task, Rollout]], left_out: Collection[tuple[str, int]]
) -> list[_Row]:
    """The rollouts that are not masked, each with its share of the loss."""
    kept = [
        (task, rollout, _tokens_in_loss(config, rollout))
        for task, rollout in pairs
        if is_in_loss(config, rollout, left_out)
    ]
    over_tokens = config.loss_mean == "token" and config.method != "opsa"
    shares = [task.weight * (1.0 if over_tokens else 1.0 / length) for task, _, length in kept]
    mass = sum(share * length for share, (_, _, length) in zip(shares, kept, strict=True))
    return [_Row(task, rollout, share / mass) for (task, rollout, _), share in zip(kept, shares, strict=True)]


def _teacher_tokens(rows: Sequence[_Row]) -> int:
    """Tokens that the teacher reads: each prompt once, and the completions."""
    prompts = {row.task.id: row.task.teacher_prompt for row in rows}
    return sum(len(row.rollout.completion_ids) for row in rows) + sum(map(len, prompts.values()))


def _tokens_in_loss(config: TrainConfig, rollout: Rollout) -> int:
    read = len(rollout.completion_ids) - config.skip_first
    return n_lowest(read, config.opsa_share) if config.method == "opsa" else read


def _token_counts(config: TrainConfig, rows: Sequence[_Row]) -> dict[str, int]:
    """Tokens that each metric is a mean over."""
    total = sum(_tokens_in_loss(config, row.rollout) for row in rows)
    known = not config.skip_first and all(row.rollout.mean_logprob is not None for row in rows)
    counts = {"loss": total, "unclipped_loss": total, "sampler_kl": known * total}
    if config.method == "opsa":
        read = sum(len(row.rollout.completion_ids) - config.skip_first for row in rows)
        scores = {"student_entropy": read, "student_logprob": read, "lowest_logprob": total}
        return {**counts, "divergence": 0, "teacher_entropy": 0, **scores}
    taught = total - sum(_tokens_in_loss(config, row.rollout) for row in rows if row.task.replay)
    return {**counts, **dict.fromkeys(("divergence", "teacher_entropy", "student_entropy"), taught)}


def _update(config: TrainConfig, teacher: Teacher, optimizer: torch.optim.Optimizer, ranks: Ranks) -> float:
    """Update student and teacher by the gradients of all ranks; their norm before it is limited."""
    parameters = optimizer.param_groups[0]["params"]
    ranks.sum_gradients(parameters)
    norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
    if math.isfinite(norm):
        optimizer.step()
    teacher.update()
    return norm


def _micro_batches(config: TrainConfig, rows: Sequence[_Row], ranks: Ranks) -> list[list[_Row]]:
    """This rank's rows, questions with short rollouts first, so that little is padding; a question is on one rank."""
    longest: dict[str, int] = {}
    for row in rows:
        longest[row.task.id] = max(longest.get(row.task.id, 0), len(row.rollout.completion_ids))
    parts: list[list[list[_Row]]] = []
    for rank in range(ranks.world):
        questions = {*list(longest)[rank :: ranks.world]}
        own = sorted((row for row in rows if row.task.id in questions), key=lambda row: longest[row.task.id])
        parts.append([])
        for row in own:
            if parts[-1] and _fits(config, [*parts[-1][-1], row]):
                parts[-1][-1].append(row)
            else:
                parts[-1].append([row])
    most = max(map(len, parts)) if ranks.sharded else 0
    return parts[ranks.rank] + [[_IDLE]] * (most - len(parts[ranks.rank]))


def _fits(config: TrainConfig, batch: Sequence[_Row]) -> bool:
    """Whether the rows are one micro-batch, by their number and by the student's tokens with padding."""
    prompts = {row.task.id: len(row.task.student_prompt) for row in batch}
    tokens = len(prompts) * max(prompts.values()) + len(batch) * max(len(row.rollout.completion_ids) for row in batch)
    return len(batch) <= config.micro_batch_size and tokens <= (config.micro_batch_tokens or math.inf)


def _backward(
    config: TrainConfig,
    model: PreTrainedModel,
    teacher: Teacher,
    batch: Sequence[_Row],
    forward: TrainingForward,
    timer: PhaseTimer,
    counts: Mapping[str, int],
) -> dict[str, float]:
    """Accumulate the gradient of a micro-batch and return its part of the step's sums, by its `_token_counts`."""
    total, replayed = counts["loss"], counts["loss"] - counts["divergence"]
    if config.method == "opsa":
        return opsa_backward(config, model, batch, forward, timer, counts["student_entropy"], total)
    completions = [row.rollout.completion_ids for row in batch]
    with timer.phase("teacher", synchronize=True), teacher.active() as teacher_model, autocast(config, model):
        teacher_hidden = completion_hidden(teacher_model, [row.task.teacher_prompt for row in batch], completions)
    with timer.phase("student", synchronize=True):
        prompts = [row.task.student_prompt for row in batch]
        with forward.active(), autocast(config, model):
            student_hidden = completion_hidden(model, prompts, completions)
        heads = [head_weight(one) for one in (model, teacher_model)]
        rows, device = min(map(len, heads)), student_hidden.device  # one family may pad its heads differently
        token_ids = torch.tensor([token for ids in completions for token in ids], device=device)
        position = torch.cat([torch.arange(len(ids)) for ids in completions]).to(device)
        length = torch.tensor([len(ids) for ids in completions], device=device)
        weight = torch.tensor([row.share for row in batch], device=device).repeat_interleave(length)
        in_loss = position >= config.skip_first
        output = chunked_divergence(
            student_hidden,
            teacher_hidden,
            heads[0][:rows],
            heads[1][:rows],
            _divergence(config, model),
            token_ids=token_ids,
            weights=in_loss * weight,
        )
        output.loss.backward()
        taught = torch.tensor([not row.task.replay for row in batch], device=device).repeat_interleave(length)
        n = max(1, total - replayed)
        sampled = sum(len(row.rollout.completion_ids) * (row.rollout.mean_logprob or 0.0) for row in batch)
        sums = {
            "loss": float(output.loss.detach()),
            "divergence": float(output.unclipped[taught].sum()) / n,
            "teacher_entropy": float(output.teacher_entropy[taught].sum()) / n,
            "student_entropy": float(output.student_entropy[taught].sum()) / n,
            "unclipped_loss": float(output.unclipped_loss),
            "sampler_kl": (sampled - float(output.student_logprob.sum())) / max(1, total),
        }
        if replayed:
            sums["replay_divergence"] = float(output.unclipped[~taught].sum()) / replayed
    return sums


def _divergence(config: TrainConfig, model: PreTrainedModel) -> Divergence:
    return Divergence(
        name=config.divergence,
        beta=config.beta,
        temperature=config.loss_temperature,
        clip=config.clip,
        clip_value=config.clip_value,
        topk=config.topk,
        tail=config.tail,
        softcap=logit_softcap(model),
    )
