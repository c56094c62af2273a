"""A held-out manifest of the signal search: its labels, and what a trust in its rollouts adds to the other signals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from neurosig.exported import Exported, join_gold
from neurosig.report.data import LevelData, question_level, rollout_level
from neurosig.report.refits import added_to_bases, mean_over_majority
from neurosig.statistics.auroc import AnalysisConfig

Array = np.ndarray[Any, Any]
MAJORITY, ROLLOUT = "majority is right", "rollout is right"


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
        self.in_majority = np.array([answer == row.pseudo_label for row in rows for answer in row.answers])
        self.owners = np.repeat(np.arange(len(rows)), [len(row.answers) for row in rows])
        self.levels: Mapping[str, LevelData] = {
            MAJORITY: question_level(exported, gold),
            ROLLOUT: rollout_level(exported, gold),
        }
        self._added = {
            (event, base): added
            for event, level in self.levels.items()
            for base, added in added_to_bases(level, analysis).items()
        }

    def trust(self, event: str, scores: Array) -> Array:
        """Trust in each row of the event, from that in each rollout: the mean over the majority's rollouts."""
        return scores if event == ROLLOUT else mean_over_majority(scores, self.in_majority, self.owners)

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
