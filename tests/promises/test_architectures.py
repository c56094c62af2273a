"""Every architecture of the README's table, from a saved folder on: its neurons, greedy tokens and a LoRA step.

Each is loaded as the commands load it. The tolerances are those of fp32 sums in another order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import TrainConfig
from distill.step import learn
from distill.student import TrainingForward, make_student, sampling_weights
from distill.tasks import Task
from distill.teacher import Teacher
from distill.train import main as train
from neurosig.check import compare
from neurosig.export import main as export
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.backends import trace_neurons
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.sites import ffn_sites
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample
from tests.support.architectures import ARCHITECTURES, models_table, save
from tests.support.flow import export_config, write_questions
from tests.support.pages import section
from tests.support.parsers import UNCUT
from tests.support.runs import metrics_of, train_config
from tests.support.sampling import draw, prompts
from tests.support.tiny import D_MODEL

ROLLOUTS = (
    [[5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16], [10, 11, 12], [5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16]],
    [[20, 21, 22], [30, 31, 33, 34, 35, 36, 37, 38, 39], [40, 41]],
)
EVERY_NEURON = 10**6
ENDS = [2, *range(3, 300, 9)]
"""End tokens: rows finish at different lengths, so that others take their places while the batch decodes."""
TASKS = [Task("a", tuple(range(5, 17)), (9, 8, *range(5, 17))), Task("b", (11, 12), (3, 4, 10, 11, 12))]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture's name, and a folder with a tiny model of it."""
    name: str = request.param
    return name, save(name, tmp_path_factory.mktemp("model"), ENDS)


@pytest.fixture
def loaded(folder: tuple[str, Path]) -> LoadedModel:
    return load_model(folder[1], device="cpu")


def test_neurons_are_read_the_same_in_every_way(folder: tuple[str, Path], loaded: LoadedModel) -> None:
    """What `neurosig.check` compares; and of the activations both backends give the same direct effects."""
    lens, errs = ARCHITECTURES[folder[0]].lens, ARCHITECTURES[folder[0]].lens_errs
    agreements, unchanged, reason = compare(loaded, *ROLLOUTS, set_size=20)
    assert unchanged and reason.startswith("TransformerLens cannot read") == (not lens)
    assert [name for name, one in agreements.items() if one is None] == ([] if lens else [*agreements][-1:])
    for name, one in agreements.items():
        assert one is None or (one.max_rel > 0.01 if errs and "TransformerLens" in name else one.max_rel < 2e-5)
    config = TraceConfig(value="act", score="unembed", set_size=EVERY_NEURON)
    sites, sets = ffn_sites(loaded.model), trace_neurons(loaded, *ROLLOUTS, config)
    assert (sites.n_layers, sites.d_model) == (2, D_MODEL) and sets.neuron_ids.shape == (3, 2 * sites.d_mlp)
    if lens and not errs:
        other = trace_neurons(loaded, *ROLLOUTS, config, backend="transformer_lens")
        torch.testing.assert_close(other.contributions, sets.contributions, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.hidden_states, sets.hidden_states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_tokens_are_those_of_generate(loaded: LoadedModel) -> None:
    """Two questions at a time, of which the next starts when one has finished; prompts reach beyond the windows."""
    short_prompts = prompts((5, 14, 9, 3))
    found = draw(loaded, short_prompts, num_generations=1, temperature=0.0, batch_rows=2)
    for prompt in short_prompts:
        ids = torch.tensor([prompt.token_ids])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 10}
        generated = loaded.model.generate(ids, **options)[0, ids.shape[1] :]
        (rollout,) = found[prompt.question_id]
        assert [*rollout.completion_ids] == generated.tolist()
        logits = loaded.model(torch.cat([ids[0], generated])[None]).logits[0, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, generated[:, None]).mean().item()
        assert rollout.mean_logprob == pytest.approx(expected, abs=1e-4)


def test_a_lora_step_learns_from_what_was_sampled(loaded: LoadedModel) -> None:
    """The student gives the sampled tokens the sampler's probabilities, and the loss falls; text alone is adapted."""
    config = TrainConfig(manifest=Path(), out=Path(), lora_r=4, max_grad_norm=0.1, keep_truncated=True)
    torch.manual_seed(0)
    model, adapter = make_student(config, loaded)
    with sampling_weights(model, adapter) as weight_of:
        student_prompts = [Prompt(task.id, task.student_prompt) for task in TASKS]
        sampling = SamplingConfig(num_generations=2, temperature=1.0, max_new_tokens=6)
        groups = [*sample(loaded, student_prompts, sampling, weight_of=weight_of)]
    task_of = {task.id: task for task in TASKS}
    pairs = [(task_of[rollout.question_id], rollout) for group in groups for rollout in group]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, teacher = torch.optim.SGD(trained, lr=0.01), Teacher("base", model, adapter)
    first, second = (
        learn(config, model, teacher, optimizer, pairs, TrainingForward.of(config, model)) for _ in range(2)
    )
    assert first["loss"] is not None and second["loss"] is not None and first["grad_norm"] is not None
    assert 0 < second["loss"] < first["loss"] and math.isfinite(first["grad_norm"]) and first["grad_norm"] > 0
    assert first["sampler_kl"] == pytest.approx(0, abs=1e-5)
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.slow
def test_a_whole_export_and_training(folder: tuple[str, Path], tmp_path: Path) -> None:
    model = folder[1]
    export(export_config(tmp_path, model, write_questions(tmp_path / "questions.jsonl"), answer_parser=UNCUT))
    options: dict[str, Any] = {"steps": 2, "keep_truncated": True}
    train(train_config(tmp_path, tmp_path / "manifest", **options))
    assert all(math.isfinite(step["loss"]) and abs(step["sampler_kl"]) < 1e-4 for step in metrics_of(tmp_path / "run"))


def test_the_readme_has_the_table_of_these_tests() -> None:
    """``python -m tests.support.architectures`` prints it."""
    assert models_table() in section("Which models")
