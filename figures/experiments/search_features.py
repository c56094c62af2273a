"""Neuron features of a manifest's rollouts in every reading of the signal search, from one forward pass.

Positions: the prompt's last token, all tokens of the completion, its first three, and those of its answer. Scores:
CETT, and a neuron's contribution to the logit of the next token (``logit``), read one position earlier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.exported import Exported
from neurosig.models.load import LoadedModel, load_model
from neurosig.models.prefix import pad, run_prompts
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import cett, masked_mean, neurons_per_layer, unembed
from neurosig.neurons.nnsight_reader import FFNEnvoy
from neurosig.neurons.sites import ffn_sites, w_out_norms
from neurosig.questions.answers import normalise
from neurosig.questions.prompts import PromptBuilder
from neurosig.runtime.cli import progress
from neurosig.runtime.files import write_atomic

READINGS = ("prompt", "all", "early", "answer", "logit_all", "logit_answer")
EARLY_TOKENS = 3
QUESTIONS_AT_ONCE = 24


@dataclass(frozen=True, slots=True)
class Features:
    """One manifest's rollouts in question order: active neurons and their scores in every reading, and hidden states.

    Attributes:
        ids: Flat neuron ids, the same number from each layer, largest absolute score first.
        values: Their mean scores; ``logit`` readings are signed.
        hidden: Residual stream two thirds up the layers, mean over the completion.
        without_answer: Share of the rollouts whose text does not contain their parsed answer word for word; all their
            tokens count as answer tokens.
        n_layers: Layers of the model.
        d_mlp: Neurons per layer.
    """

    ids: Int[np.ndarray, "n readings size"]
    values: Float[np.ndarray, "n readings size"]
    hidden: Float[np.ndarray, "n d_model"]
    without_answer: float
    n_layers: int
    d_mlp: int


def features_of(exported: Exported, cache: Path, *, quiet: bool = False) -> Features:
    """Trace the manifest's rollouts, or read the features that an earlier run wrote to ``cache``."""
    from safetensors import safe_open
    from safetensors.numpy import save

    path = cache / f"features-{exported.manifest.header.content_sha256[:16]}.safetensors"
    if not path.is_file():
        features = _trace(exported, quiet)
        tensors = {name: getattr(features, name) for name in ("ids", "values", "hidden")}
        numbers = {name: getattr(features, name) for name in ("without_answer", "n_layers", "d_mlp")}
        write_atomic(path, save(tensors, metadata={"features": json.dumps(numbers)}))
    with safe_open(path, framework="numpy") as stored:
        numbers = json.loads(stored.metadata()["features"])
        return Features(*(stored.get_tensor(name) for name in ("ids", "values", "hidden")), **numbers)


def answer_tokens(pieces: Sequence[str], answer: str | None) -> list[bool]:
    """Mask of the answer's tokens: the first run of words that normalises to it; all false without one.

    Args:
        pieces: The text of each token; joined they are the completion.
        answer: The parsed answer, normalised.
    """
    text = "".join(pieces)
    wanted = normalise(answer or "").split()
    words = list(_words(text))
    for start in range(len(words) - len(wanted) + 1):
        run = words[start : start + len(wanted)]
        if wanted and [word for word, _, _ in run] == wanted:
            first, last = run[0][1], run[-1][2]
            ends = np.cumsum([len(piece) for piece in pieces]).tolist()
            return [end > first and end - len(piece) < last for piece, end in zip(pieces, ends, strict=True)]
    return [False] * len(pieces)


def _words(text: str) -> Iterator[tuple[str, int, int]]:
    """Normalised words of a text with start and end of each in it."""
    for match in re.finditer(r"\w+", text):
        for word in normalise(match[0]).split():
            yield word, match.start(), match.end()


