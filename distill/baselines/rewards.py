"""Rewards of a model's own rollouts without a label, and the rollouts that TRL's GRPO trains on.

LMSI (arXiv 2210.11610) keeps the rollouts that give the majority's answer, TTRL (arXiv 2504.16084) rewards them,
Intuitor (arXiv 2505.19590) rewards certainty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.metrics_log import rollout_metrics
from distill.student import sampling_weights
from distill.tasks import keep_rollouts
from neurosig.manifest import Manifest
from neurosig.models.completion_hidden import completion_hidden, head_logits
from neurosig.questions.reader import Reading
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from neurosig.models.load import LoadedModel
    from neurosig.runtime.cli import PhaseTimer


def vote_rewards(reading: Reading) -> list[float]:
    """TTRL's reward of each rollout of one question: 1 if the answer it votes for is the majority's, else 0.

    The vote needs all answers, also those of rollouts that another process trains on. A non-answer never wins, so a
    group without any answer gets no reward.
    """
    return [float(answer is not None and answer == reading.vote.winner) for answer in reading.answers]


def consistent_rollouts(manifest: Manifest, question_ids: Sequence[str], *, keep_truncated: bool) -> list[Rollout]:
    """LMSI's examples: every rollout of these questions whose answer is the majority's, whatever its reasoning.

    Raises:
        UserError: There is none.
    """
    rows = {row.question_id: row for row in manifest.rows}
    found = [
        rollout
        for name in question_ids
        for index, answer in enumerate(rows[name].answers)
        if answer is not None
        and answer == rows[name].pseudo_label
        and (rollout := manifest.rollouts.get((name, index))) is not None
        and (keep_truncated or rollout.finish_reason == "stop")
    ]
    if not found:
        raise UserError(
            f"manifest {manifest.folder}: no finished rollout gives its question's majority answer; raise "
            "--max-new-tokens at export, or give --keep-truncated"
        )
    return found


@torch.no_grad()
def self_certainty(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Sequence[int]],
    *,
    chunk_tokens: int = 512,
) -> Float[Tensor, " rows"]:
    """Intuitor's reward of each completion: the mean over its tokens of KL(U || p), in nats, at temperature 1.

    p is the distribution the token was drawn from, at the position *before* it; the public open-r1 port of Intuitor
    reads the one after. The sampler records the same number (`neurosig.sampling.rollouts.Rollout.mean_self_certainty`);
    this one is of the model in training.

    Args:
        model: Causal language model.
        prompts: Prompt ids of each row.
        completions: Completion ids of each row, at least one.
        chunk_tokens: Positions whose logits are computed at once.
    """
    hidden = completion_hidden(model, prompts, completions)
    divergences = []
    for part in hidden.split(chunk_tokens):
        logits = head_logits(model, part)
        divergences.append(logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1]))
    rows = torch.cat(divergences).split([len(ids) for ids in completions])
    return torch.stack([row.mean() for row in rows])


@dataclass(frozen=True, slots=True)
class _Scored:
    rollout: Rollout
    reward: float
    mask: list[int]


class Rollouts:
    """TRL's rollout function: our sampler, and the rewards.

    Each process samples whole questions and rewards their rollouts, with all votes at hand; then all processes exchange
    them, and each trains on its share of the rows, which may be half a group.
    """

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        loaded: LoadedModel,
        model: PreTrainedModel,
        adapter: PeftModel | None,
        sampling: SamplingConfig,
        prompts: Mapping[str, tuple[int, ...]],
        plan: Sequence[Sequence[str]],
        done: int,
        timer: PhaseTimer,
    ):
        self.config, self.loaded, self.model, self.adapter = config, loaded, model, adapter
        self.prompts, self.timer, self.done = prompts, timer, done
        self.sampling = replace(sampling, num_generations=config.vote_generations or config.num_generations)
        self.manifest, self.reader = manifest, manifest.header.answer_reader()
        self.questions = {row.question_id: row.as_question() for row in manifest.rows}
        self.plan = plan
        self._metrics: dict[str, float | int] = {}

    def metrics(self, step: int) -> dict[str, float | int]:
        return self._metrics

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Rollouts of the rows of this process.

        Args:
            prompts: The question id of each row.
            trainer: Gives the step and the process.

        Returns:
            TRL's fields, with ``reward``, and in ``env_mask`` which completion tokens are learned.
        """
        from accelerate.utils import gather_object

        step = self.done + trainer.state.global_step + 1
        names, accelerator = self.plan[step - 1], trainer.accelerator
        training = self.model.training
        self.model.eval()
        with self.timer.phase("sample"):
            own = self._sample(names[accelerator.process_index :: accelerator.num_processes], step)
        self.model.train(training)
        groups = {group[0].rollout.question_id: group for group in gather_object(own)}
        kept = [scored for name in names for scored in groups[name][: self.config.num_generations]]
        self._metrics = self._count(kept, [scored.rollout for group in groups.values() for scored in group])
        if accelerator.is_main_process:
            sampled = [scored.rollout for name in names for scored in groups[name]]
            voting = {(r.question_id, r.rollout_id) for r in sampled if r.rollout_id >= self.config.num_generations}
            keep_rollouts(self.config, self.manifest, step, sampled, voting)
        first = accelerator.process_index * len(prompts)
        rows = kept[first : first + len(prompts)]
        assert [scored.rollout.question_id for scored in rows] == list(prompts)
        return {
            "prompt_ids": [list(self.prompts[name]) for name in prompts],
            # of a rollout that is not learned from, one token: TRL pads all rows to the longest
            "completion_ids": [list(s.rollout.completion_ids[: None if any(s.mask) else 1]) for s in rows],
            "logprobs": None,
            "reward": [scored.reward for scored in rows],
            "env_mask": [scored.mask if any(scored.mask) else [0] for scored in rows],
        }

    def _sample(self, names: Sequence[str], step: int) -> list[list[_Scored]]:
        batch = [Prompt(name, self.prompts[name]) for name in names]
        options: dict[str, Any] = {"batch_rows": self.config.batch_rows, "salt": f"step{step}"}
        options["compile_decoding"] = self.config.compile_decoding
        with sampling_weights(self.model, self.adapter) as weight_of:
            groups = list(sample(self.loaded, batch, self.sampling, weight_of=weight_of, **options))
        self.timer.add_tokens("sample", sum(len(rollout.completion_ids) for group in groups for rollout in group))
        scored = []
        for group, rewards in zip(groups, self._rewards(groups), strict=True):
            scored.append([_Scored(r, reward, self._mask(r)) for r, reward in zip(group, rewards, strict=True)])
        return scored

    def _rewards(self, groups: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        if self.config.method == "ttrl":
            return [vote_rewards(self.reader.read(group, self.questions[group[0].question_id])) for group in groups]
        rewards: list[float] = []
        rollouts = [rollout for group in groups for rollout in group]
        for start in range(0, len(rollouts), self.config.micro_batch_size):
            part = rollouts[start : start + self.config.micro_batch_size]
            certainty = self_certainty(
                self.model, [self.prompts[r.question_id] for r in part], [r.completion_ids for r in part]
            )
            rewards += certainty.tolist()
        size = self.sampling.num_generations
        return [rewards[start : start + size] for start in range(0, len(rewards), size)]

    def _mask(self, rollout: Rollout) -> list[int]:
        kept = self.config.keep_truncated or rollout.finish_reason == "stop"
        return [int(kept and position >= self.config.skip_first) for position in range(len(rollout.completion_ids))]

    def _count(self, kept: Sequence[_Scored], sampled: Sequence[Rollout]) -> dict[str, float | int]:
        read = sum(
            len(self.prompts[s.rollout.question_id]) + (len(s.rollout.completion_ids) if any(s.mask) else 1)
            for s in kept
        )
        return {
            **rollout_metrics([scored.rollout for scored in kept], self.reader.prompt_opens_thought),
            "rollouts_in_loss": sum(any(scored.mask) for scored in kept),
            "tokens_in_loss": sum(sum(scored.mask) for scored in kept),
            "rollouts": len(sampled),
            "generated_tokens": sum(len(rollout.completion_ids) for rollout in sampled),
            "teacher_tokens": read,
        }
