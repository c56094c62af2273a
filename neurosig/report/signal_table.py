"""The signals table: every signal's AUROC, correlations, what it adds to the others, and the verdict in words.

rows = analyse(signals, right, owners, {"length": length}, AnalysisConfig(seed=0))
print(rows[0].auroc, rows[0].verdict)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from neurosig.runtime.shapes import check_choice
from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.auroc import (
    LEVEL,
    AnalysisConfig,
    Gain,
    HeldOut,
    auroc_interval,
    compare,
    cross_fit,
    rarest_class,
    spearman_interval,
)
from neurosig.statistics.metrics import Interval
from neurosig.statistics.significance import holm

SignalKind = Literal["neuron", "other", "output", "control"]

DISGUISE = 0.8
"""Least absolute Spearman correlation at which a verdict says what a signal is nearly the same as."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal over n questions or rollouts.

    Attributes:
        name: Its name.
        trust: One value per row, higher is more trustworthy.
        kind: ``neuron`` reads activations, ``output`` only the sampled text and its probabilities, ``control`` nothing;
            ``other`` is a function of the user's, or a score of the teacher's answers.
        fitted: Whether it was fitted to labels. What it adds then keeps its sign as fixed beforehand, and takes a p
            from refits to be believed.
    """

    name: str
    trust: Float[np.ndarray, " n"]
    kind: SignalKind
    fitted: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, SignalKind)


@dataclass(frozen=True, slots=True)
class SignalRow:
    """One line of the signals table; ``auroc`` and the gains are ``None`` without gold answers.

    Attributes:
        signal: The signal.
        auroc: AUROC for right against wrong.
        correlations: Spearman correlation of the signal with each confounder, by name.
        over_vote: What it adds to the vote share; ``None`` for the vote share itself.
        over_outputs: What it adds to all output-level signals (to all others, where it is one of them).
        over_vote_p: p-value of ``over_vote``, corrected for the number of signals in the table (Holm).
        over_outputs_p: The same of ``over_outputs``.
    """

    signal: Signal
    auroc: Interval | None
    correlations: Mapping[str, Interval]
    over_vote: Gain | None
    over_outputs: Gain | None
    over_vote_p: float
    over_outputs_p: float

    @property
    def adds_to_vote(self) -> bool:
        return _adds(self.over_vote, self.over_vote_p)

    @property
    def adds_to_outputs(self) -> bool:
        return _adds(self.over_outputs, self.over_outputs_p)

    @property
    def verdict(self) -> str:
        """These numbers in words, with any confounder that the signal is nearly the same as."""
        outputs = "the other output signals" if self.signal.kind == "output" else "all output signals"
        gains = ((self.over_vote, self.over_vote_p, "vote share"), (self.over_outputs, self.over_outputs_p, outputs))
        tested = [(gain, p, base) for gain, p, base in gains if gain is not None]
        if tested and all(gain.auroc.low <= 0 <= gain.auroc.high for gain, _, _ in tested):
            bases = " or to ".join(base for _, _, base in tested)
            intervals = "both intervals include" if len(tested) > 1 else "the interval includes"
            parts = [f"adds nothing to {bases}: {intervals} zero"]
        else:
            parts = [_reading(gain, p, base) for gain, p, base in tested]
        for name, correlation in self.correlations.items():
            if name != self.signal.name and abs(correlation.estimate) >= DISGUISE:
                parts.append(f"nearly the same as {name.replace('_', ' ')} (Spearman {correlation.estimate:+.2f})")
        return "; ".join(parts)


def base_signals(signals: Sequence[Signal]) -> dict[str, list[Signal]]:
    """What a gain is measured on: the gain's field of `SignalRow` -> the signals of the base."""
    outputs = [signal for signal in signals if signal.kind == "output"]
    return {"over_vote": [signal for signal in signals if signal.name == "vote_share"], "over_outputs": outputs}


