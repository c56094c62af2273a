"""`neurosig.trace`: the numbers of plain hooks, every site, tables, what is kept and refused, and how it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neurosig
from neurosig.explore.cache import HOOKS
from neurosig.explore.tracing import TraceInterrupted
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import PAD
from neurosig.neurons.lens_reader import LensReader
from neurosig.neurons.sites import ffn_sites
from neurosig.neurons.token_trace import trace_tokens
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample
from tests.support.hooked import hooked_scores
from tests.support.paths import ROOT
from tests.support.tiny import D_MLP, D_MODEL, Arch, tiny_model, tiny_tokenizer

TEXTS: list[Any] = [("Is it red?", " It is blue."), "What?", ("Why so?", " No."), "Hello there"]
ALL = TraceConfig(set_size=10**6)


def loaded(arch: Arch = "llama") -> LoadedModel:
    return load_model((tiny_model(arch), tiny_tokenizer()))


def outputs(model: nn.Module, path: str, ids: tuple[int, ...]) -> Tensor:
    """The oracle: a module's output on one sequence, ``[seq, d]``, by a hook of the test's own."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return kept[0].reshape(len(ids), -1)


@pytest.mark.parametrize(
    ("arch", "score", "value"),
    [
        ("llama", "cett", "gated"),
        ("gpt2", "cett", "gated"),
        ("gemma3", "magnitude", "act"),
        ("qwen3", "unembed", "gated"),
    ],
)
def test_contributions_are_those_of_plain_hooks(arch: Arch, score: str, value: str) -> None:
    model = loaded(arch)
    config = replace(ALL, score=score, value=value)  # type: ignore[arg-type]
    for positions in ("answer", "prompt", "prompt_end", "0:2"):
        texts = TEXTS[::2] if positions == "prompt_end" else TEXTS
        run = neurosig.trace(model, texts, positions=positions, config=config, values=True, progress=False)
        for row, (text, at) in enumerate(zip(run.texts, run.read_at, strict=True)):
            scores = hooked_scores(model.model, list(text.ids), value, score)
            read = [position - (score == "unembed") for position in at]
            expected = scores[read].mean(dim=0).flatten().float()
            assert torch.allclose(run.sets.contributions[row], expected, atol=1e-5, rtol=1e-4)
            frame = run[row].to_frame(5)
            best = scores[read].amax(dim=0)
            for found in frame.itertuples():
                assert float(best[found.layer, found.neuron]) == pytest.approx(
                    float(scores[found.position - (score == "unembed"), found.layer, found.neuron]), rel=1e-4, abs=1e-7
                )
                assert found.token == text.tokens[found.position]
    kept = trace_tokens(run.tracer, run.texts[0].prompt_ids, run.texts[0].completion_ids)
    assert torch.allclose(run.values[0], kept.values[:, :2], atol=1e-5)


def test_the_table_of_neurons() -> None:
    model = loaded("qwen3")
    run = neurosig.trace(model, TEXTS, positions="all", config=TraceConfig(set_size=16), progress=False)
    frame = run.to_frame(top=7)
    assert frame.groupby("text").size().tolist() == [7] * 4
    for text, part in frame.groupby("text"):
        ids, contributions = run.sets.neuron_ids[text], run.sets.contributions[text]
        assert part["contribution"].is_monotonic_decreasing
        assert part["contribution"].iloc[0] == pytest.approx(float(contributions.max()))
        flat = (part["layer"] * D_MLP + part["neuron"]).tolist()
        assert set(flat) <= set(ids[ids != PAD].tolist())
        table = run.attribution(text, position=int(part["position"].iloc[0]), by="neurons", top=10**6)
        row = part.iloc[0]
        found = table[(table["layer"] == row["layer"]) & (table["neuron"] == row["neuron"])]
        assert found["effect"].item() == pytest.approx(row["effect"], rel=1e-4)
        assert table.attrs["next_token"] == row["next_token"]
    assert run.to_frame(10**6).groupby("text").size().tolist() == (run.sets.neuron_ids != PAD).sum(dim=1).tolist()


