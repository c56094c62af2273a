"""Which weights of a folder or a hub repository are fetched, hashed and loaded, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from tests.support.flow import save_tiny
from tests.support.hub import COMMIT, hub_of
from tests.support.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7]])


def save_mistral(folder: Path) -> Path:
    """A folder as Mistral publishes them: the same weights sharded for transformers and once more in one file."""
    tiny_model("mistral").save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    save_file({"layers.0.wo.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    shutil.copy(folder / "config.json", folder / "original" / "params.json")
    shutil.copy(folder / "consolidated.safetensors", folder / "original" / "consolidated.00.safetensors")
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    return folder


def test_weights_that_a_hub_has_twice_are_fetched_once(tmp_path: Path) -> None:
    folder, name = save_mistral(tmp_path / "published"), "mistralai/tiny"
    shards = sorted(file.name for file in folder.glob("model-*.safetensors"))
    with hub_of(name, folder, tmp_path / "cache") as fetched:
        loaded = load_model(name)
        files = ["config.json", "generation_config.json", "model.safetensors.index.json"]
        assert sorted(fetched) == sorted([*files, *shards, *(file.name for file in folder.glob("*token*")), TEMPLATE])
        assert load_model(name).info == loaded.info and len(fetched) == len({*fetched})
    assert sorted(loaded.info.weights) == shards and len(shards) > 1
    assert (loaded.info.id, loaded.info.revision) == (name, COMMIT)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, tiny_model("mistral")(IDS).logits)
    with pytest.MonkeyPatch.context() as patch:  # without a network the cache suffices
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        assert load_model(name).info == loaded.info


TEMPLATE = "chat_template.jinja"


def test_one_unsharded_file_of_a_hub_is_fetched(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "published")
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    with hub_of("org/tiny", folder, tmp_path / "cache") as fetched:
        assert list(load_model("org/tiny").info.weights) == ["model.safetensors"]
    assert [name for name in fetched if name.endswith(".safetensors")] == ["model.safetensors"]


def test_only_the_files_that_are_loaded_are_hashed(tmp_path: Path) -> None:
    folder = save_mistral(tmp_path)
    before = load_model(folder).info
    assert all(name.startswith("model-0") for name in before.weights)
    (folder / "consolidated.safetensors").unlink()
    assert load_model(folder).info == before


def test_a_missing_shard_and_a_damaged_index_are_named(tmp_path: Path) -> None:
    folder = save_mistral(tmp_path)
    shard = sorted(folder.glob("model-*"))[1]
    shard.rename(folder / "aside")
    with pytest.raises(UserError, match=rf"{shard.name} of model\.safetensors\.index\.json is missing; download"):
        load_model(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match=r"index\.json names \.\./elsewhere\.safetensors"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_model(folder)
    index.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file that transformers loads .*, only consolidated\.saf"):
        load_model(folder)


DOWN = "model.layers.0.mlp.down_proj"
TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "fp8": {f"{DOWN}.weight": torch.zeros(32, 64, dtype=torch.float8_e4m3fn)},
    "int8": {f"{DOWN}.weight": torch.zeros(32, 64, dtype=torch.int8), f"{DOWN}.SCB": torch.zeros(32)},
    "4-bit": {f"{DOWN}.weight": torch.zeros(1024, 1, dtype=torch.uint8)},
    "packed": {f"{DOWN}.weight_packed": torch.zeros(32, 8, dtype=torch.int32)},
    "qweight": {f"{DOWN}.qweight": torch.zeros(8, 32, dtype=torch.int32)},
    "blocks": {f"{DOWN}_blocks": torch.zeros(2, 32, 2, 16, dtype=torch.uint8)},
}
"""How libraries store a quantised weight."""
ASKED: list[tuple[str, dict[str, Any] | None, str]] = [
    ("fp8", {"quant_method": "fp8"}, r"FineGrainedFP8Config\(dequantize=True\), then save_pretrained\(FOLDER, save_o"),
    ("fp8", {"quant_method": "fbgemm_fp8"}, "fbgemm_fp8, .* give the unquantised model that it was made from"),
    ("fp8", {"quant_method": "compressed-tensors"}, r"CompressedTensorsConfig\(dequantize=True\)"),
    ("fp8", None, r"quantised \(model\.layers\.0\.mlp\.down_proj\.weight is F8_E4M3\), but neurons are read from fl"),
    ("int8", {"load_in_8bit": True}, r"bitsandbytes, .*weight is I8\).* call its dequantize\(\)"),
    ("4-bit", {"quant_method": "bitsandbytes", "load_in_4bit": True}, r"weight is U8\).* call its dequantize\(\)"),
    ("packed", {"quant_method": "compressed-tensors"}, r"weight_packed is I32"),
    ("qweight", {"quant_method": "gptq", "bits": 4}, "gptq, .*qweight is I32.* give the unquantised model"),
    ("qweight", {"quant_method": "awq"}, "awq, .* give the unquantised model"),
    ("blocks", {"quant_method": "mxfp4"}, r"down_proj_blocks is U8\).*Mxfp4Config\(dequantize=True\)"),
]


@pytest.mark.parametrize(("kind", "section", "message"), ASKED, ids=str)
def test_quantised_weights_are_refused_by_the_type_of_their_tensors(
    tmp_path: Path, kind: str, section: dict[str, Any] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight is read."""
    folder = save_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{DOWN}.weight"]
    save_file({**tensors, **TENSORS[kind]}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_plain_weights_with_a_config_that_asks_for_quantisation(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="asks for awq quantisation of weights that are not quantised; remove its"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert load_model(folder).info.dtype == "float32"


def test_masks_of_older_models_are_no_quantised_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "gpt_neox")
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_model(folder).model(IDS).logits, tiny_model("gpt_neox")(IDS).logits)


def test_the_advice_for_fp8_gives_a_folder_that_loads(tmp_path: Path) -> None:
    """With the default of ``save_original_format``, transformers writes FP8 again."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder, tensors = save_tiny(tmp_path / "fp8", "llama"), tiny_model("llama").state_dict()
    del tensors["lm_head.weight"]
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        blocks = tensors[name].unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        tensors[name] = (blocks / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[name.replace("weight", "weight_scale_inv")] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    section = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    with pytest.raises(UserError, match="FineGrainedFP8Config"):
        load_model(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    plain.save_pretrained(tmp_path / "plain", save_original_format=False)
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        error = load_model(tmp_path / "plain").model(IDS).logits - tiny_model("llama")(IDS).logits
    assert error.abs().max() < 0.2 * tiny_model("llama")(IDS).logits.abs().max()
