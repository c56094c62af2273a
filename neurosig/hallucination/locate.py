"""Locating neurons: `HallucinationProbe` and the table of neurons it finds.

It adds to the probe's fit (`neurosig.hallucination.probe`) a regularisation path, stability selection with a bound on
false discoveries (`neurosig.hallucination.stability`) and each neuron's AUROC alone. The control of a located set is in
`neurosig.hallucination.controls`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy import sparse, special
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.lasso import Design, design, fit_l1
from neurosig.hallucination.probe import (
    chosen_penalty,
    cross_fit_by_seed,
    inverse_penalties,
    no_contrast,
    regularisation_path,
    too_few,
)
from neurosig.hallucination.stability import Stability, selection_limit, stability_selection
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.runtime.shapes import check_choice
from neurosig.statistics.arrays import takes_arrays

FORMAT = "neurosig-probe-1"


@dataclass(frozen=True, slots=True, eq=False)
class FittedProbe:
    """A fitted probe, as `HallucinationProbe.fit` returns it.

    Attributes:
        config: The options it was fitted with.
        n_neurons: Neurons of the model, over all layers.
        d_mlp: Neurons per layer.
        inverse_penalty: Chosen on the path, or as given.
        columns: Flat ids of the neurons with a weight, ascending.
        weights: Their weights on contributions scaled to a largest magnitude of 1; positive points to hallucination.
        scale: Divisors of their contributions.
        intercept: The log odds of a rollout without any of them.
        scores: Cross-fitted probability that each fitted rollout is guessed; its probe never saw the question.
        auroc: Of ``scores`` against the labels, over the labelled rollouts.
        path: `neurosig.hallucination.probe.regularisation_path`.
        neurons: `neuron_table`: every neuron with a weight or stable.
        candidates: Flat ids of the neurons that stability selection considered.
        stability: Their selection frequencies and the expected number of false discoveries.
    """

    config: ProbeConfig
    n_neurons: int
    d_mlp: int
    inverse_penalty: float
    columns: Int[np.ndarray, " neurons"]
    weights: Float[np.ndarray, " neurons"]
    scale: Float[np.ndarray, " neurons"]
    intercept: float
    scores: Float[np.ndarray, " rollouts"]
    auroc: float
    path: pd.DataFrame
    neurons: pd.DataFrame
    candidates: Int[np.ndarray, " candidates"]
    stability: Stability

    def score(self, contributions: sparse.csr_array) -> Float[np.ndarray, " rollouts"]:
        """Probability that each rollout is guessed; the same to the bit after `save` and `load`.

        Raises:
            UserError: The contributions have another number of neurons than those fitted.
        """
        if contributions.shape[1] != self.n_neurons:
            raise UserError(
                f"probe: contributions of {contributions.shape[1]} neurons, fitted on {self.n_neurons}; "
                "use the model it was fitted on"
            )
        return special.expit(contributions[:, self.columns] @ (self.weights / self.scale) + self.intercept)

    def save(self, path: str | Path) -> None:
        """Write everything as safetensors."""
        tensors = {
            **{name: getattr(self, name) for name in ("columns", "weights", "scale", "scores", "candidates")},
            "frequency": self.stability.frequency,
            **{f"path.{name}": self.path[name].to_numpy() for name in self.path},
            **{f"neurons.{name}": self.neurons[name].to_numpy() for name in self.neurons},
        }
        numbers = ("n_neurons", "d_mlp", "inverse_penalty", "intercept", "auroc")
        stability = {name: getattr(self.stability, name) for name in ("threshold", "selected_per_half", "pairs")}
        record = {
            "format": FORMAT,
            "config": asdict(self.config),
            "stability": stability,
            **{name: getattr(self, name) for name in numbers},
        }
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        write_atomic(path, save(contiguous, metadata={"probe": json.dumps(record)}))

    @classmethod
    def load(cls, path: str | Path) -> FittedProbe:
        """Read what `save` wrote.

        Raises:
            UserError: The file is missing or not a saved probe.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"probe {path}: no such file")
        try:
            with safe_open(path, framework="numpy") as stored:
                record = json.loads((stored.metadata() or {})["probe"])
                if record.pop("format") != FORMAT:
                    raise ValueError("another format")
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            frames = {
                frame: pd.DataFrame(
                    {name.partition(".")[2]: tensors.pop(name) for name in list(tensors) if frame in name}
                )
                for frame in ("path.", "neurons.")
            }
            return cls(
                config=ProbeConfig(**record.pop("config")),
                stability=Stability(tensors.pop("frequency"), **record.pop("stability")),
                path=frames["path."][list(PATH_COLUMNS)],
                neurons=frames["neurons."][list(NEURON_COLUMNS)],
                **record,
                **tensors,
            )
        except (SafetensorError, LookupError, ValueError, TypeError) as error:
            raise UserError(f"probe {path}: not a saved probe ({error}); fit and save it again") from error


