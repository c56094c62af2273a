"""A search for readings of the neurons that beat the export's, chosen on some sets of questions, confirmed on others.

    python -m figures.experiments.signal_search --exports runs/search

The folder holds exports of the bundled sets, named as in `figures.experiments.search_plan`: ``geography-train`` of
``geography:train``, and so on. Every variant of the plan is an annotation-free probe, fitted on some exports and judged
on questions, kinds of question or domains that it never saw. Gold answers are read there only, to judge, strictly and
leniently.

1. Search: every variant on every task of the search: its AUROC, and what it adds to the vote share and to all
   output-level signals, the p-values corrected over all of them (Holm). Variants with a gain that survives are also
   fitted again to permuted labels: a probe of labels that mean nothing gains too
   (`neurosig.statistics.permutation`).
2. Confirmation: the best few, on sets that chose nothing, against the default: difference in AUROC with its paired
   bootstrap interval over questions, per task and meaned over the tasks, again corrected.

`python -m figures signal_search` draws the figure from ``signal_search.csv`` of the results folder, or from the
committed ``figures/data/signal_search.csv``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures.experiments.search_plan import CONFIRMED, RULE, TASKS, VARIANTS, Stage, Task, Variant
from neurosig.runtime.cli import CommonConfig, PhaseTimer, progress, run_command

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from figures.experiments.search_fit import Source
    from figures.experiments.search_judge import Draws

    Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)

NAME = "signal_search"
NEEDS = None
ALL_TASKS = "mean over the tasks"
BASES = ("over_vote", "over_outputs")


@dataclass(kw_only=True)
class SearchConfig(CommonConfig):
    """Fit every variant, choose the best, confirm them on other questions, and write signal_search.csv."""

    exports: Path = Path("runs/search")
    """Folder of the plan's exports; the traced features are kept there for a second run."""
    out: Path = Path("runs/search")
    """Folder of signal_search.csv."""
    resamples: int = 1000
    """Bootstrap resamples. The p of a gain below .01 is computed again from 40 times as many: a correction over n tests
    can only reject a p below .05 / n."""
    permutations: int = 49
    """Refits of a variant to permuted labels, where one of its gains survives the correction; they give the p of what
    it adds beside the bootstrap's: at least 1 / (1 + this)."""
    seed: int = 0
    """Seed of bootstrap, folds and shuffled labels."""


def main(config: SearchConfig) -> None:
    """Run the plan.

    Raises:
        UserError: An export or its gold answers cannot be read.
    """
    search(config, VARIANTS, TASKS)


def search(config: SearchConfig, variants: Sequence[Variant], tasks: Sequence[Task]) -> pd.DataFrame:
    """Run both stages over ``variants`` and ``tasks``, print them and write the table; see the module."""
    import pandas as pd

    from figures.sources import finished_export
    from neurosig.runtime.files import write_atomic

    names = list(dict.fromkeys(name for task in tasks for name in (*task.fitted, task.judged)))
    for name in names:
        finished_export(config.exports / name)
    config.out.mkdir(parents=True, exist_ok=True)
    with PhaseTimer() as timer:
        with timer.phase("trace"):
            sources = {name: _source(name, index, config) for index, name in enumerate(names)}
        with timer.phase("search"):
            found = _judged("search", variants, tasks, sources, config)
        chosen = _chosen(found)
        print(_search_summary(found, chosen))
        with timer.phase("confirm"):
            kept = [variant for variant in variants if variant.role != "tried" or variant.name in chosen]
            confirmed = _judged("confirmation", kept, tasks, sources, config)
        print(_confirmation_summary(confirmed, chosen))
    table = pd.concat([found, confirmed], ignore_index=True).assign(
        resamples=config.resamples, permutations=config.permutations, seed=config.seed
    )
    write_atomic(config.out / f"{NAME}.csv", table.to_csv(index=False, float_format="%.4g"))
    return table


def _source(name: str, index: int, config: SearchConfig) -> Source:
    from figures.experiments.search_features import features_of
    from figures.experiments.search_fit import Source
    from figures.experiments.search_judge import Judge
    from neurosig.exported import Exported
    from neurosig.statistics.auroc import AnalysisConfig

    exported = Exported(config.exports / name)
    features = features_of(exported, config.exports, quiet=config.quiet)
    lacking = ", ".join(f"{positions} {share:.2f}" for positions, share in features.lacking.items() if share)
    logger.info("%s: %d questions; share of rollouts without such a token: %s", name, len(exported.rows), lacking)
    analysis = AnalysisConfig(config.seed + 1000 * index, config.resamples, repeats=1)  # draws of its own for every set
    return Source(exported, features, Judge(exported, analysis), config.seed)


# Judging


