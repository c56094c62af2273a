"""Options of the screen; the flags of ``neurosig.screen`` take their defaults from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from neurosig.runtime.shapes import AtLeast, check_config

PromptFeatures = Literal["neurons", "residual", "both"]


@dataclass(frozen=True, slots=True)
class ScreenProbeConfig:
    """How the probe is fitted.

    Attributes:
        features: What it reads at the prompt's last token, of one layer: ``neurons``, its FFN neurons' values;
            ``residual``, the residual stream after it; ``both``.
        groups: What the folds keep together: ``question``, or another column (`neurosig.hallucination.groups`).
        folds: Cross-fitting folds, and the folds inside each that choose layer and penalty.
        seed: Seed of the folds and of the bootstrap.
    """

    features: PromptFeatures = "neurons"
    groups: str = "question"
    folds: Annotated[int, AtLeast(2)] = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_config(self)
