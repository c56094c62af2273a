"""The learning rate of each step and AdamW's options, for N-OPSD and for the baselines on TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import TrainConfig
from distill.optimizer import learning_rates, make_optimizer
from distill.train import main
from neurosig.runtime.errors import UserError
from tests.support.flow import interrupted_at, make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import metrics_of, result_bytes, train, train_config

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [1 / 2, 1, 1, 1, 1, 1]),
        ("linear", [1 / 2, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        ("cosine", [1 / 2, 1, 0.904508, 0.654508, 0.345492, 0.095492]),  # (1 + cos(pi k / 5)) / 2
        ("inverse_sqrt", [1 / 2, 1, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5, (2 / 6) ** 0.5]),
    ],
)
def test_every_schedule_by_hand(tmp_path: Path, schedule: Any, rates: list[float]) -> None:
    """No step has a rate of 0."""
    options: Any = {"steps": 6, "warmup_steps": 2, "learning_rate": 0.1, "lr_scheduler": schedule}
    rate = learning_rates(TrainConfig(manifest=tmp_path, out=tmp_path, **options))
    assert [rate(step) / 0.1 for step in range(1, 7)] == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("method", ["nopsd", "lmsi", "ttrl"])
def test_one_meaning_for_every_method_also_when_resumed(tmp_path: Path, manifest: Path, method: str) -> None:
    """The rates are in metrics.jsonl; the optimizer's options change the weights of a resumed run alike."""
    options: dict[str, Any] = {"method": method, "lr_scheduler": "linear", "warmup_steps": 2, "steps": 5}
    options |= {"weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.6, "num_generations": 2, "save_steps": 1}
    main(train_config(tmp_path, manifest, "straight", **options))
    rates = [step["learning_rate"] for step in metrics_of(tmp_path / "straight")]
    assert rates == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])
    main(train_config(tmp_path, manifest, "broken", **options))
    (tmp_path / "broken" / "train.json").unlink()
    for step in ("step-000005", "step-000004"):  # as if killed in step 4 or later
        for file in (tmp_path / "broken" / "checkpoints" / step).glob("*"):
            file.write_bytes(b"")
    main(train_config(tmp_path, manifest, "broken", **options, resume=True))
    for name in ("metrics.jsonl", WEIGHTS):
        assert result_bytes(tmp_path / "broken" / name) == result_bytes(tmp_path / "straight" / name)
    for change in ({"weight_decay": 0.0}, {"adam_beta1": 0.9}, {"adam_beta2": 0.999}):
        main(train_config(tmp_path, manifest, "other", **{**options, **change}, overwrite=True))
        assert result_bytes(tmp_path / "other" / WEIGHTS) != result_bytes(tmp_path / "straight" / WEIGHTS)


def test_adamw_by_hand() -> None:
    """One step of decoupled decay and of a gradient of one sign: w (1 - lr wd) - lr."""
    options: Any = {"learning_rate": 0.1, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.6}
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = make_optimizer(TrainConfig(manifest=Path(), out=Path(), **options), [weight])
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert weight.tolist() == pytest.approx([2.0 * 0.95 - 0.1, -1.0 * 0.95 - 0.1], abs=1e-6)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_more_steps_extend_a_constant_rate_only(tmp_path: Path, manifest: Path) -> None:
    whole = train(tmp_path, manifest, "whole", steps=5)
    train(tmp_path, manifest, steps=3)
    assert train(tmp_path, manifest, steps=5, resume=True) == whole
    train(tmp_path, manifest, "falling", steps=3, lr_scheduler="cosine")
    with pytest.raises(UserError, match=r"lr_scheduler \(cosine over 3 steps before, cosine over 5 steps now\)"):
        train(tmp_path, manifest, "falling", steps=5, lr_scheduler="cosine", resume=True)
    finished = result_bytes(tmp_path / "falling" / WEIGHTS)
    train(tmp_path, manifest, "falling", steps=3, lr_scheduler="cosine", resume=True)
    assert result_bytes(tmp_path / "falling" / WEIGHTS) == finished
    with interrupted_at(3), pytest.raises(KeyboardInterrupt):
        train(tmp_path, manifest, "killed", steps=4, lr_scheduler="cosine")
    with pytest.raises(UserError, match=r"cosine over 4 steps before, cosine over 5 steps now"):
        train(tmp_path, manifest, "killed", steps=5, lr_scheduler="cosine", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": -0.1}, "--weight-decay: expected 0 or more, got -0.1"),
        ({"adam_beta1": 1.0}, "--adam-beta1: expected 0 to below 1, got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, manifest: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_config(tmp_path, manifest, **change)
