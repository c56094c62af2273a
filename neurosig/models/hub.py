"""Fetch a model from the Hugging Face hub: its small files, then those weight files that it is loaded from."""

from __future__ import annotations

from pathlib import Path

from neurosig.models.weight_files import INDEX, SINGLE, indexed_files
from neurosig.runtime.errors import UserError

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def hub_snapshot(repo_id: str, revision: str | None, known: str) -> Path:
    """The cached folder of a hub model, fetched where it is not cached.

    Weights in other formats (``consolidated.safetensors``, pickles, ONNX) and files in folders of the repository stay
    on the hub.

    Args:
        repo_id: ``ORG/NAME``.
        revision: Branch, tag or commit; ``None`` is the main branch.
        known: Names of the models that need no hub, for the message.

    Raises:
        UserError: There is no such model, or the hub is out of reach and the model not cached whole.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        small = snapshot_download(repo_id, revision=revision, allow_patterns=[*SMALL_FILES], ignore_patterns=["*/*"])
        folder = Path(small)
        weights = indexed_files(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
        snapshot_download(repo_id, revision=folder.name, allow_patterns=weights)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {repo_id}: not a folder here, not an embedded model ({known}), and the hub has no such "
            f"model or is out of reach ({type(error).__name__}); check the name or download it first"
        ) from error
    return folder
