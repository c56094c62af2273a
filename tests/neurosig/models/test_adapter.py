"""An adapter is found in a run, its result and its checkpoints, and every reader of neurons sees its effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from distill.evaluate import main as evaluate
from neurosig.check import CheckConfig
from neurosig.check import main as check
from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.models.load import LoadedModel, load_model
from neurosig.models.run_folder import find_adapter
from neurosig.neurons.backends import trace_neurons
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.sites import ffn_sites, w_out_norms
from neurosig.report.__main__ import ReportConfig
from neurosig.report.__main__ import main as report
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from neurosig.views.run import ExportedRun
from tests.support.flow import export_config, make_manifest
from tests.support.runs import evaluate_config, train
from tests.support.tiny import Arch, rollouts

OPTIONS: dict[str, Any] = {"steps": 4, "save_steps": 2, "learning_rate": 0.02, "lora_r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its manifest, a run with LoRA and one with --full."""
    folder = tmp_path_factory.mktemp("adapters")
    manifest = make_manifest(folder)
    train(folder, manifest, **OPTIONS)
    from distill.train import main
    from tests.support.runs import train_config

    main(train_config(folder, manifest, "full", **{**OPTIONS, "learning_rate": 1e-3, "full": True}))
    return folder


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(torch.tensor([[5, 6, 7, 8]])).logits.float()
    return found


def test_the_run_its_result_and_its_checkpoints_are_found(folder: Path) -> None:
    """The last checkpoint holds the weights of the result; the one before it those of a shorter run."""
    load = {
        name: load_model(folder / "model", adapter=folder / "run" / name)
        for name in ("", "adapter", "checkpoints/step-000004", "checkpoints/step-000002")
    }
    torch.testing.assert_close(logits(load[""]), logits(load["adapter"]), rtol=0, atol=0)
    torch.testing.assert_close(logits(load["checkpoints/step-000004"]), logits(load["adapter"]))
    base, early = logits(load_model(folder / "model")), logits(load["checkpoints/step-000002"])
    assert (early - logits(load[""])).abs().max() > 1e-3 and (early - base).abs().max() > 1e-3
    assert load[""].info.adapter == sha256_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    assert load[""].info.weights == load_model(folder / "model").info.weights


def test_a_full_run_is_a_model_and_so_are_its_checkpoints(folder: Path) -> None:
    whole = logits(load_model(folder / "full" / "model"))
    torch.testing.assert_close(logits(load_model(folder / "full")), whole, rtol=0, atol=0)
    last = load_model(folder / "full" / "checkpoints" / "step-000004")
    torch.testing.assert_close(logits(last), whole)
    assert last.info.weights != load_model(folder / "model").info.weights
    assert (logits(load_model(folder / "full" / "checkpoints" / "step-000002")) - whole).abs().max() > 1e-4


def test_adapters_and_models_in_the_wrong_place_are_told_where_they_belong(folder: Path, tmp_path: Path) -> None:
    for place in ("run", "run/adapter", "run/checkpoints/step-000002"):
        with pytest.raises(UserError, match="an adapter without weights of a model; give it as --adapter"):
            load_model(folder / place)
    for place in ("full", "full/model", "full/checkpoints/step-000002", "model"):
        with pytest.raises(UserError, match="give it as --model"):
            load_model(folder / "model", adapter=folder / place)
    shutil.copytree(folder / "run" / "checkpoints" / "step-000002", tmp_path / "step-000002")
    with pytest.raises(UserError, match=r"no adapter_config.json in .*; leave the checkpoint in its run's folder"):
        find_adapter(tmp_path / "step-000002")
    shutil.copytree(folder / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"not finished; give a checkpoint of it, such as .*step-000004"):
        find_adapter(tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-000004" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-000004: damaged .sha256 differs.; give another checkpoint"):
        find_adapter(weights.parent)
    with pytest.raises(UserError, match=r"its weights are not those that .*/checkpoints was trained on"):
        load_model("organism", adapter=folder / "run" / "checkpoints" / "step-000002")


