"""Signs that training collapses: answers that grow or shrink, sharpen or repeat themselves.

Source: the stop rules of public on-policy distillation recipes; the thresholds are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LENGTH_RATIO = 1.5
ENTROPY_RATIO = 0.5
DISTINCT_RATIO = 0.5


def distinct_3(completions: Sequence[Sequence[int]]) -> float:
    """Distinct token trigrams over all trigrams of a step's completions, each counted by itself; 1 without any."""
    trigrams = [list(zip(ids, ids[1:], ids[2:], strict=False)) for ids in completions]
    total = sum(map(len, trigrams))
    return sum(len(set(own)) for own in trigrams) / total if total else 1.0


def collapse(metrics: Sequence[Mapping[str, float | int]], window: int) -> str | None:
    """Why the last ``window`` steps count as collapsed against the first; ``None`` when they do not.

    Steps differ in their questions, so means over windows are compared, and nothing is said before two windows of
    steps are done.

    Args:
        metrics: ``mean_length``, ``student_entropy`` and ``distinct_3`` of every step so far.
        window: Steps a mean is taken over.
    """
    if len(metrics) < 2 * window:
        return None

    def means(name: str) -> tuple[float, float]:
        first, last = ([step[name] for step in part] for part in (metrics[:window], metrics[-window:]))
        return sum(first) / window, sum(last) / window

    start, now = means("mean_length")
    if not start / LENGTH_RATIO <= now <= start * LENGTH_RATIO:
        return f"the mean length went from {start:.1f} to {now:.1f} tokens"
    for name, ratio, said in (
        ("student_entropy", ENTROPY_RATIO, "the student's entropy fell from {:.3f} to {:.3f} nats"),
        ("distinct_3", DISTINCT_RATIO, "the share of distinct trigrams fell from {:.2f} to {:.2f}"),
    ):
        start, now = means(name)
        if now < ratio * start:
            return said.format(start, now)
    return None
