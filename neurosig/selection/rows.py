"""From signals to manifest rows: the decisions of selection, one row per question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from neurosig.hallucination.config import HallucinationScore
from neurosig.hallucination.probe import ProbeResult
from neurosig.hallucination.scores import QuestionSignals, Scores
from neurosig.manifest import DemonstrationRecord, QuestionRow, Reason, VoteRecord
from neurosig.patterns.signatures import representative, signature
from neurosig.questions.load import Question
from neurosig.selection.choose import Candidate, selection_reasons
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
) -> list[QuestionRow]:
    """Select questions, choose their contexts, and record the decision about every input question.

    Args:
        questions: All input questions; those without signals were too long.
        signals: Votes and active sets of the traced questions.
        scores: Their hallucination scores.
        ranked_by: The score that the question filter uses.
        selection: Options of filter and context.
        prompt_tokens: Question id -> tokens of its prompt.
    """
    by_id = {question.id: question for question in questions}
    candidates = [
        _candidate(
            by_id[name],
            signal,
            float(scores.by_name[ranked_by][index]),
            representative(signal.answers, signal.vote.winner, scores.rollout_probe[index].tolist()),
            selection,
            prompt_tokens[name],
        )
        for index, (name, signal) in enumerate(signals.items())
    ]
    reasons = selection_reasons(candidates, selection)
    contexts = choose_contexts(candidates, [reason == "selected" for reason in reasons], selection)
    if selection.context_policy != "none":
        reasons = [
            "no_context" if reason == "selected" and not context else reason
            for reason, context in zip(reasons, contexts, strict=True)
        ]
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
    return [
        QuestionRow(
            question_id=question.id,
            line=question.line,
            domain=question.domain,
            kind=question.kind,
            question=question.question,
            choices=question.choices,
            answer_space=question.answer_space,
            text_sha256=question.text_sha256,
            **decided.get(question.id, _TOO_LONG),
        )
        for question in questions
    ]


def _candidate(
    question: Question,
    signal: QuestionSignals,
    score: float,
    chosen: int | None,
    selection: SelectionConfig,
    prompt_tokens: int,
) -> Candidate:
    lengths = [len(rollout.completion_ids_without_eos) for rollout in signal.rollouts]
    majority = [] if chosen is None else signal.majority
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
        "scores": {name: round(float(score), 6) for name, score in scores.items()},
        "selected": reason == "selected",
        "reason": reason,
        "context": tuple(context),
        "weight": weight,
    }


def neurons_csv(ids: Int[Tensor, "n size"], probe: ProbeResult, d_mlp: int) -> str:
    """The probe's neurons: layer, index, weight, and the share of rollouts that have them in their active set."""
    used, counts = ids.unique(return_counts=True)
    active = dict(zip(used.tolist(), counts.tolist(), strict=True))
    lines = ["layer,index,weight,active_share"]
    for neuron, weight in zip(probe.neurons.tolist(), probe.weights, strict=True):
        lines.append(f"{neuron // d_mlp},{neuron % d_mlp},{weight:.6g},{active.get(neuron, 0) / len(ids):.4f}")
    return "\n".join(lines) + "\n"
