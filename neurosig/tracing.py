"""Trace finished rollouts and reduce their FFN activity to active sets.

This is the only file that imports nnsight. Each rollout is run through the model once, teacher-forced. All
reduction happens inside the trace, layer by layer, so that no ``[tokens, d_mlp]`` tensor outlives its layer,
and the run stops after the last FFN: the language-model head is never computed.

Positions: the value at position t is computed from token t, while the model reads it and before it knows
token t+1. A rollout's score is the mean over the positions that hold completion tokens, ``len(prompt)`` up
to and including ``len(prompt) + len(completion) - 1``. So the last completion token counts (the end token
too, if it is among the ids); the prompt's last position, which predicts the first completion token, does not.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import nnsight
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from neurosig.batching import Prefix, distinct_rows, run_prompts
from neurosig.contributions import active_set, cett, magnitude, masked_mean, neurons_per_layer
from neurosig.errors import UserError
from neurosig.sites import ffn_sites, w_out_norms


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """What is measured, and how much at once."""

    value: Literal["gated", "act"] = "gated"
    """A neuron's value: ``gated`` is the down projection's input, act(gate) * up; ``act`` is act(gate) alone.
    The two are the same in a model without a gate."""
    score: Literal["cett", "magnitude"] = "cett"
    """A neuron's contribution at one position; see `neurosig.contributions`."""
    set_size: int = 1000
    """Neuron ids in a rollout's active set, shared out evenly over the layers."""
    batch_tokens: int = 4096
    """Tokens in one batch, padding included. A rollout longer than this makes a batch of its own."""

    def __post_init__(self) -> None:
        for name in ("set_size", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"TraceConfig.{name} is {getattr(self, name)}; it must be at least 1")


class ActiveSets(NamedTuple):
    """The most contributing neurons of each rollout and layer, largest mean score first."""

    ids: Int32[Tensor, "n n_layers k"]
    values: Float[Tensor, "n n_layers k"]


