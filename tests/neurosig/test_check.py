"""The check of a user's own model: exit codes, what it says, and that it can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from neurosig.check import TOLERANCE, CheckConfig, main
from neurosig.neurons.contributions import cett
from neurosig.neurons.parity import agreement, hooked_means
from neurosig.neurons.sites import ffn_sites, w_out_norms
from neurosig.runtime.cli import run_command
from tests.support.commands import loaded_after
from tests.support.flow import save_tiny, write_questions
from tests.support.tiny import Arch, MixtureArch, OtherArch, tiny_model, tiny_tokenizer


def check(*argv: str | Path) -> int:
    return run_command(CheckConfig, main, presets={}, prog="check", argv=[str(argument) for argument in argv])


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gemma3", "gpt2", "opt", "phi3", "starcoder2"])
def test_a_model_that_is_read_rightly(tmp_path: Path, arch: Arch | OtherArch, capsys: pytest.CaptureFixture) -> None:
    folder = save_tiny(tmp_path / "model", arch)
    assert check("--model", folder, "--set-size", "20") == 0
    out = capsys.readouterr().out
    assert out.count("   ok\n") == 3
    assert "logits after = before          the same to the bit" in out
    assert "rollouts       8, " in out
    assert ("gated          yes" in out) == (arch not in ("gpt2", "opt", "starcoder2"))
    assert ("not tied" in out) == (arch in ("qwen3", "phi3"))
    assert out.endswith("all within tolerance (0.001 of a contribution in float32)\n")


def test_a_set_size_may_be_a_share(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save_tiny(tmp_path / "model")
    quick = ("--model", folder, "--limit", "1", "--num-generations", "1", "--max-new-tokens", "4")
    for given, size in ((["--set-size", "0.25"], 32), (["--set-size", "7"], 8), ([], 4)):
        assert check(*quick, *given) == 0
        assert f"sets of {size} neurons\n" in capsys.readouterr().out
    assert check(*quick, "--set-size", "1.5") == 2
    assert capsys.readouterr().err.startswith(
        "error: --set-size is 1.5; it must be at least 1, a whole number of neurons,"
    )


def test_a_failed_parity_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No two ways of summing agree to 1e-12."""
    folder = save_tiny(tmp_path / "model")
    assert check("--model", folder, "--tolerance", "1e-12") == 1
    out = capsys.readouterr().out
    assert "above 1e-12" in out
    assert "TransformerLens = plain hooks" in out.splitlines()[-1] and out.splitlines()[-1].startswith("failed: ")


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_refused(tmp_path: Path, arch: MixtureArch, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "model"
    tiny_model(arch).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert check("--model", folder) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: model type '{arch}': its FFN neurons cannot be located, since its experts" in captured.err


@pytest.mark.parametrize("flag", ["--limit", "--set-size"])
def test_nothing_to_compare(tmp_path: Path, flag: str, capsys: pytest.CaptureFixture) -> None:
    assert check("--model", tmp_path / "model", flag, "0") == 2
    assert capsys.readouterr().err == f"error: {flag} 0: give at least 1\n"


def test_without_transformer_lens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    assert check("--model", save_tiny(tmp_path / "model"), "--limit", "2", "--num-generations", "1") == 0
    out = capsys.readouterr().out
    assert "TransformerLens = plain hooks  not compared" in out
    assert "TransformerLens was not compared: backend transformer_lens: transformer_lens is not installed" in out
    assert "rollouts       2, " in out


def test_with_questions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", 3)
    assert check("--model", save_tiny(tmp_path / "model"), "--questions", questions, "--max-new-tokens", "5") == 0
    assert "rollouts       6, " in capsys.readouterr().out


def test_a_head_of_another_width(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = OPTConfig(
        vocab_size=300,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert check("--model", tmp_path / "model") == 0
    assert "the score unembed does not: it reads 16 dimensions" in capsys.readouterr().out


def test_help_is_quick_and_teaches(capsys: pytest.CaptureFixture) -> None:
    assert loaded_after("import neurosig.check", "torch", "transformers", "nnsight", "transformer_lens") == set()
    assert check("--help") == 0
    text = capsys.readouterr().out
    assert "--questions" in text and "exit code 0 when they agree" in " ".join(text.split())


@torch.no_grad()
def test_hooked_means_of_one_neuron() -> None:
    """By hand: the scores of single positions, from single forward passes of ever longer prefixes."""
    model = tiny_model("gpt2")
    sites = ffn_sites(model)
    prompt, completion = [5, 6, 7], [8, 9]
    scores = []
    for end in (4, 5):
        seen = {}
        handle = model.get_submodule(sites.layers[1]).register_forward_hook(
            lambda m, a, o, seen=seen: seen.update(a=a, o=o)
        )
        model(torch.tensor([(prompt + completion)[:end]]))
        handle.remove()
        scores.append(cett(seen["a"][0], w_out_norms(model, sites)[1], seen["o"])[0, -1, 13])
    means = hooked_means(model, sites, [prompt], [completion])
    torch.testing.assert_close(means[0, 1, 13], sum(scores) / 2)
    assert not any(module._forward_hooks for module in model.modules())


def test_agreement_by_hand() -> None:
    """Two rollouts, two layers of three neurons, sets of one neuron per layer."""
    expected = torch.tensor([[[4.0, 1.0, 2.0], [0.1, 0.5, 0.2]], [[1.0, 2.0, 8.0], [3.0, 1.0, 1.0]]])
    means = expected.clone()
    means[0, 0, 1] = 1.5  # in no set: absolute difference only
    means[1, 0, 2] = 6.0  # in a set: a quarter less
    means[1, 1] = torch.tensor([3.0, 4.0, 1.0])  # another neuron leads, by 3
    found = agreement(means, expected, share=1)
    assert (found.max_abs, found.max_rel, found.same_sets) == (3.0, 0.25, 0.5)
    assert found.overlap == pytest.approx((1 + 1 / 3) / 2)
    silent = torch.zeros(1, 1, 3)  # neurons that never fire, as behind a ReLU
    assert agreement(silent, silent, share=1).max_rel == 0


def test_positions_that_are_wrong_by_one_are_above_every_tolerance() -> None:
    model = tiny_model("qwen3")
    sites = ffn_sites(model)
    prompts, completions = [[5, 6, 7, 8]] * 2, [[9, 10, 11, 12], [20, 21, 22, 23]]
    right = hooked_means(model, sites, prompts, completions)
    for first, last in ((3, 8), (5, 8), (4, 7)):
        rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        wrong = hooked_means(model, sites, [row[:first] for row in rows], [row[first:last] for row in rows])
        assert agreement(wrong, right, share=10).max_rel > max(TOLERANCE.values())


@pytest.mark.smollm2
def test_smollm2(capsys: pytest.CaptureFixture) -> None:
    assert check("--model", "smollm2-135m", "--limit", "2") == 0
    out = capsys.readouterr().out
    assert "30, model.layers.0 to model.layers.29" in out
    assert "46,080 in all" in out
    assert out.count("   ok\n") == 3
