"""Accuracy without sampling: every possible answer is scored by its log-probability.

Multiple choice: ``letter`` scores the reply ``Answer: A`` by the sum over its tokens; lm-evaluation-harness calls the
accuracy of that sum ``acc``, and so scores tasks whose choices are letters, such as MMLU. ``text`` scores the choice's
text by the mean over its tokens, so that long choices are not at a loss; the harness's ``acc_norm`` divides by
characters instead.

Free-form questions with an answer space: the prompt is opened with ``Answer:`` and each member's canonical name is
scored by the mean over its tokens. Its other names are not scored; the member is right where any of its names is the
gold answer. The mean favours long names, whose last tokens follow from the first; the prior corrects that.

The answer is the best choice, the first of equals; its confidence is the softmax of the scores over the question's
choices. With priors, each reply is scored also after the prompt without its question, and the difference of the two
ranks the choices a second time, as PMI-DC does (Holtzman et al. 2021, arXiv 2104.08315; its domain premise is here the
prompt with only the instruction) and ``acc_mutual_info`` of lm-evaluation-harness, which takes sums over the tokens and
an empty prompt.

A scored reply is stored as a rollout, so the files and ``--resume`` are those of sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from string import ascii_uppercase
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from neurosig.models.completion_hidden import HEAD_ROWS, completion_hidden, head_logits
from neurosig.models.finite import first_not_finite
from neurosig.questions.answers.spaces import members
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice
from neurosig.sampling.rollouts import Rollout

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question
    from neurosig.sampling.sampler import Prompt

ChoiceForm = Literal["letter", "text"]
PADDED_ROWS = 32
"""Replies that share a batch whatever their lengths; from there on another length is worth another pass."""
_OPENED = "Answer:"


def check_answer_space(question: Question) -> None:
    """Refuse to rank the answers of a free-form question without a space.

    Raises:
        UserError: Naming the question and its line.
    """
    if not members(question):
        raise UserError(
            f'question "{question.id}" (line {question.line}) has no choices and no answer space, which --scoring '
            'loglikelihood compares; give its record the field "answer_space" or use --scoring sampling'
        )


def completions(question: Question, form: ChoiceForm, prompt: str) -> list[str]:
    """The reply scored for each choice or member of the answer space, after a prompt that may end in ``Answer:``
    (``--template plain``, and every free-form question)."""
    check_choice("form", form, ChoiceForm)
    replies = [choice.strip() for choice in question.choices or [names[0] for names in members(question)]]
    letters = form == "letter" and question.choices is not None
    if letters:
        replies = list(ascii_uppercase[: len(replies)])
    if prompt.rstrip().endswith(_OPENED):
        return [f" {text}" for text in replies]
    return [f"{_OPENED} {text}" for text in replies] if letters else replies


def _opened(loaded: LoadedModel, question: Question, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The prompt, that of a free-form question up to ``Answer:``."""
    if question.choices or str(loaded.tokenizer.decode(list(prompt))).rstrip().endswith(_OPENED):
        return prompt
    return (*prompt, *loaded.tokenizer(_OPENED, add_special_tokens=False)["input_ids"])


def score_choices(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Question],
    form: ChoiceForm,
    *,
    priors: Mapping[str, tuple[int, ...]] | None = None,
    batch_rows: int = 256,
    done: Collection[str] = (),
) -> Iterator[list[Rollout]]:
    """Yield the replies of each question in their order, each with its mean log-probability in nats per token.

    A prompt is computed once for all its replies, a prior once for all questions that share it. Batches do not depend
    on ``done``, so a resumed call gives the same bits.

    Args:
        loaded: Model and tokenizer.
        prompts: One prompt per question.
        questions: Id -> question, each with choices or an answer space.
        form: What is scored; see `completions`.
        priors: Question id -> its prompt without the question; the replies after it follow those after the prompt.
        batch_rows: Replies per batch; memory and speed only.
        done: Question ids to skip.

    Raises:
        UserError: A question is too long for the model, or its log-probabilities are not finite.
    """
    batches: list[list[tuple[Prompt, list[str], list[tuple[int, ...]]]]] = [[]]
    for given in sorted(prompts, key=lambda prompt: len(prompt.token_ids)):
        prompt = replace(given, token_ids=_opened(loaded, questions[given.question_id], given.token_ids))
        texts = completions(questions[prompt.question_id], form, str(loaded.tokenizer.decode(list(prompt.token_ids))))
        encoded = loaded.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        _check_length(loaded, prompt, max(map(len, encoded)))
        if batches[-1] and sum(len(item[1]) for item in batches[-1]) + len(texts) > batch_rows:
            batches.append([])
        batches[-1].append((prompt, texts, [tuple(ids) for ids in encoded]))
    if {prompt.question_id for prompt in prompts} <= set(done):
        return
    opened = {name: _opened(loaded, questions[name], prior) for name, prior in (priors or {}).items()}
    after = {
        prompt.question_id: [(opened[prompt.question_id], ids) for ids in encoded]
        for batch in batches
        for prompt, _, encoded in batch
        if opened
    }
    distinct = list(dict.fromkeys(row for rows in after.values() for row in rows))
    prior_means = dict(zip(distinct, _mean_logprobs(loaded, distinct, batch_rows), strict=True))
    for batch in batches:
        if all(prompt.question_id in done for prompt, _, _ in batch):
            continue
        rows = [(prompt.token_ids, ids) for prompt, _, encoded in batch for ids in encoded]
        means = iter(_mean_logprobs(loaded, rows, batch_rows))
        for prompt, texts, encoded in batch:
            values = [next(means) for _ in texts] + [prior_means[row] for row in after.get(prompt.question_id, ())]
            group = [
                Rollout(prompt.question_id, place, text, ids, "length", mean)
                for place, (mean, text, ids) in enumerate(zip(values, cycle(texts), cycle(encoded), strict=False))
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
def _mean_logprobs(
    loaded: LoadedModel, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], batch_rows: int
) -> list[float]:
    """Mean log-probability of each row's completion after its prompt, ``batch_rows`` at a time, the shortest first."""
    means = [0.0] * len(rows)
    for chunk in _chunks([len(ids) for _, ids in rows], batch_rows):
        replies = [rows[place][1] for place in chunk]
        hidden = completion_hidden(loaded.model, [rows[place][0] for place in chunk], replies)
        tokens = torch.tensor([token for ids in replies for token in ids], device=hidden.device)
        parts = []
        for block, chosen in zip(hidden.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True):
            parts.append(head_logits(loaded.model, block).log_softmax(-1).gather(1, chosen[:, None])[:, 0].cpu())
        for place, part in zip(chunk, torch.cat(parts).split([len(ids) for ids in replies]), strict=True):
            means[place] = float(part.mean())
    return means


def _chunks(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices by length, in chunks of at most ``most``; one of `PADDED_ROWS` or more ends where the length grows."""
    chunks: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        full = not chunks or len(chunks[-1]) >= most
        if full or (len(chunks[-1]) >= PADDED_ROWS and lengths[index] > lengths[chunks[-1][-1]]):
            chunks.append([])
        chunks[-1].append(index)
    return chunks


def _check_length(loaded: LoadedModel, prompt: Prompt, longest: int) -> None:
    if len(prompt.token_ids) + longest > loaded.max_length:
        raise UserError(
            f'question "{prompt.question_id}": a prompt of {len(prompt.token_ids)} tokens and a choice of {longest} '
            f"exceed the {loaded.max_length} positions of model {loaded.info.id}; leave the question out"
        )