def _judged(
    stage: Stage, variants: Sequence[Variant], tasks: Sequence[Task], sources: dict[str, Source], config: SearchConfig
) -> pd.DataFrame:
    """One row per variant, task, event and grading, with p-values corrected, and the means over the tasks."""
    import numpy as np
    import pandas as pd

    from figures.experiments.search_fit import trust_of

    own = [task for task in tasks if task.stage == stage]
    lines: list[dict[str, Any]] = []
    default: dict[tuple[str, tuple[str, str]], Draws] = {}
    for variant in progress(variants, desc=stage, quiet=config.quiet):
        against: dict[tuple[str, str], list[Any]] = {}
        for task in own:
            labels = {name: sources[name].labels(variant) for name in task.fitted}
            scores, used = trust_of(variant, task, sources, labels, config.seed)
            judge = sources[task.judged].judge
            for key in judge.levels:
                auroc = judge.auroc(key, judge.trust(key[0], scores))
                if variant.role == "default":
                    default[task.name, key] = auroc
                lines.append(_line(stage, task, variant, key, used, auroc, default[task.name, key], judge, scores))
                against.setdefault(key, []).append((auroc, default[task.name, key]))
        lines += [_mean_line(stage, variant, key, pairs, config) for key, pairs in against.items()]
    for task in own:
        lines += _output_lines(stage, task, sources[task.judged].judge)
    table = _corrected(pd.DataFrame(lines))
    table["over_vote_p_refit"] = table["over_outputs_p_refit"] = np.nan
    surviving = table[_survives(table, "over_vote") | _survives(table, "over_outputs")]
    kept = set(zip(surviving.variant, surviving.task, strict=True))
    refitted = [(variant, task) for variant in variants for task in own if (variant.name, task.name) in kept]
    for variant, task in progress(refitted if config.permutations else [], desc="refits", quiet=config.quiet):
        for (event, grading, base), p in _p_refit(variant, task, sources, config):
            where = (table.variant == variant.name) & (table.task == task.name)
            table.loc[where & (table.event == event) & (table.grading == grading), f"{base}_p_refit"] = p
    return table


def _line(
    stage: Stage,
    task: Task,
    variant: Variant,
    key: tuple[str, str],
    used: int,
    auroc: Draws,
    default: Draws,
    judge: Any,
    scores: Array,
) -> dict[str, Any]:
    level, n = judge.levels[key], len(judge.exported.rows)
    line = {
        **{"stage": stage, "task": task.name, "reach": task.reach, "event": key[0], "grading": key[1]},
        **{"variant": variant.name, "role": variant.role, "neurons": used, "n": n, "right": int(level.right.sum())},
        **_columns("auroc", auroc.interval(n, judge.analysis.seed)),
    }
    if variant.role != "default":
        difference = auroc.minus(default)
        line |= _columns("over_default", difference.interval(n, judge.analysis.seed))
    for base, gain in judge.gains(key, judge.trust(key[0], scores)).items():
        line |= _columns(base, gain.auroc) | {f"{base}_p": gain.p}
    return line


def _mean_line(
    stage: Stage, variant: Variant, key: tuple[str, str], pairs: Sequence[tuple[Draws, Draws]], config: SearchConfig
) -> dict[str, Any]:
    """Means over the tasks; tasks on one set of questions share its draws, sets are drawn independently."""
    import numpy as np

    from figures.experiments.search_judge import mean_draws
    from neurosig.statistics.significance import bootstrap_p

    mean = mean_draws([auroc for auroc, _ in pairs])
    line = {
        **{"stage": stage, "task": ALL_TASKS, "reach": "all", "event": key[0], "grading": key[1]},
        **{"variant": variant.name, "role": variant.role, **_columns("auroc", mean.interval(0, config.seed))},
    }
    if variant.role != "default":
        difference = mean_draws([auroc.minus(default) for auroc, default in pairs])
        line |= _columns("over_default", difference.interval(0, config.seed))
        if stage == "confirmation":
            line["over_default_p"] = bootstrap_p(difference.draws[~np.isnan(difference.draws)])
    return line


def _output_lines(stage: Stage, task: Task, judge: Any) -> Iterator[dict[str, Any]]:
    for key, level in judge.levels.items():
        for signal in level.signals:
            if signal.kind == "output":
                auroc = judge.auroc(key, signal.trust).interval(len(judge.exported.rows), judge.analysis.seed)
                yield {
                    **{"stage": stage, "task": task.name, "reach": task.reach, "event": key[0], "grading": key[1]},
                    **{"variant": signal.name.replace("_", " "), "role": "output", **_columns("auroc", auroc)},
                }


def _columns(name: str, interval: Any) -> dict[str, float]:
    ends = {name: "estimate", f"{name}_low": "low", f"{name}_high": "high"}
    return {column: getattr(interval, end) for column, end in ends.items()}


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """With p-values corrected over the tried variants, tasks, events and gradings of the stage; those over the default,
    which the confirmation has for the means over the tasks, are a family of their own."""
    from neurosig.statistics.significance import holm

    for base in (*BASES, "over_default"):
        table[f"{base}_p_holm"] = float("nan")
        if f"{base}_p" in table:
            rows = (table["role"] == "tried") & table[f"{base}_p"].notna()
            table.loc[rows, f"{base}_p_holm"] = holm(table.loc[rows, f"{base}_p"].tolist())
    return table


