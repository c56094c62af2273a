"""Real completions read by our parser, beside the benchmark's own expressions and beside the eye."""

from __future__ import annotations

from collections import defaultdict

import pytest
from scipy.stats import binomtest

from tests.support.real_answers import EYE_READ, MMLU_PRO, OfficialReading, eye_readings, official_readings

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("name", EYE_READ)
def test_readings_that_differ_from_the_eye(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Print how many of a table's rollouts are read otherwise, and how many graded otherwise, by kind and in all."""
    by_kind: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for one in eye_readings(name):
        by_kind[one.kind].append((one.differs, one.regraded))
        by_kind["all"].append((one.differs, one.regraded))
    lines = [f"\n{name:28} {'n':>5} {'read otherwise':>28} {'graded otherwise':>28}"]
    for kind, pairs in sorted(by_kind.items()):
        differ, regraded = (_share(sum(pair[place] for pair in pairs), len(pairs)) for place in (0, 1))
        lines.append(f"{kind:28} {len(pairs):5} {differ:>28} {regraded:>28}")
    with capsys.disabled():
        print("\n".join(lines))


def _share(count: int, n: int) -> str:
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return f"{count} = {100 * count / n:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


@pytest.mark.skipif(not MMLU_PRO.is_file(), reason="needs the collected completions")
def test_answers_per_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Print accuracy under both readings, where the first expression finds one letter how often ours is it, and every
    output that one reading grades right and the other wrong."""
    models: dict[str, list[OfficialReading]] = defaultdict(list)
    lines = [""]
    for one in official_readings():
        models[one.model].append(one)
        if (one.official == one.gold) != (one.ours == one.gold):
            lines.append(f"{one.model} {one.question_id}: official {one.official}, ours {one.ours}, gold {one.gold}")
            lines.append(f"    ...{one.text[-160:]!r}")
    lines.append(f"{'model':28} {'n':>5} {'official':>9} {'ours':>7} {'one letter':>11} {'agree':>7}")
    models["all"] = [one for outputs in models.values() for one in outputs]
    for model, outputs in models.items():
        official = 100 * sum(one.official == one.gold for one in outputs) / len(outputs)
        ours = 100 * sum(one.ours == one.gold for one in outputs) / len(outputs)
        clear = [{one.ours} == one.stated for one in outputs if len(one.stated) == 1]
        agree = 100 * sum(clear) / len(clear)
        lines.append(f"{model:28} {len(outputs):5} {official:8.2f}% {ours:6.2f}% {len(clear):11} {agree:6.2f}%")
    with capsys.disabled():
        print("\n".join(lines))
