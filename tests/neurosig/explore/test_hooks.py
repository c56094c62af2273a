"""Changed neurons: the same as changed weights, at chosen positions, while decoding; and nothing is left behind."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import neurosig
from neurosig.explore.traces import check_model
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.nnsight_reader import NeuronScaler
from neurosig.neurons.sites import ffn_sites
from neurosig.runtime.errors import UserError
from tests.support.tiny import ARCHS, D_MLP, Arch, tiny_model, tiny_tokenizer

IDS = [5, 80, 33, 9, 250, 41, 17, 60]
NEURONS = [(0, 3), (1, 40), (1, 7)]
TEXT = ("Is it red?", " It is blue.")
ALL = TraceConfig(set_size=10**6)


def loaded(arch: Arch = "llama") -> LoadedModel:
    return load_model((tiny_model(arch), tiny_tokenizer()))


def logits(model: LoadedModel, ids: list[int] = IDS) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.model(torch.tensor([ids]), use_cache=False).logits[0]
    return out


def by_hand(model: LoadedModel, change: Callable[[int, Tensor], Tensor], ids: list[int] = IDS) -> Tensor:
    """The oracle: logits with ``change(layer, values [seq, d_mlp])`` applied in plain hooks of the test's own."""
    handles = []
    for layer, path in enumerate(ffn_sites(model.model).layers):

        def hook(module: Any, args: tuple[Tensor], layer: int = layer) -> tuple[Tensor]:
            value = args[0]
            return (change(layer, value.reshape(len(ids), -1).clone()).reshape(value.shape),)

        handles.append(model.model.get_submodule(path).register_forward_pre_hook(hook))
    try:
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("arch", ARCHS)
def test_silenced_scaled_set_and_patched(arch: Arch) -> None:
    model = loaded(arch)
    before = logits(model)

    def scaled(layer: int, values: Tensor) -> Tensor:
        values[:, [neuron for at, neuron in NEURONS if at == layer]] *= -2.5
        return values

    def assigned(layer: int, values: Tensor) -> Tensor:
        values[:, [neuron for at, neuron in NEURONS if at == layer]] = 1.5
        return values

    with neurosig.hooks(model, ablate=NEURONS):
        got = logits(model)
        assert torch.allclose(got, by_hand(model, lambda layer, values: values), atol=1e-6)
        assert (got - before).abs().max() > 1e-3
    weights = {path: model.model.get_submodule(path).weight for path in ffn_sites(model.model).layers}
    kept = {path: weight.detach().clone() for path, weight in weights.items()}
    with torch.no_grad():  # silencing is what zeroing the output direction does
        for layer, neuron in NEURONS:
            weight = weights[ffn_sites(model.model).layers[layer]]
            (weight[neuron] if arch == "gpt2" else weight[:, neuron]).zero_()
    assert torch.allclose(logits(model), got, atol=1e-5)
    with torch.no_grad():
        for path, weight in weights.items():
            weight.copy_(kept[path])
    for options, change in (
        ({"neurons": NEURONS, "scale": -2.5}, scaled),
        ({"scale": dict.fromkeys(NEURONS, -2.5)}, scaled),
        ({"neurons": pd.DataFrame(NEURONS, columns=["layer", "neuron"]), "set_to": 1.5}, assigned),
        ({"set_to": dict.fromkeys(NEURONS, 1.5)}, assigned),
        ({"patch": lambda layer, values: values.relu() if layer == 1 else values},
         lambda layer, values: values.relu() if layer == 1 else values),
        ({"patch": {1: torch.Tensor.relu}}, lambda layer, values: values.relu() if layer == 1 else values),
    ):  # fmt: skip
        expected = by_hand(model, change)
        with neurosig.hooks(model, **options):  # type: ignore[arg-type]
            assert torch.allclose(logits(model), expected, atol=1e-5)
        assert torch.equal(logits(model), before)


