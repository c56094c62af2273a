"""Random prompts and what a model samples after them."""

from __future__ import annotations

from typing import Any

import torch

from neurosig.models.load import LoadedModel
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from tests.support.tiny import VOCAB_SIZE


def prompts(lengths: tuple[int, ...] = (5, 12, 9, 12, 3)) -> list[Prompt]:
    """Prompts of these lengths in random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(f"q{index}", tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()))
        for index, n in enumerate(lengths)
    ]


def draw(model: LoadedModel, prompts: list[Prompt], **options: Any) -> dict[str, list[Rollout]]:
    """The rollouts of each question id."""
    extra = {key: options.pop(key) for key in ("batch_rows", "compile_decoding", "salt", "done") if key in options}
    config = SamplingConfig(**{"num_generations": 4, "temperature": 1.0, "max_new_tokens": 10, **options})
    return {group[0].question_id: group for group in sample(model, prompts, config, **extra)}


def tokens(groups: dict[str, list[Rollout]]) -> dict[str, list[tuple[int, ...]]]:
    """The token ids of each rollout."""
    return {name: [rollout.completion_ids for rollout in group] for name, group in groups.items()}
