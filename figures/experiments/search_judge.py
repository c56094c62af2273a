"""A judged set of the signal search: its labels under both gradings, and what a trust in its rollouts is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from neurosig.exported import Exported, join_gold
from neurosig.questions.reader import AnswerReader, Reading
from neurosig.report.data import LevelData, question_level, rollout_level
from neurosig.report.refits import added_to_bases, mean_over_majority
from neurosig.report.signal_table import base_signals
from neurosig.statistics.auroc import AnalysisConfig, Gain, auroc_draws, compare, cross_fit, rarest_class
from neurosig.statistics.metrics import Interval
from neurosig.statistics.resampling import percentile_ends, question_counts

Array = np.ndarray[Any, Any]
MAJORITY, ROLLOUT = "majority is right", "rollout is right"
STRICT, LENIENT = "strict", "lenient"
LEVEL = 0.95
COARSE_P, FINER = 0.01, 40
"""A p below the first is computed again from this many times the resamples."""


@dataclass(frozen=True, slots=True)
class Draws:
    """A statistic of a set with its bootstrap draws over questions; all draws of one set are paired."""

    estimate: float
    draws: Array

    def minus(self, other: Draws) -> Draws:
        """The difference to another statistic of the same set."""
        return Draws(self.estimate - other.estimate, self.draws - other.draws)

    def interval(self, n: int, seed: int) -> Interval:
        """The percentile interval."""
        known = self.draws[~np.isnan(self.draws)]
        return Interval(self.estimate, *percentile_ends(known, LEVEL), n, len(self.draws), seed)


def mean_draws(statistics: Sequence[Draws]) -> Draws:
    """Their mean, draw by draw."""
    return Draws(
        float(np.mean([one.estimate for one in statistics])), np.mean([one.draws for one in statistics], axis=0)
    )


class Judge:
    """The rollouts of an export with their gold answers.

    Attributes:
        exported: The export.
        levels: (Event, grading) -> signals and labels.
        right: Grading -> which rollouts are right.
    """

    def __init__(self, exported: Exported, analysis: AnalysisConfig) -> None:
        """Read the gold answers and grade strictly and leniently.

        A majority is leniently right when more than half of its rollouts are.

        Raises:
            UserError: Gold answers cannot be read.
        """
        gold, lacking = join_gold(exported.manifest, required=True)
        assert lacking is None, lacking
        rows = list(exported.rows.values())
        self.exported, self.analysis = exported, analysis
        self.in_majority = np.array([answer == row.pseudo_label for row in rows for answer in row.answers])
        self.owners = np.repeat(np.arange(len(rows)), [len(row.answers) for row in rows])
        reader: AnswerReader = exported.manifest.header.answer_reader()
        lenient: list[bool] = []
        for row in rows:
            question, group = gold[row.question_id], exported.rollouts[row.question_id]
            vote = reader.read(group, row.as_question()).vote
            lenient += reader.grade(Reading(row.raw_answers, row.answers, vote), group, question).lenient
        strict = {MAJORITY: question_level(exported, gold), ROLLOUT: rollout_level(exported, gold)}
        rollouts = np.array(lenient)
        parsed = np.array([row.pseudo_label is not None for row in rows])
        majority = parsed & (mean_over_majority(rollouts.astype(float), self.in_majority, self.owners) > 0.5)
        self.levels: Mapping[tuple[str, str], LevelData] = {
            **{(event, STRICT): level for event, level in strict.items()},
            (MAJORITY, LENIENT): replace(strict[MAJORITY], right=majority),
            (ROLLOUT, LENIENT): replace(strict[ROLLOUT], right=rollouts),
        }
        self.right = {grading: self.levels[ROLLOUT, grading].right for grading in (STRICT, LENIENT)}

    def trust(self, event: str, scores: Array) -> Array:
        """Trust in each row of the event, from that in each rollout: the mean over the majority's rollouts."""
        return scores if event == ROLLOUT else mean_over_majority(scores, self.in_majority, self.owners)

    @cached_property
    def counts(self) -> Array:
        """How often each draw holds each question."""
        blocks = question_counts(len(self.exported.rows), self.analysis.resamples, seed=self.analysis.seed, block=500)
        return np.concatenate(list(blocks))

    def auroc(self, key: tuple[str, str], trust: Array) -> Draws:
        """AUROC of a trust in the rows of an event and grading; ``nan`` where all are right or all wrong."""
        level = self.levels[key]
        assert level.right is not None
        once = np.ones((1, self.counts.shape[1]), dtype=np.int64)
        estimate = auroc_draws(trust, level.right, level.owners, once)[0]
        return Draws(float(estimate), auroc_draws(trust, level.right, level.owners, self.counts))

    @cached_property
    def _bases(self) -> Mapping[tuple[str, str], Mapping[str, tuple[Array, Any]]]:
        found = {}
        for key, level in self.levels.items():
            assert level.right is not None
            if rarest_class(level.right, level.owners) >= self.analysis.folds:
                bases = base_signals([signal for signal in level.signals if signal.kind == "output"])
                columns = {name: np.column_stack([signal.trust for signal in base]) for name, base in bases.items()}
                found[key] = {
                    name: (base, cross_fit(base, level.right, level.owners, self.analysis))
                    for name, base in columns.items()
                }
        return found

    def gains(self, key: tuple[str, str], trust: Array) -> dict[str, Gain]:
        """What a trust adds to the vote share and to all output-level signals; empty where a class is too rare."""
        level = self.levels[key]
        assert level.right is not None
        gains = {}
        for name, (base, alone) in self._bases.get(key, {}).items():
            full = cross_fit(np.column_stack([base, trust]), level.right, level.owners, self.analysis)
            gains[name] = compare(alone, full, level.right, level.owners, self.analysis)
            if gains[name].p < COARSE_P:
                finer = replace(self.analysis, resamples=FINER * self.analysis.resamples)
                gains[name] = replace(gains[name], p=compare(alone, full, level.right, level.owners, finer).p)
        return gains

    @cached_property
    def _added(self) -> dict[tuple[str, str, str], Any]:
        return {
            (*key, base): added
            for key, level in self.levels.items()
            for base, added in added_to_bases(level, self.analysis).items()
        }

    def refit_gains(self, scores: Array) -> list[float]:
        """What the rollouts' trust adds, its sign fixed, in the order of `tests`."""
        return [added(self.trust(event, scores)) for (event, _, _), added in self._added.items()]

    @property
    def tests(self) -> list[tuple[str, str, str]]:
        """Event, grading and base of each of `refit_gains`."""
        return list(self._added)
