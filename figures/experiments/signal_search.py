"""A search for neuron signals that add to the outputs, with held-out domains: what was tried, and what is left of it.

    python -m figures.experiments.signal_search --train runs/demo/manifest --held-out runs/search/geography
    runs/search/language

Every variant is an annotation-free probe fitted on the rollouts of one manifest (geography, training split) and read on
the rollouts of others: questions of the same domain that it has not seen, and a domain that it has never seen. Gold
answers are read there only, to judge. Each variant's trust is compared with the vote share and with all output-level
signals (`neurosig.statistics.auroc`), and the p-values are corrected for all variants, domains and events together
(Holm). Controls: shuffled labels, a linear probe of hidden states, and probes that were told the training questions'
gold answers, which show what more is in the neurons than the annotation-free labels bring out.

`python -m figures signal_search` draws the figure from ``signal_search.csv`` of the results folder, or from the
committed ``figures/data/signal_search.csv`` where there is none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neurosig.runtime.cli import CommonConfig, PhaseTimer, progress, run_command

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes

    from figures.experiments.search_features import Features
    from neurosig.manifest import Manifest, QuestionRow

    Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)

NAME = "signal_search"
NEEDS = None
COMMITTED = Path(__file__).parents[1] / "data" / f"{NAME}.csv"
RESAMPLES = 5000
PENALTY, MIN_ACTIVE_SHARE = 0.1, 0.02
HIDDEN_PENALTY = 0.01

Labels = Literal["agreement", "contrast", "shuffled", "gold"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One reading of the rollouts' neurons and what its probe learns.

    Attributes:
        name: As the figure shows it.
        reading: One of `figures.experiments.search_features.READINGS`, or ``hidden``.
        labels: ``agreement``: the question's rollouts split against agree; ``contrast``: the rollout left the
            majority of its question against stayed with it; ``gold``: wrong against right.
        layers: First and last third of the layers that count, of 0, 1 and 2.
        role: ``tried`` counts in the correction, ``control`` does not.
    """

    name: str
    reading: str
    labels: Labels = "agreement"
    layers: tuple[int, int] = (0, 2)
    role: Literal["tried", "control"] = "tried"


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
    """Manifest whose rollouts the probes learn from."""
    held_out: tuple[Path, ...]
    """Manifests to judge on; none may share a question with --train."""
    out: Path = Path("runs/search")
    """Folder of signal_search.csv and of the traced features, which a second run reads again."""
    resamples: int = RESAMPLES
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of bootstrap, folds and shuffled labels."""


def main(config: SearchConfig) -> None:
    """Run the search described by ``config``."""
    import pandas as pd

    from figures.experiments.search_features import features_of
    from neurosig.manifest import read_manifest
    from neurosig.runtime.errors import UserError
    from neurosig.runtime.files import write_atomic

    config.out.mkdir(parents=True, exist_ok=True)
    train = read_manifest(config.train)
    held_out = [read_manifest(folder) for folder in config.held_out]
    known = {row.text_sha256 for row in train.rows}
    for manifest in held_out:
        if known & {row.text_sha256 for row in manifest.rows}:
            raise UserError(f"--held-out {manifest.folder}: shares questions with --train {config.train}")
    with PhaseTimer() as timer:
        with timer.phase("trace"):
            learnt = features_of(train, config.out, quiet=config.quiet)
            seen = [features_of(manifest, config.out, quiet=config.quiet) for manifest in held_out]
        with timer.phase("fit"):
            trust = _fit_all(train, learnt, seen, config)
        with timer.phase("judge"):
            tables = [_judge(manifest, scores, config) for manifest, scores in zip(held_out, trust, strict=True)]
    table = _corrected(pd.concat(tables, ignore_index=True))
    write_atomic(config.out / f"{NAME}.csv", table.to_csv(index=False, float_format="%.6g"))
    without = ", ".join(f"{features.without_answer:.2f}" for features in (learnt, *seen))
    logger.info("share of rollouts without the answer's words, train and held out: %s", without)
    print(summary(table))


def summary(table: pd.DataFrame) -> str:
    """What is left of the search, in words."""
    tried = table[table["role"] == "tried"]
    lines = []
    for base, spoken in (("over_vote", "the vote share"), ("over_outputs", "all output-level signals")):
        adding = tried[(tried[f"{base}_low"] > 0) & (tried[f"{base}_p_holm"] <= 0.05)]
        alone = int((tried[f"{base}_low"] > 0).sum())
        named = "; ".join(
            f"{row.variant} ({row.domain}, {row.event}) {getattr(row, base):+.3f}" for row in adding.itertuples()
        )
        lines.append(
            f"Of {len(tried)} tests ({tried['variant'].nunique()} variants) {len(adding)} add to {spoken} after "
            f"correction, {alone} before it{': ' if named else ''}{named}."
        )
    return "\n".join(lines)


# Fitting


def _fit_all(
    train: Manifest, learnt: Features, seen: Sequence[Features], config: SearchConfig
) -> list[dict[str, tuple[Array, int]]]:
    """For each held-out manifest, variant -> the trust of its rollouts, and how many neurons the probe uses."""
    labels = _labels(train, config)
    trust: list[dict[str, tuple[Array, int]]] = [{} for _ in seen]
    for variant in progress(VARIANTS, desc="fit", quiet=config.quiet):
        fit = _fit_hidden if variant.reading == "hidden" else _fit_neurons
        for scores, result in zip(trust, fit(variant, labels[variant.labels], learnt, seen, config), strict=True):
            scores[variant.name] = result
    return trust


def _labels(manifest: Manifest, config: SearchConfig) -> dict[str, Array]:
    """Label of each rollout, 1 suspect, 0 trusted, -1 not learnt from, in question order."""
    import numpy as np

    from neurosig.hallucination.config import ProbeConfig
    from neurosig.hallucination.probe import agreement_labels
    from neurosig.questions.answers import is_correct
    from neurosig.report.data import join_gold, voted

    rows = voted(manifest)
    k = len(rows[0].answers)
    shares = np.array([row.vote.count / row.vote.n for row in rows if row.vote])
    of_question = agreement_labels(shares, ProbeConfig())
    shuffled = of_question.copy()
    learnt = np.flatnonzero(of_question >= 0)
    shuffled[learnt] = np.random.default_rng(config.seed).permutation(of_question[learnt])
    contrast = [
        -1 if answer is None or not clear else int(answer != row.pseudo_label)
        for row, clear in zip(rows, _clear_majority(rows), strict=True)
        for answer in row.answers
    ]
    gold, _ = join_gold(manifest, manifest.header.dataset["sources"], required=True)
    wrong = [int(not is_correct(answer, gold[row.id])) for row in rows for answer in row.answers]
    return {
        "agreement": np.repeat(of_question, k),
        "shuffled": np.repeat(shuffled, k),
        "contrast": np.array(contrast),
        "gold": np.array(wrong),
    }


def _clear_majority(rows: Sequence[QuestionRow]) -> list[bool]:
    """Whether one answer holds at least half of the votes and no other as many."""
    return [row.vote is not None and 2 * row.vote.count >= row.vote.n and row.vote.tied == 1 for row in rows]


def _fit_neurons(
    variant: Variant, labels: Array, learnt: Features, seen: Sequence[Features], config: SearchConfig
) -> list[tuple[Array, int]]:
    """The L1 probe of `neurosig.hallucination.probe` at its default penalty."""
    import numpy as np

    from neurosig.hallucination.lasso import design, fit_l1

    known = np.flatnonzero(labels >= 0)
    prepared = design(_matrix(variant, learnt), MIN_ACTIVE_SHARE)
    model = fit_l1(prepared.matrix[known], labels[known], PENALTY, config.seed)
    used = int(np.count_nonzero(model.coef_))
    weights = model.coef_[0] / prepared.scale
    return [(-(_matrix(variant, features)[:, prepared.columns] @ weights), used) for features in seen]


def _matrix(variant: Variant, features: Features) -> Any:
    from figures.experiments.search_features import READINGS
    from neurosig.hallucination.probe import contribution_matrix

    column = READINGS.index(variant.reading)
    ids, values = features.ids[:, column], features.values[:, column].astype(float)
    third = features.n_layers / 3
    layer = ids[0] // features.d_mlp  # every row holds as many neurons of each layer, layer after layer
    kept = (layer >= variant.layers[0] * third) & (layer < (variant.layers[1] + 1) * third)
    return contribution_matrix(ids[:, kept], values[:, kept], features.n_layers * features.d_mlp)


def _fit_hidden(
    variant: Variant, labels: Array, learnt: Features, seen: Sequence[Features], config: SearchConfig
) -> list[tuple[Array, int]]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = labels >= 0
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=HIDDEN_PENALTY, class_weight="balanced", max_iter=1000)
    ).fit(learnt.hidden[known], labels[known])
    return [(-model.decision_function(features.hidden), 0) for features in seen]


# Judging


def _judge(manifest: Manifest, trust: Mapping[str, tuple[Array, int]], config: SearchConfig) -> pd.DataFrame:
    """AUROC and gains of every variant for both events on one held-out manifest."""
    import numpy as np
    import pandas as pd

    from neurosig.report.data import join_gold, question_level, read_traced, rollout_level, voted
    from neurosig.report.signal_table import Signal, analyse
    from neurosig.statistics.auroc import AnalysisConfig

    rows = voted(manifest)
    gold, lacking = join_gold(manifest, manifest.header.dataset["sources"], required=True)
    assert lacking is None, lacking
    n, k = len(rows), len(rows[0].answers)
    stays = np.array([[answer == row.pseudo_label for answer in row.answers] for row in rows])
    levels = {
        "majority is right": question_level(manifest, gold),
        "rollout is right": rollout_level(manifest, read_traced(manifest), gold),
    }
    lines = []
    for event, level in levels.items():
        tried = []
        for name, (scores, _) in trust.items():
            values = scores
            if event == "majority is right":
                values = (scores.reshape(n, k) * stays).sum(axis=1) / stays.sum(axis=1)
            tried.append(Signal(name, values, "neuron"))
        outputs = [signal for signal in level.signals if signal.kind == "output"]
        analysis = AnalysisConfig(config.seed, config.resamples)
        table = analyse([*tried, *outputs], level.right, level.owners, level.confounders, analysis)
        roles = {variant.name: variant.role for variant in VARIANTS}
        for row in table:
            line = {
                "domain": manifest.rows[0].domain,
                "event": event,
                "variant": row.signal.name.replace("_", " "),
                "role": roles.get(row.signal.name, "output"),
                "neurons": trust[row.signal.name][1] if row.signal.name in trust else 0,
                "n": n,
                "rows": len(level.owners),
                "right": int(level.right.sum()) if level.right is not None else 0,
                **_columns("auroc", row.auroc),
                **_columns("spearman_vote_share", row.correlations["vote_share"]),
                **_columns("spearman_token_overlap", row.correlations["token_overlap"]),
            }
            for base in ("over_vote", "over_outputs"):
                gain = getattr(row, base)
                line |= _columns(base, gain and gain.auroc) | {f"{base}_p": gain and gain.p}
            lines.append(line | {"resamples": config.resamples, "seed": config.seed})
    return pd.DataFrame(lines)


def _columns(name: str, interval: Any) -> dict[str, float | None]:
    ends = {name: "estimate", f"{name}_low": "low", f"{name}_high": "high"}
    return {column: interval and getattr(interval, end) for column, end in ends.items()}


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """With p-values corrected for everything tried: all variants, domains and events."""
    from neurosig.statistics.significance import holm

    tried = table["role"] == "tried"
    for base in ("over_vote", "over_outputs"):
        table.loc[tried, f"{base}_p_holm"] = holm(table.loc[tried, f"{base}_p"].tolist())
    return table


# Drawing


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    import pandas as pd

    from figures.style import save_figure, use_style
    from neurosig.runtime.files import write_atomic

    use_style()
    import matplotlib.pyplot as plt

    made = results / f"{NAME}.csv"
    table = pd.read_csv(made if made.is_file() else COMMITTED)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{NAME}.csv", table.to_csv(index=False, float_format="%.6g"))
    panels = {"auroc": "AUROC", "over_vote": "adds to vote share", "over_outputs": "adds to all output signals"}
    events = list(dict.fromkeys(table["event"]))
    figure, axes = plt.subplots(len(events), len(panels), figsize=(11, 4.6 * len(events)), sharey="row", squeeze=False)
    for line, event in zip(axes, events, strict=True):
        for axis, (column, label) in zip(line, panels.items(), strict=True):
            _draw_panel(axis, table[table["event"] == event], column)
            axis.set_xlabel(f"{label} ({event})")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    paths = save_figure(figure, out, NAME)
    plt.close(figure)
    return [*paths, out / f"{NAME}.csv"]


def _draw_panel(axis: Axes, table: pd.DataFrame, column: str) -> None:
    colours = {"tried": "#0072B2", "control": "#E69F00", "output": "#7f7f7f"}
    names = list(dict.fromkeys(table["variant"]))
    axis.axvline(0.5 if column == "auroc" else 0.0, color="black", linewidth=0.8, linestyle="--")
    for offset, domain in enumerate(dict.fromkeys(table["domain"])):
        mine = table[table["domain"] == domain].set_index("variant").loc[names]
        y = [position + 0.2 * (2 * offset - 1) for position in range(len(names))]
        marks = [colours[role] for role in mine["role"]]
        axis.hlines(y, mine[f"{column}_low"], mine[f"{column}_high"], colors=marks, linewidth=1.2)
        marker, faces = ("o", marks) if offset == 0 else ("s", "white")
        axis.scatter(mine[column], y, color=faces, edgecolors=marks, marker=marker, s=16, zorder=3)
        shown = "black" if offset == 0 else "white"
        label = f"{domain} (n={mine['n'].iloc[0]})"
        axis.scatter([], [], color=shown, edgecolors="black", marker=marker, label=label)
    if column != "auroc":
        proven = table[table["role"].eq("tried") & (table[f"{column}_p_holm"] <= 0.05) & (table[f"{column}_low"] > 0)]
        for row in proven.itertuples():
            axis.annotate("*", (getattr(row, f"{column}_high"), names.index(str(row.variant))), va="center")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)


if __name__ == "__main__":
    sys.exit(run_command(SearchConfig, main, presets={}, prog="python -m figures.experiments.signal_search"))
