"""LMSI: which rollouts it learns from, and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.baselines import trl as baselines
from distill.baselines.rewards import consistent_rollouts
from distill.tasks import question_prompts, sampling_config
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import baseline_config, train_baseline
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


def test_lmsi_learns_the_exact_tokens_of_the_consistent_rollouts(tmp_path: Path, manifest: Path) -> None:
    """The loss of the first step is the plain cross-entropy of the completions, the prompt's labels left out."""
    read, loaded = read_manifest(manifest), load_model(manifest.parent / "model")
    config = baseline_config(tmp_path, manifest, method="lmsi", steps=1)
    prompts = question_prompts(read, loaded, config, max_new_tokens=sampling_config(config, read).max_new_tokens)
    found = consistent_rollouts(read, list(prompts), keep_truncated=True)
    rows = {row.question_id: row for row in read.rows}
    assert 0 < len(found) < len(read.rollouts)
    for (name, index), rollout in read.rollouts.items():
        assert (rollout in found) == (rows[name].answers[index] == rows[name].pseudo_label is not None)
    tokenizer = tiny_tokenizer()
    assert any(tuple(tokenizer(r.text, add_special_tokens=False)["input_ids"]) != r.completion_ids for r in found)
    assert not consistent_or_none(read, list(prompts))  # none of these rollouts ended by itself

    batch = baselines.Consistent(config, read, loaded.model, prompts)
    table = batch.dataset(0)
    losses, whole = [], []
    for ids, mask, rollout in zip(table["input_ids"], table["completion_mask"], batch.plan[0], strict=True):
        prompt = prompts[rollout.question_id]
        assert tuple(ids) == (*prompt, *rollout.completion_ids)
        assert mask == [0] * len(prompt) + [1] * len(rollout.completion_ids)
        with torch.no_grad():
            log_p = tiny_model("qwen3")(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nll = -log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        losses.append(nll[len(prompt) - 1 :])
        whole.append(nll)
    expected = torch.cat(losses).mean().item()
    assert abs(expected - torch.cat(whole).mean().item()) > 1e-2
    for micro_batch_size in (1, 16):
        [row] = train_baseline(
            tmp_path, manifest, f"micro{micro_batch_size}", method="lmsi", steps=1, micro_batch_size=micro_batch_size
        )
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
        assert row["tokens_in_loss"] == len(torch.cat(losses))


def consistent_or_none(read: Any, names: list[str]) -> list[Rollout]:
    try:
        return consistent_rollouts(read, names, keep_truncated=False)
    except UserError as error:
        assert "no finished rollout gives its question's majority answer" in str(error)
        return []


def test_lmsi_learns_what_it_is_shown(tmp_path: Path, manifest: Path) -> None:
    rows = train_baseline(tmp_path, manifest, method="lmsi", steps=8)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(UserError, match=r"step [23]: \w+ is nan; the last checkpoint is kept, lower --learning-rate"):
        train_baseline(tmp_path, manifest, method="lmsi", learning_rate=1e30, steps=4)
    assert not (tmp_path / "run" / "adapter").exists()


def test_baselines_report_to_tensorboard(tmp_path: Path, manifest: Path) -> None:
    train_baseline(tmp_path, manifest, method="lmsi", steps=1, report_to=("tensorboard",))
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
