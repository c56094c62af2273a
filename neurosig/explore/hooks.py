"""Change neurons inside a ``with`` block: silence, scale, set or patch them, and see what the model then does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.explore.changes import Change, Edit, Where, changed, in_force, prompt_of, with_only
from neurosig.explore.texts import TextReader
from neurosig.explore.traces import Traces, check_model, trace
from neurosig.models.load import LoadedModel
from neurosig.neurons.config import neuron_name
from neurosig.neurons.sites import FFNSites, ffn_sites
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample

Neuron = tuple[int, int]
Patch = Callable[[int, Tensor], Tensor]


class Hooked:
    """What `hooks` gives inside its block: the model with the change in force.

    Whatever runs the model inside the block sees the change, also `neurosig.trace` and the model's own ``generate``.
    """

    def __init__(self, model: LoadedModel, change: Change) -> None:
        self.model = model
        self._change = change
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Hooked:
        if self._change in in_force(self.model.model):
            raise UserError("hooks: this block is already open; call neurosig.hooks again for another one")
        self._stack.enter_context(changed(self.model.model, self._change))
        return self

    def __exit__(self, *fault: object) -> None:
        self._stack.close()

    def trace(self, texts: Any, **options: Any) -> Traces:
        """`neurosig.trace` under the change; its tables stay those of the changed model after the block."""
        return trace(self.model, texts, **options)

    def generate(self, prompt: Any, *, max_new_tokens: int = 32, temperature: float = 0.0, seed: int = 0) -> str:
        """The text that the model writes after a prompt.

        Args:
            prompt: A text, a chat or a `neurosig.sampling.sampler.Prompt`, as in `neurosig.trace`.
            max_new_tokens: Most tokens to write.
            temperature: 0 takes the most likely token; above, tokens are drawn.
            seed: Seed of the draws.

        Raises:
            UserError: The prompt is empty, or with its completion beyond the model's positions.
        """
        ids = TextReader(self.model.tokenizer).prompt_ids(prompt)
        config = SamplingConfig(num_generations=1, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        with prompt_of(in_force(self.model.model), len(ids)):
            ((rollout,),) = sample(self.model, [Prompt("", ids)], config)
        return rollout.text

    def top_tokens(self, prompt: Any, k: int = 10) -> pd.DataFrame:
        """The most likely next tokens before and after the change.

        Args:
            prompt: A text, chat or (prompt, completion) pair; the token that follows it is meant.
            k: How many; a token belongs if it is among the ``k`` likeliest before or after.

        Returns:
            A row per token, the likeliest after the change first: ``token``, ``id``, ``before`` and ``after``
            (probabilities at temperature 1), ``rank_before`` and ``rank_after`` (1 is the likeliest). Before means
            without this block's change; blocks around it stay in force.
        """
        text = TextReader(self.model.tokenizer).read([prompt])[0]
        model, all_changes = self.model.model, in_force(self.model.model)
        chances = []
        for changes in ([one for one in all_changes if one is not self._change], all_changes):
            with with_only(model, changes), prompt_of(changes, len(text.prompt_ids)):
                chances.append(_next_chances(self.model, text.ids))
        ranks = [chance.argsort(descending=True, stable=True).argsort() + 1 for chance in chances]
        shown = torch.minimum(*ranks) <= k
        ids = shown.nonzero()[:, 0][chances[1][shown].argsort(descending=True, stable=True)].tolist()
        decode = self.model.tokenizer.decode
        table = {"token": [decode([token]) for token in ids], "id": ids}
        table |= {name: chance[ids].tolist() for name, chance in zip(("before", "after"), chances, strict=True)}
        table |= {f"rank_{name}": rank[ids].tolist() for name, rank in zip(("before", "after"), ranks, strict=True)}
        return pd.DataFrame(table)

    def __repr__(self) -> str:
        state = "in force" if self._change in in_force(self.model.model) else "not in force"
        return f"Hooked({self.model.info.id}: {self._change}, {state})"


def hooks(
    model: LoadedModel,
    neurons: Any = (),
    *,
    ablate: Any = (),
    scale: float | Mapping[Neuron, float] | None = None,
    set_to: float | str | Mapping[Neuron, float | str] | None = None,
    patch: Patch | Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    positions: str | int | Iterable[int] = "all",
    reference: Traces | None = None,
) -> Hooked:
    """Change FFN neurons inside a ``with`` block; afterwards the model is as before, also after an error or Ctrl-C.

    A neuron's value is act(gate) * up, its column of the down projection's input; silencing it removes exactly what it
    writes into the residual stream. Blocks may be nested: the outer change acts first.

        >>> from neurosig import hooks, load_model
        >>> model = load_model("smollm2-135m")
        >>> with hooks(model, ablate=[(28, 1095), (25, 200)]) as hooked:
        ...     text = hooked.generate("The capital of France is", max_new_tokens=4)
        ...     table = hooked.top_tokens("The capital of France is", k=3)
        >>> list(table.columns)
        ['token', 'id', 'before', 'after', 'rank_before', 'rank_after']

    Args:
        model: What `neurosig.load_model` returns.
        neurons: (layer, neuron) pairs that a number for ``scale`` or ``set_to`` is about; also a table with columns
            ``layer`` and ``neuron`` such as `Traces.to_frame` gives.
        ablate: (layer, neuron) pairs, or such a table, whose values become 0.
        scale: By what the values of ``neurons`` are multiplied, or a dict from (layer, neuron) to its factor.
        set_to: What the values of ``neurons`` become, in the units of values; ``"mean"`` is each neuron's mean over
            the tokens that ``reference`` read; or a dict from (layer, neuron) to either.
        patch: ``function(layer, values)``, called for every layer with all of its values ``[rows, tokens, d_mlp]``,
            returns the new values; or a dict from a layer to ``function(values)``. It sees the other changes.
        positions: Where the change acts: ``all`` tokens, those of the ``prompt``, its last (``prompt_end``), those of
            the ``completion``, or numbers of tokens, 0 the first of the sequence (often BOS).
        reference: Traces for ``"mean"``.

    Raises:
        UserError: A neuron is outside the model or changed twice, a value is not finite, nothing is changed, or
            ``"mean"`` has no reference.
    """
    check_model(model)
    sites = ffn_sites(model.model)
    set_values = {neuron: 0.0 for neuron in _pairs(ablate, "ablate", sites)}
    given = _per_neuron(set_to, neurons, "set_to", sites)
    for neuron in given.keys() & set_values.keys():
        raise UserError(f"hooks: {neuron_name(*neuron)} is in ablate and in set_to; give one of them")
    set_values |= _means(given, reference, sites)
    factors = _per_neuron(scale, neurons, "scale", sites)
    if neurons is not None and len(neurons) and scale is None and set_to is None:
        raise UserError("hooks: neurons without scale or set_to; say what becomes of them")
    edits: dict[int, list[Edit]] = {}
    for values, edit in ((factors, _scaled), (set_values, _assigned)):
        for layer in sorted({layer for layer, _ in values}):
            columns = [neuron for at, neuron in values if at == layer]
            new = torch.tensor([_number(values[layer, neuron]) for neuron in columns])
            edits.setdefault(layer, []).append(edit(torch.tensor(columns), new))
    for layer, function in _patches(patch, sites):
        edits.setdefault(layer, []).append(function)
    if not edits:
        raise UserError("hooks: nothing is changed; give ablate, scale, set_to or patch")
    what = [f"{len(factors)} scaled"] * bool(factors) + [f"{len(set_values)} set"] * bool(set_values)
    name = ", ".join([*what, *(["patched"] if patch is not None else [])])
    return Hooked(model, Change(model.model, sites, edits, _where(positions), name))


def _pairs(given: Any, option: str, sites: FFNSites) -> list[Neuron]:
    """The (layer, neuron) pairs of an option, each once."""
    if isinstance(given, pd.DataFrame):
        if not {"layer", "neuron"} <= set(given.columns):
            raise UserError(f"hooks: {option}: a table without the columns layer and neuron")
        given = zip(given["layer"].tolist(), given["neuron"].tolist(), strict=True)
    found: dict[Neuron, None] = {}
    for pair in given if isinstance(given, Iterable) and not isinstance(given, str) else [given]:
        try:
            layer, neuron = (int(number) for number in pair)
        except (TypeError, ValueError):
            raise UserError(
                f"hooks: {option}: expected (layer, neuron) pairs such as (19, 696), got {pair!r}"
            ) from None
        if not (0 <= layer < sites.n_layers and 0 <= neuron < sites.d_mlp):
            raise UserError(
                f"hooks: {option}: {neuron_name(layer, neuron)}: the model has layers 0 to {sites.n_layers - 1} of "
                f"neurons 0 to {sites.d_mlp - 1}"
            )
        found[layer, neuron] = None
    return list(found)


def _per_neuron(given: Any, neurons: Any, option: str, sites: FFNSites) -> dict[Neuron, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(zip(_pairs(given, option, sites), given.values(), strict=True))
    pairs = _pairs(neurons, "neurons", sites)
    if not pairs:
        raise UserError(f"hooks: {option}={given!r} of which neurons? give neurons=[(layer, neuron), ...] or a dict")
    return dict.fromkeys(pairs, given)


def _means(given: Mapping[Neuron, Any], reference: Traces | None, sites: FFNSites) -> dict[Neuron, Any]:
    wanted = [neuron for neuron, value in given.items() if value == "mean"]
    if not wanted:
        return dict(given)
    if reference is None:
        raise UserError("hooks: set_to='mean' needs reference=, the traces whose mean values are meant")
    if (reference.sites.n_layers, reference.sites.d_mlp) != (sites.n_layers, sites.d_mlp):
        raise UserError("hooks: reference has traces of another model")
    means = reference.mean_values(wanted).tolist()
    return {**given, **dict(zip(wanted, means, strict=True))}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"hooks: expected a finite number or 'mean', got {value!r}")
    return float(value)


def _scaled(columns: Tensor, factors: Float[Tensor, " kept"]) -> Edit:
    def edit(values: Tensor) -> Tensor:
        new = values.clone()
        new[..., columns] = values[..., columns] * factors.to(values)
        return new

    return edit


def _assigned(columns: Tensor, given: Float[Tensor, " kept"]) -> Edit:
    def edit(values: Tensor) -> Tensor:
        new = values.clone()
        new[..., columns] = given.to(values)
        return new

    return edit


def _patches(patch: Any, sites: FFNSites) -> Sequence[tuple[int, Edit]]:
    if patch is None:
        return []
    if isinstance(patch, Mapping):
        for layer in patch:
            _pairs([(layer, 0)], "patch", sites)
        return list(patch.items())

    def of(layer: int) -> Edit:
        return lambda values: patch(layer, values)

    return [(layer, of(layer)) for layer in range(sites.n_layers)]


def _where(positions: Any) -> Where | frozenset[int]:
    if isinstance(positions, str):
        if positions not in get_args(Where):
            raise UserError(
                f"hooks: positions: expected {', '.join(get_args(Where))}, or numbers of tokens, got {positions!r}"
            )
        where: Where = positions  # type: ignore[assignment]
        return where
    numbers = [positions] if isinstance(positions, int) else list(positions)
    if not numbers or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise UserError(f"hooks: positions: expected numbers of tokens from 0, the first, got {positions!r}")
    return frozenset(numbers)


@torch.inference_mode()
def _next_chances(model: LoadedModel, ids: Sequence[int]) -> Float[Tensor, " vocab"]:
    shown = torch.tensor([list(ids)], device=model.model.device)
    return model.model(input_ids=shown, use_cache=False, logits_to_keep=1).logits[0, -1].float().softmax(-1).cpu()
