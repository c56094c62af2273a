"""Adapters and the base weights that they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from neurosig.models.adapter import apply_adapter
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from tests.support.flow import save_tiny
from tests.support.tiny import tiny_model, tiny_tokenizer


def adapter_of(folder: Path, base: str, record: dict[str, object] | None) -> Path:
    """An adapter for the tiny Qwen3 with the record of distill.train, or of another program."""
    adapter = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = base
    adapter.save_pretrained(folder)
    if record is not None:
        (folder / "train.json").write_text(json.dumps({"model": record}))
    return folder


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    base, other = (load_model(save_tiny(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    adapter = adapter_of(tmp_path / "adapter", base.info.id, base.info.as_dict())
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    message = (
        rf"model {other.info.id}: its weights are not those that {adapter} was trained on; give --model {tmp_path}/0"
    )
    with pytest.raises(UserError, match=message):
        apply_adapter(other, adapter)
    assert all((tensor == before[name]).all() for name, tensor in other.model.state_dict().items())
    assert apply_adapter(base, adapter).info.adapter
    live = load_model((tiny_model("qwen3"), tiny_tokenizer()))  # whose files are not known
    assert apply_adapter(live, adapter).info.adapter


def test_an_adapter_made_elsewhere_is_taken_with_a_note_if_its_base_has_another_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "model")
    apply_adapter(load_model(folder), adapter_of(tmp_path / "same", str(folder), None))
    assert not caplog.records
    other = adapter_of(tmp_path / "other", "org/another", None)
    assert apply_adapter(load_model(folder), other).info.adapter
    note = f"{other}: made for org/another, as its adapter_config.json says, and put into {folder}"
    assert [record.message for record in caplog.records] == [note]
