"""From signals to manifest rows: the decisions of selection, one row per question."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from neurosig.hallucination.probe import ProbeResult
from neurosig.hallucination.scores import QuestionSignals, Scores
from neurosig.manifest import DemonstrationRecord, QuestionRow, Reason, VoteRecord
from neurosig.patterns.signatures import representative, signature
from neurosig.questions.load import WITHOUT_GOLD, Question
from neurosig.registry import Open
from neurosig.sampling.rollouts import RolloutPart
from neurosig.selection.choose import DECIMALS, Candidate, before_contexts, selection_reasons
from neurosig.selection.config import SelectionConfig
from neurosig.selection.contexts import OWN_SOLUTION, choose_contexts


def candidates_of(
    questions: Sequence[Question],
    signals: Mapping[str, QuestionSignals],
    rollout_probe: Float[np.ndarray, "questions k"],
    selection: SelectionConfig,
    prompt_tokens: Mapping[str, int],
) -> list[Candidate]:
    """The traced questions as selection sees them before any score, in the order of ``signals``.

    Args:
        questions: All input questions.
        signals: Votes and active sets of the traced questions.
        rollout_probe: Probe score of each of their rollouts.
        selection: Options of filter and context.
        prompt_tokens: Question id -> tokens of its prompt.
    """
    by_id = {question.id: question for question in questions}
    return [
        _candidate(by_id[name], signal, rollout_probe[index].tolist(), selection, prompt_tokens[name])
        for index, (name, signal) in enumerate(signals.items())
    ]


def contexts_before(
    candidates: Sequence[Candidate], selection: SelectionConfig, privileged: Collection[str] = ()
) -> dict[str, list[DemonstrationRecord]]:
    """The contexts of the questions that votes and rollouts leave, for scores that see what a context does.

    Args:
        candidates: The traced questions.
        selection: Options of filter and context.
        privileged: Ids of the questions that bring a context of their own.

    Returns:
        Question id -> demonstrations, of the questions that get a context, or need none.
    """
    asked = [reason == "selected" for reason in before_contexts(candidates, selection)]
    found = choose_contexts(candidates, asked, selection)
    bare = selection.context_policy == "none"
    return {
        one.question_id: [] if one.question_id in privileged else context
        for one, keep, context in zip(candidates, asked, found, strict=True)
        if keep and (context or bare or one.question_id in privileged)
    }


def manifest_rows(
    questions: Sequence[Question],
    signals: Mapping[str, QuestionSignals],
    scores: Scores,
    candidates: Sequence[Candidate],
    *,
    ranked_by: str,
    selection: SelectionConfig,
    contexts: Mapping[str, Sequence[DemonstrationRecord]] | None = None,
) -> tuple[list[QuestionRow], str]:
    """Select questions, choose their contexts, and record the decision about every input question.

    Returns:
        One row per question, and what the score could not decide (`neurosig.selection.choose.score_cut`), or "".

    Args:
        questions: All input questions; those without signals were too long.
        signals: Votes and active sets of the traced questions.
        scores: Their scores.
        candidates: See `candidates_of`.
        ranked_by: The score that the question filter uses.
        selection: Options of filter and context.
        contexts: What `contexts_before` chose; default: contexts are chosen among the selected questions.

    Raises:
        UserError: There is no score ``ranked_by``; or see `selection_reasons` and `choose_contexts`.
    """
    Open("score").check("ranked_by", ranked_by)
    useless = scores.probe.shortage if ranked_by == "probe_score" else ""
    values = [None] * len(candidates) if useless else scores.by_name[ranked_by].tolist()
    candidates = [
        replace(one, score=value if value is not None and math.isfinite(value) else None)
        for one, value in zip(candidates, values, strict=True)
    ]
    reasons, undecided = selection_reasons(candidates, selection)
    because = f" ({useless})" if useless else ""
    note = f"{ranked_by}: {undecided}{because}" if undecided else ""
    by_id = {question.id: question for question in questions}
    privileged = [by_id[one.question_id].privileged_context is not None for one in candidates]
    if contexts is None:
        found: Sequence[Sequence[DemonstrationRecord]] = choose_contexts(
            candidates, [reason == "selected" for reason in reasons], selection
        )
    else:
        found = [contexts.get(one.question_id, ()) for one in candidates]
    chosen = [
        () if own or reason != "selected" else context
        for own, reason, context in zip(privileged, reasons, found, strict=True)
    ]
    if selection.context_policy != "none":
        solution, lacking = selection.context_policy in OWN_SOLUTION, []
        for candidate, reason, context, own in zip(candidates, reasons, chosen, privileged, strict=True):
            cut = solution and candidate.vote.winner is not None  # under the filter all, every question comes this far
            lacking.append(reason if context or own or reason != "selected" else "cut_off" if cut else "no_context")
        reasons = lacking
    decided = {
        name: _decided(
            signal,
            reason,
            context,
            {score: float(column[index]) for score, column in scores.by_name.items()},
            1.0 if selection.question_weight == "uniform" else signal.vote.share,
        )
        for index, ((name, signal), reason, context) in enumerate(zip(signals.items(), reasons, chosen, strict=True))
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
    probe_scores: Sequence[float],
    selection: SelectionConfig,
    prompt_tokens: int,
) -> Candidate:
    usable = [selection.keep_truncated or rollout.finish_reason == "stop" for rollout in signal.rollouts]
    chosen = representative(signal.answers, signal.vote.winner, probe_scores, usable)
    majority = [] if chosen is None else [index for index in signal.majority if usable[index]]
    part: RolloutPart = "all" if selection.demonstration_thoughts else "answer"
    lengths = [len(rollout.positions(part)) for rollout in signal.rollouts]
    likely = [index for index in majority if signal.rollouts[index].mean_logprob is not None]
    return Candidate(
        question_id=question.id,
        text_sha256=question.text_sha256,
        kind=question.kind or question.domain,
        vote=signal.vote,
        score=None,
        representative=chosen,
        shortest=min(majority, key=lambda index: lengths[index], default=None),
        signature=signature(signal.ids, majority, chosen, selection.signature),
        hidden=signal.hidden[chosen or 0],
        num_tokens=prompt_tokens + lengths[chosen or 0],
        likeliest=max(likely, key=lambda index: signal.rollouts[index].mean_logprob or 0.0, default=None),
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
        "scores": {name: round(float(score), DECIMALS) for name, score in scores.items() if math.isfinite(score)},
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
