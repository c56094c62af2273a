"""The export's probe fitted again: to folds that leave out other groups, and to permuted labels.

The probe is fitted to whether a question's rollouts agree. Folds by kind show whether it knows more than what tells
the kinds apart; permuted labels show what a probe of labels that mean nothing would add to the vote share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from sklearn.metrics import roc_auc_score

from neurosig.exported import Exported
from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.groups import fold_groups
from neurosig.hallucination.lasso import Design, design
from neurosig.hallucination.probe import (
    cross_fit,
    cross_fit_by_seed,
    fold_count,
    probe_matrix,
    rollout_labels,
    too_few,
)
from neurosig.report.data import LevelData
from neurosig.report.signal_table import SignalRow, base_signals
from neurosig.runtime.cli import progress
from neurosig.runtime.errors import UserError
from neurosig.statistics.auroc import AnalysisConfig, added_auroc, rarest_class
from neurosig.statistics.permutation import permutation_p

PROBE_SCORE = "probe_score"
GROUPINGS = ("question", "kind")


@dataclass(frozen=True, slots=True)
class FoldRow:
    """AUROC of the cross-fitted probe for one choice of what its folds keep together.

    Attributes:
        groups: The column: a question is scored by a probe that saw nothing of its group.
        n_groups: Its values.
        folds: Cross-fitting folds.
        fold_seeds: Times that the folds were drawn.
        side: AUROC for "the rollouts split" over the labelled rollouts, of the mean over the fold seeds.
        side_low, side_high: Least and largest AUROC of a single fold seed.
        right: AUROC for "the majority is right" over the questions; ``None`` without gold answers of both kinds.
        right_low, right_high: Least and largest AUROC of a single fold seed.
    """

    groups: str
    n_groups: int
    folds: int
    fold_seeds: int
    side: float
    side_low: float
    side_high: float
    right: float | None
    right_low: float | None
    right_high: float | None


@dataclass(frozen=True, slots=True)
class FoldTable:
    """The probe by what its folds leave out: one row per grouping, and why a grouping is missing."""

    rows: Sequence[FoldRow]
    missing: Sequence[str]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    @property
    def sentence(self) -> str:
        """The comparison in words, made from the numbers."""
        parts = [
            f"{row.side:.3f} where folds leave out a {row.groups} ({row.n_groups} in {row.folds} folds"
            + (
                f", {row.side_low:.3f} to {row.side_high:.3f} over {row.fold_seeds} fold seeds)"
                if several(row)
                else ")"
            )
            for row in self.rows
        ]
        text = (
            f"AUROC of the probe for the side of a question that it did not see: {', '.join(parts)}." if parts else ""
        )
        return " ".join([text, *self.missing]).strip()


def several(row: FoldRow) -> bool:
    """Whether the fold seeds drew different folds; with a fold per group there is only one way."""
    return row.fold_seeds > 1 and row.folds < row.n_groups


class Refits:
    """The export's probe: its labels, its features and its options."""

    def __init__(self, exported: Exported) -> None:
        options: Mapping[str, Any] = exported.manifest.header.options
        self.exported = exported
        self.config = ProbeConfig(
            agree_share=options["probe_agree_share"],
            split_share=options["probe_split_share"],
            inverse_penalty=options["probe_inverse_penalty"],
            folds=options["probe_folds"],
            groups=options.get("probe_groups", "question"),  # earlier exports had one grouping and one fold seed
            fold_seeds=options.get("probe_fold_seeds", 1),
            labels=options.get("probe_labels", "agreement"),
            values=options.get("probe_values", "contribution"),
            seed=options["seed"],
        )
        self.rows = list(exported.rows.values())
        sizes = [len(row.answers) for row in self.rows]
        self.owners = np.repeat(np.arange(len(self.rows)), sizes)
        winners = [row.pseudo_label for row in self.rows]
        self.labels = rollout_labels([row.answers for row in self.rows], winners, self.config)
        self.in_majority = np.array([answer == row.pseudo_label for row in self.rows for answer in row.answers])

    def contributions(self) -> sparse.csr_array:
        """`neurosig.hallucination.probe.probe_matrix` of the rollouts, in the order of the questions."""
        signals = self.exported.signals
        ids = [(row.question_id, index) for row in self.rows for index in range(len(row.answers))]
        places = [self.exported.place[key] for key in ids]
        values = signals.contributions[places].float().numpy()
        return probe_matrix(
            signals.neuron_ids[places].numpy(), values, signals.n_layers, signals.n_neurons, self.config
        )

    def design(self) -> Design:
        """The same, scaled."""
        return design(self.contributions(), self.config.min_active_share)

    def groups(self, column: str) -> Int[np.ndarray, " rollouts"]:
        """Index of each rollout's group.

        Raises:
            UserError: See `neurosig.hallucination.groups.fold_groups`.
        """
        named = fold_groups(self.rows, column)
        names = [row.question_id if named is None else named[row.question_id] for row in self.rows]
        _, index = np.unique(names, return_inverse=True)  # numbered as by the export, for the same folds
        return np.asarray(index[self.owners])

    def by_question(self, scores: Float[np.ndarray, " rollouts"]) -> Float[np.ndarray, " questions"]:
        """See `mean_over_majority`."""
        return mean_over_majority(scores, self.in_majority, self.owners)


