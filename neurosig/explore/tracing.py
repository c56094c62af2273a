"""The passes behind `neurosig.trace`, with progress; interrupted, they keep the texts that were finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from neurosig.explore.changes import prompt_of
from neurosig.explore.forward import read_modules
from neurosig.neurons.contributions import ActiveSets, concat_sets
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.explore.texts import TracedText
    from neurosig.explore.traces import Traces

T = TypeVar("T")
FEWER = "read fewer tokens (positions=), trace the texts in parts, or raise values_limit"


class TraceInterrupted(KeyboardInterrupt):
    """Ctrl-C while texts were traced; ``traces`` has those that were finished, in input order."""

    def __init__(self, traces: Traces, total: int) -> None:
        super().__init__(
            f"{len(traces)} of {total} texts are traced; this exception's attribute traces has them "
            "(in a notebook: import sys; run = sys.last_value.traces)"
        )
        self.traces = traces


def traced(run: Traces, progress: bool) -> Traces:
    """The run with its active sets."""
    rows = [_traced_at(text, at) for text, at in zip(run.texts, run.read_at, strict=True)]
    order: list[int] = []
    parts: list[ActiveSets] = []

    def finished() -> Traces:
        back = torch.tensor(order).argsort()
        merged = ActiveSets(*(tensor[back] for tensor in concat_sets(parts)))
        return replace(run[sorted(order)], _sets=merged)

    try:
        with tqdm(total=len(rows), desc="trace", unit="text", disable=not progress, leave=False, delay=1) as bar:
            for indices, sets in _batches(run, rows):
                order += indices
                parts.append(sets)
                bar.update(len(indices))
    except KeyboardInterrupt as stop:
        if not parts:
            raise
        raise TraceInterrupted(finished(), len(rows)) from stop
    return finished()


def _batches(run: Traces, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[list[int], ActiveSets]]:
    """Text by text under a change that depends on the prompt's length."""
    prompts, completions, masks = zip(*rows, strict=True)
    if not any(change.relative for change in run.changes):
        yield from run.tracer.trace_batches(prompts, completions, token_masks=masks)
        return
    for index, (prompt, completion, mask) in enumerate(rows):
        with prompt_of(run.changes, len(run.texts[index].prompt_ids)):
            yield [index], run.tracer.trace([prompt], [completion], token_masks=[mask])


def _traced_at(text: TracedText, at: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], list[bool]]:
    """Prompt, completion and mask as the tracer takes them: what is read is the completion's."""
    start = min(at[0], len(text.prompt_ids))
    counted = set(at)
    return text.ids[:start], text.ids[start : at[-1] + 1], [i in counted for i in range(start, at[-1] + 1)]


def with_values(run: Traces, progress: bool) -> Traces:
    act = run.config.value == "act"

    def keep(layer: int, value: Tensor, made: Tensor, output: Tensor) -> Tensor:
        return (output if act else value).float().cpu()

    def read(index: int) -> Tensor:
        return torch.stack(run.neurons(index, keep))

    done = _each(run, read, lambda part, found: replace(part, _values=found), progress, "values")
    return replace(run, _values=done)


def traced_elsewhere(run: Traces, values_limit: int | None, progress: bool) -> Traces:
    """The run with the means of another site, and its values if they have a limit in bytes."""
    kept_bytes = 0

    def read(index: int) -> Tensor:
        at = run.read_at[index]
        if run.site == "attention_out":
            return run.stream(index, at).attention.float().cpu()
        paths = run.sites.blocks if run.site == "residual" else (run.site,)
        return run.within(index, lambda model, ids: read_modules(model, paths, ids, at)).float().cpu()

    def keep(index: int) -> tuple[Tensor, Tensor | None]:
        nonlocal kept_bytes
        found = read(index)
        if values_limit is None:
            return found.mean(dim=1), None
        kept_bytes += found.numel() * found.element_size()
        if kept_bytes > values_limit:  # the width of a module is known only here
            raise UserError(
                f"values: those of {index + 1} of {len(run)} texts are {kept_bytes / 1e9:.2f} GB, more than "
                f"values_limit={values_limit}; {FEWER}"
            )
        return found.mean(dim=1), found

    def with_(part: Traces, found: tuple[Any, ...]) -> Traces:
        kept = tuple(each for _, each in found)
        return replace(
            part, _vectors=torch.stack([mean for mean, _ in found]), _values=None if values_limit is None else kept
        )

    return with_(run, _each(run, keep, with_, progress, "trace"))


def _each(
    run: Traces,
    read: Callable[[int], T],
    with_: Callable[[Traces, tuple[T, ...]], Traces],
    progress: bool,
    name: str,
) -> tuple[T, ...]:
    """``read`` of every text; interrupted, what is there of the first texts is kept."""
    found: list[T] = []
    try:
        for index in tqdm(range(len(run)), desc=name, unit="text", disable=not progress, leave=False, delay=1):
            found.append(read(index))
    except KeyboardInterrupt as stop:
        if not found:
            raise
        raise TraceInterrupted(with_(run[: len(found)], tuple(found)), len(run)) from stop
    return tuple(found)
