"""Multiple choice without sampling: every choice is scored by the log-probability that the model gives it.

``letter`` scores the reply ``Answer: A`` by the sum over its tokens; lm-evaluation-harness calls the accuracy of that
sum ``acc``, and so scores tasks whose choices are letters, such as MMLU. ``text`` scores the choice's text by the mean
over its tokens, so that long choices are not at a loss; the harness's ``acc_norm`` divides by characters instead. The
answer is the best choice, the first of equals; its confidence is the softmax of the scores over the question's choices.

A scored choice is kept as a rollout that nobody sampled, so the files and ``--resume`` are those of sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from distill.completion_hidden import completion_hidden, head_logits
from neurosig.models.finite import first_not_finite
from neurosig.questions.answers import is_correct, normalise
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from neurosig.statistics import metrics

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question
    from neurosig.sampling.sampler import Prompt

ChoiceForm = Literal["letter", "text"]

PARTS = 1000
"""Confidences count in thousandths where `neurosig.statistics.metrics` bins them, as it bins votes."""
HEAD_ROWS = 256
"""Positions whose logits exist at a time."""
_OPENED = "Answer:"


def completions(question: Question, form: ChoiceForm, prompt: str) -> list[str]:
    """What the model would say for each choice, after a prompt that may end in ``Answer:`` (``--template plain``)."""
    said = [choice.strip() for choice in question.choices or ()]
    if form == "letter":
        said = list(ascii_uppercase[: len(said)])
    if prompt.rstrip().endswith(_OPENED):
        return [f" {text}" for text in said]
    return [f"{_OPENED} {text}" for text in said] if form == "letter" else said


def score_choices(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Question],
    form: ChoiceForm,
    *,
    batch_rows: int = 256,
    done: Collection[str] = (),
) -> Iterator[list[Rollout]]:
    """Yield the choices of each question in their order, each with its mean log-probability in nats a token.

    A prompt is computed once for all its choices. Batches are cut alike whatever is done, so that what an interrupted
    call left over comes out the same to the last bit.

    Args:
        loaded: Model and tokenizer.
        prompts: One prompt a question.
        questions: Id -> question, each with choices.
        form: What is scored; see `completions`.
        batch_rows: Choices computed at a time; memory and speed only.
        done: Question ids of an earlier call, which are not yielded again.

    Raises:
        UserError: A question is too long for the model, or its log-probabilities are not finite.
    """
    batches: list[list[tuple[Prompt, list[str], list[tuple[int, ...]]]]] = [[]]
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.token_ids)):
        texts = completions(questions[prompt.question_id], form, str(loaded.tokenizer.decode(list(prompt.token_ids))))
        encoded = loaded.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        _check_length(loaded, prompt, max(map(len, encoded)))
        if batches[-1] and sum(len(asked[1]) for asked in batches[-1]) + len(texts) > batch_rows:
            batches.append([])
        batches[-1].append((prompt, texts, [tuple(ids) for ids in encoded]))
    for batch in batches:
        if all(prompt.question_id in done for prompt, _, _ in batch):
            continue
        rows = [(prompt.token_ids, ids) for prompt, _, encoded in batch for ids in encoded]
        means = iter(_mean_logprobs(loaded, rows))
        for prompt, texts, encoded in batch:
            group = [
                Rollout(prompt.question_id, place, text, ids, "length", next(means))
                for place, (text, ids) in enumerate(zip(texts, encoded, strict=True))
            ]
            if not all(np.isfinite(rollout.mean_logprob or 0.0) for rollout in group):
                bad = next(rollout for rollout in group if not np.isfinite(rollout.mean_logprob or 0.0))
                where = first_not_finite(loaded.model, (*prompt.token_ids, *bad.token_ids))
                raise UserError(
                    f"model {loaded.info.id}: log-probabilities are not finite for the choices of question "
                    f'"{prompt.question_id}"{where}; get intact weights or another --dtype'
                )
            if prompt.question_id not in done:
                yield group


@torch.inference_mode()
def _mean_logprobs(loaded: LoadedModel, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
    """Mean log-probability of each row's completion after its prompt."""
    prompts, said = [prompt for prompt, _ in rows], [ids for _, ids in rows]
    hidden = completion_hidden(loaded.model, prompts, said)
    tokens = torch.tensor([token for ids in said for token in ids], device=hidden.device)
    parts = []
    for block, chosen in zip(hidden.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True):
        parts.append(head_logits(loaded.model, block).log_softmax(-1).gather(1, chosen[:, None])[:, 0].cpu())
    return [float(mine.mean()) for mine in torch.cat(parts).split([len(ids) for ids in said])]


def _check_length(loaded: LoadedModel, prompt: Prompt, longest: int) -> None:
    if len(prompt.token_ids) + longest > loaded.max_length:
        raise UserError(
            f'question "{prompt.question_id}": a prompt of {len(prompt.token_ids)} tokens and a choice of {longest} '
            f"exceed the {loaded.max_length} positions of model {loaded.info.id}; leave the question out"
        )


def choice_row(question: Question, group: Sequence[Rollout], form: ChoiceForm) -> dict[str, Any]:
    """One question's result: a score for each choice, the best of them, and whether it is right.

    ``scores`` are in nats: sums over the tokens for ``letter``, means for ``text``.
    """
    scores = [(rollout.mean_logprob or 0.0) * (len(rollout.token_ids) if form == "letter" else 1) for rollout in group]
    best = int(np.argmax(scores))
    winner = normalise(ascii_uppercase[best])
    return {
        "id": question.id,
        "domain": question.domain,
        "kind": question.kind,
        "choices": len(group),
        "scores": scores,
        "winner": winner,
        "confidence": float(1 / np.exp(np.array(scores) - scores[best]).sum()),
        "correct": int(is_correct(winner, question)),
    }


def summarise_choices(rows: Sequence[Mapping[str, Any]], *, seed: int) -> dict[str, dict[str, Any]]:
    """Aggregates of each domain, with 95% bootstrap intervals over questions; ``chance`` is what guessing would get."""
    summary = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        mine = sorted((row for row in rows if row["domain"] == domain), key=lambda row: row["id"])
        n = len(mine)
        correct = np.array([float(row["correct"]) for row in mine])
        confidence = np.array([row["confidence"] for row in mine])
        parts = np.rint(confidence * PARTS).astype(np.int64)

        def calibration(index: Any, parts: Any = parts, correct: Any = correct) -> float:
            return metrics.ece(parts[index], PARTS, correct[index])

        none = {"low": None, "high": None}
        summary[domain] = {
            "n": n,
            "accuracy": asdict(metrics.paired_mean_interval(correct, np.zeros(n), seed=seed))
            if n > 1
            else {"estimate": float(correct[0]), **none},
            "ece": asdict(metrics.bootstrap_interval(calibration, n, seed=seed, resamples=2000))
            if n > 1
            else {"estimate": metrics.ece(parts, PARTS, correct), **none},
            "smooth_ece": metrics.smooth_ece(parts, PARTS, correct),
            "brier": metrics.brier(parts, PARTS, correct),
            "mean_confidence": float(confidence.mean()),
            "signed_gap": float((confidence - correct).mean()),
            "chance": float(np.mean([1 / row["choices"] for row in mine])),
            "by_kind": {
                kind: {"n": len(right), "accuracy": sum(right) / len(right)}
                for kind in dict.fromkeys(row["kind"] for row in mine if row["kind"] is not None)
                for right in [[row["correct"] for row in mine if row["kind"] == kind]]
            },
        }
    return summary
