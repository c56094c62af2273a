"""A search for neuron signals that add to output-level signals, judged on held-out questions and domains.

    python -m figures.experiments.signal_search --train runs/demo/manifest --held-out runs/search/geography
    runs/search/language

Every variant is an annotation-free probe fitted on the rollouts of one manifest (geography, training split) and applied
to the rollouts of others: unseen questions of the same domain, and an unseen domain. Gold answers are read there only,
to judge. Each variant's trust is compared with the vote share and with all output-level signals
(`neurosig.statistics.auroc`), its sign fixed beforehand, and the p-values are corrected for all variants, domains and
events together (Holm). Every variant is also fitted again to permuted labels of the training questions: a probe of
labels that mean nothing gains too (`neurosig.statistics.permutation`).
Controls: shuffled labels, a linear probe of hidden states, and probes fitted on the gold answers of the training
questions, which show how much the neurons hold beyond the annotation-free labels.

`python -m figures signal_search` draws the figure from ``signal_search.csv`` of the results folder, or from the
committed ``figures/data/signal_search.csv``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neurosig.runtime.cli import CommonConfig, PhaseTimer, progress, run_command
from neurosig.runtime.shapes import check_config

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes

    from figures.experiments.search_features import Features
    from figures.experiments.search_judge import Judge
    from neurosig.exported import Exported
    from neurosig.manifest import QuestionRow

    Array = np.ndarray[Any, Any]
    Fit = Callable[[Array], list[tuple[Array, int]]]

logger = logging.getLogger(__name__)

NAME = "signal_search"
NEEDS = None
RESAMPLES = 5000
PENALTY, MIN_ACTIVE_SHARE, HIDDEN_PENALTY = 0.1, 0.02, 0.01

Labels = Literal["agreement", "contrast", "shuffled", "gold"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One reading of the rollouts' neurons and the labels of its probe.

    Attributes:
        name: Label in the figure.
        reading: One of `figures.experiments.search_features.READINGS`, or ``hidden``.
        labels: ``agreement``: questions whose rollouts split against questions whose rollouts agree; ``contrast``:
            rollouts outside the majority of their question against rollouts inside; ``shuffled``: ``agreement`` in
            random order; ``gold``: wrong against right rollouts.
        layers: First and last third of the layers to read, of 0, 1 and 2.
        role: ``tried`` counts in the correction, ``control`` does not.
    """

    name: str
    reading: str
    labels: Labels = "agreement"
    layers: tuple[int, int] = (0, 2)
    role: Literal["tried", "control"] = "tried"

    def __post_init__(self) -> None:
        check_config(self)


VARIANTS = (
    Variant("all tokens (the default)", "all"),
    Variant("answer tokens", "answer"),
    Variant("first 3 tokens", "early"),
    Variant("last prompt token", "prompt"),
    Variant("early layers", "all", layers=(0, 0)),
    Variant("middle layers", "all", layers=(1, 1)),
    Variant("late layers", "all", layers=(2, 2)),
    Variant("every token's logit", "logit_all"),
    Variant("answer's logit", "logit_answer"),
    Variant("answer's logit, middle layers", "logit_answer", layers=(1, 1)),
    Variant("contrast, all tokens", "all", "contrast"),
    Variant("contrast, answer tokens", "answer", "contrast"),
    Variant("contrast, answer's logit", "logit_answer", "contrast"),
    Variant("shuffled labels", "all", "shuffled", role="control"),
    Variant("hidden states", "hidden", role="control"),
    Variant("gold labels, all tokens", "all", "gold", role="control"),
    Variant("gold labels, answer tokens", "answer", "gold", role="control"),
    Variant("gold labels, hidden states", "hidden", "gold", role="control"),
)


@dataclass(kw_only=True)
class SearchConfig(CommonConfig):
    """Fit every variant on one manifest, judge it on others, and write signal_search.csv."""

    train: Path
    """Manifest whose rollouts the probes are fitted on."""
    held_out: tuple[Path, ...]
    """Manifests to judge on; none may share a question with --train."""
    out: Path = Path("runs/search")
    """Folder of signal_search.csv and of the traced features, which a second run reuses."""
    resamples: int = RESAMPLES
    """Bootstrap resamples."""
    permutations: int = 49
    """Refits of every variant to permuted labels of the training questions, which give the p of what it adds beside the
    bootstrap's: at least 1 / (1 + this). 0 leaves them out."""
    seed: int = 0
    """Seed of bootstrap, folds and shuffled labels."""