def _survives(table: pd.DataFrame, base: str) -> pd.Series[bool]:
    return (table[f"{base}_low"] > 0) & (table[f"{base}_p_holm"] <= 0.05)


def _p_refit(
    variant: Variant, task: Task, sources: dict[str, Source], config: SearchConfig
) -> list[tuple[tuple[str, str, str], float]]:
    """p of each gain from fits to permuted labels."""
    import numpy as np

    from figures.experiments.search_fit import trust_of
    from neurosig.statistics.permutation import permutation_p

    judge, parts = sources[task.judged].judge, [sources[name] for name in task.fitted]
    sizes = np.cumsum([len(part.owners) for part in parts])[:-1]
    steps = np.cumsum([0, *(int(part.owners.max()) + 1 for part in parts)])
    owners = np.concatenate([part.owners + step for part, step in zip(parts, steps[:-1], strict=True)])
    labels = np.concatenate([part.labels(variant) for part in parts])

    def gains(permuted: Array) -> list[float]:
        own = dict(zip(task.fitted, np.split(permuted, sizes), strict=True))
        return judge.refit_gains(trust_of(variant, task, sources, own, config.seed)[0])

    p = permutation_p(gains, labels, config.permutations, config.seed, owners).p
    return list(zip(judge.tests, p.tolist(), strict=True))


# In words


def _chosen(found: pd.DataFrame) -> list[str]:
    """The variants that are confirmed: see `figures.experiments.search_plan.CONFIRMED`."""
    mean = _ranked(found[found["role"] == "tried"])
    return [str(name) for name in mean.index[:CONFIRMED]]


def _ranked(found: pd.DataFrame) -> pd.Series[float]:
    own = found[(found["task"] == ALL_TASKS) & (found["event"] == "majority is right")]
    return own.groupby("variant", sort=True)["auroc"].mean().sort_values(ascending=False, kind="stable")


def adds(table: pd.DataFrame, base: str) -> pd.Series[bool]:
    """Whether a variant adds to a base: after correction, and more than fits to permuted labels."""
    return _survives(table, base) & (table[f"{base}_p_refit"].fillna(0.0) <= 0.05)


def _search_summary(found: pd.DataFrame, chosen: Sequence[str]) -> str:
    tried, ranked = found[found["role"] == "tried"], _ranked(found)
    default = found.loc[found["role"] == "default", "variant"].iloc[0]
    lines = [f"Search: {tried['variant'].nunique()} variants on {found['task'].nunique() - 1} tasks."]
    for base, name in (("over_vote", "the vote share"), ("over_outputs", "all output-level signals")):
        tests = tried[tried[f"{base}_p"].notna()]
        lines.append(
            f"Of {len(tests)} tests {int(adds(tests, base).sum())} add to {name} after correction and against refits "
            f"on permuted labels, {int((tests[f'{base}_low'] > 0).sum())} by their interval alone."
        )
    best = "; ".join(f"{name} {ranked[name]:.3f}" for name in chosen)
    lines.append(f"Best by mean AUROC for 'majority is right': {best}; the default {ranked[default]:.3f}.")
    return "\n".join(lines)


def _confirmation_summary(table: pd.DataFrame, chosen: Sequence[str]) -> str:
    lines = ["Confirmation, on sets that chose nothing, against the default:"]
    supported = []
    for name in chosen:
        own = table[(table["variant"] == name) & (table["event"] == "majority is right")]
        mean, by_task = own[own["task"] == ALL_TASKS], own[own["task"] != ALL_TASKS]
        parts = [
            f"{row.grading} {row.over_default:+.3f} [{row.over_default_low:+.3f}, {row.over_default_high:+.3f}], "
            f"p = {row.over_default_p_holm:.3f}"
            for row in mean.itertuples()
        ]
        lost = int((by_task["over_default_high"] < 0).sum())
        lines.append(f"{name}: {'; '.join(parts)}; below it in {lost} of {len(by_task)} tests")
        if (mean["over_default_low"] > 0).all() and (mean["over_default_p_holm"] <= 0.05).all() and not lost:
            supported.append(name)
    lines.append(f"{RULE} By this rule: {', '.join(supported) or 'the default stays'}.")
    return "\n".join(lines)


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    from figures.experiments.search_figure import draw_table
    from figures.sources import made_or_committed

    return draw_table(made_or_committed(results / f"{NAME}.csv", NAME), out, NAME)


if __name__ == "__main__":
    sys.exit(run_command(SearchConfig, main, presets={}, prog="python -m figures.experiments.signal_search"))