def test_parts_of_a_run() -> None:
    run = neurosig.trace(loaded(), TEXTS, values=True, progress=False)
    assert (len(run), len(run[1:]), len(run[[0, 3]]), [len(one) for one in run]) == (4, 3, 2, [1] * 4)
    for part, rows in (
        (run[1:], [1, 2, 3]),
        (run[[3, 0]], [3, 0]),
        (run[-1], [3]),
        (run[np.array([3, 1])[1]], [1]),
        (run[torch.tensor([0, 2])], [0, 2]),
        (run[np.array([False, True, False, True])], [1, 3]),
    ):
        assert part.texts == tuple(run.texts[row] for row in rows)
        assert torch.equal(part.sets.contributions, run.sets.contributions[rows])
        assert all(torch.equal(part.values[i], run.values[row]) for i, row in enumerate(rows))
    alone = neurosig.trace(run.model, TEXTS[2], progress=False)
    assert torch.allclose(alone.sets.contributions, run[2].sets.contributions, atol=1e-6)
    with pytest.raises(IndexError):
        run[4]
    with pytest.raises(UserError, match="a mask of 2 for 4 texts"):
        run[[True, False]]


def test_rollouts_and_chats_are_traced_as_they_were_sampled() -> None:
    model = loaded()
    prompts = [Prompt("a", (1, 40, 41)), Prompt("b", (1, 50))]
    groups = list(sample(model, prompts, SamplingConfig(num_generations=3, max_new_tokens=5)))
    rollouts = [rollout for group in groups for rollout in group]
    run = neurosig.trace(model, rollouts, prompts=prompts, positions="all", progress=False)
    ids = {prompt.question_id: prompt.token_ids for prompt in prompts}
    expected = run.tracer.trace(
        [ids[r.question_id] for r in rollouts], [r.completion_ids_without_eos for r in rollouts]
    )
    assert torch.allclose(run.sets.contributions, expected.contributions, atol=1e-6)
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo."}]
    assert neurosig.trace(model, chat, progress=False).texts[0].completion == "Yo."


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_other_sites(arch: Arch) -> None:
    model = loaded(arch)
    sites = ffn_sites(model.model)
    run = neurosig.trace(model, TEXTS, sites="residual", values=True, progress=False)
    for i, text in enumerate(run.texts):
        for layer, block in enumerate(sites.blocks):
            expected = outputs(model.model, block, text.ids)[list(run.read_at[i])]
            assert torch.allclose(run.values[i][layer], expected, atol=1e-5)
            assert torch.allclose(run.vectors[i, layer], expected.mean(dim=0), atol=1e-5)
    frame = run.to_frame(3)
    assert list(frame.columns) == ["text", "layer", "dimension", "value"]
    first = frame.iloc[0]
    assert abs(first["value"]) == pytest.approx(float(run.vectors[0].abs().max()))
    assert float(run.vectors[0, int(first["layer"]), int(first["dimension"])]) == pytest.approx(first["value"])
    attention = {"llama": "self_attn", "gpt2": "attn", "gemma3": "post_attention_layernorm"}[arch]
    run = neurosig.trace(model, TEXTS[0], sites="attention_out", progress=False)
    expected = outputs(model.model, f"{sites.blocks[1]}.{attention}", run.texts[0].ids)[list(run.read_at[0])]
    assert torch.allclose(run.vectors[0, 1], expected.mean(dim=0), atol=1e-5)
    path = f"{sites.blocks[1]}.{'mlp.c_fc' if arch == 'gpt2' else 'mlp.gate_proj'}"
    run = neurosig.trace(model, TEXTS[0], sites=path, progress=False, config=replace(ALL, score="unembed"))
    expected = outputs(model.model, path, run.texts[0].ids)[list(run.read_at[0])]
    assert torch.allclose(run.vectors[0], expected.mean(dim=0)[None], atol=1e-5)
    assert list(run.to_frame(2).columns) == ["text", "module", "dimension", "value"]
    for name in ("sets", "values"):
        with pytest.raises(UserError, match="trace with"):
            getattr(run, name)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_the_cache_has_the_activations_of_plain_hooks(arch: Arch) -> None:
    model = loaded(arch)
    run = neurosig.trace(model, TEXTS[:3:2], progress=False)
    sites = ffn_sites(model.model)
    ids = run.texts[1].ids
    pre, post, attention, ffn = (run.cache[f"blocks.1.{name}"] for name in HOOKS[3:] + HOOKS[2:0:-1])
    assert pre.shape == (2, len(run.texts[0].ids), D_MODEL)
    assert not pre[1, len(ids) :].any()
    for name, value in (("blocks.0", pre), ("blocks.1", post)):
        expected = outputs(model.model, sites.blocks[int(name[-1])], ids)
        assert torch.allclose(value[1, : len(ids)], expected, atol=1e-5)
    assert torch.allclose(pre + attention + ffn, post, atol=1e-5)
    values = run.cache["blocks.1.mlp.hook_post"][1, : len(ids)]
    assert values.shape[-1] == D_MLP
    traced = neurosig.trace(model, TEXTS[2], values=True, positions="all", progress=False)
    assert torch.allclose(values[list(traced.read_at[0])], traced.values[0][1], atol=1e-5)
    assert len(run.cache) == len(list(run.cache)) == 5 * sites.n_layers
    with pytest.raises(
        UserError, match=r"cache: no 'blocks.1.hook_attn'; the nearest names are .*blocks.1.hook_attn_out"
    ):
        run.cache["blocks.1.hook_attn"]
    with pytest.raises(UserError, match=r"no 'blocks.9.hook_resid_post'"):
        run.cache["blocks.9.hook_resid_post"]


