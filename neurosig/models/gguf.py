"""Dequantise a GGUF file into a folder of float32 safetensors, once."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.runtime.errors import UserError, one_line
from neurosig.runtime.extras import check_installed
from neurosig.runtime.files import disk_space

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Folder of dequantised models: ``$NEUROSIG_CACHE`` or ``~/.cache/neurosig``."""
    return Path(os.environ.get("NEUROSIG_CACHE", "~/.cache/neurosig")).expanduser()


def dequantised(gguf: Path, digest: str) -> Path:
    """Folder with the float32 safetensors of a GGUF file, created once and cached under its hash."""
    import transformers

    folder = cache_dir() / "gguf" / f"{digest[:16]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    with gguf.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"model {gguf}: not a GGUF file")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    except OSError as error:
        raise UserError(
            f"cache {folder.parent}: cannot write there ({error.strerror}); set NEUROSIG_CACHE to a writable folder"
        ) from error
    try:
        logger.info("dequantising %s once into %s", gguf.name, folder)
        model, tokenizer = _dequantise(gguf)
        with disk_space(folder, sum(p.numel() * p.element_size() for p in model.parameters())):
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        os.replace(aside, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _dequantise(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_installed(f"model {gguf}", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except (ValueError, OSError, LookupError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"model {gguf}: cannot be dequantised: {one_line(error)}") from error
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a model that still counts as quantised refuses save_pretrained
    model = type(quantised)(config).float()
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model, AutoTokenizer.from_pretrained(gguf.parent, **where)
