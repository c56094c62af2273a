"""One optimizer step: teacher and student read the same completions, and the student moves towards the teacher."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from distill.completion_hidden import completion_hidden
from distill.distributed import ALONE, Ranks, whole_tensor
from distill.losses import chunked_divergence
from distill.stopping import distinct_3
from distill.student import TrainingForward
from distill.tasks import Task
from neurosig.runtime.cli import PhaseTimer
from neurosig.sampling.rollouts import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from distill.teacher import Teacher

_IDLE = Task("", (0,), (0,)), Rollout("", 0, "", (0,), "stop")
"""What a rank without work runs beside the others under FSDP2; of weight 0."""


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
) -> dict[str, float]:
    """One optimizer step on a global batch.

    The loss is a weighted mean of the divergence: over all completion tokens that are in it, each with its question's
    weight (``token``), or over its rollouts, each with the mean of its tokens (``sequence``). Each rank computes the
    part of it, and of its gradient, that belongs to its questions.

    Args:
        config: Loss, masking and batch options.
        model: The student.
        teacher: Where the target distribution comes from.
        optimizer: Holds the trained parameters.
        pairs: Every rollout of the step, the other ranks' too, with its question's prompts.
        forward: How the student's layers run; by default as they are.
        timer: Its phases ``teacher``, ``student`` and ``optimizer``.
        ranks: The processes at work.
        left_out: (question id, rollout id) of rollouts that are counted but not learned from.

    Returns:
        The step's metrics; divergence and entropies, in nats, are means over the tokens in the loss, unweighted and
        without those of replayed prompts, whose divergence stands apart.
    """
    forward = forward or TrainingForward(model)
    timer = timer or PhaseTimer()
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
    replayed = sum(length for (task, _), length in zip(kept, lengths, strict=True) if task.replay)
    sums = dict.fromkeys(("loss", "divergence", "teacher_entropy", "student_entropy", "clip_fraction"), 0.0)
    if any(task.replay for task, _ in pairs):
        sums["replay_divergence"] = 0.0
    owners = {question: index % ranks.world for index, question in enumerate(dict.fromkeys(t.id for t, _ in kept))}
    mine = [(pair, share) for pair, share in zip(kept, shares, strict=True) if owners[pair[0].id] == ranks.rank]
    rows = len(mine)
    if ranks.sharded and kept:  # all ranks run as many batches as the one with the most rows
        most = math.ceil(max(Counter(owners[task.id] for task, _ in kept).values()) / config.micro_batch_size)
        rows = max(rows, (most - 1) * config.micro_batch_size + 1)
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, rows, config.micro_batch_size):
        chosen = mine[start : start + config.micro_batch_size] or [(_IDLE, 0.0)]
        batch = [pair for pair, _ in chosen]
        completions = [rollout.token_ids for _, rollout in batch]
        with _phase(timer, "teacher"), teacher.active() as teacher_model:
            teacher_hidden = completion_hidden(teacher_model, [task.teacher_prompt for task, _ in batch], completions)
        with _phase(timer, "student"):
            prompts = [task.student_prompt for task, _ in batch]
            with forward.active():
                student_hidden = completion_hidden(model, prompts, completions, forward.share_prompts)
            head = model.get_output_embeddings().weight
            token_ids = torch.tensor([token for ids in completions for token in ids], device=student_hidden.device)
            position = torch.cat([torch.arange(len(ids)) for ids in completions]).to(student_hidden.device)
            length = torch.tensor([len(ids) for ids in completions], device=student_hidden.device)
            weight = torch.tensor([share for _, share in chosen], device=length.device).repeat_interleave(length)
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
            taught = torch.tensor([not task.replay for task, _ in batch], device=length.device).repeat_interleave(
                length
            )
            for name, values in (
                ("divergence", output.unclipped),
                ("teacher_entropy", output.teacher_entropy),
                ("student_entropy", output.student_entropy),
            ):
                sums[name] += float(values[taught].sum()) / max(1, total - replayed)
            if replayed:
                sums["replay_divergence"] += float(output.unclipped[~taught].sum()) / replayed
            sums["clip_fraction"] += float(output.clip_fraction) * share
    norm = 0.0
    with _phase(timer, "optimizer"):
        if kept:
            parameters = optimizer.param_groups[0]["params"]
            ranks.sum_gradients(parameters)
            norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
            if math.isfinite(norm):
                optimizer.step()
        teacher.update()
    for phase in ("teacher", "student", "optimizer"):
        timer.add_tokens(phase, total)
    parts = ranks.gather(sums)
    sums = {name: math.fsum(part[name] for part in parts) for name in sums}
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


@contextlib.contextmanager
def _phase(timer: PhaseTimer, name: str) -> Iterator[None]:
    """A phase of work that an accelerator may still be at when the block ends."""
    with timer.phase(name):
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