def main(config: SearchConfig) -> None:
    """Run the search described by ``config``.

    Raises:
        UserError: A manifest or its gold answers cannot be read, or --held-out shares questions with --train.
    """
    import pandas as pd

    from figures.experiments.search_features import features_of
    from figures.experiments.search_judge import Judge
    from neurosig.exported import Exported
    from neurosig.runtime.errors import UserError
    from neurosig.runtime.files import write_atomic
    from neurosig.statistics.auroc import AnalysisConfig

    config.out.mkdir(parents=True, exist_ok=True)
    train = Exported(config.train)
    held_out = [Exported(folder) for folder in config.held_out]
    known = {row.text_sha256 for row in train.manifest.rows}
    for exported in held_out:
        if known & {row.text_sha256 for row in exported.manifest.rows}:
            raise UserError(f"--held-out {exported.manifest.folder}: shares questions with --train {config.train}")
    with PhaseTimer() as timer:
        with timer.phase("trace"):
            fitted = features_of(train, config.out, quiet=config.quiet)
            judged = [features_of(exported, config.out, quiet=config.quiet) for exported in held_out]
        with timer.phase("fit"):
            judges = [Judge(exported, AnalysisConfig(config.seed)) for exported in held_out]
            trust, p_refit = _fit_all(train, fitted, judged, judges, config)
        with timer.phase("judge"):
            tables, start = [], 0
            for judge, scores in zip(judges, trust, strict=True):
                own = {name: p[start : start + len(judge.tests)] for name, p in p_refit.items()}
                tables.append(_judge(judge, scores, own, config))
                start += len(judge.tests)
    table = _corrected(pd.concat(tables, ignore_index=True))
    write_atomic(config.out / f"{NAME}.csv", table.to_csv(index=False, float_format="%.6g"))
    without = ", ".join(f"{features.without_answer:.2f}" for features in (fitted, *judged))
    logger.info("share of rollouts without the answer's words, train and held out: %s", without)
    print(summary(table))


def summary(table: pd.DataFrame) -> str:
    """The result of the search in words."""
    from figures.experiments.search_judge import adds

    tried = table[table["role"] == "tried"]
    lines = []
    for base, name in (("over_vote", "the vote share"), ("over_outputs", "all output-level signals")):
        adding = tried[adds(tried, base)]
        alone = int((tried[f"{base}_low"] > 0).sum())
        named = "; ".join(
            f"{row.variant} ({row.domain}, {row.event}) {getattr(row, base):+.3f}" for row in adding.itertuples()
        )
        lines.append(
            f"Of {len(tried)} tests ({tried['variant'].nunique()} variants) {len(adding)} add to {name} after "
            f"correction and against refits on permuted labels, {alone} by their interval alone"
            f"{': ' if named else ''}{named}."
        )
    return "\n".join(lines)


# Fitting


def _fit_all(
    train: Exported, fitted: Features, judged: Sequence[Features], judges: Sequence[Judge], config: SearchConfig
) -> tuple[list[dict[str, tuple[Array, int]]], dict[str, Array]]:
    """For each held-out manifest, variant -> trust of its rollouts, and number of neurons that the probe uses.

    Then variant -> p of its gains from refits on permuted labels, in the order of the manifests' `Judge.tests`.
    """
    import numpy as np

    from neurosig.statistics.permutation import permutation_p

    labels = _labels(train, config)
    questions = np.repeat(np.arange(len(train.rows)), [len(row.answers) for row in train.rows.values()])
    trust: list[dict[str, tuple[Array, int]]] = [{} for _ in judged]
    p_refit = {}
    for variant in progress(VARIANTS, desc="fit", quiet=config.quiet):
        own = labels[variant.labels]
        fit = (_fit_hidden if variant.reading == "hidden" else _fit_neurons)(variant, fitted, judged, config)
        for scores, result in zip(trust, fit(own), strict=True):
            scores[variant.name] = result
        if config.permutations:
            gains = partial(_gains, fit, judges)
            p_refit[variant.name] = permutation_p(gains, own, config.permutations, config.seed, questions).p
    return trust, p_refit