def mean_over_majority(
    scores: Float[np.ndarray, " rollouts"],
    in_majority: Bool[np.ndarray, " rollouts"],
    owners: Int[np.ndarray, " rollouts"],
) -> Float[np.ndarray, " questions"]:
    """Each question's mean over its majority's rollouts, as `neurosig.hallucination.scores` takes it."""
    return np.bincount(owners, scores * in_majority) / np.bincount(owners, in_majority)


def fold_table(refits: Refits, level: LevelData) -> FoldTable:
    """The probe with folds by question, by kind, and by what the export used.

    Args:
        refits: The export's probe.
        level: Its questions, with gold answers or without.
    """
    rows, missing, prepared = [], [], None
    for column in dict.fromkeys((*GROUPINGS, refits.config.groups)):
        config = replace(refits.config, groups=column)
        try:
            groups = refits.groups(column)
        except UserError as error:
            missing.append(f"Folds by {column} were left out: {str(error).removeprefix(f'--probe-groups {column}: ')}.")
            continue
        shortage = too_few(refits.labels, groups, config)
        if shortage:
            missing.append(f"Folds by {column} were left out: {shortage}.")
            continue
        prepared = prepared or refits.design()
        by_seed = cross_fit_by_seed(prepared.matrix, refits.labels, groups, config)
        rows.append(_fold_row(refits, level, by_seed, groups, config))
    return FoldTable(rows, missing)


def _fold_row(
    refits: Refits,
    level: LevelData,
    by_seed: Float[np.ndarray, "seeds rollouts"],
    groups: Int[np.ndarray, " rollouts"],
    config: ProbeConfig,
) -> FoldRow:
    known = refits.labels >= 0
    each = [by_seed.mean(axis=0), *by_seed]
    side = [float(roc_auc_score(refits.labels[known], scores[known])) for scores in each]
    right: list[float | None] = [None] * len(each)
    judged = level.right is not None and len(level.right) == len(refits.rows)
    if judged and level.right is not None and 0 < level.right.sum() < len(level.right):
        right = [float(roc_auc_score(level.right, -refits.by_question(scores))) for scores in each]
    ends = [value for value in right[1:] if value is not None]
    return FoldRow(
        config.groups,
        len(np.unique(groups)),
        fold_count(groups, config),
        config.fold_seeds,
        side[0],
        min(side[1:]),
        max(side[1:]),
        right[0],
        min(ends, default=None),
        max(ends, default=None),
    )


def with_refit_p(
    refits: Refits,
    levels: Mapping[str, LevelData],
    tables: Mapping[str, Sequence[SignalRow]],
    analysis: AnalysisConfig,
    *,
    permutations: int,
    quiet: bool = True,
) -> dict[str, list[SignalRow]]:
    """The tables with the p of what the probe adds, from probes refitted on permuted labels of the questions.

    Observed and permuted gains are those of one drawing of the folds, the probe's and the nested regressions'. Tables
    are as given where there is nothing to fit or to judge, or without permutations.

    Args:
        refits: The export's probe.
        levels: The data of each table, of all questions of the export.
        tables: The tables.
        analysis: Folds and repeats of the nested regressions.
        permutations: Refits; p is at least 1 / (1 + permutations).
        quiet: No progress bar.
    """
    unchanged = {name: list(rows) for name, rows in tables.items()}
    groups = refits.groups(refits.config.groups)
    complete = all(int(level.owners.max()) + 1 == len(refits.rows) for level in levels.values())
    tested = [
        (name, base, added)
        for name, level in levels.items()
        if permutations and complete
        for base, added in added_to_bases(level, analysis).items()
    ]
    if not tested or too_few(refits.labels, groups, refits.config):
        return unchanged
    prepared = refits.design()
    bar = progress(total=permutations + 1, desc="permute", quiet=quiet)

    def gains(labels: Int[np.ndarray, " rollouts"]) -> list[float]:
        scores = cross_fit(prepared.matrix, labels, groups, refits.config)
        bar.update()
        trust = {"question": -refits.by_question(scores), "rollout": -scores}
        return [added(trust[name]) for name, _, added in tested]

    with bar:
        result = permutation_p(gains, refits.labels, permutations, analysis.seed, refits.owners)
    for (name, base, _), p in zip(tested, result.p.tolist(), strict=True):
        unchanged[name] = [
            replace(row, **{base: replace(gain, p_refit=p)})
            if row.signal.name == PROBE_SCORE and (gain := getattr(row, base)) is not None
            else row
            for row in unchanged[name]
        ]
    return unchanged


def added_to_bases(level: LevelData, analysis: AnalysisConfig) -> dict[str, Callable[[Float[np.ndarray, " n"]], float]]:
    """For each base that a gain is measured on, the function from a trust to the AUROC that it adds, its sign fixed.

    The nested regressions draw their folds once. Empty without gold answers, or with too few of a class to fold.

    Args:
        level: The signals, of which some are the bases, and the labels.
        analysis: Folds and seed.
    """
    right, once = level.right, replace(analysis, repeats=1)
    if right is None or rarest_class(right, level.owners) < once.folds:
        return {}
    return {
        name: added_auroc(np.column_stack([signal.trust for signal in base]), right, level.owners, once)
        for name, base in base_signals(level.signals).items()
        if base
    }
