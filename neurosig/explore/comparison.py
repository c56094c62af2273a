"""The same texts through two models: which neurons changed, in which layer, by how much, and whether by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import sparse

from neurosig.explore.probes.display import axes
from neurosig.explore.probes.inputs import model_name, prompt_index, read_groups, read_input
from neurosig.explore.tables import neurons_html
from neurosig.explore.traces import Traces
from neurosig.hallucination.config import ProbeConfig
from neurosig.neurons.contributions import PAD
from neurosig.runtime.cli import printable
from neurosig.runtime.errors import UserError

ALPHA = 0.05
CELLS_AT_ONCE = 20_000_000
"""Flips times neurons in memory at a time."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison:
    """What `compare` found; ``table`` has every neuron that is in an active set of either run.

    Attributes:
        table: See `to_frame`.
        jaccard: Of each text's two active sets, [texts].
        models: Names of the two models, before and after.
        n_texts: Texts.
        n_groups: Groups of texts whose differences flip together.
        permutations: Sign flips.
        n_layers: Layers of both models.
    """

    table: pd.DataFrame
    jaccard: Float[np.ndarray, " texts"]
    models: tuple[str, str]
    n_texts: int
    n_groups: int
    permutations: int
    n_layers: int

    def to_frame(self, alpha: float | None = None) -> pd.DataFrame:
        """A row per neuron, the surest change first and among equally sure ones the largest.

        Args:
            alpha: Only neurons with ``q`` at most this.

        Returns:
            ``layer``, ``neuron``, ``before`` and ``after`` (mean contribution over the texts, 0 where the neuron is
            outside the active set), ``change`` (after minus before), ``texts_before`` and ``texts_after`` (texts that
            have it in the active set), ``p`` (of this neuron alone) and ``q`` (corrected for all neurons: the chance
            that any neuron would change as surely).
        """
        return self.table if alpha is None else self.table[self.table["q"] <= alpha].reset_index(drop=True)

    def by_layer(self, alpha: float = ALPHA) -> pd.DataFrame:
        """Where the changes are: a row per layer.

        Returns:
            ``layer``, ``neurons`` (in an active set of either run), ``changed`` (``q`` at most ``alpha``), ``grown``
            (of these with a positive change), ``change`` (sum of the absolute changes of all its neurons) and
            ``largest`` (the neuron that changes most).
        """
        rows = []
        for layer in range(self.n_layers):
            own = self.table[self.table["layer"] == layer]
            sure, size = own[own["q"] <= alpha], own["change"].abs()
            largest = int(own["neuron"].to_numpy()[size.to_numpy().argmax()]) if len(own) else -1
            rows.append((layer, len(own), len(sure), int((sure["change"] > 0).sum()), float(size.sum()), largest))
        return pd.DataFrame(rows, columns=["layer", "neurons", "changed", "grown", "change", "largest"])

    def plot(self, ax: Any = None) -> Any:
        """Neurons that changed per layer, drawn on matplotlib axes, which are returned."""
        layers, ax = self.by_layer(), axes(ax)
        ax.bar(layers["layer"], layers["changed"])
        ax.set(xlabel="layer", ylabel=f"neurons changed (q <= {ALPHA:g})")
        return ax

    def __repr__(self) -> str:
        changed = int((self.table["q"] <= ALPHA).sum())
        return printable(
            f"Comparison of {self.n_texts} texts through {self.models[0]} and {self.models[1]}: {changed} of "
            f"{len(self.table)} neurons changed (q <= {ALPHA:g}, {self.permutations} sign flips of {self.n_groups} "
            f"groups); mean Jaccard similarity of the active sets {self.jaccard.mean():.3f}"
        )

    def _repr_html_(self) -> str:
        return neurons_html(repr(self), self.table)


def compare(
    before: Traces, after: Traces, *, groups: Any = None, permutations: int = 1999, seed: int = 0
) -> Comparison:
    """Compare the neurons of the same texts in two models of the same layout, such as base and adapter.

        >>> import neurosig
        >>> model = neurosig.load_model("smollm2-135m")
        >>> texts = [f"{city} is a city in" for city in ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi")]
        >>> base = neurosig.trace(model, texts, progress=False)
        >>> with neurosig.hooks(model, scale={(28, 1095): 4.0}):
        ...     changed = neurosig.trace(model, texts, progress=False)
        >>> found = neurosig.compare(base, changed)
        >>> found.to_frame().loc[0, ["layer", "neuron"]].tolist()
        [28, 1095]
        >>> len(neurosig.compare(base, base).to_frame(alpha=0.05))
        0

    The null: a text's difference of contributions is as likely to have the other sign. The statistic of a neuron is the
    sum of its differences over the root of their sum of squares, a monotone function of the paired t. ``p`` is the
    share of the sign flips, the observed one included, with at least the neuron's absolute statistic; ``q`` with at
    least it in any neuron (the largest statistic of each flip, after Westfall & Young 1993), so that the chance of one
    false neuron with ``q <= .05`` is .05. With n groups no p is below 2 ** (1 - n): six are needed for .05.

    Args:
        before: The texts through the first model.
        after: The same texts, read at the same positions, through the second.
        groups: What flips together, one value per text; default: texts of the same prompt.
        permutations: Sign flips.
        seed: Their seed.

    Raises:
        UserError: Other texts, positions, layers, width or contributions; one group; or no sign flip.
    """
    for name, run in (("before", before), ("after", after)):
        if not isinstance(run, Traces):
            raise UserError(f"compare: {name}: expected what neurosig.trace returns, got {type(run).__name__}")
    _check_same(before, after)
    if permutations < 1:
        raise UserError(f"permutations: expected at least 1, got {permutations}")
    owners = prompt_index(before) if groups is None else read_groups(groups, len(before))
    if owners.max() < 1:
        raise UserError("compare: one text has no null to compare with; give at least two, better 10 or more")
    first, second = (read_input(run, ProbeConfig()).matrix for run in (before, after))
    columns = np.flatnonzero(first.count_nonzero(axis=0) + second.count_nonzero(axis=0))
    first, second = first[:, columns], second[:, columns]
    p, q = sign_flip_p(sparse.csr_array(second - first), owners, permutations, seed)
    means = [np.asarray(matrix.sum(axis=0)).ravel() / len(before) for matrix in (first, second)]
    found = pd.DataFrame(
        {
            "layer": columns // before.sites.d_mlp,
            "neuron": columns % before.sites.d_mlp,
            "before": means[0],
            "after": means[1],
            "change": means[1] - means[0],
            "texts_before": first.count_nonzero(axis=0),
            "texts_after": second.count_nonzero(axis=0),
            "p": p,
            "q": q,
        }
    )
    order = np.lexsort((-found["change"].abs(), found["p"], found["q"]))
    return Comparison(
        found.iloc[order].reset_index(drop=True),
        _jaccard(before.sets.neuron_ids.numpy(), after.sets.neuron_ids.numpy()),
        (_name(before), _name(after)),
        len(before),
        int(owners.max()) + 1,
        permutations,
        before.sites.n_layers,
    )