@takes_arrays
def analyse(
    signals: Sequence[Signal],
    right: Bool[np.ndarray, " n"] | None,
    owners: Int[np.ndarray, " n"],
    confounders: Mapping[str, Float[np.ndarray, " n"]],
    config: AnalysisConfig,
) -> list[SignalRow]:
    """The signals table, in the order of ``signals``.

    Verdicts correct the p-values for the number of signals tested (Holm). Whatever the labels do not allow is left
    out: everything but the correlations when they hold one class only, the gains when a class is too rare to fold.

    Args:
        signals: All of the same rows; the one named ``vote_share`` is the base of the first comparison.
        right: The labels; ``None`` without gold answers.
        owners: Index of each row's question.
        confounders: Quantities that each signal is correlated with.
        config: Bootstrap and cross-fitting.
    """
    judged = right is not None and bool(right.any()) and not bool(right.all())
    over_vote: list[Gain | None] = [None] * len(signals)
    over_outputs: list[Gain | None] = [None] * len(signals)
    if right is not None and judged and rarest_class(right, owners) >= config.folds:
        over_vote, over_outputs = (
            _gains(base, signals, right, owners, config) for base in base_signals(signals).values()
        )
    corrected = [_corrected(gains) for gains in (over_vote, over_outputs)]
    rows = []
    for index, signal in enumerate(signals):
        correlations = {
            name: spearman_interval(signal.trust, values, owners, config) for name, values in confounders.items()
        }
        auroc = None
        if right is not None and judged:
            auroc = auroc_interval(signal.trust, right, owners, config)
        gains = over_vote[index], over_outputs[index]
        rows.append(SignalRow(signal, auroc, correlations, *gains, *(column[index] for column in corrected)))
    return rows


def headline(rows: Sequence[SignalRow], event: str) -> str:
    """One sentence on what the neurons add, from the table's numbers.

    Args:
        rows: The table.
        event: What is predicted, as in "the majority is right".
    """
    neuron = [row for row in rows if row.signal.kind == "neuron"]
    known = [row for row in rows if row.auroc is not None]
    if not known or not neuron:
        return ""
    best = max(known, key=lambda row: row.auroc.estimate if row.auroc else 0.0)
    text = (
        f"The best predictor of whether {event}: {_spoken(best)}, AUROC {best.auroc.estimate:.3f}."
        if best.auroc
        else ""
    )
    for base, gains in (
        ("the vote share", [(row, row.over_vote if row.adds_to_vote else None) for row in neuron]),
        ("all output-level signals", [(row, row.over_outputs if row.adds_to_outputs else None) for row in neuron]),
    ):
        if any(row.over_outputs is not None for row in neuron):
            named = [f"{_spoken(row)} {gain.auroc:+.3f}" for row, gain in gains if gain is not None]
            text += f" Neuron signals that add to {base}: {', '.join(named) or 'none'} (of {len(neuron)})."
    return text


def _gains(
    base: Sequence[Signal],
    signals: Sequence[Signal],
    right: Bool[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    config: AnalysisConfig,
) -> list[Gain | None]:
    """What each signal adds to ``base``, less the signal itself; ``None`` where nothing is left to add to."""
    known: dict[tuple[str, ...], HeldOut] = {}

    def fitted(chosen: Sequence[Signal]) -> HeldOut:
        names = tuple(sorted(signal.name for signal in chosen))
        if names not in known:
            features = np.column_stack([s.trust for s in chosen])
            known[names] = cross_fit(features, right, owners, config, signed=chosen[-1].fitted)
        return known[names]

    gains: list[Gain | None] = []
    for signal in signals:
        others = [other for other in base if other.name != signal.name]
        gain = compare(fitted(others), fitted([*others, signal]), right, owners, config) if others else None
        gains.append(gain)
    return gains


def _corrected(gains: Sequence[Gain | None]) -> list[float]:
    tested = [index for index, gain in enumerate(gains) if gain is not None]
    corrected = [1.0] * len(gains)
    for index, p in zip(tested, holm([gain.p for gain in gains if gain is not None]), strict=True):
        corrected[index] = p
    return corrected


def _adds(gain: Gain | None, corrected: float) -> bool:
    alike = gain is not None and gain.p_refit is not None and gain.p_refit > 1 - LEVEL
    return gain is not None and gain.auroc.low > 0 and corrected <= 1 - LEVEL and not alike


def _reading(gain: Gain, corrected: float, base: str) -> str:
    if _adds(gain, corrected):
        return f"adds {gain.auroc:+.3f} to {base}"
    if gain.p_refit is not None and gain.p_refit > 1 - LEVEL and gain.auroc.low > 0 and corrected <= 1 - LEVEL:
        return f"gains {gain.auroc:+.3f} on {base}, but fits to permuted labels gain as much (p {gain.p_refit:.2f})"
    if gain.auroc.low > 0:
        return f"may add to {base}, but not after correction for the number of signals"
    return f"adds {'only noise' if gain.auroc.high < 0 else 'nothing'} to {base}"


def _spoken(row: SignalRow) -> str:
    return row.signal.name.replace("_", " ")
