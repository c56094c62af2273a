"""Draw the next token of each row, and measure the distribution it comes from."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.sampling.config import SamplingConfig

CPU_ENTRIES = 2**19
"""Probabilities per block on the CPU: a block and its temporaries fit into the processor's cache."""


def next_tokens(
    logits: Float[Tensor, "rows vocab"],
    uniforms: Float[Tensor, " rows"],
    seen: Bool[Tensor, "rows vocab"] | None,
    config: SamplingConfig,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows 3"]]:
    """One token per row, with its log-probability, the entropy and the self-certainty at temperature 1, in nats."""
    at_once = max(1, CPU_ENTRIES // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    parts = []
    for start in range(0, len(logits), at_once):
        block = slice(start, start + at_once)
        log_p = torch.log_softmax(logits[block].float(), dim=-1)
        scores = penalised(logits[block], log_p, None if seen is None else seen[block], config)
        chosen = choose(scores, uniforms[block], config)
        log_p = log_p.clamp_min(-1e4)
        logprob = log_p.gather(1, chosen[:, None])[:, 0]
        entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
        certainty = -log_p.mean(-1) - math.log(log_p.shape[-1])
        parts.append((chosen, torch.stack([logprob, entropy, certainty], dim=-1)))
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([measures for _, measures in parts])


def uniforms(question_id: str, config: SamplingConfig, salt: str) -> Float[np.ndarray, "k budget"]:
    """The numbers in [0, 1) that draw a question's K rollouts, one per token: a function of seed, salt and id."""
    digest = hashlib.sha256(f"{config.seed}\x00{salt}\x00{question_id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    return generator.random((config.num_generations, config.max_new_tokens), dtype=np.float32)


def seen_tokens(
    ids: Int[Tensor, "prompts seq"], mask: Bool[Tensor, "prompts seq"], vocab: int, k: int
) -> Bool[Tensor, "rows vocab"]:
    """The tokens of each prompt without its padding, once for each of its K rows."""
    seen = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    seen.scatter_(1, torch.where(mask, ids, vocab), True)
    return seen[:, :vocab].repeat_interleave(k, dim=0)


def penalised(
    logits: Tensor, log_p: Tensor, seen: Tensor | None, config: SamplingConfig
) -> Float[Tensor, "rows vocab"]:
    """Scores to sample from; the repetition penalty (CTRL, arXiv 1909.05858) needs the logits' signs."""
    if seen is None:
        return log_p
    penalty = config.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits).float()


def choose(
    scores: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], config: SamplingConfig
) -> Int[Tensor, " rows"]:
    """Next tokens by inverse CDF: far cheaper than ``torch.multinomial`` and driven by the question's own numbers."""
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
