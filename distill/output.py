"""The output of a finished run: weights in PEFT or transformers format, a model card and the run record."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.metrics_log import WANDB_ID
from neurosig.models.run_folder import RECORD
from neurosig.models.trained import PROMPT_OPTIONS, TEMPLATE, trained_folders, write_trained_on
from neurosig.runtime.cli import config_record, untimed
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import atomic_folder, disk_space, sha256_file, write_atomic
from neurosig.runtime.provenance import run_record

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from distill.distributed import Ranks
    from distill.metrics_log import Metrics
    from neurosig.manifest import Manifest
    from neurosig.manifest.combined import Combined
    from neurosig.models.load import LoadedModel

logger = logging.getLogger(__name__)

_CARD = Path(__file__).with_name("model_card.md.jinja")
_SHOWN = (
    *("reward", "divergence", "teacher_entropy", "student_entropy", "entropy_gap", "student_logprob", "lowest_logprob"),
    *("mean_length", "eos_rate"),
)
_OF_TEACHER = ("divergence", "teacher_entropy", "entropy_gap")
_SPENT = {
    **{"rollouts": "rollouts", "generated_tokens": "generated_tokens", "trained_rollouts": "rollouts_in_loss"},
    **{"trained_tokens": "tokens_in_loss", "teacher_tokens": "teacher_tokens"},
}
_METHODS = {
    "nopsd": ("distilled on its own rollouts against itself with context (Neuron-OPSD", "2607.02460"),
    "u-opsd": ("distilled on its own rollouts against itself with its own majority solution (U-OPSD", "2608.06296"),
    "opsa": ("trained without a teacher, its unlikely tokens made less likely (OPSA", "2608.31046"),
    "lmsi": ("fine-tuned on its own rollouts that give the majority's answer (LMSI", "2210.11610"),
    "ttrl": ("trained by GRPO, rewarded for the majority's answer (TTRL", "2504.16084"),
    "intuitor": ("trained by GRPO, rewarded for its own self-certainty (Intuitor", "2505.19590"),
}
"""What was done, and the paper; for U-OPSD the paper that compares with it."""


def write_final(
    config: TrainConfig,
    manifest: Combined,
    loaded: LoadedModel,
    model: PreTrainedModel,
    adapter: PeftModel | None,
    history: Sequence[Metrics],
    question_ids: Sequence[Collection[str]],
    ranks: Ranks,
    teacher: LoadedModel | None = None,
    kept: Mapping[str, Any] | None = None,
    stopped: Mapping[str, Any] | None = None,
) -> None:
    """Write ``adapter/`` (or ``model/``), and then the run record, whose presence means that the run is complete.

    ``kept`` has the ``step`` of the weights, by default the last, and the ``reason``: the record's ``last``,
    ``updates`` and ``questions_seen`` and the card describe that step; the budget is what the whole run spent.
    ``teacher`` is that of ``--teacher-model``; ``history`` has the metrics and ``question_ids`` the questions of steps.

    Raises:
        UserError: The disk is full; or the run is complete, but its upload failed.
    """
    weights = None
    if ranks.sharded:
        trained = ((name, p) for name, p in (adapter or model).named_parameters() if p.requires_grad)
        weights = ranks.whole_tensors(model.state_dict().items() if adapter is None else trained)
    if not ranks.main:
        return
    budget, history, wandb_id = token_budget(manifest, history), [*map(untimed, history)], config.out / WANDB_ID
    kept = kept or {"step": len(history), "reason": "the last step"}
    described = history[: kept["step"]]
    target = config.out / ("model" if adapter is None else "adapter")
    written = [p for p in (adapter or model).parameters() if p.requires_grad or adapter is None]
    needed = sum(p.numel() * p.element_size() for p in written) + len(loaded.tokenizer.backend_tokenizer.to_str())
    with atomic_folder(target, aside=config.out / ".final") as aside:
        with disk_space(target, needed, kept="the checkpoints are kept"):
            if adapter is None:
                model.save_pretrained(aside, state_dict=weights)
            else:
                adapter.save_pretrained(str(aside), save_embedding_layers=False, state_dict=weights)
            loaded.tokenizer.save_pretrained(aside)
        write_questions(config, manifest, aside)
        record: dict[str, Any] = {
            **training_record(config, manifest, loaded),
            **({} if teacher is None else {"teacher": teacher.info.as_dict()}),
            "questions_seen": len({name for names in question_ids[: len(described)] for name in names}),
            "updates": sum(step["tokens_in_loss"] > 0 for step in described),
            "budget": budget,
            "weights": {file.name: sha256_file(file) for file in sorted(aside.glob("*.safetensors"))},
            "first": history[0],
            "last": described[-1],
            "kept": kept,
            "stopped": stopped,
            "wandb_id": wandb_id.read_text() if wandb_id.exists() else None,
            "run": run_record(),
        }
        text = json.dumps(record, indent=1) + "\n"
        (aside / "README.md").write_text(model_card(record, config.license), encoding="utf-8")
        (aside / RECORD).write_text(text, encoding="utf-8")
    write_atomic(config.out / RECORD, text)
    names = ("loss",) if config.method == "opsa" else ("entropy_gap", "reward", "loss")
    watched = next(name for name in names if name in history[0])
    values = [step[watched] for step in described if step[watched] is not None] or [math.nan]
    logger.info(
        "%s: %d steps, %d updates, %d tokens generated, %s %.3f -> %.3f", target, len(described), record["updates"],
        record["budget"]["generated_tokens"], watched.replace("_", " "), values[0], values[-1],
    )  # fmt: skip
    if config.push_to_hub is not None:
        _push(target, config.push_to_hub)


def describe_checkpoints(
    config: TrainConfig, manifest: Combined, loaded: LoadedModel, model: PreTrainedModel, adapter: PeftModel | None
) -> None:
    """Write what makes a checkpoint a model: the adapter's configuration, the training's prompts and its questions."""
    folder = config.out / "checkpoints"
    folder.mkdir(exist_ok=True)
    if adapter is not None:
        lora, info = adapter.peft_config["default"], loaded.info
        # peft finds the base model by hub id or folder
        lora.base_model_name_or_path = info.id if info.revision is not None else str(model.name_or_path)
        lora.revision = info.revision
        lora.save_pretrained(str(folder))
    if loaded.tokenizer.chat_template is not None:
        write_atomic(folder / TEMPLATE, str(loaded.tokenizer.chat_template))
    write_questions(config, manifest, folder)
    write_atomic(folder / RECORD, json.dumps(training_record(config, manifest, loaded), indent=1) + "\n")


def training_record(config: TrainConfig, manifest: Combined, loaded: LoadedModel) -> dict[str, Any]:
    """What is known before training; a checkpoint is evaluated by it as the finished run is by ``train.json``."""
    options = manifest.header.options
    return {
        "config": config_record(config),
        "manifest_sha256": manifest.header.content_sha256,
        **({"manifests": several} if (several := manifest.record()) else {}),
        "prompt": {name: options[name] for name in PROMPT_OPTIONS if name in options},
        "domains": sorted({row.domain for row in manifest.rows}),
        "questions_selected": len(manifest.selected),
        "model": loaded.info.as_dict(),
    }


def write_questions(config: TrainConfig, manifest: Manifest, folder: Path) -> None:
    """Write the hashes of the questions of this training, and of those before it."""
    rows = manifest.rows if config.questions_of == "all" else manifest.selected
    used = {row.question_id for row in rows} | {item.question_id for row in rows for item in row.context}
    header = manifest.header
    earlier = trained_folders(config.model or header.model["id"], header.adapter(config.adapter))
    write_trained_on(folder, [row.text_sha256 for row in manifest.rows if row.question_id in used], earlier)


def token_budget(manifest: Manifest, history: Sequence[Metrics]) -> dict[str, int]:
    """Tokens that a run spent, counted alike for every method: the manifest's rollouts, and sums over its steps.

    ``generated_tokens`` are sampled in training, ``trained_tokens`` are in the loss, ``teacher_tokens`` are read by a
    second model: the teacher's prompts (once per question and step) and completions, or those of GRPO's KL reference.
    """
    return {
        "manifest_rollouts": len(manifest.rollouts),
        "manifest_tokens": sum(len(rollout.completion_ids) for rollout in manifest.rollouts.values()),
        "steps": len(history),
        **{name: int(sum(step[metric] for step in history)) for name, metric in _SPENT.items()},
    }


def model_card(record: Mapping[str, Any], license: str | None) -> str:
    """The card of a run: YAML header of the Hugging Face hub, what was done, and how to load it.

    Args:
        record: Content of ``train.json``.
        license: SPDX name, or ``None``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    full, method = record["config"]["full"], record["config"]["method"]
    data = ModelCardData(
        base_model=record["model"]["id"],
        library_name="transformers" if full else "peft",
        license=license,
        pipeline_tag="text-generation",
        tags=["neuron-opsd", "self-distillation"] if method == "nopsd" else [method],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_CARD),
        record=record,
        name=Path(record["config"]["out"]).name,
        method="{0}, [arXiv {1}](https://arxiv.org/abs/{1}))".format(*_METHODS[method]),
        shown=[name for name in _SHOWN if method != "opsa" or name not in _OF_TEACHER],
        library=data.library_name,
        loader="AutoModelForCausalLM" if full else "AutoPeftModelForCausalLM",
    )
    return str(card)


def _push(folder: Path, repo_id: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"--push-to-hub {repo_id}: the run is complete, its upload is not ({type(error).__name__}: {error}); "
            f"try again with `hf upload {repo_id} {folder}`"
        ) from error
    logger.info("pushed to %s (private)", repo_id)
