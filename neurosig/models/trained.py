"""What the folder of a trained adapter or model says of its training: prompts, parsing and questions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from neurosig.models.run_folder import find_adapter, find_model, full_checkpoint, read_record
from neurosig.models.template import PLAIN_TEMPLATE, read_template
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text
from neurosig.runtime.provenance import explain

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=Any)

TRAINED_ON, TEMPLATE = "trained_on.txt", "chat_template.jinja"
PROMPT_OPTIONS = (
    *("system", "instruction", "choice_instruction", "student_thinking"),
    *("template", "answer_format", "vote_merge", "answer_parser"),
)
"""Options of a manifest that its training, and an evaluation of the result, share; an evaluation calls the thinking
mode ``eval_thinking`` and may have another."""


def trained_folders(model: str, adapter: Path | None) -> list[Path]:
    """Those of the adapter's and the model's folder that describe a training by distill.train, the adapter's first.

    Args:
        model: Name, or a folder: of a model, of a run with ``--full``, or one of its checkpoints.
        adapter: See `neurosig.models.run_folder.find_adapter`.

    Raises:
        UserError: There is no adapter at ``adapter``, or an adapter at ``model``.
    """
    places = [] if adapter is None else [find_adapter(adapter).folder]
    folder = Path(model).expanduser()
    if folder.is_dir():
        full = full_checkpoint(folder)
        places.append(find_model(folder) if full is None else full.folder)
    return [path for path in places if read_record(path) is not None]


def as_trained(config: ConfigT, folders: Sequence[Path]) -> ConfigT:
    """The options with prompts and answer format of the training, where the user gave no others.

    Args:
        config: Options of a command, with ``PROMPT_OPTIONS``; an evaluation has ``eval_thinking`` for
            ``student_thinking``.
        folders: `trained_folders`; the first decides.

    Raises:
        UserError: An explicit option contradicts the training; every one is named with both values.
    """
    record = read_record(folders[0]) if folders else None
    trained = {} if record is None else dict(record.get("prompt", {}))
    if record is None or not trained:
        return config
    folder, template = folders[0], record["model"]["chat_template_sha256"]
    earlier = trained.pop("enable_thinking", None)  # its name before students and teachers had modes of their own
    mode = "eval_thinking" if hasattr(config, "eval_thinking") else "student_thinking"
    trained[mode] = trained.pop("student_thinking", earlier)
    if trained["template"] not in (None, "plain"):
        trained["template"] = str(folder / TEMPLATE)
    changed = {
        name: (value, getattr(config, name))
        for name, value in trained.items()
        if getattr(config, name) != value
        and not (name == "template" and config.template is not None and _template_sha256(config.template) == template)
    }
    if "eval_thinking" in changed and config.is_explicit("eval_thinking"):
        other = changed.pop("eval_thinking")
        logger.info("%s: --eval-thinking %s, the student's in training was %s", folder, other[1], other[0])
    if wrong := {name: pair for name, pair in changed.items() if config.is_explicit(name)}:
        raise UserError(
            f"{folder}: trained with other options: {explain(wrong, 'in training', 'here')}; leave them out, the "
            "training's are used"
        )
    if changed:
        logger.info("%s: used as in training: %s", folder, explain(changed, "in training", "by default"))
    config = copy.copy(config)
    for name, (value, _) in changed.items():
        setattr(config, name, value)
    return config


def _template_sha256(template: str) -> str:
    path = Path(template)
    text = PLAIN_TEMPLATE if template == "plain" else path.read_text(encoding="utf-8") if path.is_file() else ""
    return sha256_text(text)


def load_as_trained(config: Any, device: str | None) -> LoadedModel:
    """The model of ``--model`` and ``--adapter``, with the chat template of its training.

    Args:
        config: Options of a command: ``model``, ``adapter``, ``dtype`` and ``template``.
        device: See `neurosig.models.load.load_model`.

    Raises:
        UserError: See `neurosig.models.load.load_model`.
    """
    from neurosig.models.adapter import apply_adapter
    from neurosig.models.load import load_model

    loaded = load_model(config.model, dtype=config.dtype, device=device, template=config.template)
    folders = trained_folders(config.model, config.adapter)
    record = read_record(folders[0]) if folders else None
    if record is not None and record["model"]["chat_template_sha256"] != loaded.info.chat_template_sha256:
        template = read_template(str(folders[0] / TEMPLATE))
        loaded.tokenizer.chat_template = template
        loaded = replace(loaded, info=replace(loaded.info, chat_template_sha256=sha256_text(template)))
    return loaded if config.adapter is None else apply_adapter(loaded, config.adapter)


def trained_from(model: str) -> Mapping[str, str] | None:
    """Weights from which distill.train made the model in this folder; ``None`` for any other model."""
    record = read_record(folders[0]) if (folders := trained_folders(model, None)) else None
    return None if record is None else dict(record["model"]["weights"])


def trained_on_text(what: str, blocks: Iterable[Mapping[str, Any]]) -> str:
    """A line under a table: how many questions a model was trained on, of domains' blocks in summary.json; or empty."""
    blocks = list(blocks)
    known = [block.get("trained_on", 0) for block in blocks]
    if None in known:
        return f"trained_on: unknown ({what}; its adapter has no {TRAINED_ON})"
    n = sum(known)
    return f"trained_on: {n} ({what}; of {sum(block['n'] for block in blocks)} questions)" if n else ""


def write_trained_on(folder: Path, text_hashes: Iterable[str], earlier: Sequence[Path] = ()) -> None:
    """Write the hashes of the questions that training used (`neurosig.questions.load.Question.text_sha256`).

    Args:
        folder: Where to write.
        text_hashes: Of this training's questions.
        earlier: `trained_folders` of the weights that it started from; if one does not say, nothing is written.
    """
    used = _trained_on(earlier)
    if used is not None:
        lines = "".join(f"{digest}\n" for digest in sorted({*text_hashes, *used}))
        (folder / TRAINED_ON).write_text(lines, encoding="utf-8")


def count_trained_on(folders: Sequence[Path], questions: Iterable[Question]) -> dict[str, int | None]:
    """Questions of each domain that were trained on; ``None`` for weights that do not say.

    Args:
        folders: `trained_folders`; none is an untrained model.
        questions: Those of an evaluation.
    """
    used = _trained_on(folders)
    counts: dict[str, int | None] = {}
    for question in questions:
        known = used is not None and question.text_sha256 in used
        counts[question.domain] = None if used is None else (counts.get(question.domain) or 0) + known
    return counts


def _trained_on(folders: Sequence[Path]) -> set[str] | None:
    """Hashes of the questions that any of the folders' weights were trained on; ``None`` if one does not say."""
    lists = [folder / TRAINED_ON for folder in folders]
    if not all(path.is_file() for path in lists):
        return None
    return {line for path in lists for line in path.read_text(encoding="utf-8").split()}
