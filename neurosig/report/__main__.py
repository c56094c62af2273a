"""Report how well the signals of an export predict right answers: one HTML page, and the numbers as CSV.

    python -m neurosig.report --manifest runs/demo/manifest

For each signal: AUROC for "the majority is right" and "this rollout is right", correlation with length, vote share and
text overlap, what it adds to the vote share and to all output-level signals, and a verdict in words made from these
numbers. Gold answers are read from the question files, by this command only; without them the rest is reported.
"""

from __future__ import annotations

import csv
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.runtime.cli import CommonConfig, PhaseTimer, printable, run_command
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.exported import Exported
    from neurosig.manifest import Manifest
    from neurosig.report.data import Bin, Layer, LevelData
    from neurosig.report.patterns import Patterns
    from neurosig.report.probe import Located
    from neurosig.report.signal_table import SignalRow
    from neurosig.statistics.auroc import AnalysisConfig

logger = logging.getLogger(__name__)

PAGE, SIGNALS_CSV, NEURONS_CSV, LAYERS_CSV = "report.html", "signals.csv", "located_neurons.csv", "layers.csv"
PATH_CSV, FOLDS_CSV, PROBE, CONTEXTS_CSV = "path.csv", "folds.csv", "probe.safetensors", "contexts.csv"


@dataclass(kw_only=True)
class ReportConfig(CommonConfig):
    """Write the signal report of a manifest: how well each signal predicts right answers, and what it adds."""

    manifest: Path
    """Manifest folder written by neurosig.export."""
    adapter: Path | None = None
    """Refuse a manifest that was not made by this adapter: folder of a distill.train run, its adapter/ or one of its
    checkpoints/step-N."""
    against: Path | None = None
    """Manifest of the same questions from the model after training: the page then shows how answers, scores and the
    probe's neurons changed."""
    out: Path | None = None
    """Folder of report.html, the CSV files and probe.safetensors; default: MANIFEST/report."""
    questions: tuple[str, ...] = ()
    """Question files with gold answers; default: the sources of the manifest."""
    fields: tuple[str, ...] = ()
    """FIELD=COLUMN for columns of --questions with other names, as in neurosig.export; default: the manifest's."""
    resamples: int = 2000
    """Bootstrap resamples of the questions."""
    folds: int = 5
    """Cross-fitting folds of the nested regressions."""
    permutations: int = 49
    """Refits of the probe to permuted labels of the questions, which give the p of what it adds: at least 1 / (1 +
    this). 0 leaves them out."""
    seed: int = 0
    """Seed of bootstrap and folds."""
    examples: int = 5
    """Number of selected and of suspect questions on the page."""
    neurons: int = 30
    """Number of located neurons on the page."""


