"""What ranking questions before they are sampled buys: trustworthy questions per sampled question.

    python -m figures.experiments.screening --pool runs/screening/pool --out runs/screening \\
        --pilots runs/screening/geography runs/screening/language runs/screening/chemistry

The pilots are exports of the training splits (`neurosig.export`), the pool an evaluation of the test splits
(`distill.evaluate`, K=8), whose rollouts show how each of its questions would have turned out. Probes are fitted on the
pilots as `neurosig.screen` fits them, rank the pool, and the top of the ranking is compared with a random draw
(`figures.experiments.screening_yield`) under both gradings. Gold answers are read here, to judge only.

Settings: ``in domain``; ``unseen kind``, each kind of question ranked by a pilot of all domains without it, with folds
by kind; ``unseen domain``, by a pilot of the other domains; ``hard kinds``, the three kinds of chemistry that the model
knows least, in domain; ``all domains``, one pilot and one pool of all. Controls: ``kind alone`` ranks by the pilot's
mean vote share of the kind, at random within it; ``permuted`` fits on permuted vote shares.

`python -m figures screening` draws ``screening.csv`` of the results folder, or the committed
``figures/data/screening.csv``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.runtime.cli import CommonConfig, progress, run_command

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes

    from neurosig.exported import Exported
    from neurosig.models.load import LoadedModel
    from neurosig.screening.config import PromptFeatures

    Array = np.ndarray[Any, Any]

NAME = "screening"
NEEDS = None
HARD = ("compound", "element", "atomic_number")
ALL = "all"
SHOWN = (
    ("in domain", "neurons", "in domain"),
    ("unseen kind", "neurons", "a kind that the pilot lacks"),
    ("unseen domain", "neurons", "a domain that the pilot lacks"),
    ("kind alone", "none", "control: the kind's mean alone"),
    ("permuted", "neurons", "control: permuted vote shares"),
)
"""Setting, features and label of each series in the figure."""


@dataclass(kw_only=True)
class ScreeningConfig(CommonConfig):
    """Rank a pool by probes of several pilots, judge the rankings, and write screening.csv."""

    pilots: tuple[Path, ...]
    """Finished exports of the training splits, one per domain, by one model."""
    pool: Path
    """Folder of distill.evaluate on --questions, by the same model with the same prompts."""
    questions: tuple[str, ...] = ("geography", "language", "chemistry")
    """Questions of the pool with gold answers; of bundled sets the test split."""
    out: Path = Path("runs/screening")
    """Folder of screening.csv and of the features, which a second run reuses."""
    permutations: int = 3
    """Probes fitted on permuted vote shares per domain."""
    resamples: int = 2000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of folds, permutations and bootstrap."""


@dataclass(frozen=True)
class Part:
    """Questions with the vote shares of their rollouts and their features at every layer.

    Attributes:
        domains: Of each question.
        kinds: Domain and kind of each question.
        shares: Vote share of each question.
        features: [questions, layers, neurons and residual stream].
        d_mlp: Number of neurons per layer, which come first.
    """

    domains: Array
    kinds: Array
    shares: Array
    features: Array
    d_mlp: int

    def rows(self, mask: Array) -> Part:
        """The questions of the mask."""
        return Part(self.domains[mask], self.kinds[mask], self.shares[mask], self.features[mask], self.d_mlp)


@dataclass(frozen=True)
class Pool(Part):
    """Questions whose answers are known.

    Attributes:
        right: Grading -> whether each majority is right, in expectation over tied answers.
        tokens: Sampled tokens of each question's rollouts.
    """

    right: Mapping[str, Array]
    tokens: Array


