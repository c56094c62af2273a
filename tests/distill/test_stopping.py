"""The stop rules by hand, and a run that they stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import distill.step
from distill.config import TrainConfig
from distill.stopping import collapse, distinct_3
from distill.train import main
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest


def test_distinct_trigrams_by_hand() -> None:
    assert distinct_3([[1, 2, 3, 1, 2, 3], [5, 6, 7]]) == 4 / 5  # 123 231 312 123, and 567
    assert distinct_3([[1, 2, 3], [1, 2, 3]]) == 1.0
    assert distinct_3([[1, 2], []]) == 1.0


def steps(**series: list[float]) -> list[dict[str, float]]:
    n = len(next(iter(series.values())))
    whole = {"mean_length": [10.0] * n, "student_entropy": [1.0] * n, "distinct_3": [0.9] * n} | series
    return [{name: values[index] for name, values in whole.items()} for index in range(n)]


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ({"mean_length": [10, 10, 12, 17]}, None),
        ({"mean_length": [10, 10, 14, 17]}, "the mean length went from 10.0 to 15.5 tokens"),
        ({"mean_length": [9, 9, 6, 5]}, "the mean length went from 9.0 to 5.5 tokens"),
        ({"mean_length": [10, 10, 14]}, None),
        ({"student_entropy": [1.2, 0.8, 0.6, 0.4]}, None),
        ({"student_entropy": [1.2, 0.8, 0.5, 0.4]}, "the student's entropy fell from 1.000 to 0.450 nats"),
        ({"student_entropy": [1.2, 0.8, 5.0, 9.0]}, None),
        ({"distinct_3": [0.8, 0.8, 0.4, 0.3]}, "the share of distinct trigrams fell from 0.80 to 0.35"),
    ],
)
def test_windows_are_compared(series: dict[str, list[float]], reason: str | None) -> None:
    assert collapse(steps(**series), window=2) == reason


def run(tmp_path: Path, out: str, **changes: Any) -> dict[str, Any]:
    manifest = tmp_path / "manifest"
    if not manifest.exists():
        make_manifest(tmp_path)
    options: dict[str, Any] = {"steps": 8, "questions_per_step": 3, "learning_rate": 1e-2, "lora_r": 4, "quiet": True}
    options |= {"keep_truncated": True, "save_steps": 1, "keep_checkpoints": 9, "collapse_window": 2, **changes}
    main(TrainConfig(manifest=manifest, out=tmp_path / out, **options))
    return json.loads((tmp_path / out / "train.json").read_text())


def test_a_collapsed_run_stops_and_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trigrams are made to look repeated from step 4 on: the windows of steps 1-2 and 4-5 differ first."""
    seen: list[int] = []
    monkeypatch.setattr(distill.step, "distinct_3", lambda ids: 0.9 if seen.append(1) or len(seen) < 4 else 0.1)
    record = run(tmp_path, "stopped")
    assert record["stopped"] == {
        "step": 5,
        "reason": "the share of distinct trigrams fell from 0.90 to 0.10",
        "weights_of_step": 3,
    }
    assert record["last"]["step"] == 5
    final = load_file(tmp_path / "stopped" / "adapter" / "adapter_model.safetensors")
    third = load_file(tmp_path / "stopped" / "checkpoints" / "step-000003" / "weights.safetensors")
    fourth = load_file(tmp_path / "stopped" / "checkpoints" / "step-000004" / "weights.safetensors")
    assert not (tmp_path / "stopped" / "checkpoints" / "step-000005").exists()
    name = next(name for name in third if "lora_B" in name)
    stored = next(tensor for key, tensor in final.items() if key.endswith(name.replace(".default", "")))
    assert stored.equal(third[name]) and not stored.equal(fourth[name])
    seen.clear()
    assert run(tmp_path, "on", stop_on_collapse=False)["stopped"] is None
    seen.clear()
    with pytest.raises(UserError, match=r"step 5: training collapsed \(.*\) before the first checkpoint; lower"):
        run(tmp_path, "early", save_steps=8)


def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    record = run(tmp_path, "healthy", learning_rate=1e-5)
    assert record["stopped"] is None and record["last"]["step"] == 8
    assert 0 < record["last"]["distinct_3"] <= 1