def main(config: ReportConfig) -> None:
    """Write the report described by ``config``."""
    from neurosig.exported import Exported, join_gold
    from neurosig.hallucination.locate import write_neurons
    from neurosig.manifest import HEADER
    from neurosig.report.against import against
    from neurosig.report.data import layer_profile, question_level, rollout_level
    from neurosig.report.effects import effects
    from neurosig.report.html import render
    from neurosig.report.patterns import patterns
    from neurosig.report.probe import Located, locate
    from neurosig.report.refits import Refits, fold_table, with_refit_p
    from neurosig.report.signal_table import analyse
    from neurosig.runtime.files import write_atomic
    from neurosig.statistics.auroc import AnalysisConfig

    analysis = AnalysisConfig(config.seed, config.resamples, config.folds)
    if not (config.manifest / HEADER).is_file() and (config.manifest / "manifest" / HEADER).is_file():
        raise UserError(f"--manifest {config.manifest}: not a manifest folder; its subfolder manifest is one")
    with PhaseTimer() as timer:
        with timer.phase("read"):
            exported = Exported(config.manifest)
            if not exported.rows:
                raise UserError(
                    f"--manifest {config.manifest}: every question was too long, so there are no signals to report"
                )
            if config.adapter is not None:
                _check_adapter(config.adapter, exported.manifest)
            gold, lacking = join_gold(
                exported.manifest, config.questions, config.fields, required=bool(config.questions)
            )
        with timer.phase("analyse"):
            levels = {"question": question_level(exported, gold), "rollout": rollout_level(exported, gold)}
            tables = {
                name: analyse(level.signals, level.right, level.owners, level.confounders, analysis)
                for name, level in levels.items()
            }
            layers = layer_profile(exported)
        with timer.phase("refit"):
            refits = Refits(exported)
            tables = with_refit_p(
                refits, levels, tables, analysis, permutations=config.permutations, quiet=config.quiet
            )
            folds = fold_table(refits, levels["question"])
        with timer.phase("locate"):
            located = locate(exported, seed=config.seed, quiet=config.quiet)
        with timer.phase("cluster"):
            clustered = patterns(exported, seed=config.seed)
        with timer.phase("compare"):
            affected = effects(exported, gold, analysis)
            compared = None if config.against is None else against(exported, config.against, gold, analysis)
        with timer.phase("write"):
            page = _page(config, exported, levels, tables, lacking, layers, located, clustered, gold, analysis)
            page |= {"folds": folds, "permutations": config.permutations, "against": compared}
            page["effects"] = affected
            page["most_neurons"] = config.neurons
            page["findings"] += [folds.sentence] if folds.rows else []
            page["findings"] += [affected.sentence] if affected else []
            out = config.manifest / "report" if config.out is None else config.out
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / SIGNALS_CSV, _signals_csv(levels, tables))
            if isinstance(located, Located):
                write_neurons(out / NEURONS_CSV, located.probe.neurons)
                write_atomic(out / PATH_CSV, located.probe.path.to_csv(index=False))
                located.probe.save(out / PROBE)
            if folds.rows:
                write_atomic(out / FOLDS_CSV, _csv(folds.records))
            if affected:
                write_atomic(out / CONTEXTS_CSV, _csv(affected.questions))
            write_atomic(out / LAYERS_CSV, _csv([asdict(layer) for layer in layers]))
            write_atomic(out / PAGE, render(page))
    for sentence in page["findings"]:
        print(printable(sentence))
    print(printable(str(out / PAGE)))


def _check_adapter(adapter: Path, manifest: Manifest) -> None:
    from neurosig.models.run_folder import find_adapter
    from neurosig.runtime.files import sha256_file

    made, given = manifest.header.model.get("adapter"), sha256_file(find_adapter(adapter).file)
    if made != given:
        by = f"the adapter {made[:12]}" if made else "a model without an adapter"
        raise UserError(f"--adapter {adapter}: has SHA-256 {given[:12]}, the manifest was made by {by}; export again")


def _page(
    config: ReportConfig,
    exported: Exported,
    levels: Mapping[str, LevelData],
    tables: Mapping[str, Sequence[SignalRow]],
    lacking: str | None,
    layers: Sequence[Layer],
    located: Located | str,
    clustered: Patterns | str,
    gold: Mapping[str, Any],
    analysis: AnalysisConfig,
) -> dict[str, Any]:
    """The variables of the template."""
    from neurosig.report.data import examples, reliability
    from neurosig.report.html import layer_charts, table_of
    from neurosig.report.signal_table import headline

    manifest = exported.manifest
    bins = reliability(exported, gold)
    events = {"question": "the majority is right", "rollout": "a rollout is right"}
    samples = {name: _sample(name, level, lacking, analysis) for name, level in levels.items()}
    findings = [headline(tables[name], event) for name, event in events.items()]
    selected, suspect = examples(exported, gold, config.examples)
    options = manifest.header.options
    return {
        "run": {
            "model": str(manifest.header.model["id"]),
            "sources": ", ".join(manifest.header.dataset["sources"]),
            "facts": _facts(manifest),
        },
        "findings": [sentence for sentence in findings if sentence] or [samples["question"]],
        "question_table": table_of(tables["question"], levels["question"], samples["question"]),
        "rollout_table": table_of(tables["rollout"], levels["rollout"], samples["rollout"]),
        "bins": bins,
        "most": max((bin.n for bin in bins), default=1),
        "calibration": _calibration(bins, manifest.k, config.seed),
        "without_gold": f"No gold answers: {lacking}.",
        "charts": layer_charts(layers),
        "located": located,
        "patterns": clustered,
        "top_neurons": [] if isinstance(located, str) else located.table[: config.neurons],
        "selected": selected,
        "suspect": suspect,
        "policy": f"{options['context_policy']}".replace("_", " "),
        "analysis": analysis,
    }


