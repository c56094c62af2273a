"""Rank a pool of questions by how far a model's answers to them will agree, before any of them is sampled.

    python -m neurosig.screen --run runs/demo/manifest --questions pool.jsonl --out runs/demo/screened

A finished export of some questions, the pilot, says how far the answers to each agree. A ridge regression learns that
vote share from the last token of the prompt (FFN neuron values or residual stream of one layer), and one forward pass
per prompt then gives the expected vote share of every question of the pool. ``python -m neurosig.export --questions
OUT --limit N`` samples the N questions with the highest. No gold answer is read for the ranking: OUT/questions.jsonl
holds those that the pool came with, unread, for the commands that judge by them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from neurosig.options import QuestionOptions
from neurosig.runtime.cli import PhaseTimer, config_record, progress, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import run_in_folder
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import AtLeast, Shapes
from neurosig.screening.config import PromptFeatures, ScreenProbeConfig

if TYPE_CHECKING:
    import numpy as np

    from neurosig.exported import Exported
    from neurosig.manifest import Header, QuestionRow
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.screening.agreement_probe import AgreementProbe

logger = logging.getLogger(__name__)

RESULTS, QUESTIONS, CALIBRATION, WORK = "screen.json", "questions.jsonl", "calibration.svg", ".work"
PROBE = ScreenProbeConfig()  # the options' defaults


@dataclass(kw_only=True)
class ScreenConfig(QuestionOptions):
    """Rank unlabelled questions by how far a model's answers will agree, from one forward pass per prompt.

    Writes questions.jsonl (the pool, highest expected vote share first, which neurosig.export --questions OUT --limit N
    reads), screen.json (the probe, how well it predicts the pilot, and the speed) and calibration.svg.
    """

    run: Annotated[Path, Shapes.ROLLOUTS, Section.QUESTIONS]
    """Finished export, the pilot, of questions like those of the pool: its vote shares teach the probe, and its model,
    adapter, prompt wording, template and thinking mode are used for the pool. At least 20 questions; a few hundred are
    better."""
    questions: Annotated[tuple[str, ...], Shapes.ROLLOUTS]
    """The pool: bundled sets (optionally :train, :dev, :test), files, folders or hf:ORG/NAME[/SET], as in
    neurosig.export. A question of the pilot gets the prediction of a probe that did not see it."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of the ranked questions."""
    model: Annotated[str | None, Shapes.MODEL] = None
    """Load the pilot's model from here instead of the id in its manifest; the weights must match."""
    adapter: Annotated[Path | None, Shapes.MODEL] = None
    """Load the pilot's adapter from here instead of the path in its manifest; the weights must match."""
    split: Annotated[Literal["train", "dev", "test", "all"], Shapes.ROLLOUTS] = "train"
    """Split of the bundled sets that name none."""
    limit: Annotated[int | None, Shapes.ROLLOUTS] = None
    """Use only the first N questions of the pool."""
    resume: Annotated[bool, Shapes.PLACE, Section.OUTPUT] = False
    """Continue an interrupted screen; leave a finished one unchanged."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier screen in --out."""

    features: Annotated[PromptFeatures, Shapes.TRACES, Section.SCORE] = PROBE.features
    """What the probe reads at the prompt's last token: neurons, the values of one layer's FFN neurons; residual, the
    residual stream after one layer; both. The layer and the penalty are chosen by cross-validation on the pilot."""
    groups: Annotated[str, Shapes.SELECTION] = PROBE.groups
    """What the folds keep together, as --probe-groups of neurosig.export. question: a question is predicted by a probe
    that saw others of its kind; kind, domain or another column: by a probe that saw none with the same value, which is
    right for a pool of kinds or domains that the pilot lacks. At least 3 values of it are needed."""
    folds: Annotated[int, Shapes.SELECTION, AtLeast(2)] = PROBE.folds
    """Cross-fitting folds, and folds inside each that choose layer and penalty."""
    seed: Annotated[int, Shapes.SELECTION] = PROBE.seed
    """Seed of the folds and of the bootstrap intervals."""

    batch_tokens: Annotated[int, Shapes.RESOURCES, AtLeast(1), Section.RESOURCES] = 4096
    """Prompt tokens per forward pass, padding included; memory and speed only."""
    device: Annotated[str | None, Shapes.RESOURCES] = None
    """torch device; default: the first accelerator, else the CPU."""

    def probe_config(self) -> ScreenProbeConfig:
        """How the probe is fitted."""
        return ScreenProbeConfig(self.features, self.groups, self.folds, self.seed)


