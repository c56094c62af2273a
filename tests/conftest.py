import beartype  # noqa: F401,I001  # line 1: nnsight mounts .save on object, which breaks beartype if it comes first

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from tests.support.served import ServerProcess

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; the commands that tests start inherit it


@pytest.fixture(scope="session")
def smollm2() -> "LoadedModel":
    """The embedded SmolLM2-135M-Instruct, loaded once; a test must not change it."""
    from neurosig.models.load import load_model

    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``model``, which `running` serves, and ``questions.jsonl``."""
    from tests.support.flow import save_tiny, write_questions

    folder = tmp_path_factory.mktemp("served")
    save_tiny(folder / "model")
    write_questions(folder / "questions.jsonl")
    return folder


@pytest.fixture(scope="session")
def running(served_folder: Path) -> "Iterator[ServerProcess]":
    """The tests' server; a test that lets it die starts it again."""
    from tests.support.served import lora_server

    process = lora_server(served_folder / "model")
    yield process
    process.kill()


@pytest.fixture
def process(running: "ServerProcess") -> "ServerProcess":
    """The tests' server, without the fault of an earlier test."""
    running.post("/control", kind="none")
    return running
