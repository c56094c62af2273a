"""Trace texts in one call: which neurons take part in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from neurosig.explore.positions import find_positions, positions_name
from neurosig.explore.texts import TextReader, TracedText
from neurosig.models.load import LoadedModel
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import PAD, ActiveSets, concat_sets
from neurosig.neurons.sites import FFNSites
from neurosig.neurons.tracer import NeuronTracer
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.sampling.sampler import Prompt


class TraceInterrupted(KeyboardInterrupt):
    """Ctrl-C while texts were traced; ``traces`` has those that were finished, in input order."""

    def __init__(self, traces: Traces, total: int) -> None:
        super().__init__(
            f"{len(traces)} of {total} texts are traced; they are the attribute traces of this exception "
            "(in a notebook: import sys; run = sys.last_value.traces)"
        )
        self.traces = traces


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Traces:
    """Texts with their neurons, as `trace` returns them; ``run[3]``, ``run[:10]`` and ``run[[0, 5]]`` are part of it.

    Attributes:
        model: The model that read them.
        texts: The texts, in input order.
        positions: The tokens that were asked for.
        read_at: The tokens that were read, per text indices into ``prompt_ids + completion_ids``.
        site: ``ffn``, ``residual``, ``attention_out`` or a module's path.
        sites: Where the model's FFN neurons are.
        notes: What was done otherwise than asked, in sentences.
    """

    model: LoadedModel
    texts: tuple[TracedText, ...]
    positions: str
    read_at: tuple[Sequence[int], ...]
    site: str
    tracer: NeuronTracer
    notes: tuple[str, ...]
    _sets: ActiveSets | None = None

    @property
    def sites(self) -> FFNSites:
        return self.tracer.sites

    @property
    def config(self) -> TraceConfig:
        """What was measured."""
        return self.tracer.config

    @property
    def sets(self) -> ActiveSets:
        """Active sets of all texts, one row per text.

        Raises:
            UserError: Another site than the FFN's neurons was traced.
        """
        if self._sets is None:
            raise UserError(f"sites={self.site!r} selects no neurons; trace with sites='ffn'")
        return self._sets

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Traces]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, which: int | slice | Sequence[int]) -> Traces:
        if isinstance(which, slice):
            rows = list(range(len(self))[which])
        else:
            rows = [range(len(self))[index] for index in ([which] if isinstance(which, int) else which)]
        sets = self._sets and ActiveSets(*(tensor[rows] for tensor in self._sets))
        texts, read_at = (tuple(items[row] for row in rows) for items in (self.texts, self.read_at))
        return replace(self, texts=texts, read_at=read_at, _sets=sets)

    def to_frame(self, top: int = 20) -> pd.DataFrame:
        """The ``top`` neurons of each text with the largest contributions, largest first."""
        rows = []
        for text, (ids, contributions) in enumerate(zip(*self.sets[:2], strict=True)):
            order = contributions.masked_fill(ids == PAD, -torch.inf).argsort(descending=True, stable=True)[:top]
            rows += [
                (text, *divmod(int(ids[place]), self.sites.d_mlp), float(contributions[place]))
                for place in order
                if ids[place] != PAD
            ]
        return pd.DataFrame(rows, columns=["text", "layer", "neuron", "contribution"])


def trace(
    model: LoadedModel,
    texts: Any,
    *,
    positions: Any = "answer",
    prompts: Iterable[Prompt] | None = None,
    config: TraceConfig | None = None,
    progress: bool = True,
) -> Traces:
    """Trace texts through a model."""
    if not isinstance(model, LoadedModel):
        raise UserError(f"model: expected what neurosig.load_model returns, got {type(model).__name__}")
    name = positions_name(positions)
    read = TextReader(model.tokenizer, prompts).read(texts)
    tracer = NeuronTracer(model.model, config)
    at, notes = find_positions(read, name, model.tokenizer, about_next=tracer.about_next)
    return _traced(Traces(model, read, name, tuple(at), "ffn", tracer, notes), progress)


def _traced(run: Traces, progress: bool) -> Traces:
    rows = [_traced_at(text, at) for text, at in zip(run.texts, run.read_at, strict=True)]
    prompts, completions, masks = zip(*rows, strict=True)
    order: list[int] = []
    parts: list[ActiveSets] = []

    def finished() -> Traces:
        back = torch.tensor(order).argsort()
        merged = ActiveSets(*(tensor[back] for tensor in concat_sets(parts)))
        return replace(run[sorted(order)], _sets=merged)

    try:
        batches = run.tracer.trace_batches(prompts, completions, token_masks=masks)
        with tqdm(total=len(rows), desc="trace", unit="text", disable=not progress, leave=False) as bar:
            for indices, sets in batches:
                order += indices
                parts.append(sets)
                bar.update(len(indices))
    except KeyboardInterrupt as stop:
        if not parts:
            raise
        raise TraceInterrupted(finished(), len(rows)) from stop
    return finished()


def _traced_at(text: TracedText, at: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], list[bool]]:
    """Prompt, completion and mask as the tracer takes them: what is read is the completion's."""
    start = min(at[0], len(text.prompt_ids))
    counted = set(at)
    return text.ids[:start], text.ids[start : at[-1] + 1], [i in counted for i in range(start, at[-1] + 1)]