def _gains(fit: Fit, judges: Sequence[Judge], labels: Array) -> list[float]:
    return [gain for judge, (scores, _) in zip(judges, fit(labels), strict=True) for gain in judge.gains(scores)]


def _labels(exported: Exported, config: SearchConfig) -> dict[str, Array]:
    """Labels of the rollouts in question order: 1 suspect, 0 trusted, -1 not used for fitting."""
    import numpy as np

    from neurosig.exported import join_gold
    from neurosig.hallucination.config import ProbeConfig
    from neurosig.hallucination.probe import agreement_labels
    from neurosig.questions.answers import is_correct

    rows = list(exported.rows.values())
    k = len(rows[0].answers)
    shares = np.array([row.vote.count / row.vote.n for row in rows if row.vote])
    of_question = agreement_labels(shares, ProbeConfig())
    shuffled = of_question.copy()
    used = np.flatnonzero(of_question >= 0)
    shuffled[used] = np.random.default_rng(config.seed).permutation(of_question[used])
    contrast = [
        -1 if answer is None or not clear else int(answer != row.pseudo_label)
        for row, clear in zip(rows, _clear_majority(rows), strict=True)
        for answer in row.answers
    ]
    gold, _ = join_gold(exported.manifest, required=True)
    wrong = [int(not is_correct(answer, gold[row.question_id])) for row in rows for answer in row.answers]
    return {
        "agreement": np.repeat(of_question, k),
        "shuffled": np.repeat(shuffled, k),
        "contrast": np.array(contrast),
        "gold": np.array(wrong),
    }


def _clear_majority(rows: Sequence[QuestionRow]) -> list[bool]:
    """Whether one answer has at least half of the votes, and no other answer as many."""
    return [row.vote is not None and 2 * row.vote.count >= row.vote.n and row.vote.n_tied == 1 for row in rows]


def _fit_neurons(variant: Variant, fitted: Features, judged: Sequence[Features], config: SearchConfig) -> Fit:
    """The L1 probe of `neurosig.hallucination.probe` at its default penalty."""
    import numpy as np

    from neurosig.hallucination.lasso import design, fit_l1

    prepared = design(_matrix(variant, fitted), MIN_ACTIVE_SHARE)
    unseen = [_matrix(variant, features)[:, prepared.columns] for features in judged]

    def fit(labels: Array) -> list[tuple[Array, int]]:
        known = np.flatnonzero(labels >= 0)
        model = fit_l1(prepared.matrix[known], labels[known], PENALTY, config.seed)
        weights = model.coef_[0] / prepared.scale
        return [(-(matrix @ weights), int(np.count_nonzero(weights))) for matrix in unseen]

    return fit


def _matrix(variant: Variant, features: Features) -> Any:
    from figures.experiments.search_features import READINGS
    from neurosig.hallucination.probe import contribution_matrix

    column = READINGS.index(variant.reading)
    ids, values = features.ids[:, column], features.values[:, column].astype(float)
    third = features.n_layers / 3
    layer = ids[0] // features.d_mlp  # every row has the same number of neurons per layer, layer after layer
    kept = (layer >= variant.layers[0] * third) & (layer < (variant.layers[1] + 1) * third)
    return contribution_matrix(ids[:, kept], values[:, kept], features.n_layers * features.d_mlp)


def _fit_hidden(variant: Variant, fitted: Features, judged: Sequence[Features], config: SearchConfig) -> Fit:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(labels: Array) -> list[tuple[Array, int]]:
        known = labels >= 0
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=HIDDEN_PENALTY, class_weight="balanced", max_iter=1000)
        ).fit(fitted.hidden[known], labels[known])
        return [(-model.decision_function(features.hidden), 0) for features in judged]

    return fit


# Judging


