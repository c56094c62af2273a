"""The tables of methods by domains: values, and changes against the untrained model with their intervals.

A method is trained on a source domain and evaluated on every target, which gives a matrix source x target. The tables
of the paper (arXiv 2607.02460, poster) condense it, one column per source::

    in      the source itself, M[s][s]
    cross   plain mean over all other targets, also those that the method has not been trained on
    groups  plain mean of the row over the group's sources ("SKE_AVG" is biology, material, physics and chemistry)
    AVG     plain mean of the row over the sources that have a value; a missing source is a dash

Changes compare with the reference over the same cells and come from unrounded values, so they can differ from the
difference of two printed numbers. The ECE of an average is the average of the ECEs. These formulas reproduce every
number of the published Tables 3 and 4 but one (see ``tests/data``).

Every number may have bootstrap draws: the last axis of all arrays is ``draws``, whose first entry is the observed
value. `plain` makes such an axis for numbers without draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from figures.grid.config import BASE
from neurosig.runtime.errors import UserError
from neurosig.statistics.resampling import percentile_ends
from neurosig.statistics.significance import bootstrap_p, holm, minimum_detectable_effect

AVERAGE = "AVG"
SCOPES = ("in", "cross")
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure and how it is printed: ``scale`` times the value, with ``decimals``."""

    name: str
    title: str
    decimals: int
    scale: float = 1.0
    higher_is_better: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        Metric("avg_at_k", "Avg@{k} (per cent)", 2, 100.0),
        Metric("maj_at_k", "maj@{k} (per cent)", 2, 100.0),
        Metric("ece", "ECE of the majority vote", 3, higher_is_better=False),
    )
}


@dataclass(frozen=True)
class Layout:
    """The domains of a table, in order, and the groups of domains that have a mean of their own.

    Raises:
        UserError: A name occurs twice, or a group holds an unknown domain.
    """

    domains: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*self.domains, *self.groups, AVERAGE]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f'layout: "{name}" names two columns; domains, groups and "{AVERAGE}" must differ')
        for group, members in self.groups.items():
            for member in members or ("",):
                if member not in self.domains:
                    raise UserError(f'group "{group}": "{member}" is no domain; have {", ".join(self.domains)}')

    @property
    def columns(self) -> tuple[str, ...]:
        """Domains, each group after the last of its members, and the average."""
        columns: list[str] = []
        for domain in self.domains:
            columns.append(domain)
            last = {group: max(members, key=self.domains.index) for group, members in self.groups.items()}
            columns += [group for group, member in last.items() if member == domain]
        return (*columns, AVERAGE)

    def members(self, column: str) -> list[int]:
        """Indices of the domains that a column is the mean of."""
        names = self.domains if column == AVERAGE else self.groups.get(column, (column,))
        return [self.domains.index(name) for name in names]


PAPER = Layout(
    ("BIO", "MAT", "PHYS", "CHEM", "EDU", "MMLU_PRO"), {"SKE_AVG": ("BIO", "MAT", "PHYS", "CHEM")}
)  # fmt: skip
"""SciKnowEval's four sciences, an education set that the poster does not name, and MMLU-Pro."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table; every field is ``None`` for a dash, and the interval is ``None`` without draws.

    Attributes:
        value: In printed units, unrounded.
        delta: Change against the reference over the same cells; ``None`` in the reference's own row.
        low, high: 95% percentile interval of the change.
        p: Two-sided bootstrap p-value of the change.
        p_holm: The same, corrected for the domains of its row (Holm); ``None`` for groups and averages.
        mde: Smallest change that this paired comparison finds with 80% power at the 5% level.
        mde_unpaired: The same for two measurements on different questions.
        n: Number of questions it is computed from.
        partial: Whether it is a mean that lacks some of its domains, and so is not comparable to complete ones.
    """

    value: float | None = None
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    mde: float | None = None
    mde_unpaired: float | None = None
    n: int | None = None
    partial: bool = False

    @property
    def unsure(self) -> bool:
        """Whether the interval of the change contains zero."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


@dataclass(frozen=True, slots=True)
class Row:
    """One line: the method, its scope (``base``, ``in``, ``cross``, or a source) and one cell per column.

    Attributes:
        seeds: Number of training seeds; 0 for untrained models, ``None`` where unknown.
        rivals: Group of rows that compete for the best value of a column.
    """

    method: str
    scope: str
    cells: tuple[Cell, ...]
    seeds: int | None = None
    rivals: str = "in"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of one metric; ``against`` is the method that the changes compare with."""

    metric: Metric
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    against: str = BASE
    heads: tuple[str, str] = ("method", "eval")

    def best(self) -> set[tuple[int, int]]:
        """Row and column of the best values of each column among rivals; a partial mean does not compete."""
        sign = 1 if self.metric.higher_is_better else -1
        best = set()
        for column in range(len(self.columns)):
            for rivals in {row.rivals for row in self.rows}:
                values = {
                    index: sign * round(row.cells[column].value or 0.0, self.metric.decimals)
                    for index, row in enumerate(self.rows)
                    if row.rivals == rivals and row.cells[column].value is not None and not row.cells[column].partial
                }
                best |= {(index, column) for index, value in values.items() if value == max(values.values())}
        return best


