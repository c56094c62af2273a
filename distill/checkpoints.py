"""Atomic checkpoints that resume bit for bit.

A checkpoint is a folder ``step-000010`` with the trained weights, the teacher's averages, the optimizer's state and
``state.json``, which is written last. Nothing is pickled. The main process writes whole tensors and every rank reads
its part of them, so a run resumes with any number of processes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.distributed import ALONE, Ranks, part_like
from neurosig.runtime.cli import config_record
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import atomic_folder, disk_space, sha256_file, write_atomic
from neurosig.runtime.provenance import check_same_run
from neurosig.runtime.shapes import Shapes, option_names

if TYPE_CHECKING:
    from distill.config import TrainConfig
    from neurosig.manifest import Manifest
    from neurosig.sampling.config import SamplingConfig

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGES, OPTIMIZER = "weights.safetensors", "averages.safetensors", "optimizer.safetensors"
STATE = "state.json"
NO_AVERAGES: Mapping[str, Tensor] = {}


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    key: Mapping[str, Any],
    *,
    averages: Mapping[str, Tensor] = NO_AVERAGES,
    keep: int,
    every: int = 1,
    best: int | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write the state after ``step`` steps and drop all but the ``keep`` newest of every ``every``-th step.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Steps done.
        parameters: Name -> trained parameter, in the optimizer's order.
        optimizer: Its per-parameter tensors are stored under the parameter's name.
        key: Everything that must be unchanged when the run is resumed.
        averages: `distill.teacher.Teacher.average`.
        keep: Number of checkpoints kept, apart from that of a last step between two saves: a longer run has none there.
        every: Steps between saves.
        best: The step whose checkpoint is kept besides.
        ranks: The processes, all of which must call this.

    Raises:
        UserError: The disk is full; the checkpoints before this one are kept.
    """
    moments = {f"{name}/{entry}": v for name, p in parameters.items() for entry, v in optimizer.state[p].items()}
    files = {
        WEIGHTS: ranks.whole_tensors(parameters.items()),
        AVERAGES: ranks.whole_tensors(averages.items()),
        OPTIMIZER: ranks.whole_tensors(moments.items()),
    }

    def write() -> None:
        target = _write(folder, step, files, key)
        saved = [path for path in _existing(folder) if _step(path) % every == 0]
        for old in {*_existing(folder)} - {target, *saved[-keep:], _place(folder, best or step)}:
            shutil.rmtree(old)

    ranks.on_main(write)


def _write(folder: Path, step: int, files: Mapping[str, dict[str, Tensor]], key: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    _remove_half_written(folder)
    kept, target = _existing(folder), _place(folder, step)
    needed = sum(tensor.numel() * tensor.element_size() for tensors in files.values() for tensor in tensors.values())
    safe = f"{kept[-1].name} is kept" if kept else "no checkpoint yet"
    with atomic_folder(target) as aside, disk_space(target, needed, kept=safe):
        aside.mkdir()
        for name, tensors in files.items():
            save_file({label: tensor.cpu().contiguous() for label, tensor in tensors.items()}, aside / name)
        hashes = {name: sha256_file(aside / name) for name in files}
        write_atomic(aside / STATE, json.dumps({"step": step, "key": key, "sha256": hashes}, indent=1) + "\n")
    return target


def _remove_half_written(folder: Path) -> None:
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def load_newest(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    key: Mapping[str, Any],
    *,
    averages: Mapping[str, Tensor] = NO_AVERAGES,
    ranks: Ranks = ALONE,
) -> int:
    """Restore the newest intact checkpoint in place; returns its step, 0 when there is none.

    A damaged checkpoint is renamed to ``.corrupt`` and the one before it is used; a half-written one is removed.

    Raises:
        UserError: The run that wrote it had other options; each is named.
    """
    chosen = ranks.on_main(lambda: _newest_intact(folder, key))
    if chosen is None:
        return 0
    _restore(parameters, load_file(chosen / WEIGHTS))
    _restore(averages, load_file(chosen / AVERAGES))
    _restore_optimizer(parameters, optimizer, load_file(chosen / OPTIMIZER))
    return _step(chosen)


def resume_key(config: TrainConfig, manifest: Manifest, sampling: SamplingConfig, dtype: str) -> dict[str, Any]:
    """Everything that must be unchanged for a resumed run to equal an uninterrupted one."""
    free = option_names(type(config), Shapes.PLACE, Shapes.MODEL, Shapes.RESOURCES, Shapes.EXTENDS)
    record = {name: value for name, value in config_record(config).items() if name not in free}
    if config.lr_scheduler in ("linear", "cosine"):
        record["lr_scheduler"] += f" over {config.steps} steps"
    return {
        **record,
        **sampling.as_dict(),
        "manifest": manifest.header.content_sha256,
        "dtype": dtype,
        "torch": torch.__version__,
        "threads": None if torch.accelerator.is_available() else torch.get_num_threads(),
    }


def _newest_intact(folder: Path, key: Mapping[str, Any]) -> Path | None:
    _remove_half_written(folder)
    for candidate in reversed(_existing(folder)):
        try:
            found = _read_key(candidate)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.warning("%s is damaged (%s); falling back to the checkpoint before it", candidate, error)
            aside = candidate.with_name(candidate.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            candidate.rename(aside)
            continue
        check_same_run(folder.parent, found, json.loads(json.dumps(key)))
        return candidate
    return None


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return [_step(path) for path in _existing(folder)]


def load_weights(folder: Path, step: int, parameters: Mapping[str, Tensor]) -> None:
    """Restore the weights of a step in place.

    Raises:
        UserError: Its checkpoint is damaged.
    """
    chosen = _place(folder, step)
    try:
        _read_key(chosen)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{chosen}: damaged ({error}); remove it and --resume, which takes another step") from error
    _restore(parameters, load_file(chosen / WEIGHTS))


def _read_key(candidate: Path) -> dict[str, Any]:
    """Key of a checkpoint whose files are intact."""
    state = json.loads((candidate / STATE).read_bytes())
    step, key, hashes = state["step"], state["key"], state["sha256"]
    if step != _step(candidate) or not isinstance(key, dict):
        raise TypeError(f"{STATE} is malformed")
    if any(sha256_file(candidate / name) != hashes[name] for name in (WEIGHTS, AVERAGES, OPTIMIZER)):
        raise ValueError("sha256 differs")
    return key


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _existing(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + "[0-9]" * 6))


@torch.no_grad()
def _restore(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(part_like(tensor, stored[name]))


def _restore_optimizer(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    state = optimizer.state_dict()
    state["state"] = {
        index: {
            entry.rpartition("/")[2]: part_like(parameter, tensor) if tensor.ndim else tensor
            for entry, tensor in moments.items()
            if entry.rpartition("/")[0] == name
        }
        for index, (name, parameter) in enumerate(parameters.items())
    }
    optimizer.load_state_dict(state)