def sign_flip_p(
    differences: sparse.csr_array, groups: Int[np.ndarray, " texts"], permutations: int, seed: int
) -> tuple[Float[np.ndarray, " neurons"], Float[np.ndarray, " neurons"]]:
    """p of each column's paired differences alone, and corrected for all columns (`compare`).

    Args:
        differences: [texts, neurons]; a column without any has p 1.
        groups: Index of each text's group; a group's differences are summed and flip together.
        permutations: Sign flips.
        seed: Their seed.
    """
    n = int(groups.max()) + 1
    summed = sparse.csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape=(n, len(groups)))
    units = sparse.csc_array(summed @ differences)
    size = np.sqrt(np.asarray(units.multiply(units).sum(axis=0)).ravel())
    active = np.flatnonzero(size > 0)
    units = sparse.csc_array(units[:, active] @ sparse.diags_array(1 / size[active]))
    observed = np.abs(np.asarray(units.sum(axis=0)).ravel()) * (1 - 1e-9)  # equal sums may differ in their last bit
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations, n))
    alone, largest = np.empty(len(active)), np.zeros(permutations)
    block = max(1, CELLS_AT_ONCE // permutations)
    for start in range(0, len(active), block):
        part = slice(start, start + block)
        flipped = np.abs((units[:, part].T @ signs.T).T)
        alone[part] = (1 + (flipped >= observed[part]).sum(axis=0)) / (1 + permutations)
        largest = np.maximum(largest, flipped.max(axis=1))
    any_as_sure = permutations - np.searchsorted(np.sort(largest), observed)
    p, q = np.ones(len(size)), np.ones(len(size))
    p[active], q[active] = alone, (1 + any_as_sure) / (1 + permutations)
    return p, q


def _jaccard(
    first: Int[np.ndarray, "texts size"], second: Int[np.ndarray, "texts size"]
) -> Float[np.ndarray, " texts"]:
    shared = [len(np.intersect1d(a[a != PAD], b[b != PAD])) for a, b in zip(first, second, strict=True)]
    total = (first != PAD).sum(axis=1) + (second != PAD).sum(axis=1)
    return np.array([both / max(1, every - both) for both, every in zip(shared, total, strict=True)])


def _name(run: Traces) -> str:
    info = run.model.info
    name = model_name({"id": info.id, "weights": info.weights, "adapter": info.adapter})
    return " with ".join([name, *map(str, run.changes)])


def _check_same(before: Traces, after: Traces) -> None:
    """Refuse runs whose neurons cannot be paired."""
    layouts = [f"{run.sites.n_layers} layers of {run.sites.d_mlp} neurons" for run in (before, after)]
    if layouts[0] != layouts[1]:
        raise UserError(f"compare: before has {layouts[0]}, after {layouts[1]}; compare models of the same layout")
    if len(before) != len(after):
        raise UserError(f"compare: before has {len(before)} texts, after {len(after)}; trace the same texts")
    for index, (one, two) in enumerate(zip(before.texts, after.texts, strict=True)):
        if (one.prompt_ids, one.completion_ids) != (two.prompt_ids, two.completion_ids):
            raise UserError(
                f"compare: text {index} is {printable(one.prompt)[:40]!r} before and {printable(two.prompt)[:40]!r} "
                "after, or other tokens of it; trace the same texts with the same tokenizer"
            )
        if list(before.read_at[index]) != list(after.read_at[index]):
            raise UserError(
                f"compare: text {index} was read at other tokens (positions {before.positions} before, "
                f"{after.positions} after); trace both with the same positions"
            )
    measured = [read_input(run[:1], ProbeConfig()).measured for run in (before, after)]
    for name, value in measured[0].items():
        if name != "positions" and measured[1].get(name) != value:
            raise UserError(f"compare: {name} is {value} before and {measured[1].get(name)} after; trace both alike")
    if before.site != "ffn":
        raise UserError(f"compare: sites={before.site!r} selects no neurons; trace both with sites='ffn'")