def _trace(exported: Exported, quiet: bool) -> Features:
    header = exported.manifest.header
    options = header.options
    where: Any = {"dtype": options["dtype"], "template": options["template"], "adapter": header.adapter()}
    loaded = load_model(str(header.model["id"]), **where)
    builder = PromptBuilder(loaded.tokenizer, header.prompt_config())
    rows, groups = list(exported.rows.values()), list(exported.rollouts.values())
    prompts = [builder.student(row.as_question()) for row in rows]
    answers = [row.answers for row in rows]
    completions = [[rollout.completion_ids_without_eos for rollout in group] for group in groups]
    marked = [
        [answer_tokens(_pieces(loaded, ids), answer) for ids, answer in zip(group, texts, strict=True)]
        for group, texts in zip(completions, answers, strict=True)
    ]
    flat = [mask for group in marked for mask in group]
    without = sum(not any(mask) for mask in flat) / len(flat)
    tracer = _Tracer(loaded)
    order = sorted(range(len(rows)), key=lambda index: max(map(len, completions[index])))
    parts: list[Any] = [None] * len(rows)
    with progress(total=len(rows), desc="trace", quiet=quiet) as bar:
        for start in range(0, len(order), QUESTIONS_AT_ONCE):
            batch = order[start : start + QUESTIONS_AT_ONCE]
            traced = tracer.trace(
                [prompts[index] for index in batch],
                [completions[index] for index in batch],
                [marked[index] for index in batch],
            )
            k = len(groups[0])
            for place, index in enumerate(batch):
                parts[index] = [tensor[place * k : (place + 1) * k] for tensor in traced]
            bar.update(len(batch))
    ids, values, hidden = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Features(ids, values, hidden, without, tracer.sites.n_layers, tracer.sites.d_mlp)


def _pieces(loaded: LoadedModel, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens belongs to its last."""
    prefixes = [list(token_ids[:end]) for end in range(len(token_ids) + 1)]
    texts = [str(loaded.tokenizer.decode(prefix)).rstrip("\ufffd") for prefix in prefixes]
    return [after[len(before) :] for before, after in pairwise(texts)]


class _Tracer:
    """Runs completions once, each after its prompt's last token, and reduces every reading."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model
        self.sites = ffn_sites(loaded.model)
        self.envoy = FFNEnvoy(loaded.model, self.sites)
        self.norms = w_out_norms(loaded.model, self.sites)
        self.share = neurons_per_layer(self.sites.n_layers, self.sites.d_mlp, TraceConfig().set_size)

    @torch.no_grad()
    def trace(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        answers: Sequence[Sequence[Sequence[bool]]],
    ) -> list[Tensor]:
        """``ids`` and ``values`` [n, readings, size] and ``hidden`` [n, d_model] of all completions, in order."""
        prefix = run_prompts(self.model, [prompt[:-1] for prompt in prompts])
        owners = torch.tensor([owner for owner, group in enumerate(completions) for _ in group])
        rows = [[prompt[-1], *ids] for prompt, group in zip(prompts, completions, strict=True) for ids in group]
        tokens, real = pad(rows, side="right", device="cpu")
        answer = pad([[0, *mask] for group in answers for mask in group], side="right", device="cpu")[0].bool()
        position = torch.arange(tokens.shape[1])
        whole = real & (position > 0)
        answer = torch.where(answer.any(dim=1, keepdim=True), answer, whole)
        masks = {
            "prompt": (position == 0).expand_as(real),
            "all": whole,
            "early": whole & (position <= EARLY_TOKENS),
            "answer": answer,
        }
        layers, hidden = self.envoy.read(
            prefix.rows(owners).inputs(rows),
            partial(self._reduce, masks=masks, tokens=tokens),
            lambda hidden: masked_mean(hidden.float(), whole),
            lambda layers, hidden: (layers, hidden),
            value="gated",
            with_output=True,
            hidden_layer=self.sites.n_layers * 2 // 3,
        )
        ids, values = (torch.cat(column, dim=-1) for column in zip(*layers, strict=True))
        return [ids, values, hidden]

    def _reduce(
        self,
        layer: int,
        value: Tensor,
        ffn_out: Tensor,
        w_out: Tensor,
        head: Tensor,
        *,
        masks: dict[str, Bool[Tensor, "n seq"]],
        tokens: Int[Tensor, "n seq"],
    ) -> tuple[Int[Tensor, "n readings share"], Float[Tensor, "n readings share"]]:
        """Each reading's strongest neurons of one layer."""
        score = cett(value, self.norms[layer], ffn_out)
        means = [masked_mean(score, masks[name]) for name in ("prompt", "all", "early", "answer")]
        score = unembed(value[:, :-1], w_out, head[tokens[:, 1:]])
        means += [masked_mean(score, masks[name][:, 1:]) for name in ("all", "answer")]
        mean = torch.stack(means, dim=1)
        top = mean.abs().topk(self.share, dim=-1).indices
        return (top + layer * self.sites.d_mlp).int(), mean.gather(-1, top)