def main(config: ScreeningConfig) -> None:
    """Measure and write the table.

    Raises:
        UserError: A pilot or the pool cannot be read, or they share a question.
    """
    import pandas as pd

    from neurosig.exported import Exported
    from neurosig.models.load import load_model
    from neurosig.runtime.files import write_atomic

    config.out.mkdir(parents=True, exist_ok=True)
    exports = [Exported(folder) for folder in config.pilots]
    header = exports[0].manifest.header
    loaded = load_model(str(header.model["id"]), dtype=header.options["dtype"], template=header.options["template"])
    pilot, pool, prompts = _parts(config, exports, loaded)
    rows = list(_settings(config, pilot, pool))
    layer = next(row["layer"] for row in rows)
    table = pd.DataFrame([*rows, *_speed(loaded, prompts, int(layer))])
    write_atomic(config.out / f"{NAME}.csv", table.to_csv(index=False, float_format="%.4f"))
    shown = table[((table["top"] == 0.2) & (table["measure"] == "multiple")) | (table["setting"] == "prefill")]
    print(shown.round(3).to_string(index=False))


def _parts(
    config: ScreeningConfig, exports: Sequence[Exported], loaded: LoadedModel
) -> tuple[Part, Pool, Mapping[str, tuple[int, ...]]]:
    """All pilots' questions, the pool's, and the prompts of the pool."""
    import numpy as np

    from distill.results import sampled_row
    from neurosig.neurons.sites import ffn_sites
    from neurosig.questions.load import load_questions
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.questions.reader import AnswerReader
    from neurosig.runtime.errors import UserError
    from neurosig.sampling.rollouts import read_rollouts

    pilot = [row for exported in exports for row in exported.rows.values()]
    groups, known = read_rollouts(config.pool / "rollouts.jsonl"), {row.text_sha256 for row in pilot}
    questions = [one for one in load_questions(config.questions, split="test") if one.id in groups]
    if shared := [one.id for one in questions if one.text_sha256 in known]:
        raise UserError(f"--pool {config.pool}: shares question {shared[0]} with a pilot; judge on other questions")
    builder = PromptBuilder(loaded.tokenizer, exports[0].manifest.header.prompt_config())
    prompts = {one.id: builder.student(one) for one in questions}
    asked = {row.question_id: builder.student(row.as_question()) for row in pilot}
    graded = [sampled_row(one, groups[one.id], AnswerReader()) for one in questions]
    right = {
        grading: np.array([row[column] / max(1, row["n_tied"]) for row in graded])
        for grading, column in (("strict", "n_tied_right"), ("lenient", "n_tied_right_lenient"))
    }
    tokens = np.array([float(sum(len(one.completion_ids) for one in groups[question.id])) for question in questions])
    shares = np.array([row.vote.count / row.vote.n for row in pilot if row.vote is not None])
    votes = np.array([row["votes"] / row["k"] for row in graded])
    d_mlp = ffn_sites(loaded.model).d_mlp
    pilot_domains, pilot_kinds = _domains_and_kinds(pilot)
    domains, kinds = _domains_and_kinds(questions)
    of_pilot, of_pool = _features(config, "pilot", loaded, asked), _features(config, "pool", loaded, prompts)
    return (
        Part(pilot_domains, pilot_kinds, shares, of_pilot, d_mlp),
        Pool(domains, kinds, votes, of_pool, d_mlp, right, tokens),
        prompts,
    )


def _domains_and_kinds(questions: Sequence[Any]) -> tuple[Array, Array]:
    import numpy as np

    return np.array([one.domain for one in questions]), np.array([f"{one.domain} {one.kind}" for one in questions])


def _features(config: ScreeningConfig, name: str, loaded: LoadedModel, prompts: Mapping[str, tuple[int, ...]]) -> Array:
    """Both features of the prompts at every layer, from OUT if an earlier run read the same prompts."""
    import numpy as np

    from neurosig.neurons.sites import ffn_sites
    from neurosig.runtime.files import sha256_text
    from neurosig.screening.prompt_features import read_prompts

    path = config.out / f"features-{name}-{sha256_text(repr((loaded.info.weights, prompts)))[:12]}.npy"
    if not path.is_file():
        layers = range(ffn_sites(loaded.model).n_layers)
        found: dict[str, Array] = {}
        with progress(total=len(prompts), desc=name, quiet=config.quiet) as bar:
            for batch in read_prompts(loaded.model, prompts, layers, features="both", value="gated", batch_tokens=4096):
                found |= dict(zip(batch.names, batch.features.numpy(), strict=True))
                bar.update(len(batch.names))
        np.save(path, np.stack([found[question_id] for question_id in prompts]))
    return np.asarray(np.load(path))


