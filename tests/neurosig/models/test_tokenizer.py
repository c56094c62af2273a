"""Tokenizers that transformers cannot make fast, each in one sentence."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from tests.support.flow import save_tiny
from tests.support.tiny import tiny_model


def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    words = (f"is the sky blue or red {number}" for number in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, vocab_size=60, hard_vocab_limit=False
    )
    return model.getvalue()


def with_files(folder: Path, tokenizer_class: str, files: dict[str, bytes]) -> Path:
    """A model's folder with these files instead of ``tokenizer.json``."""
    save_tiny(folder, "llama")
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class}))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


TIKTOKEN = b"".join(base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256))
CTRL = {"vocab.json": b'{"a": 0, "b": 1, "<unk>": 2}', "merges.txt": b"#version\n"}


@pytest.mark.parametrize(
    ("kind", "files", "absent", "message"),
    [
        (
            "CTRLTokenizer",
            lambda: CTRL,
            (),
            r"tokenizer \(CTRLTokenizer\) has no fast backend, whose file is tokenizer\.j",
        ),
        (
            "LlamaTokenizer",
            lambda: {"tokenizer.model": sentencepiece_model()},
            ("sentencepiece",),
            r"no tokenizer\.json, and sentencepiece, .*, is not installed; run `pip install sentencepiece`, or save a",
        ),
        (
            "PreTrainedTokenizerFast",
            lambda: {"tokenizer.model": TIKTOKEN},
            ("tiktoken",),
            r"no tokenizer\.json, and tiktoken, which reads tokenizer\.model, is not installed; run `pip install tikto",
        ),
        (
            "PreTrainedTokenizerFast",
            lambda: {"tekken.json": b"{}"},
            (),
            r"no tokenizer\.json, and transformers cannot make a fast tokenizer of tekken\.json \(",
        ),
    ],
    ids=["in Python", "sentencepiece", "tiktoken", "tekken"],
)
def test_a_tokenizer_without_a_fast_backend_is_one_sentence(
    tmp_path: Path,
    kind: str,
    files: Callable[[], dict[str, bytes]],
    absent: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the weights are loaded."""
    folder = with_files(tmp_path, kind, files())
    for name in [name for name in sys.modules if name.partition(".")[0] in absent]:
        monkeypatch.delitem(sys.modules, name)
    for package in absent:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert str(caught.value).startswith(f"model {folder}: ") and "\n" not in str(caught.value)


def test_a_sentencepiece_model_becomes_a_fast_tokenizer(tmp_path: Path) -> None:
    folder = with_files(tmp_path, "LlamaTokenizer", {"tokenizer.model": sentencepiece_model()})
    tokenizer = load_model(folder).tokenizer
    assert tokenizer.decode(tokenizer("is the sky blue", add_special_tokens=False)["input_ids"]) == "is the sky blue"


def test_remote_tokenizers_without_a_file_for_the_fast_one_are_refused(tmp_path: Path) -> None:
    folder = with_files(tmp_path, "EvilTokenizer", {"tokenizer.model": sentencepiece_model()})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json asks for remote code \(auto_map\), which is never run; s"
    ):
        load_model(folder)


def test_a_live_tokenizer_in_python_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(with_files(tmp_path, "CTRLTokenizer", CTRL))
    with pytest.raises(UserError, match=r"model live: its tokenizer \(CTRLTokenizer\) has no fast backend"):
        load_model((tiny_model("llama"), tokenizer))