def _judge(
    judge: Judge, trust: Mapping[str, tuple[Array, int]], p_refit: Mapping[str, Array], config: SearchConfig
) -> pd.DataFrame:
    """AUROC and gains of every variant for both events on one held-out manifest."""
    import pandas as pd

    from neurosig.report.signal_table import Signal, analyse
    from neurosig.statistics.auroc import AnalysisConfig

    roles = {variant.name: variant.role for variant in VARIANTS}
    lines = []
    for event, level in judge.levels.items():
        tried = [Signal(name, judge.trust(event, scores), "neuron", fitted=True) for name, (scores, _) in trust.items()]
        outputs = [signal for signal in level.signals if signal.kind == "output"]
        analysis = AnalysisConfig(config.seed, config.resamples)
        table = analyse([*tried, *outputs], level.right, level.owners, level.confounders, analysis)
        for row in table:
            name = row.signal.name
            line = {
                "domain": judge.exported.manifest.rows[0].domain,
                "event": event,
                "variant": name.replace("_", " "),
                "role": roles.get(name, "output"),
                "neurons": trust[name][1] if name in trust else 0,
                "n": len(judge.exported.rows),
                "rows": len(level.owners),
                "right": int(level.right.sum()) if level.right is not None else 0,
                **_columns("auroc", row.auroc),
                **_columns("spearman_vote_share", row.correlations["vote_share"]),
                **_columns("spearman_token_overlap", row.correlations["token_overlap"]),
            }
            refits = dict(zip(judge.tests, p_refit.get(name, ()), strict=False))
            for base in ("over_vote", "over_outputs"):
                gain = getattr(row, base)
                line |= _columns(base, gain and gain.auroc) | {f"{base}_p": gain and gain.p}
                line[f"{base}_p_refit"] = refits.get((event, base))
            lines.append(line | {name: getattr(config, name) for name in ("resamples", "permutations", "seed")})
    return pd.DataFrame(lines)


def _columns(name: str, interval: Any) -> dict[str, float | None]:
    ends = {name: "estimate", f"{name}_low": "low", f"{name}_high": "high"}
    return {column: interval and getattr(interval, end) for column, end in ends.items()}


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """The table with p-values corrected over all variants that were tried, domains and events."""
    from neurosig.statistics.significance import holm

    tried = table["role"] == "tried"
    for base in ("over_vote", "over_outputs"):
        table.loc[tried, f"{base}_p_holm"] = holm(table.loc[tried, f"{base}_p"].tolist())
    return table


# Drawing


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    import pandas as pd

    from figures.sources import made_or_committed
    from figures.style import save_figure, subplots

    table = pd.read_csv(made_or_committed(results / f"{NAME}.csv", NAME))
    panels = {"auroc": "AUROC", "over_vote": "adds to vote share", "over_outputs": "adds to all output signals"}
    events = list(dict.fromkeys(table["event"]))
    figure, axes = subplots(len(events), len(panels), size=(11, 4.6 * len(events)), sharey="row", squeeze=False)
    for line, event in zip(axes, events, strict=True):
        for axis, (column, label) in zip(line, panels.items(), strict=True):
            _draw_panel(axis, table[table["event"] == event], column)
            axis.set_xlabel(f"{label} ({event})")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return save_figure(figure, out, NAME, table.to_csv(index=False, float_format="%.6g"))


def _draw_panel(axis: Axes, table: pd.DataFrame, column: str) -> None:
    from figures.experiments.search_judge import adds
    from figures.style import Colour

    colours = {"tried": Colour.OURS, "control": Colour.CONTROL, "output": Colour.BASELINE}
    names = list(dict.fromkeys(table["variant"]))
    axis.axvline(0.5 if column == "auroc" else 0.0, color="black", linewidth=0.8, linestyle="--")
    for offset, domain in enumerate(dict.fromkeys(table["domain"])):
        rows = table[table["domain"] == domain].set_index("variant").loc[names]
        y = [position + 0.2 * (2 * offset - 1) for position in range(len(names))]
        marks = [colours[role] for role in rows["role"]]
        axis.hlines(y, rows[f"{column}_low"], rows[f"{column}_high"], colors=marks, linewidth=1.2)
        marker, face = ("o", "black") if offset == 0 else ("s", "white")
        axis.scatter(rows[column], y, color=face if offset else marks, edgecolors=marks, marker=marker, s=16, zorder=3)
        axis.scatter([], [], color=face, edgecolors="black", marker=marker, label=f"{domain} (n={rows['n'].iloc[0]})")
    if column != "auroc":
        for row in table[table["role"].eq("tried") & adds(table, column)].itertuples():
            axis.annotate("*", (getattr(row, f"{column}_high"), names.index(str(row.variant))), va="center")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)


if __name__ == "__main__":
    sys.exit(run_command(SearchConfig, main, presets={}, prog="python -m figures.experiments.signal_search"))