def _facts(manifest: Manifest) -> dict[str, str]:
    header = manifest.header
    options, sampling = header.options, header.sampling
    counts = {name: count for name, count in header.counts.items() if name != "questions"}
    weights = ", ".join(f"{name} {value[:12]}" for name, value in header.model["weights"].items())
    where = "made elsewhere" if "rollouts_sha256" in sampling else f"T={options['temperature']:g}"
    facts = {
        "model": f"{header.model['id']} ({header.model['dtype']}; {weights})",
        **({"adapter": str(header.model["adapter"])[:12]} if header.model.get("adapter") else {}),
        "questions": f"{header.counts['questions']} of {', '.join(header.dataset['sources'])}",
        "rollouts": f"{len(manifest.rollouts)}, K={manifest.k}, {where}, seed {options['seed']}",
        "outcome": ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()),
    }
    facts |= {"note": "; ".join(header.notes)} if header.notes else {}
    named = ("neuron_value", "contribution", "active_set", "set_size", "hallucination_score", "question_filter")
    facts |= {name.replace("_", " "): str(options[name]) for name in named if name in options}
    return facts | {"manifest": f"{manifest.folder} (content {header.content_sha256[:12]})"}


def _sample(name: str, level: LevelData, lacking: str | None, analysis: AnalysisConfig) -> str:
    """The number of rows of a table, and what cannot be computed and why."""
    from neurosig.statistics.auroc import rarest_class

    questions, rows = int(level.owners.max()) + 1, len(level.owners)
    text = f"{questions} questions" + (f", {rows} rollouts" if name == "rollout" else "")
    if level.right is None:
        return f"{text}. No gold answers, so only the correlations: {lacking}."
    what = "majorities" if name == "question" else "rollouts"
    right = int(level.right.sum())
    text += f", {right} {what} right."
    if right in (0, rows):
        text += f" All {what} are {'right' if right else 'wrong'}, so no signal can tell right from wrong: no AUROC."
    elif rarest_class(level.right, level.owners) < analysis.folds:
        text += (
            f" The rarer outcome occurs in {rarest_class(level.right, level.owners)} questions, too few for "
            f"{analysis.folds} folds: what the signals add is left out."
        )
    return text + (f" Left out: {lacking}." if lacking else "")


def _calibration(bins: Sequence[Bin], k: int, seed: int) -> str:
    """ECE and its floor; empty without gold answers."""
    import numpy as np

    from neurosig.statistics.metrics import ece, ece_floor

    if not bins:
        return ""
    sizes = [bin.n for bin in bins]
    votes = np.repeat([round(bin.confidence * k) for bin in bins], sizes)
    right = np.concatenate([np.arange(bin.n) < bin.right for bin in bins]).astype(float)
    return (
        f"ECE {ece(votes, k, right):.3f} over {len(votes)} questions, K={k}; a perfectly calibrated sampler would show "
        f"about {ece_floor(k, len(votes), seed=seed):.3f}. Dot area: questions; ties are decided as in the manifest."
    )


def _signals_csv(levels: Mapping[str, LevelData], tables: Mapping[str, Sequence[SignalRow]]) -> str:
    lines = []
    for name, level in levels.items():
        for row in tables[name]:
            line: dict[str, Any] = {
                "level": name,
                "signal": row.signal.name,
                "kind": row.signal.kind,
                "questions": int(level.owners.max()) + 1,
                "rows": len(level.owners),
                "right": None if level.right is None else int(level.right.sum()),
                **_interval("auroc", row.auroc),
            }
            for confounder, correlation in row.correlations.items():
                line |= _interval(f"spearman_{confounder}", correlation)
            for base in ("over_vote", "over_outputs"):
                gain = getattr(row, base)
                line |= _interval(base, gain and gain.auroc) | _interval(f"{base}_log_loss", gain and gain.log_loss)
                line |= {f"{base}_p": gain and gain.p, f"{base}_p_holm": gain and getattr(row, f"{base}_p")}
                line |= {f"{base}_p_refit": gain and gain.p_refit}
            line["verdict"] = row.verdict
            lines.append(line)
    return _csv(lines)


def _interval(name: str, interval: Any) -> dict[str, float | None]:
    ends = {name: "estimate", f"{name}_low": "low", f"{name}_high": "high"}
    return {column: None if interval is None else round(getattr(interval, end), 6) for column, end in ends.items()}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(ReportConfig, main, presets={}, prog="python -m neurosig.report"))
