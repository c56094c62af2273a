"""Sample K rollouts per question: each prompt is computed once and its K rows decode together.

Continuous batching: a new question starts as soon as rows finish, so the batch stays full whatever the lengths. Every
random number comes from ``(seed, salt, question id)``, never from a global generator, so a question's batch does not
change its rollouts (up to the last bits of floating point).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.models.finite import first_not_finite
from neurosig.models.prefix import pad
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.next_token import next_tokens, seen_tokens, uniforms
from neurosig.sampling.packed_weights import PackedWeights, WeightOf, own_weight
from neurosig.sampling.rollouts import FinishReason, Rollout, answer_start, completion_text
from neurosig.sampling.step_graph import StepGraph

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.sampling.kv_cache import Mask, RowCache

WINDOW = 4
"""Batches of questions per window, which share one stream of rows; resuming decodes unfinished windows again."""
REFILL_AT = 0.125
"""Waiting questions enter the batch once this share of its rows has finished."""
COMPACT_BELOW = 0.75
"""Without waiting questions, finished rows leave the batch once less than this share of the rows is decoding."""
COMPACT_FIXED_BELOW = 0.5
"""The same for a batch of fixed shapes, whose step has to be captured again afterwards."""


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
    compile_decoding: bool = False,
    salt: str = "",
    done: Collection[str] = (),
    weight_of: WeightOf = own_weight,
) -> Iterator[list[Rollout]]:
    """Yield each prompt's K rollouts as soon as the last of them finishes; short prompts start first.

    Args:
        loaded: Model and tokenizer; an active adapter stays active.
        prompts: One prompt per question.
        config: The sampling configuration.
        batch_rows: Rollouts per decoded batch; memory and speed only.
        compile_decoding: Decode with fixed shapes, on CUDA as a captured graph; memory and speed only.
        salt: Mixed into the seed, so that each training step draws other numbers.
        done: Question ids of an earlier, interrupted call, which are not yielded again. The windows are those of that
            call and only windows without a missing question are skipped, so the remaining rollouts are the same to
            the last bit.
        weight_of: See `PackedWeights`; it has no effect where nothing is packed.

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
    size = WINDOW * questions
    windows = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    todo = [window for window in windows if not all(prompt.question_id in done for prompt in window)]
    if not todo:
        return
    rows = min(questions, len(ordered)) * config.num_generations
    packed = PackedWeights(loaded.model.modules(), rows, weight_of)
    graph = StepGraph(loaded.model.device) if compile_decoding else None
    for window in todo:
        for group in _decode_window(loaded, window, config, questions, salt, packed, graph):
            if group[0].question_id not in done:
                yield group


