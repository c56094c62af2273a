"""``python -m distill.merge``: the evaluated model in float32, and an honest word about other dtypes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from distill.merge import MergeConfig, main
from neurosig.models.adapter import apply_adapter
from neurosig.models.load import load_model
from neurosig.models.trained import trained_folders
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import train

IDS = torch.tensor([[1, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    train(folder, make_manifest(folder, answer_parser=UNCUT), dtype="bfloat16", learning_rate=1e-4)
    return folder / "run" / "adapter"


def merge(adapter: Path, out: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> float:
    """Share of the change kept, as printed for all layers."""
    main(MergeConfig(adapter=adapter, out=out, dtype=dtype))  # type: ignore[arg-type]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| all |"))
    return float(line.split("|")[2])


def test_float32_keeps_the_adapters_change_and_bfloat16_says_what_it_loses(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert merge(adapter, tmp_path / "whole", "float32", capsys) == 1.0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert merge(adapter, tmp_path / "half", "bfloat16", capsys) < 0.9
    assert "of the adapter's change; merge with --dtype float32" in caplog.text
    base = load_model(adapter.parents[1] / "model", dtype="bfloat16")
    apply_adapter(base, adapter)
    exact = base.model.float()
    with torch.no_grad():
        wanted = exact(IDS).logits
        error = {}
        for name in ("whole", "half"):
            assert trained_folders(str(tmp_path / name), None) == [tmp_path / name]
            error[name] = (load_model(tmp_path / name, dtype="float32").model(IDS).logits - wanted).norm().item()
    assert error["whole"] < 1e-3 * wanted.norm() and error["half"] > 10 * error["whole"]


def test_what_cannot_be_merged_is_named(tmp_path: Path, adapter: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists; give --overwrite"):
        main(MergeConfig(adapter=adapter, out=adapter))
    with pytest.raises(UserError, match=r"has no train.json that names its base model; give --model"):
        main(
            MergeConfig(adapter=shutil.copytree(adapter, tmp_path / "bare", ignore=lambda *_: ["train.json"]), out=out)
        )
    with pytest.raises(UserError, match=r"no adapter_model.safetensors there"):
        main(MergeConfig(adapter=tmp_path, out=out))
    with pytest.raises(UserError, match="its weights are not those that"):
        main(MergeConfig(adapter=adapter, out=tmp_path / "out", model="organism"))
    assert not (tmp_path / "out").exists()