@dataclass(frozen=True)
class Results:
    """The data of a table, for one metric, in printed units.

    Attributes:
        metric: The measure.
        layout: Its domains.
        untrained: Values of untrained models, by name; `BASE` is among them.
        trained: Source x target matrices, by method; ``nan`` where there is no value.
        seeds: Number of training seeds of each method; the smallest over its sources.
        questions: Number of questions of each domain.
        evaluations: Evaluation seeds that every value averages over; of the run with the fewest.
    """

    metric: Metric
    layout: Layout
    untrained: Mapping[str, Float[np.ndarray, "targets draws"]]
    trained: Mapping[str, Float[np.ndarray, "sources targets draws"]]
    seeds: Mapping[str, int] = field(default_factory=dict)
    questions: Sequence[int] | None = None
    evaluations: int = 1

    @property
    def sources(self) -> list[int]:
        """Indices of the domains that any method was trained on; of all, without a trained one."""
        trained = [~np.isnan(matrix[:, :, 0]).all(axis=1) for matrix in self.trained.values()]
        return np.flatnonzero(np.any(trained, axis=0)).tolist() if trained else list(range(len(self.layout.domains)))

    @property
    def sources_text(self) -> str:
        """Names of the domains that any method was trained on."""
        return ", ".join(self.layout.domains[index] for index in self.sources)

    def mean(self, method: str, scope: str) -> Float[np.ndarray, " draws"]:
        """A method's mean over the sources, ``in`` the source itself or ``cross``, over all other targets.

        An untrained model counts over the same pairs of source and target. ``nan`` where a pair has no value.
        """
        base = self.untrained[BASE]
        untrained = self.untrained.get(method)
        matrix = self.trained[method] if untrained is None else np.broadcast_to(untrained, (len(base), *base.shape))
        by_source, _ = _by_source(matrix, base, scope)
        return np.asarray(by_source[self.sources].mean(axis=0))