def _settings(config: ScreeningConfig, pilot: Part, pool: Pool) -> Iterator[dict[str, Any]]:
    """The rows of every setting; the first is of the first domain."""
    import numpy as np

    domains = list(dict.fromkeys(pilot.domains.tolist()))
    kinds = {name: [kind for kind in dict.fromkeys(pool.kinds.tolist()) if kind.split()[0] == name] for name in domains}
    for features in ("neurons", "residual", "both"):
        for name in domains:
            own, target = pilot.domains == name, pool.domains == name
            score = _ranked(config, pilot.rows(own), pool, features, "question")
            yield from _judged(config, pool, "in domain", name, features, target, [score])
            if features == "neurons":
                hard = np.isin(pool.kinds, [f"{name} {kind}" for kind in HARD])
                if hard.any():
                    yield from _judged(config, pool, "hard kinds", name, features, hard, [score])
    score = _ranked(config, pilot, pool, "neurons", "kind")
    yield from _judged(config, pool, "all domains", ALL, "neurons", np.isin(pool.domains, domains), [score])
    for name in domains:
        own, target = pilot.domains == name, pool.domains == name
        rng = np.random.default_rng(config.seed)
        means = {kind: pilot.shares[own & (pilot.kinds == kind)].mean() for kind in kinds[name]}
        alone = [np.array([means.get(kind, 0.0) for kind in pool.kinds]) for _ in range(10)]
        alone = [values + 1e-9 * rng.random(len(values)) for values in alone]
        yield from _judged(config, pool, "kind alone", name, "none", target, [(values, -1) for values in alone])
        permuted = [
            _ranked(config, pilot.rows(own), pool, "neurons", "question", rng) for _ in range(config.permutations)
        ]
        yield from _judged(config, pool, "permuted", name, "neurons", target, permuted)
        score = _ranked(config, pilot.rows(~own), pool, "neurons", "kind")
        yield from _judged(config, pool, "unseen domain", name, "neurons", target, [score])
    unseen = np.full(len(pool.shares), np.nan)
    for kind in (kind for name in domains for kind in kinds[name]):
        score = _ranked(config, pilot.rows(pilot.kinds != kind), pool, "neurons", "kind")
        unseen = np.where(pool.kinds == kind, score[0], unseen)
    for name in (*domains, ALL):
        target = np.isin(pool.domains, domains if name == ALL else [name])
        yield from _judged(config, pool, "unseen kind", name, "neurons", target, [(unseen, score[1])], by_kind=True)


def _ranked(
    config: ScreeningConfig,
    pilot: Part,
    pool: Part,
    features: PromptFeatures,
    groups: str,
    permuted: np.random.Generator | None = None,
) -> tuple[Array, int]:
    """Expected vote share of each question of the pool by a probe of the pilot, and the probe's layer."""
    import numpy as np

    from neurosig.screening.agreement_probe import fit_probe
    from neurosig.screening.config import ScreenProbeConfig

    width = {"neurons": slice(None, pilot.d_mlp), "residual": slice(pilot.d_mlp, None), "both": slice(None)}[features]
    shares = pilot.shares if permuted is None else permuted.permutation(pilot.shares)
    parts = np.arange(len(shares)) if groups == "question" else np.unique(pilot.kinds, return_inverse=True)[1]
    options = ScreenProbeConfig(features, groups, seed=config.seed)
    probe = fit_probe(pilot.features[:, :, width], shares, parts, options, quiet=config.quiet)
    return probe.expected(pool.features[:, probe.layer, width]), probe.layer


