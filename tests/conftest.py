import beartype  # noqa: F401,I001  # line 1: nnsight mounts .save on object, which breaks beartype if it comes first

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from neurosig.models import LoadedModel

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; the commands that tests start inherit it


@pytest.fixture(scope="session")
def smollm2() -> "LoadedModel":
    """The embedded SmolLM2-135M-Instruct, loaded once; leave it as it was found."""
    from neurosig.models import load_model

    return load_model("smollm2-135m")
