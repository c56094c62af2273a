"""From signals to manifest rows: the decisions of selection, one row per question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neurosig.hallucination.config import HallucinationScore
from neurosig.hallucination.scores import QuestionSignals, Scores
from neurosig.manifest import DemonstrationRecord, QuestionRow, Reason, VoteRecord
from neurosig.patterns.signatures import representative, signature
from neurosig.questions.load import WITHOUT_GOLD, Question
from neurosig.runtime.shapes import check_choice
from neurosig.sampling.rollouts import RolloutPart
from neurosig.selection.choose import DECIMALS, Candidate, selection_reasons
from neurosig.selection.config import SelectionConfig
from neurosig.selection.contexts import choose_contexts


def manifest_rows(
    questions: Sequence[Question],
    signals: Mapping[str, QuestionSignals],
    scores: Scores,
    *,
    ranked_by: HallucinationScore,
    selection: SelectionConfig,
    prompt_tokens: Mapping[str, int],
) -> tuple[list[QuestionRow], str]:
    """Select questions, choose their contexts, and record the decision about every input question.

    Returns:
        One row per question, and what the score could not decide (`neurosig.selection.choose.score_cut`), or "".

    Args:
        questions: All input questions; those without signals were too long.
        signals: Votes and active sets of the traced questions.
        scores: Their hallucination scores.
        ranked_by: The score that the question filter uses.
        selection: Options of filter and context.
        prompt_tokens: Question id -> tokens of its prompt.

    Raises:
        UserError: There is no score ``ranked_by``.
    """
    check_choice("ranked_by", ranked_by, HallucinationScore)
    by_id = {question.id: question for question in questions}
    useless = scores.probe.shortage if ranked_by == "probe_score" else ""
    candidates = [
        _candidate(
            by_id[name],
            signal,
            None if useless else float(scores.by_name[ranked_by][index]),
            scores.rollout_probe[index].tolist(),
            selection,
            prompt_tokens[name],
        )
        for index, (name, signal) in enumerate(signals.items())
    ]
    reasons, undecided = selection_reasons(candidates, selection)
    because = f" ({useless})" if useless else ""
    note = f"{ranked_by}: {undecided}{because}" if undecided else ""
    contexts = choose_contexts(candidates, [reason == "selected" for reason in reasons], selection)
    privileged = [by_id[candidate.question_id].privileged_context is not None for candidate in candidates]
    contexts = [[] if own else context for context, own in zip(contexts, privileged, strict=True)]
    if selection.context_policy != "none":
        majority, lacking = selection.context_policy == "majority_solution", []
        for candidate, reason, context, own in zip(candidates, reasons, contexts, privileged, strict=True):
            cut = majority and candidate.vote.winner is not None  # under the filter all, every question comes this far
            lacking.append(reason if context or own or reason != "selected" else "cut_off" if cut else "no_context")
        reasons = lacking
    decided = {
        name: _decided(
            signal,
            reason,
            context,
            {score: values[index] for score, values in scores.by_name.items()},
            1.0 if selection.question_weight == "uniform" else signal.vote.share,
        )
        for index, ((name, signal), reason, context) in enumerate(zip(signals.items(), reasons, contexts, strict=True))
    }
    rows = [
        QuestionRow(
            question_id=question.id,
            text_sha256=question.text_sha256,
            **{name: getattr(question, name) for name in WITHOUT_GOLD},
            **decided.get(question.id, _TOO_LONG),
        )
        for question in questions
    ]
    return rows, note


def _candidate(
    question: Question,
    signal: QuestionSignals,
    score: float | None,
    probe_scores: Sequence[float],
    selection: SelectionConfig,
    prompt_tokens: int,
) -> Candidate:
    usable = [selection.keep_truncated or rollout.finish_reason == "stop" for rollout in signal.rollouts]
    chosen = representative(signal.answers, signal.vote.winner, probe_scores, usable)
    majority = [] if chosen is None else [index for index in signal.majority if usable[index]]
    part: RolloutPart = "all" if selection.demonstration_thoughts else "answer"
    lengths = [len(rollout.positions(part)) for rollout in signal.rollouts]
    return Candidate(
        question_id=question.id,
        text_sha256=question.text_sha256,
        kind=question.kind or question.domain,
        vote=signal.vote,
        score=score,
        representative=chosen,
        shortest=min(majority, key=lambda index: lengths[index], default=None),
        signature=signature(signal.ids, majority, chosen, selection.signature),
        hidden=signal.hidden[chosen or 0],
        num_tokens=prompt_tokens + lengths[chosen or 0],
    )


_TOO_LONG: dict[str, Any] = {
    "raw_answers": (),
    "answers": (),
    "vote": None,
    "pseudo_label": None,
    "scores": {},
    "selected": False,
    "reason": "too_long",
    "context": (),
    "weight": 1.0,
}


def _decided(
    signal: QuestionSignals,
    reason: Reason,
    context: Sequence[DemonstrationRecord],
    scores: Mapping[str, float],
    weight: float,
) -> dict[str, Any]:
    vote = signal.vote
    return {
        "raw_answers": signal.reading.raw_answers,
        "answers": signal.reading.answers,
        "vote": VoteRecord(count=vote.count, n=vote.n, n_tied=vote.n_tied),
        "pseudo_label": vote.winner,
        "scores": {name: round(float(score), DECIMALS) for name, score in scores.items()},
        "selected": reason == "selected",
        "reason": reason,
        "context": tuple(context),
        "weight": weight,
    }