def _judged(
    config: ScreeningConfig,
    pool: Pool,
    setting: str,
    name: str,
    features: str,
    mask: Array,
    scores: Sequence[tuple[Array, int]],
    *,
    by_kind: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows of one setting on the pool's questions of the mask; ``by_kind`` ranks within each kind."""
    import numpy as np

    from figures.experiments.screening_yield import Truth, yields
    from neurosig.statistics.auroc import AnalysisConfig, auroc_interval

    strata = np.unique(pool.kinds[mask], return_inverse=True)[1] if by_kind else np.zeros(mask.sum(), dtype=np.int64)
    passes, ranked = pool.shares[mask] >= 0.5, [score[mask] for score, _ in scores]
    common = {"setting": setting, "pool": name, "features": features, "layer": scores[0][1]}
    for grading, right in pool.right.items():
        truth = Truth(passes.astype(np.float64), right[mask], pool.tokens[mask], strata)
        for row in yields(truth, ranked, seed=config.seed, resamples=config.resamples):
            yield {**common, "grading": grading, **row}
    if len(ranked) == 1 and not by_kind:
        area = auroc_interval(ranked[0], passes, np.arange(len(passes)), AnalysisConfig(config.seed, config.resamples))
        ends = {"value": area.estimate, "low": area.low, "high": area.high, "n": area.n}
        yield {**common, "grading": "none", "top": None, "measure": "auroc", **ends}


def _speed(loaded: LoadedModel, prompts: Mapping[str, tuple[int, ...]], layer: int) -> Iterator[dict[str, Any]]:
    """Prompts and their tokens read per second of CPU time, up to the layer of the first probe."""
    from neurosig.screening.prompt_features import read_prompts

    start, tokens = time.process_time(), 0
    for batch in read_prompts(loaded.model, prompts, [layer], features="neurons", value="gated", batch_tokens=4096):
        tokens += batch.tokens
    seconds = time.process_time() - start
    for measure, count in (("prompts_per_cpu_second", len(prompts)), ("tokens_per_cpu_second", tokens)):
        yield {"setting": "prefill", "pool": ALL, "layer": layer, "measure": measure, "value": count / seconds}


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    import pandas as pd

    from figures.sources import made_or_committed
    from figures.style import caption, save_figure, subplots

    source = made_or_committed(results / f"{NAME}.csv", NAME)
    table = pd.read_csv(source)
    figure, axes = subplots(1, 2, size=(7, 4.2), sharey=True)
    for axis, grading in zip(axes, ("strict", "lenient"), strict=True):
        _draw_panel(
            axis, table[(table["grading"] == grading) & (table["measure"] == "multiple") & (table["top"] == 0.2)]
        )
        axis.set_title(f"{grading} grading")
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, handletextpad=0.2)
    n = int(table[(table["setting"] == "all domains") & (table["measure"] == "auroc")]["n"].iloc[0])
    caption(
        figure,
        f"right majorities with half of the votes in the top fifth of the ranking, as a multiple of a random draw; {n} "
        "test\nquestions, K=8; lines: 95% bootstrap intervals over questions; dashed: random; dotted: the goals, 2 in "
        "domain, 1.3 elsewhere",
    )
    return save_figure(figure, out, NAME, source.read_text())


def _draw_panel(axis: Axes, table: pd.DataFrame) -> None:
    from figures.style import SERIES

    pools = list(dict.fromkeys(table[table["setting"] == "in domain"]["pool"]))
    for number, (setting, features, label) in enumerate(SHOWN):
        rows = table[(table["setting"] == setting) & (table["features"].fillna("none") == features)].set_index("pool")
        colour, marker = SERIES[number]
        for place, pool in enumerate(pools):
            row, y = rows.loc[pool], place + 0.15 * (number - 2)
            axis.hlines(y, row["low"], row["high"], color=colour, linewidth=1.4)
            axis.plot(row["value"], y, marker, color=colour, markersize=5, label=None if place else label)
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    for goal in (1.3, 2):
        axis.axvline(goal, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(pools)), pools)
    axis.set(xlabel="multiple of a random draw")
    axis.grid(axis="y", visible=False)


if __name__ == "__main__":
    sys.exit(run_command(ScreeningConfig, main, presets={}, prog="python -m figures.experiments.screening"))
