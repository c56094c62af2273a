"""Give a loaded model the weights of a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from neurosig.models.load import LoadedModel
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import read_once

if TYPE_CHECKING:
    from peft import PeftModel


def apply_adapter(loaded: LoadedModel, folder: Path) -> str:
    """Make the model in place what it was at the end of the adapter's training.

    In float32 the adapter is merged, which is the same function to rounding and samples faster. In half precision it
    stays beside the weights: rounded together with them, most of a small change would be lost.

    Returns:
        The SHA-256 of its weights.

    Raises:
        UserError: See `read_adapter`.
    """
    adapter, digest = read_adapter(loaded, folder)
    if loaded.model.dtype.itemsize >= 4:
        adapter.merge_and_unload()
    return digest


def read_adapter(loaded: LoadedModel, folder: Path) -> tuple[PeftModel, str]:
    """Put the adapter's layers, in float32, into the model; and the SHA-256 of its weights.

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
            adapter = PeftModel.from_pretrained(loaded.model, folder)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--adapter {folder}: not an adapter of {loaded.info.id} ({str(error).strip().splitlines()[0]}); give the "
            "folder of its training run"
        ) from error
    adapter.eval()
    return adapter, str(digest)
