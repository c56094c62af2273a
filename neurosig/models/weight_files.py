"""The safetensors files of a model's folder: which of them transformers loads, and whether they hold plain weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neurosig.runtime.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

OTHER_BUFFERS = ("bias", "masked_bias", "position_ids")
"""Last part of the name of integer tensors that are no weights: causal masks and positions of older models."""

DEQUANTISED = {
    "bitsandbytes": "call its dequantize()",
    "compressed-tensors": "quantization_config=CompressedTensorsConfig(dequantize=True)",
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True)",
    "metal": "quantization_config=MetalConfig(dequantize=True)",
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True)",
    "mxfp8": "quantization_config=FineGrainedFP8Config(dequantize=True)",
}
"""``quant_method`` -> how transformers dequantises it."""


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads from a model's folder, sorted; other safetensors files there are not read.

    Raises:
        UserError: There is none, or one that the index names is missing; the index is damaged.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        files = [folder / name for name in indexed_files(folder / INDEX)]
        for file in files:
            if not file.is_file():
                raise UserError(f"model {folder}: {file.name} of {INDEX} is missing; download it again")
        return files
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise UserError(f"model {folder}: {pickled[0].name} holds pickle weights; convert to safetensors")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    there = f", only {others[0]}" if others else ""
    raise UserError(f"model {folder}: no .safetensors file that transformers loads ({SINGLE} or {INDEX}){there}")


def indexed_files(index: Path) -> list[str]:
    """Names of the files in an index of sharded weights, sorted.

    Raises:
        UserError: It is damaged, or names a file in another folder.
    """
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"model {index.parent}: {index.name} is damaged ({error}); download it again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise UserError(f"model {index.parent}: {index.name} names {outside[0] if outside else 'no file'}")
    return names


def check_weights(files: Sequence[Path], config: Mapping[str, Any], name: str) -> None:
    """Refuse files that hold no weights, or quantised ones, by their headers alone.

    Args:
        files: `weight_files`.
        config: The model's ``config.json``.
        name: The model, for messages.

    Raises:
        UserError: A file is empty, no safetensors file or damaged; a weight is stored in fewer bits than 16, or
            ``config.json`` asks for quantisation.
    """
    for file in files:
        with file.open("rb") as handle:
            head = handle.read(64)
        kind = (
            "empty" if not head
            else "a Git LFS pointer, not weights" if head.startswith(b"version https://git-lfs")
            else "an HTML page, not weights" if head.lstrip().lower().startswith((b"<!doctype", b"<html"))
            else None
        )  # fmt: skip
        if kind:
            raise UserError(f"model {name}: {file.name} is {kind}; download it again")
    method = _quantisation(config)
    if found := next(filter(None, (_quantised_tensor(file, name) for file in files)), None):
        what = found if method is None else f"{method}, {found}"
        raise UserError(
            f"model {name}: its weights are quantised ({what}), but neurons are read from floating-point weights; "
            + (
                "give the unquantised model that it was made from" if method not in DEQUANTISED
                else f"load it with transformers, {DEQUANTISED[method]}, then "
                "save_pretrained(FOLDER, save_original_format=False) and give FOLDER"
            )
        )  # fmt: skip
    if method is not None:
        raise UserError(
            f"model {name}: config.json asks for {method} quantisation of weights that are not quantised; remove its "
            "quantization_config"
        )


def _quantisation(config: Mapping[str, Any]) -> str | None:
    """The quantisation method that a ``config.json`` names, if any."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        section = place.get("quantization_config") or place.get("compression_config")
        if isinstance(section, dict):
            in_bits = {"load_in_4bit", "load_in_8bit"} & {*section}
            return str(section.get("quant_method", "bitsandbytes" if in_bits else "unknown"))
    return None


def _quantised_tensor(file: Path, name: str) -> str | None:
    """The first quantised tensor of a file, as words; ``None`` if there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                tensor = stored.get_slice(key)
                dtype, matrix = str(tensor.get_dtype()), len(tensor.get_shape()) > 1
                few_bits = dtype.startswith(("F8", "F6", "F4"))
                packed = dtype in ("I8", "U8", "I16", "U16", "I32", "U32") and matrix
                if few_bits or (packed and key.rpartition(".")[2] not in OTHER_BUFFERS):
                    return f"{key} is {dtype}"
    except (SafetensorError, OSError) as error:
        raise UserError(f"model {name}: damaged weights ({error}); download them again") from error
    return None
