"""Merge a LoRA adapter into a loaded model."""

from __future__ import annotations

from pathlib import Path

from neurosig.models.load import LoadedModel
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import read_once


def merge_adapter(loaded: LoadedModel, folder: Path) -> str:
    """Merge the adapter of ``folder`` into the weights in place: the same function, and sampling is faster.

    Returns:
        The SHA-256 of its weights.

    Raises:
        UserError: The folder has no adapter, or one of another model.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"--adapter {folder}: no {weights.name} there; give an adapter folder of distill.train")
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with read_once(weights) as digest:
            PeftModel.from_pretrained(loaded.model, folder).merge_and_unload()
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--adapter {folder}: not an adapter of {loaded.info.id} ({str(error).strip().splitlines()[0]}); give the "
            "folder of its training run"
        ) from error
    return str(digest)
