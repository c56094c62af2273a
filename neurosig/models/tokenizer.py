"""Tokenizers of the tokenizers library: loading one from a model's folder, and its fingerprint."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.models.folder import TOKENIZER_FILES
from neurosig.runtime.errors import UserError, one_line
from neurosig.runtime.files import sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAST_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"


def tokenizer_from(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model's folder; code in the folder is never run.

    Args:
        folder: Has one of `neurosig.models.folder.TOKENIZER_FILES`.
        name: The model, for messages.

    Raises:
        UserError: transformers cannot load it, or it has no fast backend.
    """
    try:
        tokenizer = _load(folder, name)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        if (folder / FAST_FILE).is_file():
            raise UserError(f"model {name}: transformers cannot load its tokenizer: {one_line(error)}") from error
        raise UserError(f"model {name}: no {FAST_FILE}, and {_obstacle(folder, error)}") from error
    check_fast(tokenizer, name)
    return tokenizer


def _obstacle(folder: Path, error: Exception) -> str:
    """Why transformers makes no fast tokenizer of a folder without ``tokenizer.json``, and what to do."""
    source = next(file for file in TOKENIZER_FILES if (folder / file).is_file())
    save = f"save a {FAST_FILE} next to the model"
    if source == SENTENCEPIECE_FILE:
        is_text = re.match(rb"[A-Za-z0-9+/]+=* \d+\n", (folder / source).read_bytes()[:1000])
        package = "tiktoken" if is_text else "sentencepiece"
        if find_spec(package) is None:
            return f"{package}, which reads {source}, is not installed; run `pip install {package}`, or {save}"
    return f"transformers cannot make a fast tokenizer of {source} ({one_line(error)}); {save}"


def _load(folder: Path, name: str) -> PreTrainedTokenizerBase:
    import transformers

    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "auto_map" not in config:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    own = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    kind = getattr(transformers, own, None) if own.endswith("Tokenizer") else None
    if (folder / FAST_FILE).is_file():  # describes the tokenizer completely
        kind = transformers.PreTrainedTokenizerFast
    if kind is None:
        raise UserError(
            f"model {name}: {file.name} asks for remote code (auto_map), which is never run; save a {FAST_FILE} next "
            "to the model"
        )
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True)
    tokenizer.init_kwargs.pop("auto_map", None)  # else a trained model's folder would ask for the code again
    return tokenizer


def check_fast(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer in Python.

    Raises:
        UserError: It has no fast backend.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"model {name}: its tokenizer ({type(tokenizer).__name__}) has no fast backend, whose file is {FAST_FILE}; "
            "use a model whose tokenizer has one"
        )


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a fast tokenizer without its padding and truncation state."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)
    content.pop("truncation", None)
    content["special_ids"] = sorted(tokenizer.all_special_ids)
    return sha256_text(json.dumps(content, sort_keys=True))