def test_scaling_is_that_of_the_interventions() -> None:
    model = loaded("qwen3")
    columns = {0: [3], 1: [40, 7]}
    scaled: Any = NeuronScaler(model.model, ffn_sites(model.model)).scaled(columns, 3.0)
    with torch.no_grad():
        expected = scaled(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    with neurosig.hooks(model, NEURONS, scale=3.0):
        assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "kept"),
    [("all", range(8)), (0, [0]), ([2, 5], [2, 5]), (range(1, 4), [1, 2, 3])],
)
def test_numbered_positions(positions: Any, kept: Any) -> None:
    model = loaded()

    def change(layer: int, values: Tensor) -> Tensor:
        if layer == 1:
            values[list(kept), 40] = 0
        return values

    with neurosig.hooks(model, ablate=[(1, 40)], positions=positions):
        got = logits(model)
        with torch.no_grad():  # the same in two steps with a cache
            first = model.model(torch.tensor([IDS[:3]]), use_cache=True)
            rest = model.model(torch.tensor([IDS[3:]]), past_key_values=first.past_key_values).logits[0]
    assert torch.allclose(got, by_hand(model, change), atol=1e-5)
    assert torch.allclose(torch.cat([first.logits[0], rest]), got, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "prompt", "prompt_end", "completion", 4])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_decoding_with_a_cache_is_the_greedy_text_without_one(arch: Arch, positions: Any) -> None:
    model, prompt = loaded(arch), "Is it red?"
    big = [(0, n) for n in range(40)] + [(1, n) for n in range(40)]
    ids = list(tiny_tokenizer()(prompt)["input_ids"])
    n = len(ids)
    where = {"all": range(99), "prompt": range(n), "prompt_end": [n - 1], "completion": range(n, 99), 4: [4]}[positions]
    for _ in range(6):

        def change(layer: int, values: Tensor) -> Tensor:
            at = [i for i in range(len(values)) if i in where]
            values[at, :40] *= 4
            return values

        ids.append(int(by_hand(model, change, ids)[-1].argmax()))
    plain = neurosig.hooks(model, big, scale=1.0)
    with neurosig.hooks(model, big, scale=4.0, positions=positions) as hooked:
        text = hooked.generate(prompt, max_new_tokens=6)
        out = model.model.generate(torch.tensor([ids[:n]]), do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert text == tiny_tokenizer().decode(ids[n:], skip_special_tokens=True)
    assert out[0, : len(ids)].tolist() == ids[: out.shape[1]]  # type: ignore[index]
    with plain as hooked:
        assert positions == 4 or hooked.generate(prompt, max_new_tokens=6) != text


@pytest.mark.parametrize("fault", [KeyError, KeyboardInterrupt, None])
def test_the_model_is_as_before_however_the_block_ends(fault: type[BaseException] | None) -> None:
    model = loaded()
    before = logits(model)
    hooked = neurosig.hooks(model, ablate=NEURONS)
    assert torch.equal(logits(model), before)  # not in force before the block
    try:
        with hooked, neurosig.hooks(model, NEURONS, scale=2.0):
            assert not torch.equal(logits(model), before)
            with pytest.raises(UserError, match="already open"):
                hooked.__enter__()
            if fault is not None:
                raise fault
    except (KeyError, KeyboardInterrupt):
        pass
    assert torch.equal(logits(model), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.model.modules())
    with hooked:  # and it can be opened again
        assert not torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="boom"), neurosig.hooks(model, patch=_boom):
        logits(model)
    assert torch.equal(logits(model), before)


def _boom(layer: int, values: Tensor) -> Tensor:
    raise RuntimeError("boom")


def test_nested_blocks_compose() -> None:
    model = loaded()
    with neurosig.hooks(model, NEURONS, scale=6.0):
        six = logits(model)
    with neurosig.hooks(model, NEURONS, scale=2.0), neurosig.hooks(model, NEURONS, scale=3.0) as inner:
        assert torch.allclose(logits(model), six, atol=1e-5)
        table = inner.top_tokens("Is it red?", 400)
    with neurosig.hooks(model, NEURONS, scale=2.0):  # before is without the inner block alone
        ids = list(tiny_tokenizer()("Is it red?")["input_ids"])
        twice = logits(model, ids)[-1].softmax(-1)
    assert torch.allclose(torch.tensor(table.sort_values("id")["before"].tolist()), twice, atol=1e-6)
    with neurosig.hooks(model, NEURONS, set_to=2.0), neurosig.hooks(model, NEURONS, scale=3.0):
        outer_first = logits(model)
    with neurosig.hooks(model, NEURONS, set_to=6.0):
        assert torch.allclose(logits(model), outer_first, atol=1e-5)


def test_top_tokens_before_and_after() -> None:
    model = loaded()
    ids = list(tiny_tokenizer()("".join(TEXT))["input_ids"])
    before = logits(model, ids)[-1].softmax(-1)
    with neurosig.hooks(model, [(1, n) for n in range(30)], scale=5.0) as hooked:
        after = logits(model, ids)[-1].softmax(-1)
        table = hooked.top_tokens(TEXT, k=4)
    assert {*before.topk(4).indices.tolist(), *after.topk(4).indices.tolist()} == set(table["id"])
    assert table["after"].is_monotonic_decreasing
    for row in table.itertuples():
        assert row.before == pytest.approx(float(before[row.id]), rel=1e-4)
        assert row.after == pytest.approx(float(after[row.id]), rel=1e-4)
        assert row.rank_before == 1 + int((before > before[row.id]).sum())
        assert row.rank_after == 1 + int((after > after[row.id]).sum())
        assert row.token == tiny_tokenizer().decode([row.id])


