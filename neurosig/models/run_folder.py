"""Where a run of distill.train has its weights: its own folder, its result in ``adapter/`` or ``model/``, a checkpoint.

A checkpoint ``OUT/checkpoints/step-000010`` holds weights alone; ``OUT/checkpoints`` describes them, once for all: the
adapter's configuration, the training's record, its chat template and the questions it was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file

RECORD = "train.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS, STATE = "weights.safetensors", "state.json"
"""Files of a checkpoint."""


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """Weights that a training run wrote.

    Attributes:
        file: The safetensors file.
        folder: Folder of the adapter's configuration and, if distill.train wrote it, the training's record.
    """

    file: Path
    folder: Path

    @property
    def in_checkpoint(self) -> bool:
        return self.file.name == WEIGHTS


def find_adapter(place: Path) -> TrainedWeights:
    """The adapter in a PEFT folder, a run's folder or one of its checkpoints.

    Raises:
        UserError: There is none, or its checkpoint is damaged; the message names the place to give instead.
    """
    place = place.expanduser()
    for folder in (place, place / "adapter"):
        if (folder / ADAPTER_WEIGHTS).is_file():
            return TrainedWeights(folder / ADAPTER_WEIGHTS, folder)
    if (place / WEIGHTS).is_file() and (place / STATE).is_file():
        return _adapter_of_checkpoint(place)
    if (place / "config.json").is_file() or ((place / RECORD).is_file() and (place / "model").is_dir()):
        raise UserError(f"--adapter {place}: a whole model; give it as --model")
    if steps := sorted(place.glob("checkpoints/step-" + "[0-9]" * 6)):
        raise UserError(
            f"--adapter {place}: its training is not finished; give a checkpoint of it, such as {steps[-1]}"
        )
    raise UserError(
        f"--adapter {place}: no {ADAPTER_WEIGHTS} there; give the folder of a distill.train run, its adapter/ or one "
        "of its checkpoints"
    )


def _adapter_of_checkpoint(place: Path) -> TrainedWeights:
    if _is_full(place):
        raise UserError(f"--adapter {place}: a checkpoint of a run with --full; give it as --model")
    beside = place.resolve().parent
    for folder in (beside, beside.parent / "adapter"):  # earlier versions described the finished run alone
        if (folder / ADAPTER_CONFIG).is_file():
            return TrainedWeights(_intact(place, "--adapter"), folder)
    raise UserError(
        f"--adapter {place}: no {ADAPTER_CONFIG} in {beside}; leave the checkpoint in its run's folder checkpoints/"
    )


def full_checkpoint(place: Path) -> TrainedWeights | None:
    """A checkpoint of a run with ``--full``, whose weights belong on its base model; ``None`` for any other place.

    Raises:
        UserError: It is damaged.
    """
    if not (place / STATE).is_file() or not _is_full(place):
        return None
    return TrainedWeights(_intact(place, "--model"), place.resolve().parent)


def find_model(place: Path) -> Path:
    """A model's folder: ``place``, or the result in it if it is the folder of a run with ``--full``.

    Raises:
        UserError: It holds an adapter and no weights of a model of its own.
    """
    if (place / "config.json").is_file():
        return place
    if (place / RECORD).is_file() and (place / "model" / "config.json").is_file():
        return place / "model"
    configs = (place / ADAPTER_CONFIG, place / "adapter" / ADAPTER_CONFIG)
    if (place / STATE).is_file() or any(path.is_file() for path in configs):
        base = next((f" ({base_of(path)})" for path in configs if path.is_file() and base_of(path)), "")
        raise UserError(
            f"model {place}: an adapter without weights of a model; give it as --adapter, and its base model{base} as "
            "--model"
        )
    return place


def base_of(config: Path) -> str:
    """The base model that an adapter's configuration names; empty if it names none."""
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def read_record(folder: Path) -> dict[str, Any] | None:
    """The training record in the folder of weights; ``None`` where distill.train did not write them.

    Raises:
        UserError: It cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train again or remove it") from error


def _is_full(checkpoint: Path) -> bool:
    record = read_record(checkpoint.resolve().parent)
    return record is not None and bool(record["config"]["full"])


def _intact(checkpoint: Path, option: str) -> Path:
    """The weights of a checkpoint, which have the hash of its state."""
    file = checkpoint / WEIGHTS
    try:
        recorded = json.loads((checkpoint / STATE).read_bytes())["sha256"][WEIGHTS]
        problem = "" if sha256_file(file) == recorded else "sha256 differs"
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = str(error)
    if problem:
        raise UserError(f"{option} {checkpoint}: damaged ({problem}); give another checkpoint")
    return file
