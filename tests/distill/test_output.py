"""What training writes: weights that load without this project, a model card, an upload only when asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import TrainConfig
from distill.student import make_student
from distill.train import main
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest
from tests.support.parsers import UNCUT

IDS = torch.tensor([[1, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("output"), answer_parser=UNCUT)


def config(manifest: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"steps": 2, "questions_per_step": 2, "lora_r": 4, "learning_rate": 1e-2, "quiet": True}
    return TrainConfig(manifest=manifest, out=out, keep_truncated=True, **{**options, **changes})


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_result_loads_with_the_auto_classes(tmp_path: Path, manifest: Path, full: bool) -> None:
    """Its logits are those of the last checkpoint's weights put into the student by hand."""
    settings = config(manifest, tmp_path / "run", full=full)
    main(settings)
    student, _ = make_student(settings, load_model(manifest.parent / "model"))
    before = student(IDS).logits
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors")
    with torch.no_grad():
        for name, tensor in weights.items():
            student.get_parameter(name).copy_(tensor)
    folder = tmp_path / "run" / ("model" if full else "adapter")
    loader = AutoModelForCausalLM if full else AutoPeftModelForCausalLM
    loaded = loader.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, student(IDS).logits, rtol=0, atol=1e-6)
        assert not torch.allclose(loaded(IDS).logits, before, atol=1e-3)
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab() == load_model(manifest.parent / "model").tokenizer.get_vocab()
    )


def test_the_adapter_is_one_that_vllm_takes(tmp_path: Path, manifest: Path) -> None:
    """vLLM wants plain LoRA: named projections, no bias, no whole modules, no DoRA; it reads A and B alone."""
    main(config(manifest, tmp_path / "run"))
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["bias"] == "none" and not written["use_dora"]
    assert not written["modules_to_save"]
    assert {name.rpartition(".")[2] for name in written["target_modules"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert written["base_model_name_or_path"] == str(manifest.parent / "model")
    names = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_the_card_says_what_was_done(tmp_path: Path, manifest: Path) -> None:
    main(config(manifest, tmp_path / "run", license="apache-2.0"))
    card = ModelCard.load(tmp_path / "run" / "adapter" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "peft"
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record == json.loads((tmp_path / "run" / "adapter" / "train.json").read_text())
    assert record["manifest_sha256"] in card.text
    assert f"| entropy_gap | {record['first']['entropy_gap']:.4f} | {record['last']['entropy_gap']:.4f} |" in card.text
    assert (
        "2 steps with 2 updates on 4 of 8 selected questions of colour" in card.text
        and "AutoPeftModelForCausalLM" in card.text
    )


def test_nothing_is_uploaded_unless_asked_and_a_failed_upload_loses_nothing(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="distill")
    main(config(manifest, tmp_path / "run"))
    assert "pushed" not in caplog.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push-to-hub me/it: the run is complete, its upload is not") as failure:
        main(config(manifest, tmp_path / "pushed", push_to_hub="me/it"))
    assert f"`hf upload me/it {tmp_path / 'pushed' / 'adapter'}`" in str(failure.value)
    assert (tmp_path / "pushed" / "train.json").is_file()


@pytest.mark.parametrize(("full", "dtype"), [(False, "bfloat16"), (False, "float32"), (True, "float32")])
def test_the_card_loads_the_weights_in_the_dtype_of_the_run(
    tmp_path: Path, manifest: Path, full: bool, dtype: str
) -> None:
    """Its code, with the folder filled in, gives the trained model; half precision comes with a word on merging."""
    main(config(manifest, tmp_path / "run", full=full, dtype="bfloat16" if full else dtype))
    folder = tmp_path / "run" / ("model" if full else "adapter")
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    place: dict[str, Any] = {"FOLDER": str(folder)}
    exec(code, place)
    base = place["model"] if full else place["model"].get_base_model()
    assert str(base.dtype) == f"torch.{dtype}"
    assert ("would be rounded away" in card) == (dtype == "bfloat16")
