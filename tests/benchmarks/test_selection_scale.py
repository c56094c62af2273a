"""Selection of 100,000 questions: contexts in blocks, in time and memory; printed, asserted loosely. ``make bench``."""

from __future__ import annotations

import pytest
import torch

from neurosig.hallucination.planted import PlantedConfig, plant
from neurosig.questions.vote import Vote
from neurosig.selection.choose import Candidate, selection_reasons
from neurosig.selection.config import SelectionConfig
from neurosig.selection.contexts import EXACT_SETS, choose_contexts
from tests.benchmarks.resident import measured

pytestmark = pytest.mark.bench
SIZES = (10_000, 100_000)
MINUTES, MEGABYTES = 15, 2_000


def candidates(n: int) -> list[Candidate]:
    """Questions whose signatures are as alike as real ones, on 200 topics; the signatures are views of one tensor."""
    data = plant(PlantedConfig(n_questions=n, num_generations=1, n_planted=0, n_topics=200))
    ids = torch.from_numpy(data.ids).int()
    hidden, vote = torch.randn(64, generator=torch.Generator().manual_seed(0)), Vote("x", 6, ("x",), 8)
    return [
        Candidate(
            question_id=f"q{place}", text_sha256=f"{place}", kind="k", vote=vote, score=place / n, representative=0,
            shortest=0, signature=ids[place], hidden=hidden, num_tokens=50,
        )
        for place in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("policy", ["nearest", "random"])
def test_contexts_of_many_questions(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"contexts of N questions, 1,020 neurons each, {policy}, {torch.get_num_threads()} threads"]
    for n in SIZES:
        pool = candidates(n)
        config = SelectionConfig(context_policy=policy, num_demonstrations=3)
        found, seconds, megabytes = measured(
            lambda pool=pool, config=config, n=n: (  # type: ignore[misc]
                selection_reasons(pool, config),
                choose_contexts(pool, [True] * n, config),
            )
        )
        how = "exact" if policy != "nearest" or n <= EXACT_SETS else "usearch"
        lines.append(f"N {n:7,}: {how:7} {seconds:7.1f} s, +{megabytes:5.0f} MB beyond the signatures")
        assert all(len(context) == 3 for context in found[1])  # type: ignore[index]
        assert seconds < 60 * MINUTES and megabytes < MEGABYTES
    with capsys.disabled():
        print("\n" + "\n".join(lines))
