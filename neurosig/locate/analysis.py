"""What is located over several kinds of question and domains, what survives, and what could have been found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats
from sklearn.metrics import roc_auc_score

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.kinds import frequency_without_kind, marginal_signs, signs_by_kind
from neurosig.hallucination.lasso import design, fit_l1
from neurosig.hallucination.locate import stable_neurons
from neurosig.hallucination.planted import PlantedConfig, plant
from neurosig.hallucination.probe import cross_fit, too_few
from neurosig.hallucination.stability import Stability
from neurosig.locate.pooled import Pooled
from neurosig.runtime.cli import progress
from neurosig.runtime.errors import UserError
from neurosig.statistics.permutation import permutation_p
from neurosig.statistics.significance import minimum_detectable_effect

EFFECTS = (0.25, 0.5, 0.75, 1.0)
"""Cohen's d of the planted neurons for which the power is stated."""
PLANTED = 10


@dataclass(frozen=True, slots=True, eq=False)
class LocatedOverKinds:
    """Neurons located over all questions, and their signs by kind and domain.

    Attributes:
        table: A row per neuron with a weight or stable, most often selected first: ``layer``, ``index``, ``weight``,
            ``active_share``, ``stability``, ``stable``, ``kinds`` (showing its sign), ``kinds_agreeing``, ``domains``,
            ``domains_agreeing``, ``stability_left_out`` (the least with a kind left out), ``survives``.
        stability: Of all candidates.
    """

    table: pd.DataFrame
    stability: Stability


def locate_over_kinds(pooled: Pooled, config: ProbeConfig, *, quiet: bool = True) -> LocatedOverKinds:
    """Locate by stability over questions, and look at every located neuron kind by kind.

    A neuron survives if it is stable and has the sign of its weight in every kind in which its sign can be told, two at
    least, and in every such domain.

    Raises:
        UserError: Too few questions agree or split.
    """
    labels, questions = pooled.labels, pooled.questions
    if shortage := too_few(labels, questions, config):
        raise UserError(f"locate: {shortage}; give more questions or exports of several domains")
    prepared = design(pooled.contributions, config.min_active_share)
    known = np.flatnonzero(labels >= 0)
    fitted = (prepared.matrix[known], labels[known], questions[known])
    stability = stable_neurons(*fitted, config, quiet=quiet)
    weights = fit_l1(*fitted[:2], config.inverse_penalty or 0.1, config.seed).coef_[0]
    found = np.flatnonzero((weights != 0) | stability.stable)
    found = found[np.lexsort((-np.abs(weights[found]), -stability.frequency[found]))]
    matrix, weights = prepared.matrix[:, found], weights[found]
    signs = np.where(weights != 0, weights, marginal_signs(matrix, labels, questions))
    by_kind, by_domain = (
        signs_by_kind(matrix, signs, labels, questions, pooled.groups[column]) for column in ("kind", "domain")
    )
    stable = stability.stable[found]
    left_out = np.full(len(found), np.nan)
    if stable.any() and len(pooled.names["kind"]) > 1:
        frequency = frequency_without_kind(*fitted, pooled.groups["kind"][known], config, quiet=quiet)[:, found]
        left_out = np.nanmin(np.vstack([frequency, np.full((1, len(found)), np.inf)]), axis=0)
    table = {
        "layer": prepared.columns[found] // pooled.d_mlp,
        "index": prepared.columns[found] % pooled.d_mlp,
        "weight": weights,
        "active_share": prepared.matrix[:, found].count_nonzero(axis=0) / prepared.matrix.shape[0],
        "stability": stability.frequency[found],
        "stable": stable,
        "kinds": by_kind.n_kinds,
        "kinds_agreeing": by_kind.n_agreeing,
        "domains": by_domain.n_kinds,
        "domains_agreeing": by_domain.n_agreeing,
        "stability_left_out": left_out,
        "survives": stable & by_kind.survives & (by_domain.n_agreeing == by_domain.n_kinds),
    }
    return LocatedOverKinds(pd.DataFrame(table), stability)


@dataclass(frozen=True, slots=True)
class Power:
    """What these numbers of questions can show, stated before the result.

    Attributes:
        auroc: Smallest AUROC of a score that a two-sided test finds with 80% power.
        recall: Cohen's d -> share of `PLANTED` neurons of this effect that stability selection finds in planted data
            of the same numbers of agreeing and splitting questions, rollouts, layers and neurons.
    """

    auroc: float
    recall: dict[float, float]

    @property
    def detectable(self) -> float | None:
        """Smallest of the effects of which 80% are found; None if it takes a larger one."""
        return next((effect for effect, share in self.recall.items() if share >= 0.8), None)


def power(pooled: Pooled, config: ProbeConfig, *, quiet: bool = True) -> Power:
    """The power of `locate_over_kinds` and of an AUROC by question, from the numbers of questions alone.

    The standard error of an AUROC is that of Mann and Whitney's statistic without an effect.
    """
    known, guessed = pooled.labelled()
    recall = {}
    for effect in progress(EFFECTS, desc="power", quiet=quiet):
        data = plant(
            PlantedConfig(
                n_questions=known + guessed,
                num_generations=pooled.k,
                n_planted=min(PLANTED, pooled.n_layers),
                effect=effect,
                n_topics=len(pooled.names["kind"]),
                guessed_share=guessed / (known + guessed),
                n_layers=pooled.n_layers,
                d_mlp=pooled.d_mlp,
                set_size=pooled.set_size,
                seed=config.seed,
            )
        )
        prepared = design(data.contributions(), config.min_active_share)
        questions = np.repeat(np.arange(known + guessed), pooled.k)
        stable = stable_neurons(prepared.matrix, data.labels, questions, config).stable
        recall[effect] = float(np.isin(data.planted, prepared.columns[stable]).mean())
    error = math.sqrt((known + guessed + 1) / (12 * known * guessed))
    return Power(0.5 + minimum_detectable_effect(error), recall)


