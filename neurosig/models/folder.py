"""Check a model's folder by its small files, before anything is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.models.weight_files import check_weights, weight_files
from neurosig.runtime.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def check_folder(folder: Path, name: str) -> list[Path]:
    """The weight files of a folder that a causal language model can be loaded from.

    Args:
        folder: A folder as ``save_pretrained`` writes it.
        name: The model, for messages.

    Raises:
        UserError: A file is missing or damaged; weights are pickled, quantised or none; or transformers has no class
            of its own for the model.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: no config.json in this folder; give the folder of a saved model")
    configs = {file.name: _read(file) for file in sorted(folder.glob("*config.json"))}
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"model {folder}: no tokenizer in this folder ({', '.join(TOKENIZER_FILES)}); save it next to the model"
        )
    files = weight_files(folder)
    check_weights(files, configs["config.json"], name)
    return files


def model_class(folder: Path, name: str) -> type[PreTrainedModel]:
    """transformers' own class of the model in a folder; code in the folder is never run.

    Raises:
        UserError: It has none.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    remote = "auto_map" in _read(folder / "config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        obstacle = f"it has no causal language model of type {config.model_type}"
    except (ValueError, OSError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        found, obstacle = None, one_line(error)
    if found is None and remote:
        raise UserError(
            f"model {name}: config.json asks for remote code (auto_map), which is never run, and transformers "
            f"{transformers.__version__} has no class of its own for it; use a model that it has"
        )
    if found is None:
        raise UserError(f"model {name}: transformers cannot load it: {obstacle}")
    return found[0] if isinstance(found, tuple) else found


def attention_of(model: type[PreTrainedModel], wanted: str | None, name: str) -> str:
    """The attention implementation to load a model with: the one that is wanted, else sdpa or, without it, eager.

    Raises:
        UserError: The model lacks the one that is wanted.
    """
    lacks = {
        "sdpa": not model._supports_sdpa,
        "flash_attention_2": not model._supports_flash_attn,
        "flex_attention": not model._supports_flex_attn,
    }
    if wanted is None:
        return "eager" if lacks["sdpa"] else "sdpa"
    if lacks.get(wanted):
        raise UserError(
            f"model {name}: {model.__name__} has no {wanted} attention; leave --attn-implementation out, or give eager"
        )
    return wanted


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content)
    except (ValueError, TypeError) as error:
        raise UserError(f"model {file.parent}: {file.name} is damaged ({error}); download it again") from error