def _decode_window(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    questions: int,
    salt: str,
    packed: PackedWeights,
    graph: StepGraph | None,
) -> Iterator[list[Rollout]]:
    """Decode a window with at most ``questions`` questions in the batch; waiting ones replace finished rows."""
    k = config.num_generations
    slots, started = questions * k, 0
    batch = _Batch(loaded, prompts, config, salt, packed, graph)
    while started < len(prompts) or batch.decoding:
        free = slots - batch.decoding
        if started < len(prompts) and free >= max(k, REFILL_AT * slots):
            admitted = range(started, min(started + free // k, len(prompts)))
            batch.admit(admitted)
            started = admitted.stop
        else:
            if started == len(prompts):
                batch.compact()
            batch.step()
        yield from batch.take_finished()


class _Batch:
    """A window's rollouts, and the batch slots of the rows that are decoding.

    A slot holds row ``question * K + rollout``. After its row finishes it stays in the batch until a new row takes it
    or `compact` drops it; meanwhile it attends to itself alone and its tokens are ignored. The device draws tokens and
    the host keeps the books, from one small tensor per step: nothing else makes it wait for the device.

    Attributes:
        decoding: Number of slots whose row has not finished.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        salt: str,
        packed: PackedWeights,
        graph: StepGraph | None,
    ):
        self._packed, self._graph = packed, graph
        self._loaded, self._prompts, self._config = loaded, prompts, config
        self._device, shape = loaded.model.device, (len(prompts) * config.num_generations, config.max_new_tokens)
        numbers = np.concatenate([uniforms(prompt.question_id, config, salt) for prompt in prompts])
        self._uniforms = torch.from_numpy(numbers).to(self._device)
        self._tokens = np.zeros(shape, dtype=np.int64)
        self._measures = np.zeros((*shape, 3), dtype=np.float32)
        self._lengths = np.zeros(shape[0], dtype=np.int64)
        self._unfinished = [config.num_generations] * len(prompts)
        self._finished: list[int] = []
        self.decoding = 0
        # one entry per slot, from `_form` on; ``begins`` is the row's first column in the cache
        self._cache: RowCache
        self._rows: Int[np.ndarray, " slots"]
        self._begins: Int[np.ndarray, " slots"]
        self._live: Bool[np.ndarray, " slots"]
        self._last: Int[Tensor, " slots"]
        self._next_uniform: Int[Tensor, " slots"]
        self._device_begins: Int[Tensor, " slots"]
        self._seen: Bool[Tensor, "slots vocab"] | None
        self._begins_changed = False

    @torch.inference_mode()
    def admit(self, questions: range) -> None:
        """Run these questions' prompts; their rows take free slots, or form the batch if no row is decoding."""
        from neurosig.sampling.kv_cache import RowCache

        k = self._config.num_generations
        ids, mask = pad([self._prompts[q].token_ids for q in questions], side="left", device=self._device)
        cache = RowCache(self._loaded.model.config)
        logits = self._forward(cache, ids, mask.long(), (mask.long().cumsum(-1) - 1).clamp_min(0))
        owners = torch.arange(len(questions), device=self._device).repeat_interleave(k)
        rows = np.arange(questions.start * k, questions.stop * k)
        if self.decoding == 0:
            slots = np.arange(len(rows))
            self._form(cache, owners, logits.shape[-1])
        else:
            slots = np.flatnonzero(~self._live)[: len(rows)]
            if (missing := cache.end - self._cache.end) > 0:
                self._shift(missing)
            self._cache.put(self._on_device(slots), cache, owners)
        lengths = np.repeat([len(self._prompts[q].token_ids) for q in questions], k)
        self._rows[slots], self._begins[slots], self._live[slots] = rows, self._cache.end - lengths, True
        self._begins_changed = True
        target = self._on_device(slots)
        self._next_uniform[target] = self._on_device(rows * self._config.max_new_tokens)
        if self._seen is not None:
            self._seen[target] = seen_tokens(ids, mask, logits.shape[-1], k)
        self.decoding += len(rows)
        self._note(slots, self._draw(logits[owners], target))

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token of every row."""
        if self._cache.full:
            self._shift(-int(self._begins[self._live].min()))
        if self._begins_changed:
            self._device_begins.copy_(self._on_device(self._begins), non_blocking=True)
            self._begins_changed = False
        live = np.flatnonzero(self._live)
        self._cache.begin_token()
        if self._graph is not None and self._cache.fixed:
            drawn = self._graph.run(self._decode, self._cache.version)
        elif self._device.type == "cpu" and len(live) < len(self._live):
            drawn = self._decode(self._on_device(live))  # drawing takes longer here than choosing the rows
        else:
            drawn = self._decode()
        self._cache.end_token()
        self._note(live, drawn)

    @torch.inference_mode()
    def compact(self) -> None:
        """Drop the slots of finished rows if there are many."""
        below = COMPACT_FIXED_BELOW if self._cache.fixed else COMPACT_BELOW
        if self.decoding < below * len(self._live):
            live = np.flatnonzero(self._live)
            self._rows, self._begins, self._live = self._rows[live], self._begins[live], self._live[live]
            keep = self._on_device(live)
            self._last, self._next_uniform = self._last[keep], self._next_uniform[keep]
            self._device_begins = self._device_begins[keep]
            self._seen = None if self._seen is None else self._seen[keep]
            self._cache.keep(keep)

    def take_finished(self) -> list[list[Rollout]]:
        """The questions whose K rollouts were completed since the last call."""
        finished, self._finished = self._finished, []
        return [self._group(question) for question in finished]

    def _form(self, cache: RowCache, owners: Int[Tensor, " rows"], vocabulary: int) -> None:
        """Start a batch whose rows continue these rows of the cache."""
        if self._graph is not None:
            cache.fix()
        cache.keep(owners)
        self._cache, rows = cache, len(owners)
        self._rows, self._begins = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        self._live = np.zeros(rows, dtype=np.bool_)
        self._last, self._next_uniform = torch.zeros_like(owners), torch.zeros_like(owners)
        self._device_begins = torch.zeros_like(owners)
        penalised = self._config.repetition_penalty != 1
        self._seen = owners.new_zeros(rows, vocabulary, dtype=torch.bool) if penalised else None

    def _shift(self, columns: int) -> None:
        self._cache.shift(columns)
        self._begins = (self._begins + columns).clip(min=0)
        self._begins_changed = True

    def _on_device(self, values: Int[np.ndarray, " n"]) -> Int[Tensor, " n"]:
        """A copy, made without waiting for what the device computes."""
        copied = torch.from_numpy(values.copy())
        return (copied.pin_memory() if self._device.type == "cuda" else copied).to(self._device, non_blocking=True)

    def _forward(
        self, cache: RowCache, ids: Int[Tensor, "rows new"], mask: Mask, positions: Int[Tensor, "rows new"]
    ) -> Float[Tensor, "rows vocab"]:
        with self._packed:
            output = self._loaded.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]

    def _decode(self, slots: Int[Tensor, " slots"] | None = None) -> Float[Tensor, "drawn 4"]:
        """Run all rows' last tokens and draw the next ones of these slots, without waiting for the device."""
        begins = self._device_begins
        mask = self._cache.masks(begins, padded=bool(self._begins.any()))
        logits = self._forward(self._cache, self._last[:, None], mask, self._cache.positions(begins))
        return self._draw(logits if slots is None else logits[slots], slots)

    def _draw(
        self, logits: Float[Tensor, "slots vocab"], slots: Int[Tensor, " slots"] | None
    ) -> Float[Tensor, "slots 4"]:
        """Draw one token for each of these slots (None: all): token, log-probability, entropy, self-certainty."""
        index = self._next_uniform if slots is None else self._next_uniform[slots]
        seen = self._seen if slots is None or self._seen is None else self._seen[slots]
        drawn = self._uniforms.take(index.clamp_max(self._uniforms.numel() - 1))  # finished rows count on
        chosen, measures = next_tokens(logits, drawn, seen, self._config)
        if slots is None:
            self._last.copy_(chosen)
            self._next_uniform += 1
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
        else:
            self._last[slots], self._next_uniform[slots] = chosen, index + 1
            if self._seen is not None:
                self._seen[slots, chosen] = True
        return torch.cat([chosen[:, None].float(), measures], dim=1)  # exact: vocabularies are far below 2**24

    def _note(self, slots: Int[np.ndarray, " live"], drawn: Float[Tensor, "drawn 4"]) -> None:
        """Note the tokens of the live ``slots`` and finish the rows that they end; the one wait for the device."""
        values = drawn.cpu().numpy()
        if len(values) > len(slots):
            values = values[slots]
        rows, tokens = self._rows[slots], values[:, 0].astype(np.int64)
        if not np.isfinite(values).all():
            self._refuse(int(rows[~np.isfinite(values).all(axis=-1)][0]))
        step = self._lengths[rows]
        self._tokens[rows, step], self._measures[rows, step] = tokens, values[:, 1:]
        self._lengths[rows] += 1
        ended = np.isin(tokens, self._loaded.eos_token_ids) | (step == self._config.max_new_tokens - 1)
        if not ended.any():
            return
        self._live[slots[ended]], self._begins[slots[ended]] = False, self._cache.end
        self._begins_changed = True
        for question in (rows[ended] // self._config.num_generations).tolist():
            self.decoding -= 1
            self._unfinished[question] -= 1
            if self._unfinished[question] == 0:
                self._finished.append(question)

    def _refuse(self, row: int) -> NoReturn:
        bad = self._prompts[row // self._config.num_generations]
        completion = self._tokens[row, : self._lengths[row]].tolist()
        where = first_not_finite(self._loaded.model, (*bad.token_ids, *completion))
        raise UserError(
            f"model {self._loaded.info.id}: logits are not finite while sampling question "
            f'"{bad.question_id}"{where}; get intact weights or another --dtype'
        )

    def _group(self, question: int) -> list[Rollout]:
        k = self._config.num_generations
        group = []
        for rollout_id, row in enumerate(range(question * k, (question + 1) * k)):
            length = int(self._lengths[row])
            ids = self._tokens[row, :length].tolist()
            ended = ids[-1] in self._loaded.eos_token_ids
            body, decode = ids[:-1] if ended else ids, partial(completion_text, self._loaded.tokenizer)
            logprob, entropy, certainty = torch.from_numpy(self._measures[row, :length]).mean(dim=0).tolist()
            reason: FinishReason = "stop" if ended else "length"
            name, text = self._prompts[question].question_id, decode(body)
            start = answer_start(decode, body, text)
            group.append(Rollout(name, rollout_id, text, tuple(ids), reason, logprob, entropy, certainty, start))
        return group
