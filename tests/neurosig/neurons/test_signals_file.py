"""What ``signals.safetensors`` holds: finite numbers in a type that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.neurons.signals_file import read_signals
from neurosig.neurons.token_trace import TokenTrace, active_contribution, weighted_evidence
from neurosig.neurons.tracer import NeuronTracer
from neurosig.questions.prompts import PromptBuilder
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest
from tests.support.tiny import tiny_model, tiny_tokenizer


def save_scaled(folder: Path, factor: float) -> Path:
    """A tiny model with large embeddings: its residual stream exceeds float16, its neurons do not."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize(("factor", "dtype"), [(1e6, torch.float32), (1.0, torch.float16)])
def test_hidden_states_are_stored_in_a_type_that_holds_them(tmp_path: Path, factor: float, dtype: torch.dtype) -> None:
    folder = make_manifest(save_scaled(tmp_path, factor), contribution="magnitude", signature="hidden_state")
    manifest, signals = read_manifest(folder), read_signals(folder / "signals.safetensors")
    loaded = load_model(tmp_path / "model")
    builder = PromptBuilder(loaded.tokenizer, manifest.header.prompt_config())
    prompts = {row.question_id: builder.student(row.as_question()) for row in manifest.rows}
    rollouts = list(manifest.rollouts.values())
    sets = NeuronTracer(loaded.model).trace(
        [prompts[r.question_id] for r in rollouts], [r.completion_ids_without_eos for r in rollouts]
    )
    assert (sets.hidden_states.abs().max() > 65_504) == (factor > 1)
    assert signals.hidden_states.dtype == dtype and signals.contributions.dtype == torch.float16
    torch.testing.assert_close(signals.hidden_states.float(), sets.hidden_states, rtol=1e-3, atol=1e-3)
    similarities = [item.similarity for row in manifest.selected for item in row.context]
    assert len(set(similarities)) > 3 and all(-1 <= value <= 1 for value in similarities)
    again = make_manifest(tmp_path, "again", contribution="magnitude", signature="hidden_state", reuse=folder)
    assert (again / "signals.safetensors").read_bytes() == (folder / "signals.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["contributions", "hidden_states", "probe_scores"])
def test_stored_values_that_are_not_finite_are_named(tmp_path: Path, name: str) -> None:
    path = make_manifest(tmp_path) / "signals.safetensors"
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(path)
    tensors[name].view(-1)[0] = torch.inf
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=f"not what neurosig.export writes .{name} holds values that are not finite"):
        read_signals(path)


def test_a_residual_stream_that_overflows_is_named_by_its_weights(tmp_path: Path) -> None:
    """Behind a norm of it every value is zero."""
    model = load_model(save_scaled(tmp_path, 1e38) / "model").model
    with pytest.raises(UserError, match=r"its blocks give zeros or values that are not finite.*check the weights"):
        NeuronTracer(model)


def test_neurons_outside_the_set_change_no_view() -> None:
    contributions = torch.tensor([[[1.0, 2.0, torch.nan], [3.0, 4.0, torch.inf]]])
    trace = TokenTrace(contributions, contributions)
    assert active_contribution(trace, torch.tensor([[True, True, False]])).tolist() == [[1.5, 3.5]]
    assert weighted_evidence(trace, torch.tensor([[1.0, -1.0, 0.0]])).tolist() == [[-1.0, -1.0]]
