"""What the signal search tries and on what, written down before it ran: variants, tasks and the rule of the default.

Questions that choose a variant never confirm it: the search sees geography and language (training splits, and
geography's test split), the confirmation chemistry and language's test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from neurosig.runtime.shapes import check_config

POSITIONS = ("answer", "statement", "answer_words", "answer_start", "0:3", "prompt_end")
Labels = Literal["agreement", "contrast", "shuffled", "gold"]
Values = Literal["contribution", "layer_z", "signed_z"]
Stage = Literal["search", "confirmation"]
Reach = Literal["unseen kinds", "unseen questions", "other domain"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One reading of the rollouts' neurons and the labels of its probe.

    Attributes:
        positions: One of `POSITIONS`, or ``hidden`` states.
        labels: See `neurosig.hallucination.probe.rollout_labels`; ``shuffled``: agreement in random order; ``gold``:
            wrong against right rollouts.
        values: See `neurosig.hallucination.probe.probe_matrix`; ``signed_z``: `figures.experiments.search_features`.
        role: ``default``, that of the export; ``tried`` counts in the corrections, ``control`` does not.
    """

    positions: str
    labels: Labels = "agreement"
    values: Values = "contribution"
    role: Literal["default", "tried", "control"] = "tried"

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def name(self) -> str:
        """Label in tables and figure."""
        return f"{self.positions}, {self.labels}, {self.values}".replace("_", " ")


@dataclass(frozen=True, slots=True)
class Task:
    """Where probes are fitted and judged.

    Attributes:
        stage: Whether it chooses variants or confirms them.
        fitted: Exports whose rollouts the probes are fitted on.
        judged: The export that they are judged on; where it is also fitted on, one kind of question at a time is left
            out of the fit and judged.
        reach: What of the judged questions no fit has seen.
    """

    stage: Stage
    fitted: tuple[str, ...]
    judged: str
    reach: Reach

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def name(self) -> str:
        """Label in tables and figure."""
        return f"{' + '.join(self.fitted)} to {self.judged}" if self.judged not in self.fitted else self.judged


LEARNED: tuple[Labels, ...] = ("agreement", "contrast")
DEFAULT = Variant("answer", role="default")
VARIANTS = (
    DEFAULT,
    *(
        Variant(positions, labels, values)
        for labels, positions, values in product(LEARNED, POSITIONS, get_args(Values))
        # within a question the prompt's end is the same for all rollouts, so there is nothing to contrast
        if (labels, positions) != ("contrast", "prompt_end")
        and (positions, labels, values) != ("answer", "agreement", "contribution")
    ),
    Variant("answer", "shuffled", role="control"),
    Variant("hidden", role="control"),
    Variant("answer", "gold", role="control"),
    Variant("answer_words", "gold", role="control"),
)
TASKS = (
    Task("search", ("geography-train",), "geography-train", "unseen kinds"),
    Task("search", ("language-train",), "language-train", "unseen kinds"),
    Task("search", ("geography-train",), "geography-test", "unseen questions"),
    Task("search", ("geography-train",), "language-train", "other domain"),
    Task("search", ("language-train",), "geography-train", "other domain"),
    Task("confirmation", ("language-train",), "language-test", "unseen questions"),
    Task("confirmation", ("chemistry-train",), "chemistry-test", "unseen questions"),
    Task("confirmation", ("chemistry-train",), "chemistry-train", "unseen kinds"),
    Task("confirmation", ("geography-train", "language-train"), "chemistry-train", "other domain"),
    Task("confirmation", ("geography-train", "language-train"), "chemistry-test", "other domain"),
)
CONFIRMED = 3
"""Variants that go on to the confirmation: those with the largest mean AUROC over the search's tasks and both gradings
for "the majority is right", which is what the question filter ranks by."""
RULE = (
    "The default changes to a variant whose AUROC for 'the majority is right', meaned over the confirmation's tasks, "
    "is above the default's under both gradings after Holm's correction, and which loses to it in no task."
)
