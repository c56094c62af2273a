"""Multiple choice without sampling: each choice is scored by its log-probability.

``letter`` scores the reply ``Answer: A`` by the sum over its tokens; lm-evaluation-harness calls the accuracy of that
sum ``acc``, and so scores tasks whose choices are letters, such as MMLU. ``text`` scores the choice's text by the mean
over its tokens, so that long choices are not at a loss; the harness's ``acc_norm`` divides by characters instead. The
answer is the best choice, the first of equals; its confidence is the softmax of the scores over the question's choices.

A scored choice is stored as a rollout, so the files and ``--resume`` are those of sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np
import torch

from distill.results import ChoiceForm
from neurosig.models.completion_hidden import completion_hidden, head_logits
from neurosig.models.finite import first_not_finite
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice
from neurosig.sampling.rollouts import Rollout

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question
    from neurosig.sampling.sampler import Prompt

HEAD_ROWS = 256
"""Positions whose logits are computed at once."""
_OPENED = "Answer:"


def completions(question: Question, form: ChoiceForm, prompt: str) -> list[str]:
    """The reply scored for each choice, after a prompt that may end in ``Answer:`` (``--template plain``)."""
    check_choice("form", form, ChoiceForm)
    replies = [choice.strip() for choice in question.choices or ()]
    if form == "letter":
        replies = list(ascii_uppercase[: len(replies)])
    if prompt.rstrip().endswith(_OPENED):
        return [f" {text}" for text in replies]
    return [f"{_OPENED} {text}" for text in replies] if form == "letter" else replies


def score_choices(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Question],
    form: ChoiceForm,
    *,
    batch_rows: int = 256,
    done: Collection[str] = (),
) -> Iterator[list[Rollout]]:
    """Yield the choices of each question in their order, each with its mean log-probability in nats per token.

    A prompt is computed once for all its choices. Batches do not depend on ``done``, so a resumed call gives the same
    bits.

    Args:
        loaded: Model and tokenizer.
        prompts: One prompt per question.
        questions: Id -> question, each with choices.
        form: What is scored; see `completions`.
        batch_rows: Choices per batch; memory and speed only.
        done: Question ids to skip.

    Raises:
        UserError: A question is too long for the model, or its log-probabilities are not finite.
    """
    batches: list[list[tuple[Prompt, list[str], list[tuple[int, ...]]]]] = [[]]
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.token_ids)):
        texts = completions(questions[prompt.question_id], form, str(loaded.tokenizer.decode(list(prompt.token_ids))))
        encoded = loaded.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        _check_length(loaded, prompt, max(map(len, encoded)))
        if batches[-1] and sum(len(item[1]) for item in batches[-1]) + len(texts) > batch_rows:
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
            bad = next((rollout for rollout in group if not np.isfinite(rollout.mean_logprob or 0.0)), None)
            if bad is not None:
                where = first_not_finite(loaded.model, (*prompt.token_ids, *bad.completion_ids))
                raise UserError(
                    f"model {loaded.info.id}: log-probabilities are not finite for the choices of question "
                    f'"{prompt.question_id}"{where}; get intact weights or another --dtype'
                )
            if prompt.question_id not in done:
                yield group


@torch.inference_mode()
def _mean_logprobs(loaded: LoadedModel, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
    """Mean log-probability of each row's completion after its prompt."""
    prompts, replies = [prompt for prompt, _ in rows], [ids for _, ids in rows]
    hidden = completion_hidden(loaded.model, prompts, replies)
    tokens = torch.tensor([token for ids in replies for token in ids], device=hidden.device)
    parts = []
    for block, chosen in zip(hidden.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True):
        parts.append(head_logits(loaded.model, block).log_softmax(-1).gather(1, chosen[:, None])[:, 0].cpu())
    return [float(part.mean()) for part in torch.cat(parts).split([len(ids) for ids in replies])]


def _check_length(loaded: LoadedModel, prompt: Prompt, longest: int) -> None:
    if len(prompt.token_ids) + longest > loaded.max_length:
        raise UserError(
            f'question "{prompt.question_id}": a prompt of {len(prompt.token_ids)} tokens and a choice of {longest} '
            f"exceed the {loaded.max_length} positions of model {loaded.info.id}; leave the question out"
        )
