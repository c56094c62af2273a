"""Divergence between teacher and student over the whole vocabulary, a few rows at a time.

Hidden states go in; the loss and its gradient come out. The ``[tokens, vocab]`` logits never exist: each chunk of rows
is projected, reduced and turned into its gradient at once. A step costs three projections (student, teacher, gradient
of the hidden states), a fourth where the head is trained, and two ``[chunk, vocab]`` buffers.

Notation: s and t are the student's and the teacher's next-token probabilities. Every divergence except
``sampled_token`` is a sum over the vocabulary of non-negative entries: ``t log(t/s) - t + s`` for the forward KL, with
s and t exchanged for the reverse, and the mixture of both for the JSD. The added terms sum to 0 and matter to a clip of
entries alone: one of the bare ``t log(t/s)`` (OPSD, arXiv 2601.18734) cuts the positive entries, leaves the negative
ones and so pushes the student away from the teacher's favourite. With ``topk`` the sum runs over the student's k
likeliest entries and one for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"]
ClipName = Literal["none", "token", "entry"]
Entries = Float[Tensor, "rows vocab"]

_STATISTICS = 5
"""Rows of numbers per token: `DivergenceOutput`'s, from ``per_token`` to ``student_logprob``."""
_CPU_BLOCK_ENTRIES = 2**19
"""Entries handled at once on the CPU: a block and its temporaries stay in the cache between operations."""


@dataclass(frozen=True, slots=True)
class DivergenceOutput:
    """What `chunked_divergence` returns; everything but ``loss`` is detached.

    Attributes:
        loss: scalar, the sum of weight times clipped divergence; in nats.
        unclipped_loss: the same without the clip.
        per_token: clipped divergence of each token, in nats; 0 where the weight is 0, as below.
        unclipped: divergence of each token without the clip.
        teacher_entropy: entropy of the teacher's next-token distribution, in nats, at the loss temperature.
        student_entropy: the same for the student.
        student_logprob: log-probability of each of ``token_ids``, in nats, at temperature 1; 0 without them.
    """

    loss: Float[Tensor, ""]
    unclipped_loss: Float[Tensor, ""]
    per_token: Float[Tensor, " tokens"]
    unclipped: Float[Tensor, " tokens"]
    teacher_entropy: Float[Tensor, " tokens"]
    student_entropy: Float[Tensor, " tokens"]
    student_logprob: Float[Tensor, " tokens"]


def cut_share(clipped: float, unclipped: float) -> float:
    """Share of ``unclipped`` that is missing from ``clipped``; 0 of nothing."""
    return 0.0 if clipped == unclipped else max(0.0, 1 - clipped / unclipped)


class Terms(NamedTuple):
    """The vocabulary entries of a divergence: ``value`` sums to it; ``value + gauge * (s - t)`` too, and is nowhere
    negative; ``slope`` is the latter's derivative with respect to log s, exactly 0 for KL where s and t agree."""

    value: Entries
    slope: Entries
    gauge: int


_TermsFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Terms]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence, over which entries, clipped how.

    Attributes:
        name: ``forward_kl`` is KL(teacher || student), ``reverse_kl`` is KL(student || teacher). ``sampled_token``
            estimates the reverse KL from the student's own token y: its value is ``log s_y - log t_y``, its gradient
            that of ``log s_y`` times this number held fixed (REINFORCE).
        beta: The teacher's share of the mixture; for ``jsd`` only.
        temperature: Divides both logits. The loss is not multiplied by its square.
        clip: ``token`` scales each token's divergence, and so its gradient, down to the cap; ``entry`` caps each of its
            vocabulary entries, which give no gradient above the cap. Source: reconstruction.
        clip_value: The cap, in nats.
        topk: Sum over the student's k likeliest entries; 0 sums over the whole vocabulary.
        tail: With ``topk``, treat the other entries as one more; else both sides are renormalised without them.
        softcap: ``final_logit_softcapping`` of Gemma 2, applied before the temperature.
        chunk_size: Rows projected at once; memory and speed only.

    Raises:
        UserError: An option is unknown or out of range.
    """

    name: DivergenceName = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    clip: ClipName = "none"
    clip_value: float = 0.2
    topk: int = 0
    tail: bool = True
    softcap: float | None = None
    chunk_size: int = 256

    def __post_init__(self) -> None:
        check_config(self)
        for option in ("temperature", "clip_value", "chunk_size", "softcap"):
            if (value := getattr(self, option)) is not None and not value > 0:
                raise UserError(f"{option} is {value}; it must be above 0")
        if self.name == "jsd" and not 0 < self.beta < 1:
            raise UserError(f"beta is {self.beta}; it must be in (0, 1): its ends are forward_kl and reverse_kl")
        if self.topk < 0:
            raise UserError(f"topk is {self.topk}; choose 0 for the whole vocabulary, or 1 and more")
        if self.name == "sampled_token" and (self.topk or self.clip != "none"):
            raise UserError("sampled_token scores one entry per token; it takes no topk and no clip")

    def terms(self) -> _TermsFunction:
        """The function of ``log s, s, log t, t`` that gives the contribution of each entry."""
        return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": generalized_jsd(self.beta)}[self.name]


FORWARD_KL = Divergence()


def forward_kl(log_s: Entries, s: Entries, log_t: Entries, t: Entries) -> Terms:
    """KL(teacher || student): ``t (log t - log s) - t + s``."""
    return Terms((log_t - log_s).mul_(t), s - t, 1)


def reverse_kl(log_s: Entries, s: Entries, log_t: Entries, t: Entries) -> Terms:
    """KL(student || teacher): ``s (log s - log t) - s + t``."""
    value = (log_s - log_t).mul_(s)
    return Terms(value, value.clone(), -1)


def generalized_jsd(beta: float) -> _TermsFunction:
    """Generalised Jensen-Shannon divergence with the mixture ``m = beta t + (1 - beta) s``.

    ``beta KL(t || m) + (1 - beta) KL(s || m)``, the convention of GKD (arXiv 2306.13649, eq. 1) and of TRL:
    divided by beta it tends to the forward KL as beta goes to 0, divided by 1 - beta to the reverse KL as
    beta goes to 1.
    """

    def terms(log_s: Entries, s: Entries, log_t: Entries, t: Entries) -> Terms:
        log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
        slope = (log_s - log_m).mul_(s).mul_(1 - beta)
        value = (log_t - log_m).mul_(t).mul_(beta).add_(slope)
        return Terms(value, slope, 0)

    return terms


def chunked_divergence(
    student_hidden: Float[Tensor, "tokens d_model"],
    teacher_hidden: Float[Tensor, "tokens d_teacher"],
    student_head: Float[Tensor, "vocab d_model"],
    teacher_head: Float[Tensor, "vocab d_teacher"],
    divergence: Divergence = FORWARD_KL,
    *,
    token_ids: Int[Tensor, " tokens"] | None = None,
    weights: Float[Tensor, " tokens"] | None = None,
) -> DivergenceOutput:
    """Weighted sum over tokens of the divergence between teacher and student.

    The gradient reaches ``student_hidden`` and ``student_head``, whichever require it, and never the teacher. It is
    formed during the forward pass; second derivatives are not available. Softmax and sums run in float32, or in float64
    for float64 input; on the CPU a bfloat16 head is converted once per call.

    Args:
        student_hidden: last hidden states, after the final norm, at the positions that predict the tokens.
        teacher_hidden: the teacher's, for the same tokens.
        student_head: output embedding.
        teacher_head: the teacher's, over the same vocabulary.
        divergence: forward KL over the whole vocabulary by default.
        token_ids: the sampled tokens; ``sampled_token`` needs them.
        weights: one per token; a token of weight 0 is never read.

    Raises:
        UserError: shapes do not fit together, ``topk`` exceeds the vocabulary, or ``token_ids`` are missing.
    """
    _check((student_hidden, student_head), (teacher_hidden, teacher_head), divergence, token_ids, weights)
    tokens = student_hidden.shape[0]
    weights = student_hidden.new_ones(tokens) if weights is None else weights.detach()
    kept = weights.nonzero().squeeze(1)
    gradients = torch.is_grad_enabled()
    loss, statistics = _ChunkedDivergence.apply(
        student_hidden.index_select(0, kept),
        student_head,
        teacher_hidden.detach().index_select(0, kept),
        teacher_head.detach(),
        weights[kept],
        None if token_ids is None else token_ids[kept],
        divergence,
        gradients and student_hidden.requires_grad,
        gradients and student_head.requires_grad,
    )
    unclipped_loss = torch.dot(weights[kept].to(statistics.dtype), statistics[1])
    scattered = statistics.new_zeros(_STATISTICS, tokens).index_copy_(1, kept, statistics)
    return DivergenceOutput(loss, unclipped_loss, *scattered.unbind(0))


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        weights: Tensor,
        token_ids: Tensor | None,
        options: Divergence,
        train_hidden: bool,
        train_head: bool,
    ) -> tuple[Tensor, Tensor]:
        device, tokens, vocab = student_hidden.device, student_hidden.shape[0], student_head.shape[0]
        work = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        ctx.dtypes = student_hidden.dtype, student_head.dtype
        if device.type == "cpu":
            student_hidden, student_head = student_hidden.to(work), student_head.to(work)
            teacher_hidden, teacher_head = teacher_hidden.to(work), teacher_head.to(work)
        weights = weights.to(work)

        statistics = torch.zeros(_STATISTICS, tokens, dtype=work, device=device)
        grad_hidden = torch.zeros(student_hidden.shape, dtype=work, device=device) if train_hidden else None
        grad_head = torch.zeros(student_head.shape, dtype=work, device=device) if train_head else None

        chunk = min(options.chunk_size, tokens)
        student_buffer = torch.empty(chunk, vocab, dtype=work, device=device)
        teacher_buffer = torch.empty(chunk, vocab, dtype=work, device=device)
        block = max(1, _CPU_BLOCK_ENTRIES // vocab) if device.type == "cpu" else max(1, chunk)
        for start in range(0, tokens, max(1, chunk)):
            rows = slice(start, min(start + chunk, tokens))
            size = rows.stop - start
            hidden = student_hidden[rows]
            logits, teacher_logits = student_buffer[:size], teacher_buffer[:size]
            _matmul(hidden, student_head.t(), logits)
            _matmul(teacher_hidden[rows], teacher_head.t(), teacher_logits)
            for first in range(0, size, block):
                inner = slice(first, min(first + block, size))
                outer = slice(start + inner.start, start + inner.stop)
                _reduce(
                    logits[inner],
                    teacher_logits[inner],
                    weights[outer],
                    None if token_ids is None else token_ids[outer],
                    statistics[:, outer],
                    options,
                    train_hidden or train_head,
                )
            if grad_hidden is not None:
                _matmul(logits.to(student_head.dtype), student_head, grad_hidden[rows])
            if grad_head is not None:
                grad_head.addmm_(logits.t(), hidden.to(work))

        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(statistics)
        return torch.dot(weights, statistics[0]), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if saved is None else (saved * grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None, None, None


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _reduce(
    logits: Entries,
    teacher_logits: Entries,
    weights: Float[Tensor, " rows"],
    token_ids: Int[Tensor, " rows"] | None,
    statistics: Float[Tensor, "statistics rows"],
    options: Divergence,
    with_gradient: bool,
) -> None:
    """Fill ``statistics`` and turn ``logits`` into the gradient of the loss."""
    log_s, log_t = _log_softmax(logits, options), _log_softmax(teacher_logits, options)
    s, t = log_s.exp(), log_t.exp()
    per_token, unclipped, teacher_entropy, student_entropy, student_logprob = statistics
    torch.sum(t * log_t, dim=1, out=teacher_entropy).neg_()
    torch.sum(s * log_s, dim=1, out=student_entropy).neg_()

    if token_ids is not None:
        at_1 = log_s if options.temperature == 1 else torch.log_softmax(logits, dim=1)
        student_logprob.copy_(at_1.gather(1, token_ids[:, None])[:, 0])
    if token_ids is not None and options.name == "sampled_token":
        gradient = _sampled_token(log_s, s, log_t, token_ids, unclipped)
        per_token.copy_(unclipped)
    else:
        chosen = log_s.topk(options.topk, dim=1).indices if options.topk else None
        if chosen is not None:
            full = s
            log_s, log_t = _support(log_s, chosen, options.tail), _support(log_t, chosen, options.tail)
            s, t = log_s.exp(), log_t.exp()
        value, slope, gauge = options.terms()(log_s, s, log_t, t)
        torch.sum(value, dim=1, out=unclipped)
        per_token.copy_(unclipped)
        if options.clip == "entry":
            value.add_(s, alpha=gauge).sub_(t, alpha=gauge)
            slope.masked_fill_(value > options.clip_value, 0)
            torch.sum(value.clamp_(max=options.clip_value), dim=1, out=per_token)
        elif options.clip == "token":
            per_token.clamp_(max=options.clip_value)
            weights = torch.where(unclipped > options.clip_value, weights * per_token / unclipped, weights)
        gradient = slope.addcmul_(s, slope.sum(dim=1, keepdim=True), value=-1)
        if chosen is not None:
            gradient = _spread(gradient, s, full, chosen, options.tail)

    if with_gradient:
        gradient.mul_(rearrange(weights / options.temperature, "rows -> rows 1"))
        if options.softcap is None:
            logits.copy_(gradient)
        else:
            logits.div_(options.softcap).square_().neg_().add_(1).mul_(gradient)


def _sampled_token(
    log_s: Entries, s: Entries, log_t: Entries, token_ids: Int[Tensor, " rows"], value: Float[Tensor, " rows"]
) -> Entries:
    """Write the log ratio of the sampled tokens into ``value``; return the gradient, ``(1_y - s) * ratio``."""
    token = rearrange(token_ids, "rows -> rows 1")
    ratio = log_s.gather(1, token) - log_t.gather(1, token)
    value.copy_(ratio[:, 0])
    return s.mul(-ratio).scatter_add_(1, token, ratio)


def _support(log_p: Entries, chosen: Int[Tensor, "rows k"], tail: bool) -> Float[Tensor, "rows n"]:
    """Log-probabilities of the chosen entries, then of all others together; or of the chosen alone, renormalised."""
    kept = log_p.gather(1, chosen)
    mass = kept.logsumexp(dim=1, keepdim=True)
    if not tail:
        return kept - mass
    rest = torch.log(-torch.expm1(mass.clamp(max=-1e-7)))  # the bound keeps an empty tail finite, as TRL does
    return torch.cat([kept, rest], dim=1)


def _spread(
    gradient: Float[Tensor, "rows n"],
    s: Float[Tensor, "rows n"],
    full: Entries,
    chosen: Int[Tensor, "rows k"],
    tail: bool,
) -> Entries:
    """The gradient of the whole vocabulary: each entry of the tail gets its share of the tail's gradient."""
    k = chosen.shape[1]
    spread = full * (gradient[:, k:] / s[:, k:]) if tail else torch.zeros_like(full)
    return spread.scatter_(1, chosen, gradient[:, :k])


