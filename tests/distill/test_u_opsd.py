"""U-OPSD: its context, and the rollouts that it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.config import TrainConfig
from distill.step import learn
from distill.tasks import Task, agreeing
from distill.teacher import Teacher
from neurosig.manifest import read_manifest
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import make_manifest
from tests.support.runs import train_baseline
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"))


def test_u_opsd_learns_from_its_own_majority_where_it_disagrees(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match="u-opsd shows each question its own majority solution, but the contexts"):
        train_baseline(tmp_path, manifest, method="u-opsd")
    assert not (tmp_path / "run").exists()
    own = make_manifest(tmp_path, "own", context_policy="majority_solution")
    rows = train_baseline(tmp_path, own, method="u-opsd")
    assert len(rows) == 2 and rows[0]["loss"] > 0
    assert "U-OPSD" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_u_opsd_leaves_out_exactly_the_rollouts_that_agree(manifest: Path) -> None:
    read = read_manifest(manifest)
    row = next(row for row in read.rows if row.pseudo_label is not None)
    right = next(
        read.rollouts[row.question_id, i].text for i, answer in enumerate(row.answers) if answer == row.pseudo_label
    )
    texts = {0: right, 1: "Answer: surely something else", 2: ""}
    rollouts = [Rollout(row.question_id, i, text, (5 + i, 6, 7), "stop") for i, text in texts.items()]
    left_out = agreeing(read, [*rollouts, Rollout("replay:x", 0, right, (5,), "stop")])
    assert left_out == {(row.question_id, 0)}
    task = Task(row.question_id, (5, 6, 7), (9, 8, 5, 6, 7))
    config = TrainConfig(manifest=Path(), out=Path())

    def step(pairs: list[tuple[Task, Rollout]], without: set[tuple[str, int]]) -> dict[str, float]:
        model = tiny_model("qwen3")
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        return learn(config, model, Teacher("live", model, None), sgd, pairs, left_out=without)

    masked = step([(task, rollout) for rollout in rollouts], left_out)
    rest = step([(task, rollout) for rollout in rollouts[1:]], set())
    everything = step([(task, rollout) for rollout in rollouts], set())
    assert masked["loss"] == rest["loss"] != everything["loss"]
    assert (masked["rollouts_in_loss"], masked["rollouts"], masked["generated_tokens"]) == (2, 3, 9)