def test_the_mean_of_a_reference() -> None:
    model = loaded()
    reference = neurosig.trace(model, [TEXT, ("a", " bcd")], values=True, config=ALL, progress=False)
    rows = torch.cat(reference.values, dim=1)
    for layer, neuron in NEURONS:
        mean = float(rows[layer, :, neuron].mean())
        assert float(reference.mean_values([(layer, neuron)])[0]) == pytest.approx(mean, rel=1e-4)
    means = {(layer, neuron): float(rows[layer, :, neuron].mean()) for layer, neuron in NEURONS}
    with neurosig.hooks(model, set_to=means):
        expected = logits(model)
    with neurosig.hooks(model, NEURONS, set_to="mean", reference=reference):
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "prompt", "completion", [12]])
def test_a_trace_under_a_change_stays_that_of_the_changed_model(positions: Any) -> None:
    model = loaded()
    n = len(TEXT[0])
    plain = neurosig.trace(model, [TEXT, TEXT], values=True, config=ALL, positions="all", progress=False)
    with neurosig.hooks(model, ablate=[(0, 3)], positions=positions) as hooked:
        run = hooked.trace([TEXT, ("Is it", " red?")], values=True, config=ALL, positions="all", progress=False)
        inside = run.to_frame(9)
    silent = run.values[0][0, :, 3] == 0
    expected = {"all": range(n, 99), "prompt": [], "completion": range(n, 99)}.get(str(positions), [12])
    assert [n + i for i in silent.nonzero()[:, 0].tolist()] == [i for i in run.read_at[0] if i in expected]
    assert not torch.equal(run.values[0][1], plain.values[0][1])  # the layers above see it
    pd.testing.assert_frame_equal(run.to_frame(9), inside)
    with neurosig.hooks(model, NEURONS, scale=9.0):  # and no other block changes what belongs to this run
        pd.testing.assert_frame_equal(run.to_frame(9), inside)
        pd.testing.assert_frame_equal(plain.to_frame(9), plain[0:2].to_frame(9))
        assert "3 scaled" not in repr(run)
    assert "1 set at" in repr(run)
    contributions = run.sets.contributions[0].view(2, D_MLP)
    assert (contributions[0, 3] == 0) == (positions in ("all", "completion"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is changed; give ablate"),
        ({"ablate": [(2, 0)]}, "ablate: L2/0: the model has layers 0 to 1 of neurons 0 to 63"),
        ({"ablate": [(0, 64)]}, "ablate: L0/64"),
        ({"ablate": True}, r"ablate: expected \(layer, neuron\) pairs such as \(19, 696\), got True"),
        ({"ablate": [7]}, r"ablate: expected \(layer, neuron\) pairs such as \(19, 696\), got 7"),
        ({"ablate": pd.DataFrame({"layer": [1]})}, "a table without the columns layer and neuron"),
        ({"neurons": [(0, 1)]}, "neurons without scale or set_to"),
        ({"scale": 2.0}, "scale=2.0 of which neurons"),
        ({"neurons": [(0, 1)], "scale": float("nan")}, "expected a finite number or 'mean', got nan"),
        ({"neurons": [(0, 1)], "set_to": "median"}, "expected a finite number or 'mean', got 'median'"),
        ({"neurons": [(0, 1)], "set_to": "mean"}, "set_to='mean' needs reference="),
        ({"ablate": [(0, 1)], "set_to": {(0, 1): 2.0}}, "L0/1 is in ablate and in set_to"),
        ({"ablate": [(0, 1)], "positions": "answer"}, "expected all, prompt, prompt_end, completion, or numbers"),
        ({"ablate": [(0, 1)], "positions": -1}, "expected numbers of tokens from 0"),
        ({"patch": {5: torch.relu}}, "patch: L5/0"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        neurosig.hooks(loaded(), **options)


def test_faults_inside_a_block_are_named() -> None:
    model = loaded()
    with pytest.raises(UserError, match=r"model: expected what neurosig.load_model returns, got LlamaForCausalLM"):
        check_model(model.model)
    message = re.escape("patch returned a tensor of shape (1, 8, 2), expected (1, 8, 64)")
    with neurosig.hooks(model, patch={0: lambda values: values[..., :2]}), pytest.raises(UserError, match=message):
        logits(model)
    with neurosig.hooks(model, ablate=NEURONS, positions="prompt"), pytest.raises(UserError, match="several rows"):
        model.model(torch.tensor([IDS, IDS]))


@pytest.mark.smollm2
def test_the_docstring_teaches_what_runs(smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurosig, "load_model", lambda name: smollm2)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for function in (neurosig.hooks, neurosig.trace, neurosig.Probe, neurosig.compare):
        (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__)
        assert test.examples
        assert runner.run(test).failed == 0