def test_the_cache_has_the_activations_of_transformer_lens() -> None:
    model = loaded("qwen3")
    run = neurosig.trace(model, TEXTS[0], progress=False)
    bridge = LensReader(model.model, run.sites).bridge
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(torch.tensor([run.texts[0].ids]))
    names = {"mlp.hook_post": "mlp.out.hook_in", "hook_mlp_out": "mlp.hook_out", "hook_attn_out": "attn.hook_out"}
    names |= {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}
    for ours, name in names.items():
        assert torch.allclose(run.cache[f"blocks.1.{ours}"], theirs[f"blocks.1.{name}"], atol=1e-4), ours


def test_values_have_a_limit() -> None:
    model = loaded()
    per_token = 4 * 2 * D_MLP
    tokens = len(" It is blue.")
    run = neurosig.trace(model, TEXTS[0], values=True, values_limit=tokens * per_token, progress=False)
    assert run.values[0].shape == (2, tokens, D_MLP)
    with pytest.raises(UserError, match=rf"values: {tokens} tokens of {per_token} bytes .*raise values_limit"):
        neurosig.trace(model, TEXTS[0], values=True, values_limit=tokens * per_token - 1, progress=False)
    options: dict[str, Any] = {"sites": "model.layers.0.mlp.gate_proj", "values": True, "progress": False}
    with pytest.raises(UserError, match=r"values: those of 2 of 2 texts .*raise values_limit"):
        neurosig.trace(model, [TEXTS[0]] * 2, values_limit=2 * tokens * 4 * D_MLP - 1, **options)
    assert len(neurosig.trace(model, [TEXTS[0]] * 2, values_limit=2 * tokens * 4 * D_MLP, **options).values) == 2
    with pytest.raises(UserError, match="trace with values=True"):
        _ = neurosig.trace(model, TEXTS[0], progress=False).values


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (
            "Hi?",
            {"sites": "model.layers.1.mlp.gate_pro"},
            r"no such module; .*such as model\.layers\.\d\.mlp\.gate_proj",
        ),
        ("Hi?", {"sites": "residuals"}, "such as residual"),
        ("Hi?", {"sites": "model.layers"}, "gives no tensor with one row per token"),
        ("Hi?", {"positions": "end"}, "positions: expected prompt"),
        ("a" * 600, {}, "text 0: 600 tokens; the model reads 512"),
        ([], {}, "no text to trace"),
    ],
)
def test_what_cannot_be_traced_is_refused(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        neurosig.trace(loaded(), texts, progress=False, **options)


@pytest.mark.parametrize("options", [{}, {"sites": "residual"}, {"values": True}])
def test_interrupted_it_keeps_the_finished_texts(options: dict[str, Any]) -> None:
    model = loaded()
    texts = ["Why", "Because it is", "No way"]
    config = TraceConfig(set_size=16, batch_tokens=2)  # a text per batch
    whole = neurosig.trace(model, texts, config=config, progress=False, **options)
    passes = 0

    def stop(module: nn.Module, args: object) -> None:
        nonlocal passes
        passes += 1
        if passes == limit:
            raise KeyboardInterrupt

    limit = 10**6
    handle = model.model.model.layers[1].register_forward_pre_hook(stop)  # type: ignore[union-attr,index,operator]
    neurosig.trace(model, texts, config=config, progress=False, **options)
    total, passes = passes, 0
    limit = total  # Ctrl-C in the last pass
    with pytest.raises(TraceInterrupted, match=r"[12] of 3 texts are traced; .*sys.last_value.traces") as stopped:
        neurosig.trace(model, texts, config=config, progress=False, **options)
    handle.remove()
    kept = stopped.value.traces
    assert 0 < len(kept) < 3
    rows = [whole.texts.index(text) for text in kept.texts]
    assert rows == sorted(rows)
    if "sites" in options:
        assert torch.allclose(kept.vectors, whole.vectors[rows])
    else:
        assert torch.allclose(kept.sets.contributions, whole.sets.contributions[rows], atol=1e-6)
    assert kept.to_frame(2).shape[0] == 2 * len(kept)


HOSTILE = "<script>alert(1)</script> $x$ \u202e <b>"


def test_it_prints_text_as_text() -> None:
    model = loaded()
    run = neurosig.trace(model, [(HOSTILE, HOSTILE), *["Hi?"] * 6], progress=False)
    html = run._repr_html_()
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert not re.search(r"<style|class=|http|#[0-9a-f]{3}|<link|onload", html)
    assert "color:inherit" in html and "background:transparent" in html
    assert html.count("<tr>") == 1 + 4 * 4  # the texts' whole active sets
    assert "3 more texts" in html
    text = repr(run)
    assert "\n" not in text
    for said in ("7 texts through live", "sites ffn", "positions answer", "special tokens", "6 of 7 texts have no"):
        assert said in text
    assert "residual" in neurosig.trace(model, "Hi?", sites="residual", progress=False)._repr_html_()


def test_public_names_are_few_and_listed() -> None:
    page = (Path(neurosig.__file__).parent / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page.partition("## The commands")[0], flags=re.MULTILINE)
    assert sorted(listed) == sorted(set(neurosig.__all__) - {"__version__"})
    assert len(listed) <= 16
    assert all(getattr(neurosig, name).__doc__ for name in listed)


def test_importing_is_quick_and_loads_no_torch() -> None:
    statement = "import time; t = time.perf_counter(); import neurosig; print(time.perf_counter() - t < 0.3)"
    done = subprocess.run([sys.executable, "-c", f"{statement}; import sys; print('torch' in sys.modules)"],
                          capture_output=True, text=True, cwd=ROOT, check=True)  # fmt: skip
    assert done.stdout.split() == ["True", "False"]
