"""`Probe`: which neurons tell two kinds of texts apart, in scikit-learn's manner."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import special
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import roc_auc_score
from sklearn.utils.validation import check_is_fitted

from neurosig.explore.probes.calibration import Calibration, Method, fit_calibration
from neurosig.explore.probes.display import path_plot, probe_html, probe_text
from neurosig.explore.probes.fitting import Kind, fitted_probe, group_signs, halves, mixed_groups, permuted, prepare
from neurosig.explore.probes.inputs import (
    FREE_LABELS,
    Label,
    annotation_free_labels,
    check_folds,
    check_like,
    other_rows,
    read_groups,
    read_input,
    read_labels,
)
from neurosig.explore.probes.saved import read_probe, write_probe
from neurosig.explore.traces import Traces
from neurosig.hallucination.config import ProbeConfig, ProbeValues
from neurosig.hallucination.locate import FittedProbe
from neurosig.questions.load import Question
from neurosig.runtime.cli import printable
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice
from neurosig.statistics.auroc import AnalysisConfig, auroc_interval
from neurosig.statistics.metrics import Interval

Permute = Literal["auto", "between", "within"]


class Probe(ClassifierMixin, BaseEstimator):
    """A logistic regression on neurons' contributions that tells two kinds of texts apart, and says by which neurons.

        >>> import neurosig
        >>> model = neurosig.load_model("smollm2-135m")
        >>> cities = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito"]
        >>> true = [f"{city} is a city." for city in cities]
        >>> false = [f"{city} is a kind of fish." for city in cities]
        >>> run = neurosig.trace(model, true + false, progress=False)
        >>> probe = neurosig.Probe(folds=4, inverse_penalty=1.0, permutations=19)
        >>> probe = probe.fit(run, [True] * 8 + [False] * 8, groups=cities * 2)
        >>> probe.auroc
        1.0
        >>> list(probe.neurons.columns[:3])
        ['layer', 'neuron', 'weight']
        >>> bool((probe.score(run)[:8] > 0.5).all())  # the probability of True, the positive class
        True

    Three probes differ in neurons and weights. The export's probe scores the questions of a selection;
    the probe of ``neurosig.report`` and ``neurosig.locate`` names the neurons that stability selection keeps; `Probe`
    is fitted by you, on your texts and labels, with the same functions.

    Args:
        kind: ``l1`` keeps few neurons; ``dense`` (ridge) gives every neuron a weight, without stability selection.
        folds: Cross-fitting folds; a fold never splits a group. With fewer groups, each group is a fold.
        inverse_penalty: scikit-learn's ``C``. None: chosen by folds within each fold, which needs more texts and time.
        free_labels: What ``labels=None`` learns: ``agreement``, rollouts of questions whose rollouts split (positive)
            against those whose rollouts agree; ``contrast``, within a question, rollouts outside the majority
            (positive) against those inside (`neurosig.hallucination.probe.rollout_labels`).
        positive: The label that counts as positive; default: the second in sorted order (True, 1, the later word).
        values: ``contribution``, or ``layer_z``: in standard deviations of the layer.
        calibration: ``sigmoid`` (Platt) or ``isotonic``, which needs about 1,000 texts; on cross-fitted scores.
        permutations: Refits on permuted labels for ``p_``; 0 leaves it out.
        permute: ``between``: groups with as many labelled texts exchange all their labels; ``within``: texts exchange
            labels inside their group, so that a group's share of positives stays in the null. ``auto``: ``within``
            where a group has both labels, else ``between``; ``permute_`` says which.
        agree_share: Of ``agreement``: a question agrees whose majority holds at least this share of its rollouts.
        split_share: Of ``agreement``: it splits below this share.
        fold_seeds: Times that the folds are drawn; ``scores_`` are the mean.
        min_active_share: Neurons active in a smaller share of the texts are left out.
        pairs: Pairs of halves in stability selection.
        stable_frequency: Share of the halves from which on a neuron is stable.
        max_false: False discoveries to expect at most among the stable neurons.
        seed: Seed of folds, halves and permutations.

    Attributes:
        classes_: The two labels, the positive one last.
        neurons_: A row per neuron that has a weight or is stable, most stable first: ``layer``, ``neuron``,
            ``weight`` (positive points to the positive class), ``selection_frequency``, ``stable``, ``auroc_alone``,
            ``active_share``; ``groups`` and ``groups_agreeing`` where groups hold both labels: in how many groups its
            own sign can be told, and agrees (`neurosig.hallucination.kinds`). A `dense` one: its 100 heaviest.
        auroc_: Of ``scores_`` against the labels. ``auroc_interval_``: its 95% bootstrap interval over groups.
        scores_: Cross-fitted probability of the positive class, both classes weighing the same, [texts].
        labels_: 1 positive, 0 negative, -1 unlabelled, [texts].
        p_: Share of permutations, the observed labels included, with at least the same cross-fitted AUROC at a penalty
            that is not chosen: the given one, or the middle of the path. None without permutations.
        path_: Size and held-out loss at each penalty (`neurosig.hallucination.probe.regularisation_path`).
        expected_false_: Bound on the false discoveries among the stable neurons.
        notes_: What was done otherwise than asked, in sentences.
    """

    def __init__(
        self,
        *,
        kind: Kind = "l1",
        folds: int = 5,
        inverse_penalty: float | None = None,
        free_labels: Literal["agreement", "contrast"] = "agreement",
        positive: Label | None = None,
        values: ProbeValues = "contribution",
        calibration: Method = "sigmoid",
        permutations: int = 99,
        permute: Permute = "auto",
        agree_share: float = 0.75,
        split_share: float = 0.5,
        fold_seeds: int = 1,
        min_active_share: float = 0.02,
        pairs: int = 50,
        stable_frequency: float = 0.75,
        max_false: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.kind = kind
        self.folds = folds
        self.inverse_penalty = inverse_penalty
        self.free_labels = free_labels
        self.positive = positive
        self.values = values
        self.calibration = calibration
        self.permutations = permutations
        self.permute = permute
        self.agree_share = agree_share
        self.split_share = split_share
        self.fold_seeds = fold_seeds
        self.min_active_share = min_active_share
        self.pairs = pairs
        self.stable_frequency = stable_frequency
        self.max_false = max_false
        self.seed = seed

    def fit(
        self,
        run: Any,
        labels: Any = None,
        *,
        groups: Any = None,
        others: Any = None,
        questions: Sequence[Question] | None = None,
    ) -> Probe:
        """Fit, score by cross-fitting, calibrate, permute and select stable neurons.

        Args:
            run: What `neurosig.trace` returns, of any site; or a matrix [texts, neurons] or [texts, layers, neurons].
            labels: One of two values per text, None or NaN where there is none: a list, array, tensor or column. None:
                those that need no annotation (``free_labels``), for a run of rollouts of questions.
            groups: What no fold splits, one value per text, such as the kind of question; default: texts of the same
                prompt stay together. Stability selection halves the groups, or the prompts if groups are fewer than 20.
            others: The same texts traced at tokens other than the answer's (``positions="prompt"``): further negative
                texts of the fit, whatever their label, while scores, AUROC and calibration stay those of ``run``. With
                wrong answers as the positive label and ``run`` at the answer's tokens, these are the three-against-one
                labels of H-Neurons (arXiv 2512.01797; reading): tokens of wrong answers against tokens of right
                answers, other tokens of right and other tokens of wrong texts. For multiple choice ``run`` is traced
                at the letter.
            questions: The questions of rollouts, where their choices matter for reading the answers of labels=None.

        Raises:
            UserError: Labels or groups of another length, one label or more than two, too few groups with either, no
                neuron that differs, or an unknown option.
        """
        config = self._config()
        read = read_input(run, config)
        n = read.matrix.shape[0]
        classes: tuple[Label, Label]
        if labels is None:
            known, classes = annotation_free_labels(run, questions, config), FREE_LABELS[self.free_labels]
        else:
            known, classes = read_labels(labels, n, self.positive)
        owners = read.prompts if groups is None else read_groups(groups, n)
        check_folds(known, owners, classes, config)
        other = None if others is None else other_rows(run, read, others, config)
        rows = prepare(read.matrix, other, known, owners, read.prompts, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the AUROC of a fold with one label is no number
            warnings.simplefilter("ignore", UserWarning)  # fewer groups with a label than folds
            fitted = fitted_probe(rows, read.width, read.n_layers * read.width, config, self.kind)
            mixed = mixed_groups(rows)
            within = self.permute == "within" or (self.permute == "auto" and mixed)
            found = permuted(rows, config, self.kind, self.permutations, within) if self.permutations else None
        seen = np.flatnonzero(known >= 0)
        log_odds = special.logit(np.clip(fitted.scores[seen], 1e-12, 1 - 1e-12))
        calibration = fit_calibration(log_odds, known[seen], self.calibration)
        owner = np.unique(owners[seen], return_inverse=True)[1]
        interval = auroc_interval(fitted.scores[seen], known[seen] == 1, owner, AnalysisConfig(seed=self.seed))
        signs = group_signs(rows, fitted.neurons, read.width) if mixed and groups is not None else None
        self._keep(fitted, classes, (read.n_layers, read.width), calibration, interval, signs)
        self.labels_, self.model_, self.measured_ = known, read.model, read.measured
        self.p_ = None if found is None else float(found.p)
        self.permute_ = "within" if within else "between"
        by = "groups" if halves(rows) is owners else "prompts"
        self.notes_: tuple[str, ...] = (
            (f"stability selection halved the {by}",) if groups is not None and self.kind == "l1" else ()
        )
        if not len(fitted.columns):
            self.notes_ += ("no neuron has a weight at this penalty: raise inverse_penalty, or leave it None",)
        self.run_ = run if isinstance(run, Traces) else None
        return self

    @property
    def neurons(self) -> pd.DataFrame:
        """`neurons_`."""
        check_is_fitted(self)
        return self.neurons_

    @property
    def auroc(self) -> float:
        """``auroc_``."""
        check_is_fitted(self)
        return self.auroc_

    def decision_function(self, run: Any) -> Float[np.ndarray, " texts"]:
        """Log odds of the positive class, both classes weighing the same, before calibration.

        Raises:
            UserError: The run has other layers, another width or other measurements than the one fitted.
        """
        check_is_fitted(self)
        read = read_input(run, self.fitted_.config)
        check_like(read, self.layout_, self.measured_, self.model_)
        probabilities = self.fitted_.score(read.matrix)
        return np.asarray(special.logit(np.clip(probabilities, 1e-300, 1 - 1e-16)))

    def predict_proba(self, run: Any) -> Float[np.ndarray, "texts 2"]:
        """Calibrated probabilities of ``classes_``; of texts that were fitted they are too sure, see ``scores_``."""
        positive = self.calibration_(self.decision_function(run))
        return np.stack([1 - positive, positive], axis=1)

    def predict(self, run: Any) -> np.ndarray:
        """The likelier label of each text."""
        return self.classes_[(self.predict_proba(run)[:, 1] >= 0.5).astype(int)]

    @overload
    def score(self, run: Any, labels: None = None) -> Float[np.ndarray, " texts"]: ...
    @overload
    def score(self, run: Any, labels: Any) -> float: ...
    def score(self, run: Any, labels: Any = None) -> Any:
        """Without labels: the calibrated probability of the positive class, per text. With labels: their AUROC.

        The run may be another model's, of the same layers and width; a sentence then names both. Unlike scikit-learn's
        classifiers, the number is no accuracy: the AUROC does not depend on how many texts are positive.

        Raises:
            UserError: See `decision_function`, and as `fit` for labels, which must be ``classes_``.
        """
        if labels is None:
            return self.predict_proba(run)[:, 1]
        log_odds = self.decision_function(run)
        known, found = read_labels(labels, len(log_odds), self.classes_[1].item())
        if found[0] != self.classes_[0]:
            raise UserError(f"labels: {found[0]!r} and {found[1]!r}; the probe was fitted on {self.classes_.tolist()}")
        return float(roc_auc_score(known[known >= 0], log_odds[known >= 0]))

    def causal_check(
        self,
        run: Traces | None = None,
        *,
        factors: Sequence[float] = (0.0, 2.0),
        sign: Literal["positive", "negative", "all"] = "positive",
        draws: int = 3,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Scale the probe's neurons in the model that was traced, and matched controls, and see how its texts change.

        A quick check of whether the neurons matter to the model at all: nats per token of the run's completions (of
        prompts without one: of the prompt), given to the model. What scaling does to generated answers and their
        accuracy is measured by ``python -m neurosig.intervene``.

        Args:
            run: Texts, and the model to change; default: those fitted.
            factors: By what the neurons' values are multiplied; 0 silences them.
            sign: Which neurons: with a positive weight, as in H-Neurons, a negative one, or all with a weight.
            draws: Random controls: ``layer``, as many neurons of the same layers; ``activity``, of the same layers and
                with a similar mean contribution. ``strongest``, the layers' largest contributors, is not drawn.
            progress: Show a bar.

        Returns:
            A row per group of neurons and factor: ``group``, ``factor``, ``neurons``, ``texts``, ``nats``, ``change``
            from the unscaled model with the 95% bootstrap interval over texts and draws, and in the rows of controls
            ``difference``: the probe's neurons minus this control, with its interval.

        Raises:
            UserError: No run, a matrix was fitted, no neuron of that sign, or fewer than two texts.
        """
        from neurosig.explore.probes.causal import causal_table

        check_is_fitted(self)
        run = self.run_ if run is None else run
        if not isinstance(run, Traces) or run.site != "ffn":
            raise UserError("causal_check: it scales FFN neurons of a model; give a run of neurosig.trace, sites='ffn'")
        check_like(read_input(run, self.fitted_.config), self.layout_, self.measured_, self.model_)
        columns, weights = self.fitted_.columns, self.fitted_.weights
        wanted = {"positive": weights > 0, "negative": weights < 0, "all": weights != 0}
        check_choice("sign", sign, Literal["positive", "negative", "all"])
        if not wanted[sign].any():
            raise UserError(f"causal_check: the probe has no neuron with a {sign} weight; give another sign")
        return causal_table(run, columns[wanted[sign]].tolist(), columns.tolist(), factors, draws, self.seed, progress)

    def save(self, folder: str | Path) -> Path:
        """Write ``probe.safetensors`` and ``probe.json`` into a folder; texts and model are not in it.

        Raises:
            UserError: It cannot be written.
        """
        check_is_fitted(self)
        signs = [name for name in ("groups", "groups_agreeing") if name in self.neurons_]
        record = {
            "params": self.get_params(),
            "classes": self.classes_.tolist(),
            "layout": list(self.layout_),
            "calibration": asdict(self.calibration_),
            "auroc_interval": asdict(self.auroc_interval_),
            "signs": {name: self.neurons_[name].tolist() for name in signs},
            "labels": self.labels_.tolist(),
            "model": self.model_,
            "measured": self.measured_,
            "p": self.p_,
            "permute": self.permute_,
            "notes": list(self.notes_),
        }
        return write_probe(folder, self.fitted_, record)

    def plot_path(self, ax: Any = None) -> Any:
        """Held-out AUROC along the penalties, drawn on matplotlib axes, which are returned."""
        check_is_fitted(self)
        return path_plot(self.path_, self.fitted_.inverse_penalty, ax)

    def __repr__(self) -> str:
        return printable(probe_text(self))

    def _repr_html_(self) -> str:
        return probe_html(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def _config(self) -> ProbeConfig:
        for name, options in (("kind", Kind), ("calibration", Method), ("permute", Permute)):
            check_choice(name, getattr(self, name), options)
        if self.permutations < 0:
            raise UserError(f"permutations: expected 0 or more, got {self.permutations}")
        shared = {field.name for field in fields(ProbeConfig)} & set(self.get_params())
        given: dict[str, Any] = {name: getattr(self, name) for name in shared}
        return ProbeConfig(**given, labels=self.free_labels)

    def _keep(
        self,
        fitted: FittedProbe,
        classes: Sequence[Label],
        layout: tuple[int, int],
        calibration: Calibration,
        interval: Interval,
        signs: pd.DataFrame | None,
    ) -> None:
        self.fitted_, self.layout_ = fitted, layout
        self.classes_ = np.array(classes)
        self.n_features_in_ = fitted.n_neurons
        self.scores_, self.auroc_, self.path_ = fitted.scores, fitted.auroc, fitted.path
        self.expected_false_ = fitted.stability.expected_false
        self.calibration_, self.auroc_interval_ = calibration, interval
        table = fitted.neurons.rename(columns={"index": "neuron"})
        self.neurons_ = table if signs is None else pd.concat([table, signs], axis=1)


def load_probe(folder: str | Path) -> Probe:
    """Read a probe that `Probe.save` wrote.

    Raises:
        UserError: A file is missing, damaged, or no saved probe.
    """
    fitted, record = read_probe(folder)
    try:
        probe = Probe(**record["params"])
        kept = record["calibration"]
        calibration = Calibration(kept["method"], tuple(kept["x"]), tuple(kept["y"]))
        signs = pd.DataFrame(record["signs"]) if record["signs"] else None
        layout = (int(record["layout"][0]), int(record["layout"][1]))
        if layout[0] * layout[1] != fitted.n_neurons:
            raise ValueError("layout and neurons differ")
        probe._keep(fitted, record["classes"], layout, calibration, Interval(**record["auroc_interval"]), signs)
        probe.labels_ = np.array(record["labels"], dtype=np.int64)
        probe.model_, probe.measured_, probe.p_ = record["model"], record["measured"], record["p"]
        probe.permute_, probe.notes_, probe.run_ = record["permute"], tuple(record["notes"]), None
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"probe {folder}: not a saved probe ({error}); fit and save it again") from error
    return probe
