"""Scaling neurons through nnsight against plain hooks and edited weights; controls; measures; the command."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

import neurosig.intervene.interventions
from figures.draw.dose_response import draw
from neurosig.intervene.__main__ import InterveneConfig, main
from neurosig.intervene.dose_response import MEASURES, Cell, _interval, dose_response, measure, repetition
from neurosig.intervene.interventions import (
    NeuronSet,
    activity_matched,
    choose_neurons,
    completion_nll,
    layer_matched,
    mean_contributions,
    scale_neurons,
    strongest,
)
from neurosig.manifest import read_manifest, write_manifest
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.nnsight_reader import NeuronScaler
from neurosig.neurons.sites import FFNSites, ffn_sites, w_out
from neurosig.questions.load import Question, load_questions
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from neurosig.statistics.metrics import hierarchical_interval, paired_mean_interval
from tests.support.flow import make_manifest, save_tiny, write_questions
from tests.support.tiny import ALL_ARCHS, ARCHS, EOS_ID, VOCAB_SIZE, Arch, OtherArch, tiny_model, tiny_tokenizer

COLUMNS = {0: [3, 17, 40], 1: [5]}
SAMPLING = SamplingConfig(num_generations=4, temperature=1.0, max_new_tokens=10)


def loaded(arch: Arch | OtherArch = "qwen3") -> LoadedModel:
    """A model that ends some completions early, so that rows leave the batch."""
    model = tiny_model(arch)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS_ID] *= 3
    return load_model((model, tiny_tokenizer()))


def flat(model: LoadedModel) -> list[int]:
    return [layer * ffn_sites(model.model).d_mlp + index for layer, mine in COLUMNS.items() for index in mine]


def scaled(model: LoadedModel, factor: float) -> LoadedModel:
    return scale_neurons(model, NeuronScaler(model.model, ffn_sites(model.model)), flat(model), factor)


@contextmanager
def hooked(model: LoadedModel, factor: float) -> Iterator[None]:
    """The oracle: plain PyTorch hooks that scale the same columns."""

    def scale(layer: int) -> Callable[..., tuple[torch.Tensor]]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            value = inputs[0].clone()
            value[..., COLUMNS[layer]] = value[..., COLUMNS[layer]] * factor
            return (value,)

        return hook

    sites = ffn_sites(model.model)
    handles = [
        model.model.get_submodule(sites.layers[layer]).register_forward_pre_hook(scale(layer)) for layer in COLUMNS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reweighted(model: LoadedModel, factor: float) -> LoadedModel:
    """The third oracle: the same columns of W_down scaled in a copy of the model."""
    other = copy.deepcopy(model.model)
    sites = ffn_sites(other)
    with torch.no_grad():
        for layer, indices in COLUMNS.items():
            w_out(other, sites.layers[layer])[indices] *= factor
    return load_model((other, model.tokenizer))


def prompts(lengths: tuple[int, ...] = (5, 12, 9, 12, 3)) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(f"q{index}", tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()))
        for index, n in enumerate(lengths)
    ]


def drawn(model: LoadedModel) -> list[Rollout]:
    return [rollout for group in sample(model, prompts(), SAMPLING) for rollout in group]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("factor", [0.0, 4.0])
@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_logits_equal_those_of_hooks_and_of_edited_weights(arch: Arch | OtherArch, factor: float) -> None:
    model = loaded(arch)
    ids = torch.tensor([prompt.token_ids for prompt in prompts((9, 9, 9))])
    before = logits(model.model, ids)
    ours = logits(scaled(model, factor).model, ids)
    with hooked(model, factor):
        assert torch.equal(ours, logits(model.model, ids))
    torch.testing.assert_close(ours, logits(reweighted(model, factor).model, ids), rtol=1e-4, atol=1e-4)
    assert (ours - before).abs().max() > 1e-2
    assert torch.equal(before, logits(model.model, ids))  # the model itself stays as it was


@pytest.mark.parametrize("arch", ARCHS)
def test_samples_equal_those_of_hooks_and_of_edited_weights(arch: Arch) -> None:
    """Prompt and decoding, in batches of mixed lengths whose rows end at different times."""
    model = loaded(arch)
    unscaled, ours = drawn(model), drawn(scaled(model, 4.0))
    with hooked(model, 4.0):
        assert ours == drawn(model)
    assert [r.token_ids for r in ours] == [r.token_ids for r in drawn(reweighted(model, 4.0))]
    assert [r.token_ids for r in ours] != [r.token_ids for r in unscaled]
    assert len({len(r.token_ids) for r in ours}) > 1


@pytest.mark.parametrize("arch", ARCHS)
def test_factor_one_changes_nothing_to_the_bit(arch: Arch) -> None:
    model = loaded(arch)
    assert drawn(scaled(model, 1.0)) == drawn(model)


def test_scaling_reaches_the_decoding_steps() -> None:
    """Hooks that stand down after the prompt give other samples."""
    model = loaded()
    handles: list[Any] = []

    def once(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        for handle in handles:
            handle.remove()
        return (inputs[0] * 0,)

    path = ffn_sites(model.model).layers[0]
    handles.append(model.model.get_submodule(path).register_forward_pre_hook(once))
    prompt_only = drawn(model)
    scaler = NeuronScaler(model.model, ffn_sites(model.model))
    everywhere = drawn(scale_neurons(model, scaler, range(scaler.sites.d_mlp), 0.0))
    assert [r.token_ids for r in prompt_only] != [r.token_ids for r in everywhere]


def test_two_stand_ins_of_one_model_keep_apart() -> None:
    model = loaded()
    scaler = NeuronScaler(model.model, ffn_sites(model.model))
    none, four = (scale_neurons(model, scaler, flat(model), factor) for factor in (0.0, 4.0))
    ids = torch.tensor([prompts()[0].token_ids])
    first = logits(none.model, ids)
    assert not torch.equal(first, logits(four.model, ids))
    assert torch.equal(first, logits(none.model, ids))
    with pytest.raises(AttributeError):
        _ = four.model.base_model  # running it would go around the scaling


# What is scaled


def sites(n_layers: int = 3, d_mlp: int = 20) -> FFNSites:
    layers = ("a",) * n_layers
    return FFNSites(layers=layers, acts=layers, blocks=layers, head="h", d_mlp=d_mlp, d_model=4, gated=True)


LOCATED = [1, 2, 3, 45]  # three in layer 0, none in layer 1, one in layer 2


def profile(ids: list[int]) -> list[int]:
    return np.bincount(np.array(ids) // 20, minlength=3).tolist()


def test_neurons_are_chosen_by_sign(tmp_path: Path) -> None:
    path = tmp_path / "neurons.csv"
    path.write_text("layer,index,weight,active_share\n2,5,1.5,0.5\n0,1,-0.25,0.1\n0,3,0.5,0\n1,0,0,0.5\n")
    assert choose_neurons(path, sites(), "positive") == ([3, 45], [1, 3, 20, 45])
    assert choose_neurons(path, sites(), "negative") == ([1], [1, 3, 20, 45])
    assert choose_neurons(path, sites(), "all") == ([1, 3, 20, 45], [1, 3, 20, 45])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("layer,index\n0,1\n", "expected the columns layer, index and weight"),
        ("layer,index,weight\n0,1,heavy\n", "expected the columns layer, index and weight"),
        ("layer,index,weight\n0,1,1\n3,1,1\n", r"neurons\.csv:3: neuron 1 of layer 3 is outside the model"),
        ("layer,index,weight\n0,1,1\n0,20,1\n", r"neurons\.csv:3: neuron 20 of layer 0 is outside the model"),
        ("layer,index,weight\n0,1,1\n0,1,1\n", "a neuron stands twice"),
        ("layer,index,weight\n", "no neuron with a positive weight"),
        ("layer,index,weight\n0,1,-1\n1,1,0\n", "no neuron with a positive weight"),
    ],
)
def test_bad_neurons_are_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "neurons.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        choose_neurons(path, sites(), "positive")
    with pytest.raises(UserError, match="no such file"):
        choose_neurons(tmp_path / "other.csv", sites(), "positive")


def test_mean_contributions_count_absence_as_zero(tmp_path: Path) -> None:
    path = tmp_path / "signals.safetensors"
    ids = np.array([[0, 2, -1], [2, 1, 3]], dtype=np.int32)
    values = np.array([[1.0, 0.5, 0.0], [1.5, -2.0, 0.25]], dtype=np.float16)
    save_file({"ids": ids, "values": values}, path)
    assert mean_contributions(path, 5).tolist() == [0.5, 1.0, 1.0, 0.125, 0.0]
    with pytest.raises(UserError, match="largest id 3"):
        mean_contributions(path, 3)


def test_layer_matched_controls_have_the_profile_and_never_a_located_neuron() -> None:
    excluded = [*LOCATED, 10, 50]
    draws = [layer_matched(LOCATED, excluded, sites(), np.random.default_rng(seed)) for seed in range(40)]
    assert all(profile(draw) == [3, 0, 1] and len(set(draw)) == 4 for draw in draws)
    assert {neuron for draw in draws for neuron in draw}.isdisjoint(excluded)
    assert {neuron for draw in draws for neuron in draw if neuron < 20} == {*range(20)} - {1, 2, 3, 10}
    assert draws[7] == layer_matched(LOCATED, excluded, sites(), np.random.default_rng(7))


def test_activity_matched_controls_contribute_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    contributions = np.zeros(60)
    contributions[[1, 2, 3, 45]] = 8.0, 4.0, 1.0, 5.0
    contributions[[10, 11, 12, 59]] = 7.5, 4.5, 1.25, 3.0
    monkeypatch.setattr(neurosig.intervene.interventions, "NEAREST", 1)
    rng = np.random.default_rng(0)
    assert activity_matched(LOCATED, LOCATED, contributions, sites(), rng) == [10, 11, 12, 59]
    assert activity_matched(LOCATED, [*LOCATED, 10], contributions, sites(), rng) == [0, 11, 12, 59]
    monkeypatch.setattr(neurosig.intervene.interventions, "NEAREST", 3)
    draws = [activity_matched(LOCATED, LOCATED, contributions, sites(), np.random.default_rng(s)) for s in range(20)]
    assert all(profile(draw) == [3, 0, 1] and len(set(draw)) == 4 for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 5


def test_the_strongest_are_the_largest_contributors_of_each_layer() -> None:
    contributions = np.zeros(60)
    contributions[[2, 5, 6, 7, 25, 41, 42]] = 9.0, 5.0, 6.0, 7.0, 8.0, 1.0, 2.0
    assert strongest(LOCATED, LOCATED, contributions, sites()) == [5, 6, 7, 42]


def test_a_layer_without_enough_others_is_named() -> None:
    with pytest.raises(UserError, match="layer 0: 11 neurons are scaled but only 9 others are left"):
        layer_matched(range(11), range(11), sites(), np.random.default_rng(0))


# What is measured


def test_the_likelihood_of_completions_is_that_of_one_plain_forward_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded()
    groups: dict[str, list[Rollout]] = {}
    for rollout in drawn(model):
        groups.setdefault(rollout.question_id, []).append(rollout)
    ours = completion_nll(model, prompts(), groups)
    for prompt in prompts():
        nats, tokens = 0.0, 0
        for rollout in groups[prompt.question_id]:
            ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids]])
            log_p = logits(model.model, ids)[0].log_softmax(-1)
            start = len(prompt.token_ids)
            nats -= sum(float(log_p[start + i - 1, token]) for i, token in enumerate(rollout.token_ids))
            tokens += len(rollout.token_ids)
        assert ours[prompt.question_id] == pytest.approx(nats / tokens, abs=1e-4)
    monkeypatch.setattr(neurosig.intervene.interventions, "LOGITS_AT_ONCE", 1)
    assert completion_nll(model, prompts(), groups) == pytest.approx(ours, abs=1e-4)
    monkeypatch.undo()
    with hooked(model, 4.0):
        hooks = completion_nll(model, prompts(), groups)
    assert completion_nll(scaled(model, 4.0), prompts(), groups) == hooks != ours


def rollout(text: str, ids: tuple[int, ...] = (5, 6), reason: Any = "stop") -> Rollout:
    return Rollout("q", 0, text, ids, reason, mean_entropy=0.5)


def test_measures_of_one_question_by_hand() -> None:
    question = Question("q", "geography", "What is the capital of France?", answer="Paris")
    group = [
        rollout("The capital of France is Paris."),
        rollout("The capital of France is Lyon.", (5, 6, 7, 8)),
        rollout("The capital of France is Paris.", (5, 5, 5, 5), "length"),
        rollout("I'm sorry, but I cannot say."),
    ]
    assert measure(question, group, 1.25) == {
        "avg_at_k": 0.5,
        "maj_at_k": 1.0,
        "agreement": 0.5,
        "unparsed": 0.25,
        "refusal": 0.25,
        "no_answer": 0.25,
        "nll": 1.25,
        "entropy": 0.5,
        "length": 3.0,
        "truncated": 0.25,
        "repetition": 0.125,
    }
    tied = measure(question, [group[0], group[1]], 0.0)
    assert (tied["maj_at_k"], tied["agreement"]) == (0.5, 0.5)


def test_repetition_counts_trigrams_said_before() -> None:
    assert repetition((1, 2)) == repetition((1, 2, 3, 4)) == 0
    assert repetition((7, 7, 7, 7, 7)) == pytest.approx(2 / 3)
    assert repetition((1, 2, 3, 1, 2, 3)) == 0.25


def cell(neurons: NeuronSet | None, factor: float, **values: list[float]) -> Cell:
    zero = np.zeros(4)
    return Cell(neurons, factor, {name: np.array(values[name]) if name in values else zero for name in MEASURES})


def test_changes_and_differences_are_paired() -> None:
    located = NeuronSet("located", 0, (1,))
    cells = [
        cell(None, 1.0, avg_at_k=[1.0, 0.0, 0.5, 0.5]),
        cell(located, 4.0, avg_at_k=[0.75, -0.25, 0.25, 0.25]),
        cell(NeuronSet("layer", 0, (2,)), 4.0, avg_at_k=[1.0, 0.0, 0.5, 0.5]),
        cell(NeuronSet("layer", 1, (3,)), 4.0, avg_at_k=[0.9, -0.1, 0.4, 0.4]),
    ]
    rows = {(row["group"], row["factor"]): row for row in dose_response(cells, seed=0) if row["measure"] == "avg_at_k"}
    assert set(rows) == {("located", 1.0), ("located", 4.0), ("layer", 1.0), ("layer", 4.0)}
    assert "change" not in rows["located", 1.0] and rows["layer", 1.0]["value"] == 0.5
    change = rows["located", 4.0]
    assert [change[name] for name in ("change", "change_low", "change_high")] == pytest.approx([-0.25] * 3)
    assert "difference" not in change
    control = rows["layer", 4.0]
    assert (control["draws"], control["n"]) == (2, 4)
    assert control["value"] == pytest.approx(0.45) and control["change"] == pytest.approx(-0.05)
    assert control["difference"] == pytest.approx(-0.2)
    # every question differs by the same, so the interval is that of the draws
    assert (control["difference_low"], control["difference_high"]) == pytest.approx((-0.25, -0.15))
    with pytest.raises(UserError, match="no cell of the unscaled model"):
        dose_response(cells[1:], seed=0)


def test_intervals_are_those_of_the_metrics_module() -> None:
    """Against the loop over resamples, and for one draw against the paired bootstrap, up to their own noise."""
    delta = np.random.default_rng(3).normal(0.1, 0.5, (3, 30)) + np.array([[0.0], [0.3], [-0.2]])
    several = hierarchical_interval(lambda d, q: float(delta[np.ix_(d, q)].mean()), *delta.shape, seed=1)
    one = paired_mean_interval(delta[0], np.zeros(30), seed=1)
    for mine, theirs in ((delta, several), (delta[:1], one)):
        ours = _interval("change", mine, 0)
        assert ours["change"] == pytest.approx(theirs.estimate)
        assert (ours["change_low"], ours["change_high"]) == pytest.approx((theirs.low, theirs.high), abs=0.015)


# The command


NEURONS_CSV = "layer,index,weight,active_share\n0,3,0.5,0.5\n0,17,0.25,0.5\n1,5,0.5,0.5\n1,9,-0.5,0.5\n"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real export of a tiny model, with neurons: its probe has nothing to learn from."""
    folder = make_manifest(tmp_path_factory.mktemp("intervene"))
    read = read_manifest(folder)
    header = {name: getattr(read.header, name) for name in ("tool", "model", "tokenizer", "dataset", "sampling")}
    write_manifest(
        folder,
        read.rows,
        read.rollouts.values(),
        signals=(folder / "signals.safetensors").read_bytes(),
        neurons_csv=NEURONS_CSV,
        header=header | {"options": read.header.options},
    )
    return folder


