"""Trace finished rollouts and reduce their FFN activity to active sets.

Each rollout is run through the model once, teacher-forced, from its prompt's cache. All reduction happens inside
the trace (`neurosig.neurons.nnsight_reader`), layer by layer (`neurosig.neurons.reduction`), and the run stops after
the last FFN.

Positions: the value at position t is computed from token t, while the model reads it and before it knows
token t+1. A rollout's score is the mean over the positions that hold completion tokens, ``len(prompt)`` up
to and including ``len(prompt) + len(completion) - 1``. So the last completion token counts (the end token
too, if it is among the ids); the prompt's last position, which predicts the first completion token, does not.
The score ``unembed`` is about the token that comes next, so its positions are one earlier: the prompt's last, and
all of the completion but its last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from neurosig.models.prefix import Prefix, distinct_rows, max_positions, pad, run_prompts
from neurosig.neurons.config import NeuronValue, TraceConfig
from neurosig.neurons.contributions import CUT, SCORED, ActiveSets, concat_sets, neurons_per_layer
from neurosig.neurons.reduction import finish, pool, reduce_layer
from neurosig.neurons.sites import ffn_sites, w_out_norms
from neurosig.registry import Kind, find
from neurosig.runtime.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Reader(Protocol):
    """One way to look inside a forward pass: `neurosig.neurons.nnsight_reader.FFNEnvoy` or
    `neurosig.neurons.lens_reader.LensReader`.
    """

    whole: bool

    def read(
        self,
        inputs: Mapping[str, Any],
        reduce: Callable[[int, Tensor, Tensor | None, Tensor, Tensor], T],
        pool: Callable[[Tensor], Tensor],
        finish: Callable[[list[T], Tensor], R],
        *,
        value: NeuronValue,
        with_output: bool,
        hidden_layer: int,
    ) -> R: ...


class NeuronTracer:
    """Traces rollouts through one model with nnsight; build it once for a model.

    Attributes:
        sites: Where the model's FFN neurons are.
        contribution: The score's function and the names of its parameters.
        about_next: Whether the score is about the token that comes next.
        with_output: Whether it reads the FFN's output.
        key: What of the options shapes the sets, with the hashes of functions that are not ours.
    """

    def __init__(
        self, model: PreTrainedModel, config: TraceConfig | None = None, *, remote: bool | str = False
    ) -> None:
        """Wrap ``model``, a causal language model in eval mode, at its FFN sites.

        Args:
            model: The model; for a remote trace its architecture is enough, its weights may be on the meta device.
            config: What is measured.
            remote: Run the model on NDIF (nnsight's ``remote``): True, a host's URL, or ``local`` for a dry run here
                that sends everything through the same serialisation. Whole sequences run then, no prompt is shared.

        Raises:
            UserError: The architecture is not supported (`neurosig.neurons.sites.ffn_sites`), or, with the score
                ``unembed``, the head's width is not that of the residual stream.
        """
        config = config or TraceConfig()
        self.model = model
        self.sites = ffn_sites(model)
        self.config = config.sized(self.sites.n_layers, self.sites.d_mlp)
        self.hidden_layer = self.sites.n_layers * 2 // 3
        scored, self._cut = _named("contribution", config.score, SCORED), _named("active_set", config.active, CUT)
        self.contribution = scored.function, scored.names
        self.about_next, self.with_output = "next_embedding" in scored.names, "ffn_out" in scored.names
        hashes = tuple(one.sha256 for one in (scored, self._cut) if one.sha256 is not None)
        self.key = repr((replace(self.config, batch_tokens=1), *hashes))
        width = model.get_output_embeddings().weight.shape[1]
        if self.about_next and width != self.sites.d_model:
            raise UserError(
                f"score {config.score}: the head reads {width} dimensions, the residual stream has "
                f"{self.sites.d_model}; use cett or magnitude"
            )
        self.reader = self._open(remote)
        self._norms = None
        if not remote:
            self._norms = [
                norm.to(model.get_submodule(down).weight.device)
                for down, norm in zip(self.sites.layers, w_out_norms(model, self.sites), strict=True)
            ]

    def _open(self, remote: bool | str) -> Reader:
        from neurosig.neurons.nnsight_reader import FFNEnvoy

        return FFNEnvoy(self.model, self.sites, remote=remote)

    def trace(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        token_masks: Sequence[Sequence[bool]] | None = None,
        progress: bool = False,
    ) -> ActiveSets:
        """Active sets of all rollouts, in input order, on the CPU.

        Args:
            prompt_ids: Token ids of each rollout's prompt, as they were when it was sampled.
            completion_ids: Token ids of each completion; neither may be empty.
            token_masks: Which completion tokens count, at least one of each rollout; all by default.
            progress: Show a bar on stderr.

        Raises:
            UserError: See `trace_batches`.
        """
        order: list[int] = []
        parts: list[ActiveSets] = []
        with tqdm(total=len(prompt_ids), desc="trace", unit="rollout", disable=not progress) as bar:
            for indices, sets in self.trace_batches(prompt_ids, completion_ids, token_masks=token_masks):
                order += indices
                parts.append(sets)
                bar.update(len(indices))
        if not parts:
            empty = torch.empty(0, 0)
            return ActiveSets(empty.int(), empty, torch.empty(0, self.sites.d_model))
        merged = concat_sets(parts)
        back = torch.tensor(order).argsort()
        return ActiveSets(*(tensor[back] for tensor in merged))

    def trace_batches(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        token_masks: Sequence[Sequence[bool]] | None = None,
    ) -> Iterator[tuple[list[int], ActiveSets]]:
        """Yield ``(indices, sets)`` batch by batch, the longest rollouts first.

        Row i of ``sets`` is rollout ``indices[i]``. The call checks all arguments, before any batch runs.

        Raises:
            UserError: Lists of different lengths, an empty prompt or completion, a rollout beyond the model's context,
                an id outside its vocabulary, a mask of another length or without a token, a model in training mode, or
                scores that are not finite.
        """
        masks = [[True] * len(completion) for completion in completion_ids] if token_masks is None else token_masks
        self._check(prompt_ids, completion_ids, masks)
        return self._run([tuple(prompt) for prompt in prompt_ids], completion_ids, masks)

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        completions: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]],
    ) -> Iterator[tuple[list[int], ActiveSets]]:
        """Each distinct prompt runs once, untraced; its rollouts continue from it in batches of like lengths.

        A thought that does not count runs with its prompt, so that no neuron of it is kept; tokens after the last that
        counts do not run.
        """
        shift = 1 if self.about_next else 0  # a score about the next token is one position earlier
        ends = [len(mask) - list(mask)[::-1].index(True) for mask in masks]  # no later token changes what is read
        completions = [completion[:end] for completion, end in zip(completions, ends, strict=True)]
        masks = [mask[:end] for mask, end in zip(masks, ends, strict=True)]
        if self.reader.whole:
            lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
            for indices in pack_rows(lengths, self.config.batch_tokens):
                traced = [[*prompts[i], *completions[i]] for i in indices]
                counted = [[False] * (len(prompts[i]) - shift) + list(masks[i]) for i in indices]
                yield indices, self._trace_batch(None, traced, counted, indices)
            return
        rows = [_untraced_first(*row) for row in zip(prompts, completions, masks, strict=True)]
        prompts, completions, masks = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
        distinct, owners = distinct_rows(prompts)
        rollouts_of: list[list[int]] = [[] for _ in distinct]
        for index, owner in enumerate(owners):
            rollouts_of[owner].append(index)
        for group in pack_rows([len(prompt) for prompt in distinct], self.config.batch_tokens):
            with torch.no_grad():
                prefix = run_prompts(self.model, [distinct[owner][: len(distinct[owner]) - shift] for owner in group])
            row_of = {owner: row for row, owner in enumerate(group)}
            members = [index for owner in group for index in rollouts_of[owner]]
            width = prefix.mask.shape[1]
            for batch in pack_rows([width + len(completions[index]) for index in members], self.config.batch_tokens):
                indices = [members[place] for place in batch]
                places = torch.tensor([row_of[owners[index]] for index in indices], device=self.model.device)
                traced = [[*prompts[i][len(prompts[i]) - shift :], *completions[i]] for i in indices]
                yield indices, self._trace_batch(prefix.rows(places), traced, [masks[i] for i in indices], indices)

    @torch.no_grad()
    def _trace_batch(
        self,
        prefix: Prefix | None,
        tokens: list[list[int]],
        counted: Sequence[Sequence[bool]],
        indices: Sequence[int],
    ) -> ActiveSets:
        """Trace ``tokens`` after ``prefix``, if any; for ``unembed`` the last of a row is only looked at."""
        config = self.config
        device = "cpu" if prefix is None else self.model.device
        mask = pad([[int(keep) for keep in row] for row in counted], side="right", device=device)[0].bool()
        next_ids = None
        if self.about_next:
            next_ids = pad([row[1:] for row in tokens], side="right", device=device)[0]
            tokens = [row[:-1] for row in tokens]
        *sets, finite = self.reader.read(
            _whole_inputs(tokens) if prefix is None else prefix.inputs(tokens),
            partial(
                reduce_layer,
                mask=mask,
                norms=self._norms,
                next_ids=next_ids,
                contribution=self.contribution,
                active=(self._cut.function, self._cut.names),
                set_size=int(config.set_size),
                share=neurons_per_layer(self.sites.n_layers, self.sites.d_mlp, config.set_size),
                positive_only=config.positive_only,
            ),
            partial(pool, mask=mask),
            partial(
                finish, over_layers=getattr(self._cut.function, "over_layers", None), set_size=int(config.set_size)
            ),
            value=config.value,
            with_output=self.with_output,
            hidden_layer=self.hidden_layer,
        )
        if not finite.all():
            row, layer = (~finite).nonzero()[0].tolist()
            raise UserError(
                f"rollout {indices[row]}: the neuron scores of layer {layer} are not finite; "
                "check the weights, or load the model in float32"
            )
        traced = ActiveSets(*sets)
        finite = traced.hidden_states.isfinite().all(dim=-1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise UserError(
                f"rollout {indices[row]}: the hidden states after layer {self.hidden_layer} are not finite; "
                "check the weights, or load the model in float32"
            )
        return traced

    def _check(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]],
    ) -> None:
        if len(prompt_ids) != len(completion_ids):
            raise UserError(f"{len(prompt_ids)} prompts but {len(completion_ids)} completions; pass pairs")
        if len(masks) != len(completion_ids):
            raise UserError(f"{len(masks)} token masks but {len(completion_ids)} completions; pass one each")
        if self.model.training:
            raise UserError("the model is in training mode; call model.eval() first")
        context = max_positions(self.model)
        vocab = self.model.config.get_text_config().vocab_size
        for i, (prompt, completion, mask) in enumerate(zip(prompt_ids, completion_ids, masks, strict=True)):
            if not prompt or not completion:
                raise UserError(f"rollout {i}: the {'completion' if prompt else 'prompt'} is empty; leave it out")
            if len(prompt) == 1 and self.about_next:
                raise UserError(f"rollout {i}: a prompt of one token; the score {self.config.score} needs two")
            ids = [*prompt, *completion]
            if len(ids) > context:
                raise UserError(f"rollout {i}: {len(ids)} tokens; leave it out, the model reads {context}")
            if min(ids) < 0 or max(ids) >= vocab:
                raise UserError(f"rollout {i}: an id outside 0..{vocab - 1}; trace the model that sampled it")
            if len(mask) != len(completion) or not any(mask):
                raise UserError(
                    f"rollout {i}: a token mask of {len(mask)} with {sum(mask)} tokens for a completion of "
                    f"{len(completion)}; give one flag per token, at least one of them set"
                )


class _Named(NamedTuple):
    function: Callable[..., Any]
    names: tuple[str, ...]
    sha256: str | None


def _named(kind: Kind, name: str, known: Sequence[str]) -> _Named:
    """The function of an option, and which of the ``known`` tensors and numbers it is called with.

    Raises:
        UserError: It has another parameter.
    """
    found = find(kind, name)
    names = tuple(inspect.signature(found.function).parameters)
    if other := [parameter for parameter in names if parameter not in known]:
        raise UserError(f"{kind} {name}: parameter {other[0]}; it may name {', '.join(known)}")
    return _Named(found.function, names, found.sha256)


def _whole_inputs(tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Forward arguments of whole sequences, padded on the right, where causal attention never looks back at."""
    ids, mask = pad(tokens, side="right", device="cpu")
    return {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}


def _untraced_first(
    prompt: tuple[int, ...], completion: Sequence[int], mask: Sequence[bool]
) -> tuple[tuple[int, ...], Sequence[int], Sequence[bool]]:
    """The tokens before the first that counts as part of the prompt, if they are more than the prompt's.

    The prompt then runs again for each of its rollouts, which costs less than reading the neurons of a thought.
    """
    first = list(mask).index(True)
    if first <= len(prompt):
        return prompt, completion, mask
    return (*prompt, *completion[:first]), completion[first:], mask[first:]


def pack_rows(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Split indices into batches of near-equal lengths, longest first: rows * longest <= ``batch_tokens``."""
    batches: list[list[int]] = []
    rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == rows:
            batches.append([])
            rows = max(1, batch_tokens // lengths[i])
        batches[-1].append(i)
    return batches
