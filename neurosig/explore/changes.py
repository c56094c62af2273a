"""Changes of neuron values by forward pre-hooks on the down projections, and which of them are in force.

A neuron's value is one column of the down projection's input, so what changes there changes exactly that neuron,
in whole sequences and in every step of decoding. The weights stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from neurosig.neurons.sites import FFNSites
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Edit = Callable[[Float[Tensor, "rows seq d_mlp"]], Float[Tensor, "rows seq d_mlp"]]
Where = Literal["all", "prompt", "prompt_end", "completion"]
_IN_FORCE: WeakKeyDictionary[PreTrainedModel, list[Change]] = WeakKeyDictionary()


class Change:
    """Edits of some layers' values at some positions; `put_on` and `take_off` are idempotent.

    Attributes:
        prompt_length: Tokens of the prompt of the sequence that runs; None where that is not known, and the first pass
            without a cache counts as the prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: FFNSites,
        edits: Mapping[int, Sequence[Edit]],
        positions: Where | frozenset[int] = "all",
        name: str = "",
    ) -> None:
        self._name = name
        self._model, self._sites, self._edits, self._where = model, sites, edits, positions
        self._handles: list[Any] = []
        self._at = torch.zeros(1, 1, dtype=torch.long)
        self._first_pass = 0
        self.prompt_length: int | None = None

    def __str__(self) -> str:
        where = self._where if isinstance(self._where, str) else f"tokens {', '.join(map(str, sorted(self._where)))}"
        return f"{self._name} at {where}"

    @property
    def relative(self) -> bool:
        """Whether where it acts depends on how long the prompt is."""
        return isinstance(self._where, str) and self._where != "all"

    def put_on(self) -> None:
        """Register the hooks."""
        if self._handles:
            return
        self._handles = [self._model.base_model.register_forward_pre_hook(self._on_model, with_kwargs=True)]
        for layer, edits in self._edits.items():
            down = self._model.get_submodule(self._sites.layers[layer])
            self._handles.append(down.register_forward_pre_hook(self._on_down(edits)))

    def take_off(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shown = args[0] if args else kwargs.get("input_ids")
        shown = kwargs["inputs_embeds"] if shown is None else shown
        rows, width = shown.shape[:2]
        at = kwargs.get("position_ids")
        if at is None:
            cache = kwargs.get("past_key_values")
            seen = 0 if cache is None else cache.get_seq_length()
            at = torch.arange(seen, seen + width, device=shown.device)[None]
        at = at[0] if at.ndim == 3 else at
        self._at = at.expand(rows, width)
        if self.relative and self.prompt_length is None:
            if rows > 1:
                raise UserError(
                    "hooks: positions that depend on the prompt's length, in a batch of several rows; run the texts "
                    "through hooked.trace or hooked.generate, or give positions as numbers"
                )
            if int(at[0, 0]) == 0:
                self._first_pass = width

    def _on_down(self, edits: Sequence[Edit]) -> Callable[..., tuple[Any, ...]]:
        def change(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            value = args[0]
            old = value.reshape(*self._at.shape, -1)
            new = old
            for edit in edits:
                new = edit(new)
            if new.shape != old.shape:
                raise UserError(
                    f"hooks: patch returned a tensor of shape {tuple(new.shape)}, expected {tuple(old.shape)}"
                )
            where = self._mask().to(value.device)
            return (torch.where(where[..., None], new.to(old), old).reshape(value.shape), *args[1:])

        return change

    def _mask(self) -> Bool[Tensor, "rows seq"]:
        n = self._first_pass if self.prompt_length is None else self.prompt_length
        at: Int[Tensor, "rows seq"] = self._at
        match self._where:
            case "all":
                return torch.ones_like(at, dtype=torch.bool)
            case "prompt":
                return at < n
            case "prompt_end":
                return at == n - 1
            case "completion":
                return at >= n
        return torch.isin(at, torch.tensor(sorted(self._where), device=at.device))


def in_force(model: PreTrainedModel) -> tuple[Change, ...]:
    """The changes of the ``with`` blocks around this call, the outermost first."""
    return tuple(_IN_FORCE.get(model, ()))


@contextlib.contextmanager
def changed(model: PreTrainedModel, change: Change) -> Iterator[None]:
    """Have one more change in force, after those that are, inside the block; the model is as before afterwards."""
    around = _IN_FORCE.setdefault(model, [])
    around.append(change)
    try:
        change.put_on()
        yield
    finally:
        change.take_off()
        around.remove(change)


@contextlib.contextmanager
def with_only(model: PreTrainedModel, changes: Sequence[Change]) -> Iterator[None]:
    """Have exactly these changes in force inside the block, in this order, whatever is in force around it."""
    before = _IN_FORCE.get(model, [])
    try:
        for change in before:
            change.take_off()
        _IN_FORCE[model] = list(changes)
        for change in changes:
            change.put_on()
        yield
    finally:
        for change in changes:
            change.take_off()
        _IN_FORCE[model] = before
        for change in before:
            change.put_on()


@contextlib.contextmanager
def prompt_of(changes: Sequence[Change], length: int) -> Iterator[None]:
    """Tell changes how long the prompt of the sequence is that runs inside the block."""
    earlier = [change.prompt_length for change in changes]
    try:
        for change in changes:
            change.prompt_length = length
        yield
    finally:
        for change, before in zip(changes, earlier, strict=True):
            change.prompt_length = before