@dataclass(frozen=True, slots=True)
class HallucinationProbe:
    """Locates hallucination-indicative neurons::

    probe = HallucinationProbe(ProbeConfig(inverse_penalty=None)).fit(contributions, labels, question_ids)
    probe.neurons.query("stable"), probe.stability.expected_false
    """

    config: ProbeConfig = field(default_factory=lambda: ProbeConfig(inverse_penalty=None))

    @takes_arrays
    def fit(
        self,
        contributions: sparse.csr_array,
        labels: Int[np.ndarray, " rollouts"],
        question_ids: Sequence[str],
        *,
        d_mlp: int | None = None,
        quiet: bool = True,
    ) -> FittedProbe:
        """Walk the path, score by cross-fitting, fit on everything, and select stable neurons.

        Args:
            contributions: One row per rollout, [rollouts, n_layers * d_mlp]
                (`neurosig.hallucination.probe.contribution_matrix`).
            labels: 1 guessed, 0 known, -1 unlabelled, per rollout (`neurosig.hallucination.probe.agreement_labels` of
                its question).
            question_ids: Each rollout's question; folds and halves never split a question's rollouts.
            d_mlp: Neurons per layer, to name neurons by layer and index; default: all in one layer.
            quiet: No progress bar.

        Raises:
            UserError: Either label has too few questions, or no neuron is active often enough.
        """
        config, groups = self.config, np.unique(np.asarray(question_ids), return_inverse=True)[1]
        shortage = too_few(labels, groups, config)
        if shortage:
            raise UserError(f"probe: {shortage}; label more questions or lower the number of folds")
        prepared = design(contributions, config.min_active_share)
        if nothing := no_contrast(prepared.matrix, labels):
            raise UserError(f"probe: {nothing}; lower min_active_share or give other rollouts")
        path = regularisation_path(prepared.matrix, labels, groups, config)
        scores = cross_fit_by_seed(prepared.matrix, labels, groups, config).mean(axis=0)

        rows = np.flatnonzero(labels >= 0)
        matrix, known = prepared.matrix[rows], labels[rows]
        penalty = config.inverse_penalty or chosen_penalty(path, config)
        model = fit_l1(matrix, known, penalty, config.seed)
        stability = stable_neurons(matrix, known, groups[rows], config, quiet=quiet)
        n_neurons = contributions.shape[1]
        return build_probe(
            config, (n_neurons, d_mlp or n_neurons), prepared, labels, scores, path, penalty, model, stability
        )


def build_probe(
    config: ProbeConfig,
    size: tuple[int, int],
    prepared: Design,
    labels: Int[np.ndarray, " rollouts"],
    scores: Float[np.ndarray, " rollouts"],
    path: pd.DataFrame,
    penalty: float,
    model: LogisticRegression,
    stability: Stability,
    shown: Float[np.ndarray, " eligible"] | None = None,
) -> FittedProbe:
    """The fitted probe from the results of its steps.

    Args:
        config: The probe's options.
        size: Neurons over all layers, and per layer.
        prepared: The rows that were scored, with the columns' scale (`neurosig.hallucination.lasso.design`).
        labels: 1, 0 or -1 of each row.
        scores: Cross-fitted score of each row.
        path: See `neurosig.hallucination.probe.regularisation_path`.
        penalty: The inverse penalty of ``model``.
        model: The fit on everything.
        stability: Of the prepared columns.
        shown: Weights by which neurons enter the table; default: the model's.
    """
    rows, weights = np.flatnonzero(labels >= 0), model.coef_[0]
    kept = np.flatnonzero(weights)
    return FittedProbe(
        config=config,
        n_neurons=size[0],
        d_mlp=size[1],
        inverse_penalty=float(penalty),
        columns=prepared.columns[kept],
        weights=weights[kept],
        scale=prepared.scale[kept],
        intercept=float(model.intercept_[0]),
        scores=scores,
        auroc=float(roc_auc_score(labels[rows], scores[rows])),
        path=path,
        neurons=neuron_table(prepared, labels, weights if shown is None else shown, stability, size[1]),
        candidates=prepared.columns,
        stability=stability,
    )


