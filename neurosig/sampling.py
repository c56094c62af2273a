"""Sample K rollouts a question: the prompt is computed once, its K rows decode together.

Every random number comes from ``(seed, salt, question id)``, never from a global generator, so the batch a
question lands in does not change its rollouts (up to the last bits of floating point).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neurosig.batching import pad
from neurosig.errors import UserError
from neurosig.rollouts import Rollout

if TYPE_CHECKING:
    from neurosig.models import LoadedModel

COMPACT_BELOW = 0.75
"""Finished rows leave the batch once fewer than this share of its rows is still decoding."""


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Everything that shapes a sample; nothing is inherited from a model's own generation config.

    Attributes:
        num_generations: K, rollouts a question.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Nucleus mass kept; 1 keeps all.
        top_k: Number of most likely tokens kept; 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in prompt or completion.
        max_new_tokens: Completion tokens before a rollout is cut off.
        seed: Seed of every random number.
    """

    num_generations: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("num_generations", self.num_generations >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not valid:
                raise UserError(f"{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question's prompt tokens, generation prompt included."""

    question_id: str
    token_ids: tuple[int, ...]


def sample(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    batch_rows: int = 256,
    salt: str = "",
    done: Collection[str] = (),
) -> Iterator[list[Rollout]]:
    """Yield each prompt's K rollouts, shortest prompts first.

    Args:
        loaded: Model and tokenizer; the model is used as it stands (an adapter that is on, stays on).
        prompts: One prompt a question.
        config: The sampling configuration.
        batch_rows: Rollouts decoded at a time; memory and speed only.
        salt: Mixed into the seed, so that each training step draws afresh.
        done: Question ids of an earlier, interrupted call. Batches are cut as in that call and those that are done
            are skipped, so that what is left comes out the same to the last bit.

    Raises:
        UserError: A prompt and its completion exceed the model's positions, or a logit is not finite.
    """
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if longest + config.max_new_tokens > loaded.max_length:
        raise UserError(
            f"model {loaded.info.id}: a prompt of {longest} tokens and --max-new-tokens {config.max_new_tokens} "
            f"exceed its {loaded.max_length} positions"
        )
    ordered = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    questions = max(1, batch_rows // config.num_generations)
    for start in range(0, len(ordered), questions):
        batch = ordered[start : start + questions]
        if not all(prompt.question_id in done for prompt in batch):
            yield from _decode_batch(loaded, batch, config, salt)


@torch.inference_mode()
def _decode_batch(
    loaded: LoadedModel, prompts: Sequence[Prompt], config: SamplingConfig, salt: str
) -> list[list[Rollout]]:
    from transformers import StaticCache

    model, device = loaded.model, loaded.model.device
    k, budget = config.num_generations, config.max_new_tokens
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids, held = pad([prompt.token_ids for prompt in prompts], side="left", device=device)
    mask = held.long()
    cache = StaticCache(config=model.config, max_cache_len=width + budget)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = output.logits[:, -1].repeat_interleave(k, dim=0)
    _reorder(cache, torch.arange(len(prompts), device=device).repeat_interleave(k))
    mask = torch.cat([mask, mask.new_ones(len(prompts), budget)], dim=1).repeat_interleave(k, dim=0)
    positions = mask[:, :width].sum(-1, keepdim=True)
    uniforms = torch.from_numpy(np.concatenate([_uniforms(p.question_id, config, salt) for p in prompts])).to(device)
    eos = torch.tensor(loaded.eos_token_ids, device=device)
    seen = _seen_tokens(ids, mask[::k, :width], logits.shape[-1], k) if config.repetition_penalty != 1 else None

    rows = torch.arange(len(prompts) * k, device=device)
    tokens = torch.full((len(rows), budget), -1, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), budget, device=device)
    entropies = torch.zeros(len(rows), budget, device=device)
    certainties = torch.zeros(len(rows), budget, device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for step in range(budget):
        log_p = torch.log_softmax(logits.float(), dim=-1)
        if not torch.isfinite(log_p.max(dim=-1).values).all():
            bad = prompts[int(rows[~torch.isfinite(log_p.max(dim=-1).values)][0]) // k].question_id
            raise UserError(f'model {loaded.info.id}: logits are not finite while sampling question "{bad}"')
        chosen = _choose(_penalised(logits, log_p, seen, config), uniforms[rows, step], config)
        live = ~done
        tokens[rows[live], step] = chosen[live]
        logprobs[rows, step] = log_p.gather(1, chosen[:, None])[:, 0]
        entropies[rows, step] = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
        certainties[rows, step] = -log_p.clamp_min(-1e4).mean(-1) - math.log(log_p.shape[-1])
        done |= torch.isin(chosen, eos)
        if step == budget - 1 or bool(done.all()):
            break
        if seen is not None:
            seen[torch.arange(len(rows), device=device), chosen] = True
        if (~done).float().mean() < COMPACT_BELOW:
            keep = (~done).nonzero()[:, 0]
            rows, chosen, mask, positions, done = (
                rows[keep],
                chosen[keep],
                mask[keep],
                positions[keep],
                done[keep],
            )
            seen = None if seen is None else seen[keep]
            _reorder(cache, keep)
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=positions + step,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return _collect(loaded, prompts, k, tokens.cpu(), logprobs.cpu(), entropies.cpu(), certainties.cpu())


def _reorder(cache: Any, rows: Int[Tensor, " rows"]) -> None:
    """Keep these rows of a static cache, in this order and as often as they occur."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def _uniforms(question_id: str, config: SamplingConfig, salt: str) -> Float[np.ndarray, "k budget"]:
    digest = hashlib.sha256(f"{config.seed}\x00{salt}\x00{question_id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    return generator.random((config.num_generations, config.max_new_tokens), dtype=np.float32)


def _seen_tokens(ids: Tensor, mask: Tensor, vocab: int, k: int) -> Tensor:
    seen = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    seen.scatter_(1, torch.where(mask.bool(), ids, vocab), True)
    return seen[:, :vocab].repeat_interleave(k, dim=0)


def _penalised(
    logits: Tensor, log_p: Tensor, seen: Tensor | None, config: SamplingConfig
) -> Float[Tensor, "rows vocab"]:
    """Scores to sample from: the repetition penalty (CTRL, arXiv 1909.05858) needs the logits' own signs."""
    if seen is None:
        return log_p
    penalty = config.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits).float()


def _choose(
    scores: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], config: SamplingConfig
) -> Int[Tensor, " rows"]:
    """Next tokens by inverse CDF: far cheaper than ``torch.multinomial`` and driven by our own numbers."""
    if config.temperature == 0:
        return scores.argmax(-1)
    if config.temperature != 1:
        scores = scores / config.temperature
    if config.top_k:
        kth = scores.topk(min(config.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if config.top_p < 1:
        ranked, order = scores.sort(dim=-1, descending=True)
        mass_before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        scores = scores.masked_fill((mass_before >= config.top_p).gather(1, order.argsort(-1)), -torch.inf)
    cdf = scores.softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0].clamp_max(cdf.shape[-1] - 1)


def _collect(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    k: int,
    tokens: Tensor,
    logprobs: Tensor,
    entropies: Tensor,
    certainties: Tensor,
) -> list[list[Rollout]]:
    eos = set(loaded.eos_token_ids)
    groups = []
    for index, prompt in enumerate(prompts):
        group = []
        for rollout_id in range(k):
            row = index * k + rollout_id
            length = int((tokens[row] >= 0).sum())
            ids = tokens[row, :length].tolist()
            ended = ids[-1] in eos
            text = loaded.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
            group.append(
                Rollout(
                    question_id=prompt.question_id,
                    rollout_id=rollout_id,
                    text=str(text),
                    token_ids=tuple(ids),
                    finish_reason="stop" if ended else "length",
                    mean_logprob=float(logprobs[row, :length].mean()),
                    mean_entropy=float(entropies[row, :length].mean()),
                    mean_self_certainty=float(certainties[row, :length].mean()),
                )
            )
        groups.append(group)
    return groups