GROUPINGS = ("question", "entity", "kind", "domain")


@dataclass(frozen=True, slots=True)
class Transfer:
    """AUROC of the probe for "the rollouts split" where it saw nothing of the group.

    Attributes:
        left_out: What a fold leaves out.
        groups: Number of groups.
        auroc: Over all labelled rollouts, scored by a probe that did not see their group.
        within: Mean over the kinds of the AUROC within the kind, weighted by its pairs.
        null, null_within: Their means with the labels permuted over the questions of each kind.
        p, p_within: Share of the permutations, the observed one included, that reach them; ``nan`` without any.
    """

    left_out: str
    groups: int
    auroc: float
    within: float
    null: float
    null_within: float
    p: float
    p_within: float


def transfer(pooled: Pooled, config: ProbeConfig, permutations: int, *, quiet: bool = True) -> list[Transfer]:
    """The cross-fitted probe by what its folds leave out, with refits to labels permuted within the kinds.

    Permuted within kinds, labels still depend on the kind: what the probe gains from telling kinds apart is in the
    null. Groupings of one group, or whose folds lack a label, are left out.
    """
    prepared = design(pooled.contributions, config.min_active_share)
    groups: dict[str, tuple[Int[np.ndarray, " rollouts"], ProbeConfig]] = {}
    for column in GROUPINGS:
        index = pooled.questions if column == "question" else pooled.groups[column]
        n = len(np.unique(index))
        folds = n if column in ("kind", "domain") and n > 1 else config.folds
        options = replace(config, groups=column, fold_seeds=1, folds=folds)
        if n > 1 and not too_few(pooled.labels, index, options):
            groups[column] = index, options
    kinds = pooled.groups["kind"]
    bar = progress(total=permutations + 1, desc="permute", quiet=quiet)

    def aurocs(labels: Int[np.ndarray, " rollouts"]) -> list[float]:
        found = []
        for index, options in groups.values():
            scores = cross_fit(prepared.matrix, labels, index, options)
            known = labels >= 0
            found += [float(roc_auc_score(labels[known], scores[known])), within_kinds(scores, labels, kinds)]
        bar.update()
        return found

    with bar:
        if permutations:
            result = permutation_p(aurocs, pooled.labels, permutations, config.seed, pooled.questions, strata=kinds)
            gains, null, p = result.gain, result.null.mean(axis=0), result.p
        else:
            gains = np.array(aurocs(pooled.labels))
            null = p = np.full(len(gains), np.nan)
    return [
        Transfer(column, len(np.unique(index)), *gains[2 * i :][:2], *null[2 * i :][:2], *p[2 * i :][:2])
        for i, (column, (index, _)) in enumerate(groups.items())
    ]


def within_kinds(
    scores: Float[np.ndarray, " rollouts"],
    labels: Int[np.ndarray, " rollouts"],
    kinds: Int[np.ndarray, " rollouts"],
) -> float:
    """AUROC over the pairs of a guessed and a known rollout of the same kind; ``nan`` without any pair."""
    won = pairs = 0.0
    for kind in np.unique(kinds):
        known, guessed = (scores[(kinds == kind) & (labels == label)] for label in (0, 1))
        if len(known) and len(guessed):
            pairs += len(known) * len(guessed)
            won += float(stats.mannwhitneyu(guessed, known).statistic)
    return won / pairs if pairs else math.nan


def planned(pooled: Pooled, power: Power) -> list[str]:
    """The data and what they can show, in words, before anything is located."""
    known, guessed = pooled.labelled()
    shares = ", ".join(f"{share:.0%} at d={effect:g}" for effect, share in power.recall.items())
    return [
        f"{known} questions agree and {guessed} split, in {len(pooled.names['kind'])} kinds and "
        f"{len(pooled.names['domain'])} domains.",
        f"Power: of planted neurons in data of this size {shares} are located; an AUROC by question is told from "
        f"chance from {power.auroc:.3f}.",
    ]


def findings(located: LocatedOverKinds, rows: Sequence[Transfer]) -> list[str]:
    """What was found, in words made from the numbers."""
    table, stability = located.table, located.stability
    stable: Bool[np.ndarray, " neurons"] = table["stable"].to_numpy(bool)
    firm = int((stable & (table["stability_left_out"] >= stability.threshold)).sum())
    lines = [
        f"Stable over questions: {int(stable.sum())} (at most {stability.expected_false:.2f} false ones expected). Of "
        f"one sign in every kind and domain that tells: {int(table['survives'].sum())}. Stable with any one kind left "
        f"out: {firm}.",
    ]
    for row in rows:
        text = f"AUROC with one {row.left_out} left out ({row.groups}): {row.auroc:.3f}, within kinds {row.within:.3f}"
        if not math.isnan(row.p):
            text += (
                f"; labels permuted within kinds give {row.null:.3f} (p = {row.p:.3g}) and {row.null_within:.3f} "
                f"(p = {row.p_within:.3g})"
            )
        lines.append(f"{text}.")
    return lines
