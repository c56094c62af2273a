"""Checkpoints on two small parameters without a model, then whole runs that were interrupted."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distill.checkpoints
import distill.step
import neurosig.runtime.files
from distill.checkpoints import AVERAGES, OPTIMIZER, STATE, WEIGHTS, load_newest, save_checkpoint
from distill.train import main
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest
from tests.support.runs import result_bytes, train, train_config

KEY = {"learning_rate": 0.1, "sampling": {"seed": 0}, "shape": (1, 2)}
Run = tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]


def fresh(seed: int = 0) -> Run:
    """Parameters with awkward names, one of them bfloat16, and their optimizer."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "layer.0/weight": torch.nn.Parameter(torch.randn(3, 4, generator=generator)),
        "layer.0/weight/exp_avg": torch.nn.Parameter(torch.randn(5, generator=generator).bfloat16()),
    }
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.0)


def advance(run: Run, steps: int) -> None:
    parameters, optimizer = run
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter.float() ** 3).sum() for parameter in parameters.values()).backward()  # type: ignore[union-attr]
        optimizer.step()


def saved(folder: Path, steps: int, keep: int = 9) -> Run:
    run = fresh()
    for step in range(1, steps + 1):
        advance(run, 1)
        save_checkpoint(folder, step, *run, KEY, keep=keep)
    return run


def values(run: Run) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run[0].items()}


def assert_same(one: Run, other: Run) -> None:
    for name, tensor in values(one).items():
        assert torch.equal(tensor, values(other)[name]), name


def test_what_is_restored_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run, resumed, amnesiac = saved(tmp_path / "c", 3), fresh(seed=1), fresh(seed=2)
    assert load_newest(tmp_path / "c", *resumed, KEY) == 3
    assert_same(run, resumed)
    with torch.no_grad():
        for name, tensor in amnesiac[0].items():
            tensor.copy_(run[0][name])
    for each in (run, resumed, amnesiac):
        advance(each, 2)
    assert_same(run, resumed)
    with pytest.raises(AssertionError):  # the weights alone are not enough: the moments matter
        assert_same(run, amnesiac)


def test_no_checkpoint_is_step_0(tmp_path: Path) -> None:
    run = fresh()
    assert load_newest(tmp_path / "nowhere", *run, KEY) == 0
    assert_same(run, fresh())


def test_a_checkpoint_before_the_first_update_has_no_moments(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", 1, *fresh(), KEY, keep=1)
    run, straight = fresh(seed=1), fresh()
    assert load_newest(tmp_path / "c", *run, KEY) == 1
    advance(run, 1)
    advance(straight, 1)
    assert_same(run, straight)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 12, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000011", "step-000012"]
    state = json.loads((tmp_path / "step-000012" / STATE).read_text())
    assert state["step"] == 12
    assert set(state["sha256"]) == {WEIGHTS, AVERAGES, OPTIMIZER}


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def state_is(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / STATE).write_bytes(text) and None


def state_lacks(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = json.loads((folder / STATE).read_text())
        del state[name]
        (folder / STATE).write_text(json.dumps(state))

    return damage


DAMAGES = {
    **{f"flip-{name}": flip(name) for name in (WEIGHTS, AVERAGES, OPTIMIZER)},
    **{f"cut-{name}": cut(name) for name in (WEIGHTS, AVERAGES, OPTIMIZER, STATE)},
    **{f"without-{name}": without(name) for name in (WEIGHTS, AVERAGES, OPTIMIZER, STATE)},
    **{f"state-lacks-{name}": state_lacks(name) for name in ("step", "key", "sha256")},
    "list": state_is(b"[]"),
    "null": state_is(b"null"),
    "empty": state_is(b""),
    "not-utf8": state_is(b"\xff\xfe"),
    "nested": state_is(b"[" * 100_000),
    "no-hashes": state_is(json.dumps({"step": 3, "key": KEY, "sha256": {}}).encode()),
    "odd-types": state_is(b'{"step": "3", "key": null, "sha256": []}'),
    "pickled-weights": lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1})) and None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "c", 3)
    two = saved(tmp_path / "two", 2)
    damage(tmp_path / "c" / "step-000003")
    files = {path.name: path.read_bytes() for path in (tmp_path / "c" / "step-000003").iterdir()}
    run = fresh(seed=1)
    assert load_newest(tmp_path / "c", *run, KEY) == 2
    assert_same(run, two)
    aside = tmp_path / "c" / "step-000003.corrupt"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == files
    assert "step-000003 is damaged" in caplog.text
    advance(run, 1)  # the redone step takes the freed name, and a second damage the same .corrupt
    save_checkpoint(tmp_path / "c", 3, *run, KEY, keep=9)
    damage(tmp_path / "c" / "step-000003")
    assert load_newest(tmp_path / "c", *fresh(), KEY) == 2


