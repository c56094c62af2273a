"""Options of the hallucination scores; the flags of ``neurosig.export`` take their defaults from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

ProbeLabels = Literal["agreement", "contrast"]
ProbeValues = Literal["contribution", "layer_z"]
INVERSE_PENALTY = 0.1
"""C of the probe."""
FOLD_SEEDS = 3
"""Times that the probe's folds are drawn; each costs one cross-fit, a third of a second for 1,900 rollouts."""


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """Options of the probe.

    Attributes:
        agree_share: A question is labelled known when its majority holds at least this share of the K answers; 1
            asks for unanimity, which a weak model rarely reaches.
        split_share: A question is labelled guessed when its majority holds less than this share.
        inverse_penalty: sklearn's ``C``; smaller keeps fewer neurons. None: chosen on the path by cross-validation.
        folds: Cross-fitting folds; a question's rollouts are always scored by a probe that never saw the question.
            Where there are fewer groups than folds, each group is a fold.
        groups: What the folds keep together: ``question``, or another column of the questions, such as ``kind``. It
            names the groups in messages; `neurosig.hallucination.groups.fold_groups` makes them.
        labels: What it learns (`neurosig.hallucination.probe.rollout_labels`): ``agreement``, questions whose rollouts
            split against questions whose rollouts agree; ``contrast``, within a question, rollouts outside its majority
            against rollouts inside.
        values: What it reads of a neuron (`neurosig.hallucination.probe.probe_matrix`): its ``contribution``, or
            ``layer_z``, that in standard deviations of the layer.
        fold_seeds: Times that the folds are drawn, from ``seed`` upwards; the scores are the mean.
        seed: Seed of the folds, the halves and the solver.
        min_active_share: Neurons active in a smaller share of the rollouts are left out, whatever the labels.
        path_steps: Inverse penalties on the path, equally spaced in their logarithm.
        path_span: The path's largest inverse penalty over its smallest, at which the first neuron enters.
        choose_by: What cross-validation compares on the path.
        one_standard_error: Take the sparsest probe within one standard error of the best one, not the best.
        pairs: Pairs of complementary halves of the questions in stability selection.
        stable_frequency: Share of the halves from which on a selected neuron is called stable.
        max_false: False discoveries to expect at most among the stable neurons (`neurosig.hallucination.stability`).
    """

    agree_share: float = 0.75
    split_share: float = 0.5
    inverse_penalty: float | None = INVERSE_PENALTY
    folds: int = 5
    groups: str = "question"
    labels: ProbeLabels = "agreement"
    values: ProbeValues = "contribution"
    fold_seeds: int = FOLD_SEEDS
    seed: int = 0
    min_active_share: float = 0.02
    path_steps: int = 8
    path_span: float = 100.0
    choose_by: Literal["log_loss", "auroc"] = "log_loss"
    one_standard_error: bool = True
    pairs: int = 50
    stable_frequency: float = 0.75
    max_false: float = 1.0

    def __post_init__(self) -> None:
        check_config(self)
        for name, valid, expected in (
            ("agree_share", 0 <= self.agree_share <= 1, "0 to 1"),
            ("split_share", 0 <= self.split_share <= self.agree_share, "0 to --probe-agree-share"),
            ("inverse_penalty", self.inverse_penalty is None or self.inverse_penalty > 0, "above 0"),
            ("folds", self.folds >= 2, "at least 2"),
            ("fold_seeds", self.fold_seeds >= 1, "at least 1"),
            ("min_active_share", 0 <= self.min_active_share <= 1, "0 to 1"),
            ("path_steps", self.path_steps >= 2, "at least 2"),
            ("path_span", self.path_span > 1, "above 1"),
            ("pairs", self.pairs >= 1, "at least 1"),
            ("stable_frequency", 0.5 < self.stable_frequency <= 1, "above 0.5 and at most 1"),
            ("max_false", self.max_false > 0, "above 0"),
        ):
            if not valid:
                raise UserError(f"probe-{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")
