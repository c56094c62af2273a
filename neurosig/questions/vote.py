"""From K answers to a majority vote; a non-answer (``None``) never wins and stays in the denominator."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from neurosig.questions.answers.grading import is_correct
from neurosig.questions.answers.normal import normalise
from neurosig.questions.answers.spaces import canonical, members
from neurosig.questions.load import Question
from neurosig.runtime.shapes import check_choice

VoteMerge = Literal["containment", "exact"]


@dataclass(frozen=True, slots=True)
class Vote:
    """A majority vote over K answers.

    Attributes:
        winner: The winning candidate, ``None`` if no answer could be parsed.
        count: Its votes.
        tied_answers: All candidates with that many votes, sorted; more than one is a tie.
        n: K, with the non-answers.
    """

    winner: str | None
    count: int
    tied_answers: tuple[str, ...]
    n: int

    @property
    def n_tied(self) -> int:
        """Number of candidates with the most votes: 1 without a tie, 0 without an answer."""
        return len(self.tied_answers)

    @property
    def share(self) -> float:
        """Confidence: votes of the winner over all K samples."""
        return self.count / self.n


def merge_answers(answers: Sequence[str | None], question: Question, merge: VoteMerge) -> list[str | None]:
    """The candidate that each answer votes for, in the same order.

    ``exact``: every answer for itself. ``containment``: answers of one meaning are one candidate, named by its most
    frequent answer, the shortest of equals. A meaning is an answer with those that contain it as whole words, at their
    end ("west africa" for "africa"), or elsewhere where no other answer does: "sodium chloride" and "sodium nitrate"
    stay apart beside "sodium". An answer that contains two others belongs to neither, and so do different members of
    the answer space, whose other names count as they do.

    Args:
        answers: Parsed answers, ``None`` without one.
        question: Its answer space is used; letters never merge.
        merge: See above.

    Raises:
        ValueError: ``merge`` is unknown.
    """
    check_choice("merge", merge, VoteMerge)
    if merge == "exact" or question.choices:
        return list(answers)
    named = [None if answer is None else canonical(answer, question) for answer in answers]
    counts = Counter(answer for answer in named if answer is not None)
    apart = {normalise(member[0]) for member in members(question)}
    core = _cores(sorted(counts), apart)
    meanings: defaultdict[str, list[str]] = defaultdict(list)
    for answer in counts:
        meanings[core[answer]].append(answer)
    names = {
        meaning: meaning if meaning in apart else min(forms, key=lambda form: (-counts[form], len(form), form))
        for meaning, forms in meanings.items()
    }
    return [None if answer is None else names[core[answer]] for answer in named]


def _cores(candidates: Sequence[str], apart: Collection[str]) -> dict[str, str]:
    """For each candidate the shortest candidate of its meaning."""
    inside = {
        longer: [
            shorter
            for shorter in candidates
            if shorter != longer and longer not in apart and f" {shorter} " in f" {longer} "
        ]
        for longer in candidates
    }
    core = {}
    for longer, found in inside.items():
        least = [short for short in found if not any(other in inside[short] for other in found)]
        core[longer] = least[0] if len(least) == 1 else longer
    elsewhere = Counter(short for longer, short in core.items() if short != longer and not longer.endswith(f" {short}"))
    return {
        longer: short if longer.endswith(f" {short}") or elsewhere[short] == 1 else longer
        for longer, short in core.items()
    }


def majority_vote(answers: Sequence[str | None], question_id: str) -> Vote:
    """Vote over K answers.

    Ties are decided by a hash of (question id, candidate), so the order of the answers does not matter.

    Raises:
        ValueError: There are no answers to vote over.
    """
    if not answers:
        raise ValueError("a vote needs at least one answer")
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(None, 0, (), len(answers))
    most = max(counts.values())
    tied = tuple(sorted(candidate for candidate, count in counts.items() if count == most))
    winner = min(tied, key=lambda candidate: hashlib.sha256(f"{question_id}\x00{candidate}".encode()).digest())
    return Vote(winner, most, tied, len(answers))


def n_tied_right(vote: Vote, question: Question) -> int:
    """How many of the answers that tie for most votes are right. For evaluation only.

    Raises:
        ValueError: The question carries no gold answer.
    """
    return sum(is_correct(candidate, question) for candidate in vote.tied_answers)


def n_tied_right_lenient(vote: Vote, answers: Sequence[str | None], lenient: Sequence[bool]) -> int:
    """How many of the answers that tie for most votes are right by the lenient grading.

    A candidate is right when more than half of the rollouts that vote for it are.

    Args:
        vote: The vote.
        answers: The candidate of each rollout.
        lenient: The lenient grade of each rollout.
    """
    right = Counter(answer for answer, good in zip(answers, lenient, strict=True) if good)
    return sum(2 * right[candidate] > vote.count for candidate in vote.tied_answers)


def vote_accuracy(vote: Vote, question: Question) -> float:
    """Expected correctness of the vote, its tie broken uniformly at random; 0 without an answer. For evaluation only.

    Raises:
        ValueError: The question carries no gold answer.
    """
    return n_tied_right(vote, question) / max(1, vote.n_tied)
