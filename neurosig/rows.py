"""From signals to manifest rows: the decisions of selection, written down question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from neurosig.hallucination import HallucinationScore, QuestionSignals, Scores
from neurosig.manifest import ContextItem, QuestionRow, Reason, VoteRecord
from neurosig.patterns import flat_ids
from neurosig.questions import Question
from neurosig.selection import (
    Candidate,
    Demonstrated,
    SelectionConfig,
    choose_contexts,
    clean_reasons,
    representative,
)


def manifest_rows(
    questions: Sequence[Question],
    signals: Mapping[str, QuestionSignals],
    scores: Scores,
    *,
    ranked_by: HallucinationScore,
    selection: SelectionConfig,
    d_mlp: int,
) -> list[QuestionRow]:
    """Select the clean questions, choose their contexts, and say for every input question what was decided.

    Args:
        questions: All input questions; those without signals were too long.
        signals: Votes and active sets of the traced questions.
        scores: Their hallucination scores.
        ranked_by: The score that the clean filter uses.
        selection: Options of filter and context.
        d_mlp: Neurons a layer.
    """
    by_id = {question.id: question for question in questions}
    candidates = []
    for index, (name, signal) in enumerate(signals.items()):
        chosen = representative(signal.answers, signal.vote, scores.rollout_probe[index])
        candidates.append(
            Candidate(
                question_id=name,
                text_sha256=by_id[name].text_sha256,
                kind=by_id[name].kind or by_id[name].domain,
                vote=signal.vote,
                score=float(scores.by_name[ranked_by][index]),
                representative=chosen,
                signature=flat_ids(signal.ids[[chosen or 0]], d_mlp)[0],
            )
        )
    reasons = clean_reasons(candidates, selection)
    contexts = choose_contexts(candidates, [reason == "selected" for reason in reasons], selection)
    if selection.context_policy != "none":
        reasons = [
            "no_context" if reason == "selected" and not context else reason
            for reason, context in zip(reasons, contexts, strict=True)
        ]
    decided = {
        name: _decided(signal, reason, context, {score: values[index] for score, values in scores.by_name.items()})
        for index, ((name, signal), reason, context) in enumerate(zip(signals.items(), reasons, contexts, strict=True))
    }
    return [
        QuestionRow(
            id=question.id,
            line=question.line,
            domain=question.domain,
            kind=question.kind,
            question=question.question,
            choices=question.choices,
            text_sha256=question.text_sha256,
            **decided.get(question.id, _TOO_LONG),
        )
        for question in questions
    ]


_TOO_LONG: dict[str, Any] = {
    "answers": (),
    "vote": None,
    "pseudo_label": None,
    "scores": {},
    "selected": False,
    "reason": "too_long",
    "context": (),
}


def _decided(
    signal: QuestionSignals, reason: Reason, context: Sequence[Demonstrated], scores: Mapping[str, float]
) -> dict[str, Any]:
    vote = signal.vote
    return {
        "answers": tuple(signal.answers),
        "vote": VoteRecord(count=vote.count, n=vote.n, tied=len(vote.tied)),
        "pseudo_label": vote.winner,
        "scores": {name: round(float(score), 6) for name, score in scores.items()},
        "selected": reason == "selected",
        "reason": reason,
        "context": tuple(ContextItem(**asdict(shown)) for shown in context),
    }
