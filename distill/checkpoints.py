"""Checkpoints that appear whole and resume bit for bit.

A checkpoint is a folder ``step-000010`` with the trained weights, the teacher's averages, the optimizer's state and
``state.json``, which is written last. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from neurosig.errors import UserError
from neurosig.fsio import sha256_file, write_atomic

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGES, OPTIMIZER = "weights.safetensors", "averages.safetensors", "optimizer.safetensors"
STATE = "state.json"
NO_AVERAGES: Mapping[str, Tensor] = {}
_NAME = re.compile(r"step-(\d{6})")


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    key: Mapping[str, Any],
    *,
    averages: Mapping[str, Tensor] = NO_AVERAGES,
    keep: int,
) -> None:
    """Write the state after ``step`` steps and drop all but the ``keep`` newest checkpoints.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Steps done.
        parameters: Name -> trained parameter, in the optimizer's order.
        optimizer: Its per-parameter tensors are stored under the parameter's name.
        key: Everything that must be the same when the run is resumed.
        averages: `distill.teacher.Teacher.average`.
        keep: Checkpoints kept.
    """
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    aside = folder / f".step-{step:06d}"
    aside.mkdir()
    for file, tensors in ((WEIGHTS, parameters), (AVERAGES, averages)):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / file)
    save_file(_optimizer_tensors(parameters, optimizer), aside / OPTIMIZER)
    hashes = {name: sha256_file(aside / name) for name in (WEIGHTS, AVERAGES, OPTIMIZER)}
    write_atomic(aside / STATE, json.dumps({"step": step, "key": key, "sha256": hashes}, indent=1) + "\n")
    target = folder / f"step-{step:06d}"
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)
    for old in _existing(folder)[:-keep]:
        shutil.rmtree(old)


def load_newest(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    key: Mapping[str, Any],
    *,
    averages: Mapping[str, Tensor] = NO_AVERAGES,
) -> int:
    """Restore the newest intact checkpoint in place; returns its step, 0 when there is none.

    A damaged checkpoint is moved aside as ``.corrupt`` and the one before it is used.

    Raises:
        UserError: The checkpoint comes from a run with other options; each differing one is named.
    """
    for candidate in reversed(_existing(folder)):
        try:
            step, found = _read_state(candidate)
            weights, averaged, moments = (load_file(candidate / name) for name in (WEIGHTS, AVERAGES, OPTIMIZER))
        except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
            logger.warning("%s is damaged (%s); falling back to the checkpoint before it", candidate, error)
            aside = candidate.with_name(candidate.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            candidate.rename(aside)
            continue
        wanted = json.loads(json.dumps(key))
        changed = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if changed:
            raise UserError(
                f"{folder.parent}: cannot resume, these differ from the interrupted run: {', '.join(changed)}; "
                "use the same options or --overwrite"
            )
        with torch.no_grad():
            for held, stored in ((parameters, weights), (averages, averaged)):
                for name, tensor in held.items():
                    tensor.copy_(stored[name])
        _restore_optimizer(parameters, optimizer, moments)
        return step
    return 0


def load_before(folder: Path, limit: int, parameters: Mapping[str, Tensor]) -> int | None:
    """Put the weights of the newest checkpoint up to step ``limit`` in place, or of the oldest one kept.

    Returns its step, ``None`` without any checkpoint.
    """
    kept = _existing(folder)
    if not kept:
        return None
    chosen = [path for path in kept if int(path.name.removeprefix("step-")) <= limit] or kept[:1]
    weights = load_file(chosen[-1] / WEIGHTS)
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(weights[name])
    return int(chosen[-1].name.removeprefix("step-"))


def _read_state(candidate: Path) -> tuple[int, dict[str, Any]]:
    """Step and key of a checkpoint whose files are as they were written."""
    state = json.loads((candidate / STATE).read_bytes())
    step, key, hashes = state["step"], state["key"], state["sha256"]
    if type(step) is not int or not isinstance(key, dict):
        raise TypeError(f"{STATE} is malformed")
    if any(sha256_file(candidate / name) != hashes[name] for name in (WEIGHTS, AVERAGES, OPTIMIZER)):
        raise ValueError("sha256 differs")
    return step, key


def _existing(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{entry}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for entry, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    state = optimizer.state_dict()
    state["state"] = {
        index: {
            entry.rpartition("/")[2]: tensor for entry, tensor in moments.items() if entry.rpartition("/")[0] == name
        }
        for index, name in enumerate(parameters)
    }
    optimizer.load_state_dict(state)
