"""Hidden states and beliefs at the token where a rollout's answer begins.

Source: INFLOW (equation 1, section 3.3, appendix E.1). Its responses have a fixed form with the answer's letter at the
end; here the answer is found in the text (reconstruction).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.models.completion_hidden import for_head, head_logits
from neurosig.models.load import LoadedModel
from neurosig.models.prefix import Prefix, distinct_rows, run_prompts
from neurosig.neurons.sites import ffn_sites
from neurosig.neurons.tracer import pack_rows
from neurosig.questions.answers import normalise
from neurosig.questions.answers.spaces import members
from neurosig.questions.load import Question
from neurosig.questions.statement import answer_words
from neurosig.sampling.rollouts import Rollout

PROJECTED, PROJECTION_SEED = 64, 42
"""Numbers that a trajectory is projected to, and the seed of the signs (INFLOW, appendix E.1)."""


class AnswerStates(NamedTuple):
    """States of n rollouts at their answers, and their beliefs.

    Attributes:
        trajectory: The states of all layers, each scaled to norm 1, flattened and projected by a random sign matrix;
            the last layer's after the final norm.
        final: The last layer's state, after the final norm.
        beliefs: Probability of each possible answer, normalised, by the logits of their first tokens at the position
            that predicts the answer; one name stands for several that share it. ``None`` where the question names no
            possible answers, or the rollout's answer is not found or begins otherwise than they do.
    """

    trajectory: Float[Tensor, "n projected"]
    final: Float[Tensor, "n d_model"]
    beliefs: list[dict[str | None, float] | None]


@torch.inference_mode()
def answer_states(
    loaded: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    rollouts: Sequence[Rollout],
    answers: Sequence[str | None],
    questions: Sequence[Question],
    *,
    temperature: float,
    batch_tokens: int = 4096,
    prefix: Prefix | None = None,
) -> AnswerStates:
    """Read each rollout once, teacher-forced. Without a located answer, its last token counts.

    Args:
        loaded: The model.
        prompts: Prompt ids of each rollout.
        rollouts: The rollouts.
        answers: What the parser read in each.
        questions: What each answers.
        temperature: Of the beliefs; the rollouts' own (0 counts as 1).
        batch_tokens: Tokens per forward pass; memory and speed only.
        prefix: Of the prompt, if all rollouts have one and it was run before.
    """
    model, places = loaded.model, _AnswerPlaces(loaded)
    found = [places.of(*row) for row in zip(rollouts, answers, questions, strict=True)]
    sites = ffn_sites(model)
    signs = _signs(sites.n_layers, sites.d_model)
    trajectory, final = torch.empty(len(rollouts), PROJECTED), torch.empty(len(rollouts), signs.shape[1])
    beliefs: list[dict[str | None, float] | None] = [None] * len(rollouts)
    completions = [rollout.completion_ids_without_eos for rollout in rollouts]
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True)]
    for batch in pack_rows(lengths, batch_tokens):
        distinct, owners = distinct_rows([prompts[index] for index in batch])
        known = run_prompts(model, distinct) if prefix is None else prefix
        known = known.rows(torch.tensor(owners, device=model.device))
        inputs = known.inputs([completions[index] for index in batch])
        states = model.base_model(**inputs, output_hidden_states=True).hidden_states[1:]
        rows, at = torch.arange(len(batch)), torch.tensor([found[index].token for index in batch])
        own = torch.stack([layer[rows, at].float().cpu() for layer in states], dim=1)
        unit = torch.nn.functional.normalize(own, dim=-1)
        trajectory[batch] = torch.einsum("nld,ldp->np", unit, signs) / PROJECTED**0.5
        final[batch] = own[:, -1]
        before = torch.where((at > 0)[:, None].to(model.device), states[-1][rows, at - 1], known.last_hidden)
        logits = head_logits(model, for_head(model, before)).cpu()
        for row, index in enumerate(batch):
            if tokens := found[index].tokens:
                p = (logits[row, list(tokens.values())] / (temperature or 1.0)).double().softmax(0)
                beliefs[index] = dict(zip(tokens, p.tolist(), strict=True))
    return AnswerStates(trajectory, final, beliefs)


def _signs(n_layers: int, d_model: int) -> Float[Tensor, "layer d_model projected"]:
    drawn = np.random.default_rng(PROJECTION_SEED).integers(0, 2, (n_layers, d_model, PROJECTED))
    return torch.from_numpy(2 * drawn - 1).float()


class _Place(NamedTuple):
    """The completion token at which an answer begins; the first token of each possible answer there, by name."""

    token: int
    tokens: dict[str, int]


@dataclass
class _AnswerPlaces:
    loaded: LoadedModel
    _first: dict[tuple[str, tuple[str, ...]], dict[str, int]] = field(default_factory=dict)

    def of(self, rollout: Rollout, answer: str | None, question: Question) -> _Place:
        ids = list(rollout.completion_ids_without_eos)
        last = _Place(len(ids) - 1, {})
        if answer is None:
            return last
        words = answer_words(self._decode(ids), answer, question)
        if words is None:
            return last
        offset = words[0]
        token = bisect_right(range(len(ids)), offset, key=lambda n: len(self._decode(ids[: n + 1])))
        if token >= len(ids):
            return last
        names = possible_answers(question)
        before = self._decode(ids[:token])
        lead = self._decode(ids)[len(before) : offset]
        if not names:
            return _Place(token, {})
        lower = bool(question.choices) and self._decode(ids)[offset].islower()
        first = self._first_tokens(before, lead, tuple(name.lower() if lower else name for name in names))
        is_there = any(first[name] == ids[token] for name in first)
        return _Place(token, first if is_there else {})

    def _first_tokens(self, before: str, lead: str, names: tuple[str, ...]) -> dict[str, int]:
        """Normalised name -> first token after ``lead``, in the text where they were first seen."""
        if (lead, names) not in self._first:
            n = len(self._encode(before))
            first: dict[str, int] = {}
            for name in names:
                ids = self._encode(f"{before}{lead}{name}")
                if len(ids) > n and ids[n] not in first.values():
                    first[normalise(name) or name] = ids[n]
            self._first[lead, names] = first
        return self._first[lead, names]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(list(ids)))

    def _encode(self, text: str) -> list[int]:
        return list(self.loaded.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def possible_answers(question: Question) -> tuple[str, ...]:
    """The letters of a question's choices, or the canonical names of its answer space; () without."""
    if question.choices:
        return tuple(ascii_uppercase[: len(question.choices)])
    return tuple(names[0] for names in members(question))