def test_every_command_takes_it_and_names_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export, evaluation, check, report and views of a trained model, and the verification of the whole folder."""
    step = folder / "run" / "checkpoints" / "step-000002"
    config = export_config(folder, folder / "model", folder / "questions.jsonl", "again", adapter=step)
    export(config)
    digest = sha256_file(step / "weights.safetensors")
    header = read_manifest(folder / "again").header
    assert header.model["adapter"] == digest
    assert header.model["weights"] == read_manifest(folder / "manifest").header.model["weights"]
    texts = [(folder / name / "rollouts.jsonl").read_text() for name in ("manifest", "again")]
    assert texts[0] != texts[1]

    evaluate(evaluate_config(folder, adapter=folder / "run"))
    evaluate(evaluate_config(folder, "eval2", adapter=step))
    summaries = [json.loads((folder / out / "summary.json").read_text()) for out in ("eval", "eval2")]
    assert summaries[1]["adapter_sha256"] == summaries[1]["model"]["adapter"] == digest
    assert all(summary["domains"]["colour"]["trained_on"] == 8 for summary in summaries)

    check(CheckConfig(model=str(folder / "model"), adapter=step, quiet=True))
    assert f"adapter {digest[:12]}" in capsys.readouterr().out
    report(
        ReportConfig(manifest=folder / "again", adapter=step, out=tmp_path, permutations=0, resamples=100, quiet=True)
    )
    assert digest[:12] in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=f"the manifest was made by the adapter {digest[:12]}"):
        report(ReportConfig(manifest=folder / "again", adapter=folder / "run", out=tmp_path, quiet=True))
    assert ExportedRun(folder / "again").loaded.info.adapter == digest
    with pytest.raises(UserError, match=r"made by .* with an adapter, not by .* with this one"):
        _ = ExportedRun(folder / "again", adapter=folder / "run").loaded

    verify(VerifyConfig(folder=folder))
    lines = capsys.readouterr().out.splitlines()
    for name in ("again", "eval", "eval2"):
        assert f"ok    {name}: made by the adapter in the folder" in lines
    (step / "weights.safetensors").write_bytes(
        (folder / "run" / "checkpoints" / "step-000004" / "weights.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="checks failed"):
        verify(VerifyConfig(folder=folder))


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
@pytest.mark.parametrize("score", ["cett", "unembed"])
def test_an_active_adapter_is_read_as_a_merged_one(arch: Arch, score: Any) -> None:
    """Beside the weights, as in half precision, its layers give nnsight what the merged model's do."""
    from tests.support.tiny import tiny_model

    beside, merged = tiny_model(arch), tiny_model(arch)
    for model in (beside, merged):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        adapter = get_peft_model(model, lora).eval()
    adapter.merge_and_unload()
    norms = [w_out_norms(model, ffn_sites(model)) for model in (beside, merged, tiny_model(arch))]
    torch.testing.assert_close(norms[0], norms[1])
    assert not torch.allclose(norms[0], norms[2], rtol=1e-2)
    config = TraceConfig(score=score, set_size=1_000_000)
    texts = rollouts([(5, 4), (9, 2)])
    sets = [trace_neurons(model, *texts, config) for model in (beside, merged)]
    torch.testing.assert_close(sets[0].contributions, sets[1].contributions, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="TransformerLens cannot read a model with a LoRA adapter beside its weights"):
        trace_neurons(beside, *texts, config, backend="transformer_lens")


def test_in_half_precision_the_adapter_stays_beside_the_weights(folder: Path) -> None:
    """Its change, which rounding the merged weights would lose, is in the outputs and in the traced neurons."""
    half = load_model(folder / "model", dtype="bfloat16", adapter=folder / "run")
    base, whole = load_model(folder / "model"), load_model(folder / "model", adapter=folder / "run")
    change, seen = logits(whole) - logits(base), logits(half) - logits(base)
    assert (seen * change).sum() > 0.8 * (change * change).sum()
    assert any("lora_" in name for name, _ in half.model.named_parameters())
    config = TraceConfig(set_size=1_000_000)
    read = [trace_neurons(one, *rollouts(), config).contributions for one in (base, whole, half)]
    change, seen = read[1] - read[0], read[2] - read[0]
    assert (seen * change).sum() > 0.8 * (change * change).sum()
