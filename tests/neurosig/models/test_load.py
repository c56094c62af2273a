from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurosig.models.load import LoadedModel, load_model
from neurosig.models.template import PLAIN_TEMPLATE
from neurosig.runtime.errors import UserError
from tests.support.flow import save_tiny
from tests.support.tiny import ALL_ARCHS, Arch, OtherArch, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_a_folder_loads_as_it_was_saved(tmp_path: Path, arch: Arch | OtherArch) -> None:
    loaded = load_model(save_tiny(tmp_path, arch))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, tiny_model(arch)(ids).logits)
    assert not loaded.model.training
    assert loaded.eos_token_ids == (2,)
    assert loaded.max_length == 512
    assert (loaded.info.dtype, loaded.info.id) == ("float32", str(tmp_path))


def test_the_fingerprint_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    first = load_model(save_tiny(tmp_path / "a")).info
    again = load_model(save_tiny(tmp_path / "b")).info
    other = load_model(save_tiny(tmp_path / "c", seed=1)).info
    assert first.weights == again.weights != other.weights
    assert first.config_sha256 == again.config_sha256 == other.config_sha256
    assert first.tokenizer_sha256 == again.tokenizer_sha256
    model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    live = load_model((model, tokenizer)).info
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert load_model((model, tokenizer)).info.weights != live.weights
    tokenizer("padded", padding="max_length", max_length=20)
    assert load_model((model, tokenizer)).info.tokenizer_sha256 == live.tokenizer_sha256 == first.tokenizer_sha256
    tokenizer.chat_template += " "
    assert load_model((model, tokenizer)).info.chat_template_sha256 != live.chat_template_sha256


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_missing_weights_are_never_random(tmp_path: Path, missing: str) -> None:
    weights = save_tiny(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors[missing]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 weights are missing from its files \({missing}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "11 weights are missing"),
        ({"vocab_size": 400}, r"2 weights do not have the shapes of config\.json \(lm_head\.weight"),
        ({"model_type": "no_such_type"}, "transformers cannot load it: .*no_such_type"),
        ({"model_type": "t5"}, "transformers cannot load it: it has no causal language model of type t5$"),
        ({"hidden_act": "no_such_act"}, "transformers cannot load it: 'no_such_act'"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = save_tiny(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_weights_that_the_config_leaves_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_tiny(tmp_path) / "config.json"
    smaller = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **smaller}))
    load_model(tmp_path)
    assert "11 weights of its files are not used: model.layers.1.input_layernorm.weight" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_damaged_configs_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (save_tiny(tmp_path) / name).write_bytes(content)
    with pytest.raises(UserError, match=f": {name} is damaged"):
        load_model(tmp_path)


def test_a_tokenizer_is_never_made_up(tmp_path: Path) -> None:
    """transformers would build an empty one from the model type alone."""
    path = save_tiny(tmp_path) / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(UserError, match="transformers cannot load its tokenizer"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"no tokenizer in this folder \(tokenizer\.json, "):
        load_model(tmp_path)


def test_options_that_torch_cannot_serve_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    for options, message in (
        ({"device": "toaster"}, "device toaster: torch cannot use it"),
        ({"device": "mps"}, "device mps: torch cannot use it in bfloat16"),
        ({"dtype": "int3"}, "dtype int3: expected one of auto, float32"),
        ({"attn_implementation": "none_such"}, "transformers cannot load it: .*none_such"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(folder, **options)


def test_a_tied_head_may_be_missing(tmp_path: Path) -> None:
    loaded = load_model(save_tiny(tmp_path, "llama"))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.safetensors is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not weights"),
        (b"<!DOCTYPE html><html>", "is an HTML page, not weights"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{broken", "damaged weights|cannot load it"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (save_tiny(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_pickles_and_remote_code_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds pickle weights; convert to safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    for change in ({"model_type": "evil"}, {"model_type": "t5"}):
        add_fields(folder / "config.json", auto_map=AUTO_MAP, **change)
        with pytest.raises(
            UserError, match=r"config\.json asks for remote code \(auto_map\), which is never run, and tr"
        ):
            load_model(folder)


AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


def add_fields(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "listed", [["evil.Slow", "evil.Fast"], ["evil.Slow", None], ["evil.Slow"], "evil.Slow"], ids=str
)
def test_remote_code_of_what_transformers_has_itself_is_left_out(tmp_path: Path, listed: object) -> None:
    """And a model saved after training does not ask for it again."""
    plain = load_model(save_tiny(tmp_path / "plain"))
    folder = save_tiny(tmp_path / "remote")
    (folder / "evil.py").write_text("raise SystemExit('this code ran')\n")
    add_fields(folder / "config.json", auto_map=AUTO_MAP)
    add_fields(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": listed}, tokenizer_class="EvilTokenizer")
    loaded = load_model(folder)
    assert replace(loaded.info, id=plain.info.id) == plain.info
    loaded.model.save_pretrained(tmp_path / "again")
    loaded.tokenizer.save_pretrained(tmp_path / "again")
    assert not [file for file in (tmp_path / "again").glob("*.json") if "evil" in file.read_text()]


def test_a_model_without_sdpa_is_eager_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(tmp_path, "gemma2")
    with caplog.at_level("INFO", logger="neurosig"):
        loaded = load_model(folder)
    note = f"model {folder}: Gemma2ForCausalLM has no sdpa attention, eager is used"
    assert [record.message for record in caplog.records if "sdpa" in record.message] == [note]
    assert loaded.info.attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, tiny_model("gemma2")(IDS).logits)
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM has no sdpa attention; leave --attn-implementation out"):
        load_model(folder, attn_implementation="sdpa")


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no-such-model", "not a folder here, not an embedded model"),
        ("org/no-such-model", "the hub has no such model or is out of reach"),
        ("/nowhere/model", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
    ],
)
def test_unknown_models_are_one_sentence(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(spec)


def test_files_and_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.gguf").write_text("hello")
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + bytes(100))
    for path, message in (
        (tmp_path, "no config.json"),
        (tmp_path / "a.txt", "expected a folder"),
        (tmp_path / "b.gguf", "not a GGUF"),
        (tmp_path / "c.gguf", "cannot be dequantised: .*v0"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path)


def test_a_template_can_be_given(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    assert load_model(folder, template="plain").tokenizer.chat_template == PLAIN_TEMPLATE
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}")
    assert load_model(folder, template=str(path)).tokenizer.chat_template == "{{ messages[0].content }}"
    with pytest.raises(UserError, match="give `plain` or a readable Jinja file"):
        load_model(folder, template=str(tmp_path / "absent.jinja"))


def test_the_tokenizers_own_end_token_comes_first(tmp_path: Path) -> None:
    """As in Qwen3 and Llama 3, whose generation configs add the lower id that ends a document."""
    loaded = load_model(save_tiny(tmp_path))
    loaded.model.generation_config.eos_token_id = [0, 2]
    assert loaded.eos_token_ids == (2, 0)
    loaded.tokenizer.eos_token = None
    assert loaded.eos_token_ids == (0, 2)


def test_a_model_without_an_end_token_is_named(tmp_path: Path) -> None:
    loaded = load_model(save_tiny(tmp_path))
    loaded.tokenizer.eos_token = None
    loaded.model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        _ = loaded.eos_token_ids


@pytest.mark.smollm2
def test_the_embedded_model_answers_and_is_dequantised_once(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", None
    )  # must not be needed again
    again = load_model("smollm2-135m")
    assert again.info == smollm2.info
    assert list(again.info.weights) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = again.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = again.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in again.tokenizer.decode(answer)