def test_when_all_are_damaged_training_starts_over(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    for folder in list(tmp_path.iterdir()):
        flip(WEIGHTS)(folder)
    run = fresh()
    assert load_newest(tmp_path, *run, KEY) == 0
    assert_same(run, fresh())


@pytest.mark.parametrize("killed_in", ["save_file", "write_atomic", "replace"])
def test_killed_inside_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str) -> None:
    """The half-written folder is never taken for a checkpoint, and the resumed run clears it."""
    run = saved(tmp_path, 2)
    two = values(run)
    advance(run, 1)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    where = neurosig.runtime.files.os if killed_in == "replace" else distill.checkpoints
    monkeypatch.setattr(where, killed_in, killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, *run, KEY, keep=9)
    monkeypatch.undo()
    assert (tmp_path / ".step-000003").is_dir()
    resumed = fresh(seed=1)
    assert load_newest(tmp_path, *resumed, KEY) == 2
    assert not (tmp_path / ".step-000003").exists()
    assert all(torch.equal(tensor, two[name]) for name, tensor in values(resumed).items())
    advance(resumed, 1)
    save_checkpoint(tmp_path, 3, *resumed, KEY, keep=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002", "step-000003"]
    assert_same(resumed, run)


def test_other_options_are_named_and_nothing_is_touched(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    run = fresh(seed=1)
    other = {**KEY, "learning_rate": 0.2, "new": True}
    del other["sampling"]
    named = r"learning_rate \(0.1 before, 0.2 now\), new \(none before, true now\), sampling .*; use the same"
    with pytest.raises(UserError, match=rf"cannot resume, these differ .*: {named}"):
        load_newest(tmp_path, *run, other)
    assert_same(run, fresh(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("broken_at", [2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int
) -> None:
    straight = train(tmp_path, manifest, "straight")
    calls = []
    learn = distill.step.learn

    def interrupted(*args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(distill.step, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(train_config(tmp_path, manifest, "broken"))
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "train.json").exists()
    assert train(tmp_path, manifest, "broken", resume=True) == straight
    logs = [result_bytes(tmp_path / out / "metrics.jsonl") for out in ("broken", "straight")]
    assert logs[0] == logs[1]


def test_a_run_killed_while_saving_resumes_from_the_save_before(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tmp_path, manifest, "straight")
    save_file = distill.checkpoints.save_file
    saves = []

    def killed(*args: Any) -> None:
        saves.append(1)
        if len(saves) == 4:  # the optimizer's file of the checkpoint of step 4
            raise KeyboardInterrupt
        save_file(*args)

    monkeypatch.setattr(distill.checkpoints, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        main(train_config(tmp_path, manifest, "broken"))
    monkeypatch.undo()
    assert len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()) == 4
    assert train(tmp_path, manifest, "broken", resume=True) == straight
    names = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir() if path.is_dir())
    assert names == ["step-000002", "step-000004"]


def test_full_fine_tuning_resumes_against_the_same_frozen_teacher(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"full": True, "learning_rate": 1e-3}
    main(train_config(tmp_path, manifest, "straight", **options))
    learn, calls = distill.step.learn, []

    def interrupted(*args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(distill.step, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(train_config(tmp_path, manifest, "broken", **options))
    monkeypatch.undo()
    main(train_config(tmp_path, manifest, "broken", resume=True, **options))
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert result_bytes(tmp_path / "broken" / name) == result_bytes(tmp_path / "straight" / name)


def test_metrics_that_were_lost_are_not_made_up(tmp_path: Path, manifest: Path) -> None:
    train(tmp_path, manifest)
    (tmp_path / "run" / "train.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: 0 lines, but the checkpoint has done 4 steps"):
        main(train_config(tmp_path, manifest, resume=True))


def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path, manifest: Path) -> None:
    straight = train(tmp_path, manifest, "run", steps=6)
    (tmp_path / "run" / "train.json").unlink()
    newest = tmp_path / "run" / "checkpoints" / "step-000006" / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert train(tmp_path, manifest, "run", steps=6, resume=True) == straight
    assert (tmp_path / "run" / "checkpoints" / "step-000006.corrupt").is_dir()


def test_resuming_with_other_options_names_them(tmp_path: Path, manifest: Path) -> None:
    train(tmp_path, manifest, steps=2)
    (tmp_path / "run" / "train.json").unlink()
    with pytest.raises(UserError, match=r"learning_rate \(0.01 before, 1.0 now\), seed \(0 before, 3 now\)"):
        main(train_config(tmp_path, manifest, steps=2, resume=True, learning_rate=1.0, seed=3))
