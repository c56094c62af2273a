"""One optimizer step: teacher and student read the same completions, and the student moves towards the teacher."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from distill.collapse import distinct_3
from distill.hidden import completion_hidden
from distill.losses import chunked_divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from distill.tasks import Task
    from distill.teacher import Teacher
    from neurosig.rollouts import Rollout


def learn(
    config: TrainConfig,
    model: PreTrainedModel,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[tuple[Task, Rollout]],
    left_out: Collection[tuple[str, int]] = (),
) -> dict[str, float]:
    """One optimizer step on a global batch.

    The loss is a weighted mean of the divergence: over all completion tokens that are in it, each with its question's
    weight (``token``), or over its rollouts, each with the mean of its tokens (``sequence``).

    Args:
        config: Loss, masking and batch options.
        model: The student.
        teacher: Where the target distribution comes from.
        optimizer: Holds the trained parameters.
        pairs: Every rollout of the step with its question's prompts.
        left_out: (question id, rollout id) of rollouts that are counted but not learned from.

    Returns:
        The step's metrics; divergence and entropies, in nats, are means over the tokens in the loss, unweighted.
    """
    kept = [
        (task, rollout)
        for task, rollout in pairs
        if (config.keep_truncated or rollout.finish_reason == "stop")
        and len(rollout.token_ids) > config.skip_first
        and (rollout.question_id, rollout.rollout_id) not in left_out
    ]
    lengths = [len(rollout.token_ids) - config.skip_first for _, rollout in kept]
    total = sum(lengths)
    shares = [
        task.weight * (1.0 if config.loss_mean == "token" else 1.0 / length)
        for (task, _), length in zip(kept, lengths, strict=True)
    ]
    mass = sum(share * length for share, length in zip(shares, lengths, strict=True))
    shares = [share / mass if mass else 0.0 for share in shares]
    sums = {
        "loss": 0.0,
        "divergence": 0.0,
        "teacher_entropy": 0.0,
        "student_entropy": 0.0,
        "clip_fraction": 0.0,
    }
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(kept), config.micro_batch_size):
        batch = kept[start : start + config.micro_batch_size]
        completions = [rollout.token_ids for _, rollout in batch]
        with teacher.active() as teacher_model:
            teacher_hidden = completion_hidden(teacher_model, [task.teacher_prompt for task, _ in batch], completions)
        student_hidden = completion_hidden(model, [task.student_prompt for task, _ in batch], completions)
        head = model.get_output_embeddings().weight
        token_ids = torch.tensor([token for ids in completions for token in ids], device=student_hidden.device)
        position = torch.cat([torch.arange(len(ids)) for ids in completions]).to(student_hidden.device)
        rows = torch.tensor([len(ids) for ids in completions], device=student_hidden.device)
        weight = torch.tensor(shares[start : start + len(batch)], device=rows.device).repeat_interleave(rows)
        output = chunked_divergence(
            student_hidden,
            teacher_hidden,
            head,
            head,
            divergence=config.divergence,
            beta=config.beta,
            temperature=config.loss_temperature,
            clip=config.clip,
            clip_value=config.clip_value,
            topk=config.topk,
            tail=config.tail,
            token_ids=token_ids if config.divergence == "sampled_token" else None,
            softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
            weights=(position >= config.skip_first) * weight,
        )
        output.loss.backward()
        share = sum(len(ids) - config.skip_first for ids in completions) / total
        sums["loss"] += float(output.loss.detach())
        sums["divergence"] += float(output.unclipped.sum()) / total
        sums["teacher_entropy"] += float(output.teacher_entropy.sum()) / total
        sums["student_entropy"] += float(output.student_entropy.sum()) / total
        sums["clip_fraction"] += float(output.clip_fraction) * share
    norm = 0.0
    if kept:
        norm = float(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.max_grad_norm))
        if math.isfinite(norm):
            optimizer.step()
    rollouts = [rollout for _, rollout in pairs]
    return {
        **sums,
        "entropy_gap": sums["student_entropy"] - sums["teacher_entropy"],
        "grad_norm": norm,
        "mean_length": sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts),
        "distinct_3": distinct_3([rollout.token_ids for rollout in rollouts]),
        "eos_rate": sum(rollout.finish_reason == "stop" for rollout in rollouts) / len(rollouts),
        "rollouts_in_loss": float(len(kept)),
        "tokens_in_loss": float(total),
        "rollouts": len(rollouts),
        "generated_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
        "teacher_tokens": sum(len(rollout.token_ids) for _, rollout in kept)
        + sum(map(len, {task.id: task.teacher_prompt for task, _ in kept}.values())),
    }
