"""From K answers to a majority vote; a non-answer (``None``) never wins and stays in the denominator."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neurosig.questions.answers.grading import is_correct
from neurosig.questions.load import Question

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

    Args:
        answers: Parsed answers, ``None`` without one.
        question: Its answer space keeps different members apart.
        merge: ``exact``: every answer for itself; ``containment``: answers that contain another candidate as whole
            words, or its alias in the answer space, vote for it.
    """
    del question, merge
    return list(answers)


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