class NeuronTracer:
    """Traces rollouts through one model; build it once for a model.

    nnsight leaves an inert dispatcher in the ``forward`` slot of the model's modules. It registers no hooks,
    and the model's outputs outside a trace stay the same to the bit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TraceConfig = TraceConfig(),
    ) -> None:
        """Wrap ``model``, a causal language model in eval mode, at its FFN sites.

        Raises:
            UserError: An unsupported architecture (see `neurosig.sites.ffn_sites`).
        """
        self.model = model
        self.config = config
        self.sites = ffn_sites(model)
        self.k = neurons_per_layer(self.sites.n_layers, self.sites.d_mlp, config.set_size)
        self._envoy = nnsight.NNsight(model)
        self._layers = [
            (self._envoy.get(act), self._envoy.get(down), norm.to(model.get_submodule(down).weight.device))
            for act, down, norm in zip(self.sites.acts, self.sites.layers, w_out_norms(model, self.sites), strict=True)
        ]

    def trace(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        progress: bool = False,
    ) -> ActiveSets:
        """Active sets of all rollouts, in input order, on the CPU.

        Args:
            prompt_ids: Token ids of each rollout's prompt, as they were when it was sampled.
            completion_ids: Token ids of each completion; neither may be empty.
            progress: Show a bar on stderr.

        Raises:
            UserError: See `trace_batches`.
        """
        shape = (len(prompt_ids), self.sites.n_layers, self.k)
        merged = ActiveSets(torch.empty(shape, dtype=torch.int32), torch.empty(shape))
        with tqdm(total=shape[0], desc="trace", unit="rollout", disable=not progress) as bar:
            for indices, sets in self.trace_batches(prompt_ids, completion_ids):
                merged.ids[indices] = sets.ids
                merged.values[indices] = sets.values
                bar.update(len(indices))
        return merged

    def trace_batches(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], ActiveSets]]:
        """Yield ``(indices, sets)`` batch by batch, the longest rollouts first.

        Row i of ``sets`` is rollout ``indices[i]``. The call checks all arguments, before any batch runs.

        Raises:
            UserError: Lists of different lengths, an empty prompt or completion, a rollout beyond the model's context,
                an id outside its vocabulary, a model in training mode, or scores that are not finite.
        """
        self._check(prompt_ids, completion_ids)
        return self._run([tuple(prompt) for prompt in prompt_ids], completion_ids)

    def _run(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], ActiveSets]]:
        """Each distinct prompt runs once, untraced; its rollouts continue from it in batches of like lengths."""
        distinct, owners = distinct_rows(prompts)
        rollouts_of: list[list[int]] = [[] for _ in distinct]
        for index, owner in enumerate(owners):
            rollouts_of[owner].append(index)
        for group in _pack([len(prompt) for prompt in distinct], self.config.batch_tokens):
            with torch.no_grad():
                prefix = run_prompts(self.model, [distinct[owner] for owner in group])
            row_of = {owner: row for row, owner in enumerate(group)}
            members = [index for owner in group for index in rollouts_of[owner]]
            width = prefix.mask.shape[1]
            for batch in _pack([width + len(completions[index]) for index in members], self.config.batch_tokens):
                indices = [members[place] for place in batch]
                rows = torch.tensor([row_of[owners[index]] for index in indices], device=self.model.device)
                sets = self._trace_batch(prefix.rows(rows), [completions[index] for index in indices])
                _check_finite(sets, indices)
                yield indices, sets

    @torch.no_grad()
    def _trace_batch(self, prefix: Prefix, completions: list[Sequence[int]]) -> ActiveSets:
        inputs = prefix.inputs(completions)
        completion_mask = inputs["attention_mask"][:, prefix.mask.shape[1] :].bool()
        gated, relative, k = self.config.value == "gated", self.config.score == "cett", self.k
        with self._envoy.trace(**inputs) as tracer:
            reduced = nnsight.save([])
            for act, down, norm in self._layers:
                # no name for the value: it would keep the layer's values alive until the next layer's arrive
                reduced.append(
                    _reduce(
                        down.input if gated else act.output,
                        norm,
                        down.output if relative else None,
                        completion_mask,
                        k,
                    )
                )
            tracer.stop()
        gc.collect(1)  # stopping leaves a reference cycle that holds the last layer's activations
        ids = torch.stack([layer_ids.cpu() for layer_ids, _ in reduced], dim=1)
        values = torch.stack([layer_values.cpu() for _, layer_values in reduced], dim=1)
        return ActiveSets(ids.int(), values)

    def _check(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
        if len(prompt_ids) != len(completion_ids):
            raise UserError(f"{len(prompt_ids)} prompts but {len(completion_ids)} completions; pass pairs")
        if self.model.training:
            raise UserError("the model is in training mode; call model.eval() first")
        context = self.model.config.max_position_embeddings
        vocab = self.model.config.vocab_size
        for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            if not prompt or not completion:
                raise UserError(f"rollout {i}: the {'completion' if prompt else 'prompt'} is empty; leave it out")
            ids = [*prompt, *completion]
            if len(ids) > context:
                raise UserError(f"rollout {i}: {len(ids)} tokens; leave it out, the model reads {context}")
            if min(ids) < 0 or max(ids) >= vocab:
                raise UserError(f"rollout {i}: an id outside 0..{vocab - 1}; trace the model that sampled it")


def _reduce(
    value: Float[Tensor, "batch seq d_mlp"],
    w_out_norm: Float[Tensor, " d_mlp"],
    ffn_out: Float[Tensor, "batch seq d_model"] | None,
    completion_mask: Bool[Tensor, "batch seq"],
    k: int,
) -> tuple[Int64[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """One layer's active sets by cett, or by magnitude without ``ffn_out``."""
    score = magnitude(value, w_out_norm) if ffn_out is None else cett(value, w_out_norm, ffn_out)
    return active_set(masked_mean(score, completion_mask.to(score.device)), k)


def _check_finite(sets: ActiveSets, indices: Sequence[int]) -> None:
    finite = sets.values.isfinite().all(dim=-1)
    if not finite.all():
        row, layer = (~finite).nonzero()[0].tolist()
        raise UserError(
            f"rollout {indices[row]}: the neuron scores of layer {layer} are not finite; "
            "check the weights, or load the model in float32"
        )


def _pack(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Split indices into batches of near-equal lengths, longest first: rows * longest <= ``batch_tokens``."""
    batches: list[list[int]] = []
    rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == rows:
            batches.append([])
            rows = max(1, batch_tokens // lengths[i])
        batches[-1].append(i)
    return batches