def _log_softmax(logits: Entries, options: Divergence) -> Entries:
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    scaled = logits if options.temperature == 1.0 else logits / options.temperature
    return torch.log_softmax(scaled, dim=1)


def _check(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    divergence: Divergence,
    token_ids: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Both sides are (hidden states, head)."""
    (tokens, vocab), (teacher_tokens, teacher_vocab) = ((len(hidden), len(head)) for hidden, head in (student, teacher))
    if teacher_tokens != tokens:
        raise UserError(f"{tokens} student tokens but {teacher_tokens} teacher tokens; score one completion with both")
    if weights is not None and weights.shape != (tokens,):
        raise UserError(f"weights of shape {tuple(weights.shape)} for {tokens} tokens; give one per token")
    if teacher_vocab != vocab:
        raise UserError(f"heads of {vocab} and {teacher_vocab} entries; teacher and student must share one tokenizer")
    for side, (hidden, head) in {"student": student, "teacher": teacher}.items():
        if hidden.shape[1] != head.shape[1] or hidden.dtype != head.dtype:
            raise UserError(
                f"{side} hidden states of width {hidden.shape[1]} in {hidden.dtype}, head of width {head.shape[1]} in "
                f"{head.dtype}; they must agree"
            )
    if divergence.topk > vocab:
        raise UserError(f"topk is {divergence.topk}; choose 0 for the whole vocabulary, or 1 to {vocab}")
    if divergence.name == "sampled_token" and token_ids is None:
        raise UserError("the divergence sampled_token needs token_ids")