@takes_arrays
def stable_neurons(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    questions: Int[np.ndarray, " rollouts"],
    config: ProbeConfig,
    *,
    quiet: bool = True,
) -> Stability:
    """`stability_selection` at the probe's options.

    A half selects its heaviest neurons, at most as many as ``max_false`` allows. Its inverse penalty is the path's
    first at which the fit on everything has as many, doubled, since a half has half the rollouts.

    Args:
        matrix: Scaled contributions of the labelled rollouts (`neurosig.hallucination.lasso.design`).
        labels: 0 or 1.
        questions: Index of the rollout's question.
        config: The probe's options.
        quiet: No progress bar.
    """
    limit = selection_limit(config.max_false, matrix.shape[1], config.stable_frequency)
    for penalty in inverse_penalties(matrix, labels, config):
        if np.count_nonzero(fit_l1(matrix, labels, penalty, config.seed).coef_) >= limit:
            break
    return stability_selection(
        matrix,
        labels,
        questions,
        limit=limit,
        inverse_penalty=2 * penalty,
        pairs=config.pairs,
        threshold=config.stable_frequency,
        seed=config.seed,
        quiet=quiet,
    )


PATH_COLUMNS = ("inverse_penalty", "neurons", "auroc_mean", "auroc_sd", "log_loss_mean", "log_loss_sd")
Role = Literal["hallucination", "pattern"]
ROLE_COLUMNS: Mapping[Role, tuple[str, ...]] = {
    "hallucination": ("weight", "stability", "kinds", "kinds_agreeing"),
    "pattern": ("cluster", "lift", "q"),
}
"""What a manifest's ``neurons.csv`` says of each role alone, the required column first."""
COUNTS = ("kinds", "kinds_agreeing", "cluster")
NEURON_COLUMNS = ("layer", "index", "weight", "selection_frequency", "stable", "auroc_alone", "active_share")


@takes_arrays
def neuron_table(
    prepared: Design,
    labels: Int[np.ndarray, " rollouts"],
    weights: Float[np.ndarray, " eligible"],
    stability: Stability,
    d_mlp: int,
) -> pd.DataFrame:
    """Every neuron that has a weight or is stable, most often selected first, then heaviest.

    Columns: ``layer``, ``index``, ``weight`` (0 where only the halves selected it), ``selection_frequency``,
    ``stable``, ``auroc_alone`` (of its contribution alone, against the labels; above 0.5 it grows with
    hallucination) and ``active_share`` (of the rollouts).
    """
    rows, found = np.flatnonzero(labels >= 0), np.flatnonzero((weights != 0) | stability.stable)
    found = found[np.lexsort((-np.abs(weights[found]), -stability.frequency[found]))]
    alone = prepared.matrix[rows][:, found].toarray()
    table = {
        "layer": prepared.columns[found] // d_mlp,
        "index": prepared.columns[found] % d_mlp,
        "weight": weights[found],
        "selection_frequency": stability.frequency[found],
        "stable": stability.stable[found],
        "auroc_alone": np.array([roc_auc_score(labels[rows], contribution) for contribution in alone.T], np.float64),
        "active_share": prepared.matrix[:, found].count_nonzero(axis=0) / prepared.matrix.shape[0],
    }
    return pd.DataFrame(table)[list(NEURON_COLUMNS)]


def write_neurons(path: str | Path, neurons: pd.DataFrame) -> None:
    """Write a `neuron_table` as CSV, every digit kept."""
    write_atomic(path, neurons.to_csv(index=False))


def read_neurons(path: str | Path, role: Role = "hallucination") -> pd.DataFrame:
    """Read the neurons of one role: ``layer``, ``index``, and whatever else the table holds about this role.

    A table without the column ``role``, such as one of `write_neurons` or an earlier manifest's, holds hallucination
    neurons. The rows keep their numbers in the file.

    Raises:
        UserError: The file is missing, no CSV, or lacks the columns layer, index, and weight (of a pattern: cluster).
    """
    check_choice("role", role, Role)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"neurons {path}: no such file")
    required = ROLE_COLUMNS[role][0]
    try:
        table = pd.read_csv(path)
        if "role" in table:
            others = [name for kind, names in ROLE_COLUMNS.items() if kind != role for name in names]
            table = table[table.pop("role") == role].drop(columns=others, errors="ignore")
        elif role != "hallucination":
            table = table.iloc[:0].assign(cluster=0)
        types: dict[str, type] = {"layer": np.int64, "index": np.int64, required: np.float64}
        return table.astype(types | {name: np.int64 for name in COUNTS if name in table})
    except (KeyError, ValueError) as error:
        raise UserError(f"neurons {path}: expected the columns layer, index and {required} ({error})") from error
