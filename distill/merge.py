"""Merge an adapter into its model, for programs that load whole models only.

    python -m distill.merge --adapter runs/demo/nopsd/adapter --out runs/demo/nopsd/merged --dtype float32

Weights and adapter are added in float32 and rounded once. The command prints what rounding does to the adapter's
change: in bfloat16, whose spacing is 1/256 to 1/128 of a weight, most of a small change is lost, and the merged model
is not the one that was evaluated.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from neurosig.models.run_folder import RECORD, find_adapter, read_record
from neurosig.models.trained import TRAINED_ON
from neurosig.runtime.cli import CommonConfig, printable, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import Shapes

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class MergeConfig(CommonConfig):
    """Write the model with an adapter merged into its weights, and print the loss of precision."""

    adapter: Annotated[Path, Shapes.MODEL]
    """Folder of a distill.train run, its adapter/ or one of its checkpoints/step-N."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of the merged model."""
    model: Annotated[str | None, Shapes.MODEL] = None
    """The adapter's base model; default: the one named in its training record."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Shapes.MODEL] = "float32"
    """Dtype of the merged weights; float32 keeps the change."""
    device: Annotated[str | None, Shapes.RESOURCES] = None
    """torch device; default: the first accelerator, else the CPU."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier model in --out."""


class Kept(NamedTuple):
    """What rounding left of the change of one weight matrix.

    Attributes:
        change: Squared norm of the change.
        along: Inner product of the change and the rounded change; over ``change``, the share kept.
        error: Squared norm of their difference.
    """

    change: float
    along: float
    error: float


def main(config: MergeConfig) -> None:
    """Merge, write the model, and print how much of the adapter's change its dtype keeps.

    Raises:
        UserError: No base model is known, it is not the adapter's, or --out exists.
    """
    from neurosig.models.adapter import read_adapter
    from neurosig.models.load import load_model
    from neurosig.runtime.files import atomic_folder, disk_space, sha256_file

    found = find_adapter(config.adapter)
    record = read_record(found.folder)
    base = config.model or (None if record is None else record["model"]["id"])
    if base is None:
        raise UserError(f"--adapter {config.adapter}: has no {RECORD} that names its base model; give --model")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"--out {config.out}: exists; give --overwrite to replace it, or another folder")
    trained_in = "auto" if record is None else record["model"]["dtype"]
    loaded = load_model(base, dtype=trained_in, device=config.device)
    _, digest = read_adapter(loaded, config.adapter)
    kept = merge_weights(loaded, config.dtype)
    size = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    with atomic_folder(config.out) as aside, disk_space(config.out, size, kept="nothing is written"):
        loaded.model.save_pretrained(aside)
        loaded.tokenizer.save_pretrained(aside)
        if record is not None:
            weights = {file.name: sha256_file(file) for file in sorted(aside.glob("*.safetensors"))}
            merged = {
                **record,
                "weights": weights,
                "merged": {"adapter": {found.file.name: digest}, "dtype": config.dtype},
            }
            (aside / RECORD).write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
            if (found.folder / TRAINED_ON).is_file():
                shutil.copy(found.folder / TRAINED_ON, aside / TRAINED_ON)
    _report(config, kept)


def merge_weights(loaded: LoadedModel, dtype: str) -> dict[str, Kept]:
    """Merge the model's adapter layers in place, one at a time, and convert the model to ``dtype``.

    Returns:
        Name of each adapted layer -> what rounding left of its change.
    """
    import torch
    from peft.tuners.lora import Linear

    from distill.student import mergers

    model, to, kept = loaded.model, getattr(torch, dtype), {}
    merge = mergers(model)
    with torch.no_grad():
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, Linear):
                continue
            base = layer.base_layer
            own, whole = base.get_parameter("weight"), merge[base](base)
            rounded, change = whole.to(to), whole - own.float()
            moved = rounded.float() - own.to(to).float()
            norms = (change * change).sum(), (change * moved).sum(), (change - moved).square().sum()
            kept[name] = Kept(*map(float, norms))
            own.data = rounded
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, base)
    model.to(to)
    return kept


def _report(config: MergeConfig, kept: dict[str, Kept]) -> None:
    lines = [("layer", "share of the change kept", "error / change")]
    change, along, error = (sum(part) for part in zip(*kept.values(), strict=True))
    lines.append(("all", f"{along / change:.3f}", f"{(error / change) ** 0.5:.3f}"))
    worst = sorted(kept, key=lambda name: kept[name].along / kept[name].change)[:3]
    lines += [
        (name, f"{k.along / k.change:.3f}", f"{(k.error / k.change) ** 0.5:.3f}")
        for name, k in ((name, kept[name]) for name in worst)
    ]
    for cells in (lines[0], ("---",) * 3, *lines[1:]):
        print(printable(f"| {' | '.join(cells)} |"))
    if along < 0.99 * change:
        logger.warning(
            "%s keeps %.0f%% of the adapter's change; merge with --dtype float32, or load the adapter as it is",
            config.dtype, 100 * along / change,
        )  # fmt: skip
    logger.info("%s: load it in %s", config.out, config.dtype)


if __name__ == "__main__":
    sys.exit(run_command(MergeConfig, main, presets={}, prog="python -m distill.merge"))
