"""What the folder of a trained adapter or model says of its training: prompts, parsing and questions."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text
from neurosig.runtime.provenance import explain

if TYPE_CHECKING:
    from neurosig.models.load import ModelInfo
    from neurosig.questions.load import Question

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=Any)

RECORD, TRAINED_ON, TEMPLATE = "train.json", "trained_on.txt", "chat_template.jinja"
PROMPT_OPTIONS = (
    *("system", "instruction", "choice_instruction", "student_thinking"),
    *("template", "answer_format", "vote_merge", "answer_parser"),
)
"""Options of a manifest that its training, and an evaluation of the result, share; an evaluation calls the thinking
mode ``eval_thinking`` and may have another."""


def training_record(folder: Path | None) -> Mapping[str, Any] | None:
    """The training record in the folder of weights; ``None`` where distill.train did not write them.

    Raises:
        UserError: It cannot be read.
    """
    if folder is None or not (folder / RECORD).is_file():
        return None
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / RECORD}: cannot be read ({error}); train again or remove it") from error


def trained_folders(model: str, adapter: Path | None) -> list[Path]:
    """Those of the adapter's and the model's folder that distill.train wrote, the adapter's first."""
    places = [path for path in (adapter, Path(model).expanduser()) if path is not None]
    return [path for path in places if training_record(path) is not None]


def as_trained(config: ConfigT, folders: Sequence[Path]) -> ConfigT:
    """The options with prompts and answer format of the training, where the user gave no others.

    Args:
        config: Options of a command, with ``PROMPT_OPTIONS`` and ``eval_thinking``.
        folders: `trained_folders`; the first decides.

    Raises:
        UserError: An explicit option contradicts the training; every one is named with both values.
    """
    record = training_record(folders[0]) if folders else None
    trained = {} if record is None else dict(record.get("prompt", {}))
    if record is None or not trained:
        return config
    folder, template = folders[0], record["model"]["chat_template_sha256"]
    earlier = trained.pop("enable_thinking", None)  # its name before students and teachers had modes of their own
    trained["eval_thinking"] = trained.pop("student_thinking", earlier)
    if trained["template"] not in (None, "plain"):
        trained["template"] = str(folder / TEMPLATE)
    changed = {
        name: (value, getattr(config, name))
        for name, value in trained.items()
        if getattr(config, name) != value
        and not (name == "template" and config.template is not None and _template_sha256(config.template) == template)
    }
    if config.is_explicit("eval_thinking") and (other := changed.pop("eval_thinking", None)):
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
    from neurosig.models.load import PLAIN_TEMPLATE

    path = Path(template)
    text = PLAIN_TEMPLATE if template == "plain" else path.read_text(encoding="utf-8") if path.is_file() else ""
    return sha256_text(text)


def trained_template(folders: Sequence[Path], chat_template_sha256: str | None) -> str | None:
    """The file with the training's chat template, where the model's own is another."""
    record = training_record(folders[0]) if folders else None
    if record is None or record["model"]["chat_template_sha256"] == chat_template_sha256:
        return None
    return str(folders[0] / TEMPLATE)


def trained_from(model: str) -> Mapping[str, str] | None:
    """Weights from which distill.train made the model in this folder; ``None`` for any other model."""
    record = training_record(Path(model).expanduser())
    return None if record is None else dict(record["model"]["weights"])


def check_base(adapter: Path, info: ModelInfo) -> None:
    """Refuse an adapter that distill.train trained on other weights; warn where another program names another base.

    Live weights, whose files are not known, are taken as they are.

    Args:
        adapter: Its folder.
        info: The model that it is put into.

    Raises:
        UserError: It was trained on other weights, or a record cannot be read.
    """
    record = training_record(adapter)
    if record is None:
        config = adapter / "adapter_config.json"
        try:
            base = dict(json.loads(config.read_text(encoding="utf-8"))).get("base_model_name_or_path")
        except (OSError, ValueError, TypeError):  # PEFT names what is wrong with it
            return
        if base and base != info.id:
            logger.warning("%s: made for %s, as its %s says, and put into %s", adapter, base, config.name, info.id)
        return
    own, base = set(info.weights.values()), record["model"]
    if "state_dict" not in info.weights and not own <= set(base["weights"].values()):
        raise UserError(
            f"model {info.id}: its weights are not those that {adapter} was trained on; give --model {base['id']}"
        )


def trained_on_text(what: str, blocks: Iterable[Mapping[str, Any]]) -> str:
    """A line under a table: how many questions a model was trained on, of domains' blocks in summary.json; or empty."""
    blocks = list(blocks)
    known = [block.get("trained_on", 0) for block in blocks]
    if None in known:
        return f"trained_on: unknown ({what}; its adapter has no {TRAINED_ON})"
    n = sum(known)
    return f"trained_on: {n} ({what}; of {sum(block['n'] for block in blocks)} questions)" if n else ""


def write_trained_on(folder: Path, text_hashes: Iterable[str]) -> None:
    """Write the hashes of the questions that training used (`neurosig.questions.load.Question.text_sha256`)."""
    (folder / TRAINED_ON).write_text("".join(f"{digest}\n" for digest in sorted({*text_hashes})), encoding="utf-8")


def count_trained_on(folders: Sequence[Path], questions: Iterable[Question]) -> dict[str, int | None]:
    """Questions of each domain that were trained on; ``None`` for weights that do not say.

    Args:
        folders: `trained_folders`; none is an untrained model.
        questions: Those of an evaluation.
    """
    lists = [folder / TRAINED_ON for folder in folders]
    known = all(path.is_file() for path in lists)
    used = {line for path in lists if known for line in path.read_text(encoding="utf-8").split()}
    counts: dict[str, int | None] = {}
    for question in questions:
        counts[question.domain] = (
            ((counts.get(question.domain) or 0) + (question.text_sha256 in used)) if known else None
        )
    return counts
