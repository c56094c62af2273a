"""A held-out manifest of the signal search: its labels, and what a trust in its rollouts adds to the other signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from neurosig.exported import Exported, join_gold
from neurosig.report.data import LevelData, question_level, rollout_level
from neurosig.statistics.auroc import AnalysisConfig, added_auroc, rarest_class

Array = np.ndarray[Any, Any]
MAJORITY, ROLLOUT = "majority is right", "rollout is right"
BASES = ("over_vote", "over_outputs")


class Judge:
    """The rollouts of a held-out manifest with their gold answers.

    Attributes:
        exported: The manifest.
        levels: Event -> signals and labels.
    """

    def __init__(self, exported: Exported, analysis: AnalysisConfig) -> None:
        """Read the gold answers and fit the base signals.

        Raises:
            UserError: Gold answers cannot be read.
        """
        gold, lacking = join_gold(exported.manifest, required=True)
        assert lacking is None, lacking
        rows = list(exported.rows.values())
        self.exported = exported
        self.stays = np.array([[answer == row.pseudo_label for answer in row.answers] for row in rows])
        self.levels: Mapping[str, LevelData] = {
            MAJORITY: question_level(exported, gold),
            ROLLOUT: rollout_level(exported, gold),
        }
        once = replace(analysis, repeats=1)
        self._added = {
            (event, base): added_auroc(_base(level, base), level.right, level.owners, once)
            for event, level in self.levels.items()
            if level.right is not None and rarest_class(level.right, level.owners) >= once.folds
            for base in BASES
        }

    def trust(self, event: str, scores: Array) -> Array:
        """Trust in each row of the event, from that in each rollout: the mean over the majority's rollouts."""
        if event == ROLLOUT:
            return scores
        return np.asarray((scores.reshape(self.stays.shape) * self.stays).sum(axis=1) / self.stays.sum(axis=1))

    def gains(self, scores: Array) -> list[float]:
        """What the rollouts' trust adds, its sign fixed, in the order of `tests`."""
        return [added(self.trust(event, scores)) for (event, _), added in self._added.items()]

    @property
    def tests(self) -> list[tuple[str, str]]:
        """Event and base of each gain."""
        return list(self._added)


def adds(table: pd.DataFrame, base: str) -> pd.Series[bool]:
    """Whether a variant adds: after correction, and more than fits to permuted labels where these were made."""
    proven = (table[f"{base}_low"] > 0) & (table[f"{base}_p_holm"] <= 0.05)
    refits = f"{base}_p_refit"  # absent from tables of earlier searches
    return proven & (table[refits].fillna(0.0) <= 0.05) if refits in table else proven


def _base(level: LevelData, base: str) -> Array:
    chosen = [s.trust for s in level.signals if s.kind == "output" and (base == BASES[1] or s.name == "vote_share")]
    return np.column_stack(chosen)