def main(config: ScreenConfig) -> None:
    """Run the screen described by ``config``."""
    owned = (RESULTS, QUESTIONS, CALIBRATION, WORK)
    run_in_folder(config, _screen, finished=RESULTS, owned=owned, temporary=WORK)


def _screen(config: ScreenConfig, timer: PhaseTimer) -> None:
    import numpy as np

    from neurosig.exported import Exported
    from neurosig.questions.load import load_questions
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.runtime.extras import EXTRAS, check_installed
    from neurosig.screening.agreement_probe import check_pilot, fit_probe, measured
    from neurosig.screening.ranked import ranked_lines

    check_installed("neurosig.screen", *EXTRAS["signals"])
    pool = load_questions(config.questions, split=config.split, limit=config.limit, fields=config.fields)
    with timer.phase("read pilot"):
        exported = Exported(config.run)
        pilot = list(exported.rows.values())
        shares = np.array([row.vote.count / row.vote.n for row in pilot if row.vote is not None])
        groups = _groups(pilot, config.groups)
        check_pilot(shares, groups, config.probe_config())
    with timer.phase("load model"):
        loaded = _load(config, exported.manifest.header)
    builder = PromptBuilder(loaded.tokenizer, exported.manifest.header.prompt_config())
    prompts = _prompts(pool, builder, loaded, exported.manifest.header)
    with timer.phase("read pilot prompts"):
        asked = {row.question_id: builder.student(row.as_question()) for row in pilot}
        features = _pilot_features(config, loaded, exported.manifest.header, asked)
    with timer.phase("fit"):
        probe = fit_probe(features, shares, groups, config.probe_config(), quiet=config.quiet)
        del features
        measures = measured(probe, shares, seed=config.seed)
    cross_fitted = dict(zip((row.text_sha256 for row in pilot), probe.cross_fitted.tolist(), strict=True))
    texts = {question.id: question.text_sha256 for question in pool if question.id in prompts}
    scores = {name: cross_fitted[text] for name, text in texts.items() if text in cross_fitted}
    in_pilot = len(scores)
    unseen = {name: prompt for name, prompt in prompts.items() if name not in scores}
    scores |= _scores(config, loaded, exported.manifest.header, probe, unseen, timer)
    counts = {"questions": len(pool), "ranked": len(scores), "in_pilot": in_pilot, "too_long": len(pool) - len(scores)}
    _write(config, exported, loaded, probe, measures, counts, ranked_lines(pool, scores), timer)
    _report(config, measures, counts)


def _groups(pilot: Sequence[QuestionRow], column: str) -> np.ndarray:
    """Index of each pilot question's group; by default, questions of the same text are one."""
    import numpy as np

    from neurosig.hallucination.groups import fold_groups

    groups = fold_groups(pilot, column, option="--groups")
    values = [row.text_sha256 if groups is None else groups[row.question_id] for row in pilot]
    return np.unique(values, return_inverse=True)[1]


def _load(config: ScreenConfig, header: Header) -> LoadedModel:
    """The pilot's model."""
    from neurosig.models.trained import load_as_trained

    options = header.options
    where = SimpleNamespace(
        model=config.model or str(header.model["id"]),
        adapter=header.adapter(config.adapter),
        dtype=options["dtype"],
        template=options["template"],
    )
    loaded = load_as_trained(where, config.device)
    for difference in header.differences(loaded.info):
        raise UserError(
            f"the pilot {config.run} was made by {header.model['id']}, not by {loaded.info.id}: {difference}; give the "
            "right --model and --adapter, or export the pilot again"
        )
    return loaded


def _prompts(
    pool: Sequence[Question], builder: PromptBuilder, loaded: LoadedModel, header: Header
) -> dict[str, tuple[int, ...]]:
    """Prompt of each question that fits the model's positions with the pilot's completions, as export wants it."""
    prompts = {question.id: builder.student(question) for question in pool}
    room = loaded.max_length - int(header.options["max_new_tokens"])
    fitting = {name: prompt for name, prompt in prompts.items() if len(prompt) <= room}
    if not fitting:
        raise UserError(
            f"every question is too long: the shortest prompt has {min(map(len, prompts.values()))} tokens, the "
            f"model's {loaded.max_length} positions less the pilot's --max-new-tokens leave {room}"
        )
    if len(fitting) < len(prompts):
        logger.warning("%d of %d questions are too long and are left out", len(prompts) - len(fitting), len(prompts))
    return fitting