def plain(
    metric: Metric,
    layout: Layout,
    base: Mapping[str, float],
    matrices: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Results:
    """Results from numbers alone, in printed units: target -> value, and method -> source -> target -> value.

    Raises:
        UserError: The base lacks a domain, or a matrix names an unknown one.
    """
    for domain in layout.domains:
        if domain not in base:
            raise UserError(f'"{domain}": no value of the base; it must be evaluated on every domain')
    trained = {}
    for method, matrix in matrices.items():
        trained[method] = np.full((len(layout.domains), len(layout.domains), 1), np.nan)
        for source, targets in matrix.items():
            for target, value in targets.items():
                if not {source, target} <= set(layout.domains):
                    raise UserError(f"{method}: {source} to {target} is not among {', '.join(layout.domains)}")
                trained[method][layout.domains.index(source), layout.domains.index(target), 0] = value
    untrained = {BASE: np.array([[base[domain]] for domain in layout.domains], dtype=np.float64)}
    return Results(metric, layout, untrained, trained)


def scope_table(results: Results, *, against: str = BASE) -> Table:
    """The form of Tables 3 and 4: untrained rows, then ``in`` and ``cross`` of each method, one column per source.

    Args:
        results: The matrices.
        against: The untrained model that changes compare with; its row comes first.

    Raises:
        UserError: There is no such model.
    """
    layout = results.layout
    reference = _reference(results, against)
    rows = []
    for method, values in _first(results.untrained, against).items():
        other = None if method == against else reference
        rows.append(_row(method, "base", _columns(values, layout), other, results, of="in"))
    for method, matrix in results.trained.items():
        for scope in SCOPES:
            by_source, same = _by_source(matrix, reference, scope)
            rows.append(_row(method, scope, _columns(by_source, layout), same, results, of=scope))
    return Table(results.metric, layout.columns, tuple(rows), against)


def matrix_table(results: Results, *, against: str = BASE) -> Table:
    """The form of Tables 7 and 8: every source x target value, one row per method and source, one column per target.

    Raises:
        UserError: There is no such model.
    """
    layout = results.layout
    domains = replace(layout, groups={})
    reference = _reference(results, against)
    rows = []
    for method, values in _first(results.untrained, against).items():
        other = None if method == against else reference
        rows.append(_row(method, "", _columns(values, domains), other, results, of="in", layout=domains))
    for method, matrix in results.trained.items():
        for source, values in zip(layout.domains, matrix, strict=True):
            if not np.isnan(values[:, 0]).all():
                columns = _columns(values, domains)
                rows.append(_row(method, source, columns, reference, results, of="in", layout=domains))
    return Table(results.metric, domains.columns, tuple(rows), against, ("method", "source"))


# Inside


def _reference(results: Results, against: str) -> Float[np.ndarray, "targets draws"]:
    if against not in results.untrained:
        raise UserError(f'no untrained model "{against}" to compare with; have {", ".join(results.untrained)}')
    return results.untrained[against]


def _first(
    untrained: Mapping[str, Float[np.ndarray, "targets draws"]], name: str
) -> dict[str, Float[np.ndarray, "targets draws"]]:
    return {name: untrained[name], **untrained}


def _by_source(
    matrix: Float[np.ndarray, "sources targets draws"], base: Float[np.ndarray, "targets draws"], scope: str
) -> tuple[Float[np.ndarray, "sources draws"], Float[np.ndarray, "sources draws"]]:
    """One value per source, and the reference over the same targets."""
    n = len(matrix)
    if scope == "in":
        return matrix[np.arange(n), np.arange(n)], base
    if n == 1:  # there is no other target
        return np.full_like(base, np.nan), np.full_like(base, np.nan)
    others = [[target for target in range(n) if target != source] for source in range(n)]
    cross = np.stack([matrix[source][targets].mean(axis=0) for source, targets in enumerate(others)])
    return cross, np.stack([base[targets].mean(axis=0) for targets in others])


def _columns(
    by_domain: Float[np.ndarray, "domains draws"], layout: Layout
) -> dict[str, Float[np.ndarray, "present draws"]]:
    """Values of the domains of each column; domains without a value are left out."""
    known = ~np.isnan(by_domain[:, 0])
    return {column: by_domain[[i for i in layout.members(column) if known[i]]] for column in layout.columns}


def _row(
    method: str,
    scope: str,
    columns: Mapping[str, Float[np.ndarray, "present draws"]],
    reference: Float[np.ndarray, "domains draws"] | None,
    results: Results,
    *,
    of: str,
    layout: Layout | None = None,
) -> Row:
    layout = layout or results.layout
    known = np.array([len(columns[domain]) > 0 for domain in layout.domains])
    cells = []
    for column, values in columns.items():
        members = layout.members(column)
        present = [index for index in members if known[index]]
        same = None if reference is None else reference[present]
        cell = _cell(values, same)
        if present:
            n = _questions(results.questions, present, of, len(known))
            cell = replace(cell, n=n, partial=len(present) < len(members))
        cells.append(cell)
    tested = {
        index: p
        for index, column in enumerate(columns)
        if column in layout.domains and (p := cells[index].p) is not None
    }
    for index, p in zip(tested, holm(list(tested.values())), strict=True):
        cells[index] = replace(cells[index], p_holm=p)
    seeds = 0 if method in results.untrained else results.seeds.get(method)
    return Row(method, scope, tuple(cells), seeds, of)


def _cell(values: Float[np.ndarray, "present draws"], reference: Float[np.ndarray, "present draws"] | None) -> Cell:
    if len(values) == 0:
        return Cell()
    mean = values.mean(axis=0)
    if reference is None:
        return Cell(float(mean[0]))
    other = reference.mean(axis=0)
    change = mean - other
    if len(change) == 1:
        return Cell(float(mean[0]), float(change[0]))
    draws = change[1:]
    low, high = percentile_ends(draws, LEVEL)
    apart = float(np.hypot(mean[1:].std(), other[1:].std()))
    return Cell(
        value=float(mean[0]),
        delta=float(change[0]),
        low=low,
        high=high,
        p=bootstrap_p(draws),
        mde=minimum_detectable_effect(float(draws.std())),
        mde_unpaired=minimum_detectable_effect(apart),
    )


def _questions(counts: Sequence[int] | None, sources: Sequence[int], scope: str, domains: int) -> int | None:
    """Number of questions of all targets of a cell."""
    if counts is None:
        return None
    if scope == "in":
        return sum(counts[index] for index in sources)
    return sum(counts[target] for target in range(domains) if any(target != source for source in sources))