def config(manifest: Path, out: Path, **changes: Any) -> InterveneConfig:
    defaults: dict[str, Any] = {
        "questions": (str(manifest.parent / "questions.jsonl"),),
        "factors": (0.0, 4.0),
        "controls": 2,
        "num_generations": 2,
        "max_new_tokens": 4,
        "limit": 5,
        "quiet": True,
    }
    return InterveneConfig(manifest=manifest, out=out, **{**defaults, **changes})


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_every_cell_and_a_table(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(config(manifest, out))
    names = ["located", "layer-0", "layer-1", "activity-0", "activity-1", "strongest"]
    files = {"unscaled.json", *(f"{name}-x{factor}.json" for name in names for factor in (0, 4))}
    assert {path.name for path in (out / "cells").iterdir()} == files
    rows = table(out)
    assert len(rows) == 4 * 3 * len(MEASURES)
    record = json.loads((out / "results.json").read_text())
    assert {name: entry["neurons"] for name, entry in record["sets"].items()} == dict.fromkeys(names, 3)
    assert record["config"]["seed"] == 0 and record["run"]["libraries"]["nnsight"]
    assert len(json.loads((out / "plan.json").read_text())["neurons"]["located"]) == 3
    # the table says what the cells say
    content = {path.stem: json.loads(path.read_text())["measures"] for path in (out / "cells").iterdir()}
    mean = {name: np.mean([values["nll"] for values in cells.values()]) for name, cells in content.items()}
    nll = {(row["group"], row["factor"]): row for row in rows if row["measure"] == "nll"}
    assert float(nll["located", "4"]["value"]) == pytest.approx(mean["located-x4"], abs=1e-4)
    assert float(nll["located", "4"]["change"]) == pytest.approx(mean["located-x4"] - mean["unscaled"], abs=1e-4)
    pooled = (mean["layer-0-x4"] + mean["layer-1-x4"]) / 2
    assert float(nll["layer", "4"]["difference"]) == pytest.approx(mean["located-x4"] - pooled, abs=1e-4)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    main(config(manifest, out, resume=True))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_figure_shows_the_table(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished run; run `python -m neurosig\.intervene"):
        draw(tmp_path, tmp_path / "figures")
    main(config(manifest, tmp_path / "intervene", controls=1))
    pdf, png, plotted = draw(tmp_path, tmp_path / "figures")
    assert pdf.read_bytes().startswith(b"%PDF") and png.read_bytes().startswith(b"\x89PNG")
    drawn_rows = pd.read_csv(plotted)
    assert set(drawn_rows["group"]) == {"located", "layer", "activity", "strongest"}
    results = {(row["group"], float(row["factor"]), row["measure"]): row for row in table(tmp_path / "intervene")}
    for row in drawn_rows.to_dict("records"):
        source = results[row["group"], row["factor"], row["measure"]]
        value, change, low = (float(source[name] or 0) for name in ("value", "change", "change_low"))
        shown = np.log([row["value"], row["low"]]) if row["measure"] == "nll" else [row["value"], row["low"]]
        assert shown == pytest.approx([value, value - change + low], abs=1e-4)


def test_an_interrupted_run_resumes_cell_by_cell(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(config(manifest, tmp_path / "straight"))
    scored = completion_nll
    calls: list[int] = []

    def killed(*args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(neurosig.intervene.interventions, "completion_nll", killed)
    with pytest.raises(KeyboardInterrupt):
        main(config(manifest, tmp_path / "broken"))
    assert len(list((tmp_path / "broken" / "cells").iterdir())) == 4
    with pytest.raises(UserError, match="differ from the interrupted run: factors, sampling"):
        main(config(manifest, tmp_path / "broken", resume=True, factors=(0.0,), temperature=1.0))
    with pytest.raises(UserError, match="holds an earlier run"):
        main(config(manifest, tmp_path / "broken"))
    main(config(manifest, tmp_path / "broken", resume=True))
    assert len(calls) == 5 + 13 - 4
    straight, broken = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).rglob("*.json")) if path.stem != "results"}
        for name in ("straight", "broken")
    )
    assert straight == broken
    assert table(tmp_path / "straight") == table(tmp_path / "broken")


def test_bad_requests_are_refused(manifest: Path, tmp_path: Path) -> None:
    for changes, problem in (
        ({"factors": (1.0,)}, "--factors: expected a factor other than 1"),
        ({"factors": (0.0, 0.0)}, "--factors: expected each factor once"),
        ({"factors": (float("nan"), 2.0)}, "--factors: expected finite numbers"),
        ({"matching": ("layer", "layer")}, "--matching: expected each kind once"),
        ({"controls": 0}, "--controls: expected at least 1"),
        ({"reference_rollouts": 3}, "--reference-rollouts: expected 1 to --num-generations"),
    ):
        with pytest.raises(UserError, match=problem):
            config(manifest, tmp_path / "run", **changes)
    unlabelled = write_questions(tmp_path / "unlabelled.jsonl", answer=None)
    with pytest.raises(UserError, match=r'question "q0" \(line 1\) has no answer'):
        main(config(manifest, tmp_path / "run", questions=(str(unlabelled),)))
    with pytest.raises(UserError, match="1 question; an interval needs at least 2"):
        main(config(manifest, tmp_path / "run", limit=1))
    other = save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match="not the architecture of the manifest's model"):
        main(config(manifest, tmp_path / "run", model=str(other)))
    assert not (tmp_path / "run").exists()


def test_other_weights_of_the_same_architecture_are_allowed_with_a_warning(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_tiny(tmp_path / "trained", seed=1)
    mine = tmp_path / "mine.csv"
    mine.write_text("layer,index,weight\n0,8,1\n1,9,1\n")
    changes: dict[str, Any] = {"factors": (0.0,), "controls": 1, "matching": ("layer",), "table": mine}
    main(config(manifest, tmp_path / "run", model=str(other), **changes))
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["neurons"]["located"] == [8, 64 + 9]
    assert "its weights differ from those the neurons were located in" in caplog.text
    assert "5 of 5 questions are among those the neurons were located on" in caplog.text
    assert {row["group"] for row in table(tmp_path / "run")} == {"located", "layer", "strongest"}


@pytest.mark.smollm2
def test_scaling_moves_the_embedded_model_in_batches(smollm2: LoadedModel) -> None:
    """Factor 1 samples the same tokens as the bare model; silencing one whole layer makes its own samples unlikely."""
    builder = PromptBuilder(smollm2.tokenizer, PromptConfig())
    asked = [Prompt(q.id, builder.student(q)) for q in load_questions("world-facts:dev", limit=4)]
    sampling = SamplingConfig(num_generations=3, temperature=0.8, max_new_tokens=8)
    bare = {group[0].question_id: group for group in sample(smollm2, asked, sampling)}
    scaler = NeuronScaler(smollm2.model, ffn_sites(smollm2.model))
    layer = range(scaler.sites.d_mlp)
    one = {g[0].question_id: g for g in sample(scale_neurons(smollm2, scaler, layer, 1.0), asked, sampling)}
    assert one == bare
    before = completion_nll(smollm2, asked, bare)
    after = completion_nll(scale_neurons(smollm2, scaler, layer, 0.0), asked, bare)
    assert all(after[name] > before[name] + 0.5 for name in before)
