"""Direct effects add up to the logit, with the final norm folded, in every architecture; what does not add up is
refused."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

import neurosig
from neurosig.explore.attribution import Directions
from neurosig.explore.forward import frozen_norm, read_neurons, read_stream
from neurosig.models.completion_hidden import logit_softcap
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.sites import ffn_sites, w_out
from neurosig.runtime.errors import UserError
from tests.support.tiny import ALL_ARCHS, Arch, OtherArch, tiny_model, tiny_tokenizer, with_random_weights

IDS, AT, TOKENS = [5, 80, 33, 9, 250, 41, 17, 60, 71, 12, 13], [2, 7, 10], torch.tensor([9, 50, 200])


def loaded(model: PreTrainedModel) -> LoadedModel:
    return load_model((model, tiny_tokenizer()))


def true_logits(model: PreTrainedModel) -> torch.Tensor:
    """Of the tokens at the positions, before the softcap, in double precision."""
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, AT].double().gather(1, TOKENS[:, None])[:, 0]
    cap = logit_softcap(model)
    return logits if cap is None else cap * torch.atanh(logits / cap)


def keep(layer: int, value: torch.Tensor, made: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
    return value


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_the_parts_are_the_logit_and_the_neurons_are_the_ffn(arch: Arch | OtherArch) -> None:
    model = tiny_model(arch)
    sites = ffn_sites(model)
    stream = read_stream(model, sites, IDS, AT, keep)
    directions = Directions(model, sites, stream, TOKENS)
    parts = directions.parts()
    total = parts.embedding + parts.attention.sum(0) + parts.ffn.sum(0) + parts.bias
    assert torch.allclose(total, true_logits(model), atol=2e-5)
    assert torch.allclose(total, parts.logit, atol=2e-6)
    assert parts.ffn.abs().max() > 0.01
    assert all((norm is not None) == (arch in ("gemma2", "gemma3", "olmo2")) for norm in stream.post_norms)
    for layer, path in enumerate(sites.layers):
        effects = directions.neurons(layer, stream.kept[layer])
        norm = stream.post_norms[layer]
        bias = getattr(model.get_submodule(path), "bias", None)
        along = directions.residual if norm is None else norm.before(directions.residual)
        rest = 0 if bias is None else along @ bias.double()
        assert torch.allclose(effects.sum(1) + rest, parts.ffn[layer], atol=2e-6)
        some = directions.neurons(layer, stream.kept[layer][:, [3, 40]], [3, 40])
        assert torch.allclose(some, effects[:, [3, 40]])


def test_a_neuron_of_the_last_layer_acts_as_removing_it_with_the_norm_frozen() -> None:
    """By hand, for RMSNorm: logit = (stream / rms * gain) . head row."""
    model = tiny_model("llama")
    sites = ffn_sites(model)
    stream = read_stream(model, sites, IDS, AT, keep)
    effects = Directions(model, sites, stream, TOKENS).neurons(1, stream.kept[1])
    x = stream.residual[-1].double()
    rms = (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    gain, head = model.model.norm.weight.double(), model.lm_head.weight.double()[TOKENS]  # type: ignore[union-attr,operator,index]
    without = x - stream.kept[1][:, 11:12].double() * w_out(model, sites.layers[1])[11].double()
    change = (((x - without) / rms * gain) * head).sum(-1)
    assert torch.allclose(effects[:, 11], change.detach(), atol=1e-8)


def test_effects_use_the_weights_of_an_adapter() -> None:
    model = tiny_model("qwen3")
    plain = read_stream(model, ffn_sites(model), IDS, AT).hidden
    model.add_adapter(LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False))
    sites = ffn_sites(model.eval())
    stream = read_stream(model, sites, IDS, AT, keep)
    assert not torch.allclose(stream.hidden, plain, atol=1e-3)
    directions = Directions(model, sites, stream, TOKENS)
    assert torch.allclose(directions.neurons(1, stream.kept[1]).sum(1), directions.parts().ffn[1], atol=1e-5)


def test_bfloat16_adds_up_to_rounding() -> None:
    model = tiny_model("gemma3").bfloat16()
    parts = Directions(model, ffn_sites(model), read_stream(model, ffn_sites(model), IDS, AT), TOKENS).parts()
    total = parts.embedding + parts.attention.sum(0) + parts.ffn.sum(0) + parts.bias
    assert torch.allclose(total, parts.logit, atol=0.1 * float(parts.logit.abs().max()))


def granite(**options: Any) -> PreTrainedModel:
    config = GraniteConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return with_random_weights(GraniteForCausalLM(config))


def test_a_scale_of_the_logits_is_folded_and_one_of_the_residual_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = granite(logits_scaling=4.0)
    parts = Directions(model, ffn_sites(model), read_stream(model, ffn_sites(model), IDS, AT), TOKENS).parts()
    total = parts.embedding + parts.attention.sum(0) + parts.ffn.sum(0) + parts.bias
    assert torch.allclose(total, true_logits(model), atol=1e-5)
    run = neurosig.trace(loaded(granite(residual_multiplier=0.5)), ("Hi", " Yo"), progress=False)
    with pytest.raises(UserError, match="model type 'granite': block 0 adds something else to the residual stream"):
        run.attribution()
    frame = run.to_frame(4)
    assert frame["effect"].isna().all()
    assert frame["contribution"].notna().all()
    assert "no direct effects" in caplog.text


def test_what_is_no_norm_is_not_folded() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for norm in (torch.nn.RMSNorm(8), torch.nn.LayerNorm(8)):
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.linspace(-2, 2, 8))
            frozen = frozen_norm(norm, x, norm(x), "it")
            assert torch.allclose(frozen.gain, norm.weight.double(), atol=1e-5)
        assert frozen.centred is isinstance(norm, torch.nn.LayerNorm)
    with pytest.raises(UserError, match="it, a Tanh, is neither a LayerNorm nor an RMSNorm"):
        frozen_norm(torch.nn.Tanh(), x, x.tanh(), "it")


def test_the_table_of_a_run() -> None:
    run = neurosig.trace(loaded(tiny_model("gpt2")), [("Hi", " Yo"), "Hello"], progress=False)
    table = run.attribution()
    assert list(table["part"]) == ["embedding", "attention", "ffn", "attention", "ffn", "bias"]
    assert table["effect"].sum() == pytest.approx(table.attrs["logit"], abs=1e-5)
    assert (table.attrs["next_token"], table.attrs["position"]) == (" ", 1)
    with torch.no_grad():
        logits = run.model.model(torch.tensor([run.texts[0].ids])).logits[0]
    assert table.attrs["logit"] == pytest.approx(float(logits[1, run.texts[0].ids[2]]), abs=1e-5)
    other = run.attribution(0, position=-1)
    assert other.attrs["logit"] == pytest.approx(float(logits[-1].max()), abs=1e-5)  # nothing follows: the likeliest
    assert run.attribution(1, token="z").attrs["next_token"] == "z"
    neurons = run.attribution(0, by="neurons", top=10**6)
    assert neurons.shape == (128, 4)
    assert neurons["effect"].abs().is_monotonic_decreasing
    of_layer = neurons.groupby("layer")["effect"].sum()
    bias = [run.model.model.get_submodule(path).bias for path in run.sites.layers]
    assert len(bias) == 2 and isinstance(of_layer, pd.Series)
    for options, message in (
        ({"position": 99}, "position 99: text 0 has tokens 0 to 4"),
        ({"token": "zz"}, "token 'zz' is 2 tokens"),
        ({"token": 300}, "token 300: the model has tokens 0 to 299"),
        ({"by": "heads"}, "by='heads': expected sublayers or neurons"),
    ):
        with pytest.raises(UserError, match=message):
            run.attribution(0, **options)


def test_reading_leaves_no_hook_behind() -> None:
    model = tiny_model("opt")
    read_neurons(model, ffn_sites(model), IDS, AT, keep)
    read_stream(model, ffn_sites(model), IDS, AT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
