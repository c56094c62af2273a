"""Tests for mutants of the numeric core that no other test caught, and of the harness itself."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.tasks import manifest_tasks
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.questions.vote import majority_vote
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import make_manifest
from tests.support.manifests import edit_row
from tests.support.parsers import UNCUT
from tests.trust import mutants


def test_a_task_has_its_questions_weights_prompts_and_contexts(tmp_path: Path) -> None:
    folder = make_manifest(tmp_path, answer_parser=UNCUT)
    for line in range(1, 9):
        edit_row(folder, line, lambda row, line=line: row.update(weight=line / 4))
    manifest = read_manifest(folder)
    tasks = manifest_tasks(manifest, load_model(tmp_path / "model"), max_new_tokens=4)
    assert [task.weight for task in tasks] == [line / 4 for line in range(1, 9)]
    for task in tasks:
        assert task.teacher_prompt[-len(task.student_prompt) :] == task.student_prompt
        assert len(task.teacher_prompt) > 2 * len(task.student_prompt)


def test_the_end_token_carries_no_answer() -> None:
    """It is left out of the trace, unless the rollout was cut off or is the end token alone."""
    cases = (((5, 6, 2), "stop", (5, 6)), ((5, 6), "length", (5, 6)), ((2,), "stop", (2,)))
    for ids, reason, body in cases:
        assert Rollout("q", 0, "text", ids, reason).completion_ids_without_eos == body  # type: ignore[arg-type]


def named(name: str) -> mutants.Mutant:
    (mutant,) = (mutant for mutant in mutants.MUTANTS if mutant.name == name)
    return mutant


@pytest.mark.parametrize("name", ["ties by the alphabet", "padding counted in the mean"])
def test_mutants_are_caught(tmp_path: Path, name: str) -> None:
    assert mutants.caught(named(name), mutants.copied(tmp_path))


def test_a_mutant_whose_text_is_gone_is_an_error_and_the_copy_is_restored(tmp_path: Path) -> None:
    source = tmp_path / mutants.VOTE
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    with pytest.raises(LookupError, match=f"ties by the alphabet: its text is not in {re.escape(mutants.VOTE)}"):
        mutants.caught(named("ties by the alphabet"), tmp_path)
    harmless = dataclasses.replace(named("ties by the alphabet"), old="x = 1", new="x = 2", tests="gone.py")
    with pytest.raises(RuntimeError, match="the tests did not run"):
        mutants.caught(harmless, tmp_path)
    assert source.read_text() == "x = 1\n"


def test_every_mutant_replaces_text_that_is_there_once() -> None:
    """Whoever changes the numeric core must change its mutants."""
    for mutant in mutants.MUTANTS:
        text = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, mutant.name


ANSWERS = st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "c", "né", "0"])), min_size=1, max_size=16)


@settings(max_examples=200, deadline=None)
@given(answers=ANSWERS, question_id=st.text(max_size=8), seed=st.integers(0, 999))
def test_votes_count_and_do_not_depend_on_the_order(answers: list[str | None], question_id: str, seed: int) -> None:
    vote = majority_vote(answers, question_id)
    counts = Counter(answer for answer in answers if answer is not None)
    assert vote.n == len(answers) and vote.count == max(counts.values(), default=0)
    assert set(vote.tied_answers) == {answer for answer, count in counts.items() if count == vote.count}
    assert (vote.winner in vote.tied_answers) if counts else (vote.winner is None and vote.tied_answers == ())
    shuffled = random.Random(seed).sample(answers, len(answers))
    assert majority_vote(shuffled, question_id) == vote
    more = majority_vote([*answers, None], question_id)
    assert (more.winner, more.count, more.tied_answers, more.n) == (
        vote.winner,
        vote.count,
        vote.tied_answers,
        vote.n + 1,
    )
    assert 0 <= vote.share <= 1