def _pilot_features(
    config: ScreenConfig, loaded: LoadedModel, header: Header, prompts: Mapping[str, tuple[int, ...]]
) -> np.ndarray:
    """Features of the pilot's prompts at every layer: 4 bytes per question, layer and neuron."""
    import numpy as np

    from neurosig.neurons.sites import ffn_sites
    from neurosig.screening.prompt_features import read_prompts

    layers = range(ffn_sites(loaded.model).n_layers)
    found: dict[str, np.ndarray] = {}
    with progress(total=len(prompts), desc="pilot", quiet=config.quiet) as bar:
        for batch in read_prompts(loaded.model, prompts, layers, **_reading(config, header)):
            found |= dict(zip(batch.names, batch.features.numpy(), strict=True))
            bar.update(len(batch.names))
    return np.stack([found[name] for name in prompts])


def _reading(config: ScreenConfig, header: Header) -> dict[str, Any]:
    value = header.options["neuron_value"]
    return {"features": config.features, "value": value, "batch_tokens": config.batch_tokens}


def _scores(
    config: ScreenConfig,
    loaded: LoadedModel,
    header: Header,
    probe: AgreementProbe,
    prompts: Mapping[str, tuple[int, ...]],
    timer: PhaseTimer,
) -> dict[str, float]:
    """Expected vote share of each prompt, those of an interrupted run from its log."""
    from neurosig.runtime.files import sha256_text
    from neurosig.screening.prompt_features import read_prompts
    from neurosig.screening.ranked import ScoreLog

    work = config.out / WORK
    work.mkdir(exist_ok=True)
    own = config.probe_config()
    key = {
        "pilot": header.content_sha256,
        "prompts": sha256_text(json.dumps([[name, prompt] for name, prompt in prompts.items()])),
        **{name: getattr(own, name) for name in own.__dataclass_fields__},
    }
    log = ScoreLog(work / "scores.log", key)
    options = _reading(config, header)
    with timer.phase("score"), progress(total=len(prompts), desc="score", quiet=config.quiet) as bar:
        bar.update(len(log.scores))
        if not prompts:
            return {}
        for batch in read_prompts(loaded.model, prompts, [probe.layer], **options, done=set(log.scores)):
            expected = probe.expected(batch.features[:, 0].numpy()).tolist()
            new = {n: score for n, score in zip(batch.names, expected, strict=True) if n not in log.scores}
            log.append(new)
            timer.add_tokens("score", batch.tokens)
            bar.update(len(new))
    return log.scores


def _write(
    config: ScreenConfig,
    exported: Exported,
    loaded: LoadedModel,
    probe: AgreementProbe,
    measures: Mapping[str, Any],
    counts: Mapping[str, int],
    ranked: str,
    timer: PhaseTimer,
) -> None:
    import shutil

    import torch

    from neurosig.runtime.files import write_atomic
    from neurosig.runtime.provenance import run_record
    from neurosig.screening.ranked import calibration_chart

    manifest, seconds = exported.manifest, timer.seconds["score"]
    n_read, n_tokens = counts["ranked"] - counts["in_pilot"], timer.tokens.get("score", 0)
    record = {
        "pilot": {
            "sha256": manifest.header.content_sha256,
            "questions": len(exported.rows),
            "k": manifest.k,
        },
        "probe": {"features": config.features, "layer": probe.layer, "penalty": probe.penalty, "groups": config.groups},
        "cross_fitted": measures,
        "pool": counts,
        "prefill": {
            "prompts_per_second": round(n_read / seconds, 3),
            "tokens_per_second": round(n_tokens / seconds, 1),
            "threads": torch.get_num_threads(),
            "device": str(loaded.model.device),
        },
        "model": loaded.info.as_dict(),
        "config": config_record(config),
        "run": run_record(),
    }
    write_atomic(config.out / QUESTIONS, ranked)
    write_atomic(config.out / CALIBRATION, calibration_chart(measures["calibration"], len(exported.rows)))
    write_atomic(config.out / RESULTS, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(config.out / WORK)


def _report(config: ScreenConfig, measures: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    from neurosig.statistics.metrics import format_interval

    logger.info("%s: %s", config.out, ", ".join(f"{count} {name}" for name, count in counts.items()))
    auroc = measures["auroc"]
    found = "none" if auroc is None else format_interval(auroc["estimate"], auroc["low"], auroc["high"], ".3f")
    logger.info("cross-fitted on the pilot: R2 %.3f, AUROC of a vote share of at least 0.5 %s", measures["r2"], found)
    if measures["r2"] <= 0:
        logger.warning(
            "the probe predicts the pilot's unseen questions no better than their mean (R2 %.3f): the ranking is no "
            "better than chance; export a larger pilot, or one of questions more like the pool's",
            measures["r2"],
        )


if __name__ == "__main__":
    sys.exit(run_command(ScreenConfig, main, presets={}, prog="python -m neurosig.screen"))
