"""AdamW and its learning rate at each step, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from distill.config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """AdamW with the options of ``config``."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)


def learning_rates(config: TrainConfig) -> Callable[[int], float]:
    """The learning rate of each step, counted from 1, by transformers' `get_scheduler`.

    Its schedules begin, and those that end do so, with a rate of 0: that is before the first step and after the last.
    """
    from transformers import get_scheduler

    unused = torch.optim.SGD([torch.zeros(())], lr=config.learning_rate)
    schedule = cast(LambdaLR, get_scheduler(config.lr_scheduler, unused, config.warmup_steps, config.steps + 1))
    share = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * share(step)
