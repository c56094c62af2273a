"""The sampling configuration; the commands' flags take their defaults from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """All settings of sampling; nothing is inherited from a model's own generation config.

    Attributes:
        num_generations: K, rollouts per question.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Probability mass that nucleus sampling keeps; 1 keeps all.
        top_k: Likeliest tokens that sampling keeps; 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in prompt or completion.
        max_new_tokens: Most completion tokens per rollout.
        seed: Seed of every random number.

    Raises:
        UserError: A value out of range.
    """

    num_generations: int = 8
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        check_config(self)
        for name, valid, expected in (
            ("num_generations", self.num_generations >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not valid:
                raise UserError(f"{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
