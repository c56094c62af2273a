"""Functions of a user's own, one of each kind, that tests name as ``tests.support.functions:NAME``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurosig.hallucination.scores import ScoreInputs
from neurosig.manifest import DemonstrationRecord
from neurosig.selection.choose import Candidate
from neurosig.selection.config import SelectionConfig
from neurosig.selection.contexts import ContextInputs

HERE = "tests.support.functions"


def spread(inputs: ScoreInputs) -> list[float]:
    """Standard deviation of the probe score over a question's rollouts."""
    return [float(row.std()) for row in inputs.rollout_probe]


def even(candidates: Sequence[Candidate], config: SelectionConfig) -> list[bool]:
    """Every other question."""
    return [place % 2 == 0 for place in range(len(candidates))]


def alike_in_length(inputs: ContextInputs) -> list[list[DemonstrationRecord]]:
    """The questions whose demonstrations cost the most similar number of tokens."""
    costs = torch.tensor([float(one.num_tokens) for one in inputs.pool])
    return inputs.rank(lambda block: -(torch.tensor([[float(one.num_tokens)] for one in block]) - costs).abs())


def squared(value: Tensor, w_out_norm: Tensor) -> Tensor:
    """The square of a neuron's magnitude."""
    return (value.float() * w_out_norm) ** 2


def strongest(score: Tensor, mask: Tensor, share: int) -> Tensor:
    """Neurons with the largest score at any token."""
    best = score.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    order = best.sort(dim=-1, descending=True, stable=True).indices[:, :share]
    return torch.zeros_like(best, dtype=torch.bool).scatter_(1, order, True)


def of_all_layers(member: Tensor, mean: Tensor, carried: Sequence[Tensor], set_size: int) -> Tensor:
    """The ten members with the largest means."""
    return member & (mean >= mean.masked_fill(~member, -torch.inf).topk(10, dim=1).values[:, -1:])


setattr(strongest, "over_layers", of_all_layers)  # noqa: B010


def failing(inputs: ScoreInputs) -> list[float]:
    raise KeyError("nothing there")


def too_few(inputs: ScoreInputs) -> list[float]:
    return [0.0]


def other_parameter(value: Tensor, gradient: Tensor) -> Tensor:
    return value * gradient


def strangers(inputs: ContextInputs) -> list[list[DemonstrationRecord]]:
    record = DemonstrationRecord(question_id="nobody", rollout_id=0, similarity=0.0)
    return [[record] for _ in inputs.students]
