"""Training on rollouts from a server that is given the student's adapter, and export from `transformers serve`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from distill.config import TrainConfig
from distill.train import main
from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.models.load import LoadedModel, load_model
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.http import ServerConfig
from neurosig.sampling.sampler import Prompt, sample
from neurosig.sampling.server import Server, request_seed
from tests.support.flow import export_config
from tests.support.processes import exit_codes, run_training, start_ranks, train_arguments
from tests.support.runs import metrics_of
from tests.support.served import ServerProcess, lora_server, transformers_serve

pytestmark = pytest.mark.xdist_group("servers")


@pytest.fixture(scope="module")
def manifest(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    export(export_config(folder, served_folder / "model", served_folder / "questions.jsonl"))
    return folder / "manifest"


def train_config(out: Path, manifest: Path, base_url: str, **changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 3, "questions_per_step": 2, "num_generations": 2, "lora_r": 4}
    defaults |= {"learning_rate": 0.05, "warmup_steps": 1, "keep_truncated": True, "save_steps": 1, "quiet": True}
    defaults |= {"sampler": "openai", "base_url": base_url, "concurrency": 1, "max_retries": 0, "teacher": "base"}
    defaults |= {"stop_on_collapse": False}
    return TrainConfig(manifest=manifest, out=out, **{**defaults, **changes})


def test_each_step_samples_from_the_weights_of_the_step_before(
    running: ServerProcess, served_folder: Path, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three steps, the server killed within the third, and the same once more without: the adapters are equal."""
    caplog.set_level("INFO", logger="neurosig")
    running.post("/control", kind="none")
    main(train_config(tmp_path / "run", manifest, running.base_url))
    assert [(line["policy_step"], line["staleness"]) for line in metrics_of(tmp_path / "run")] == [
        (0, 0),
        (1, 0),
        (2, 0),
    ]
    calls = running.get("/seen")
    loads = [call for call in calls if call["path"] == "load"]
    assert [call["name"].rpartition("-")[2] for call in loads] == ["step0", "step1", "step2"]
    assert [call["rollouts"] for call in loads] == [0, 2, 4]  # requests before each load: two questions per step
    assert [call["name"] for call in calls if call["path"] == "unload"] == [call["name"] for call in loads]
    models = [call["model"] for call in calls if call["path"] == "completions"]
    assert models == [load["name"] for load in loads for _ in range(2)]
    agreement = [float(found) for found in re.findall(r"agree with the model here \((\S+) nats", caplog.text)]
    assert len(agreement) == 3 and max(agreement) < 1e-4
    assert not (tmp_path / "run" / "served").exists()
    assert json.loads((tmp_path / "run" / "train.json").read_text())["config"]["sampler"] == "openai"

    base = load_model(served_folder / "model")
    adapter = tmp_path / "run" / "adapter"
    merged = PeftModel.from_pretrained(load_model(served_folder / "model").model, adapter).merge_and_unload()
    tuned = LoadedModel(merged.eval(), base.tokenizer, base.info)
    prompt, greedy = Prompt("q", tuple(range(20, 50))), SamplingConfig(1, temperature=0.0, max_new_tokens=8)
    address = ServerConfig(running.base_url, "final", max_retries=0)
    Server(address, tuned).load_adapter("final", str(adapter))
    ((served,),) = Server(address, tuned).sample([prompt], greedy)
    ((own,),) = sample(tuned, [prompt], greedy)
    ((untrained,),) = sample(base, [prompt], greedy)
    assert served.completion_ids == own.completion_ids != untrained.completion_ids
    with pytest.raises(UserError, match="it serves other weights"):
        list(Server(address, base).sample([prompt], greedy))
    Server(address, tuned).unload_adapter("final")
    with pytest.raises(UserError, match=r'adapter "final": /unload_lora_adapter answers 404'):
        Server(address, tuned).unload_adapter("final")

    running.post("/control", kind="die", after=5)
    with pytest.raises(UserError, match="out of reach"):
        main(train_config(tmp_path / "killed", manifest, running.base_url))
    assert len(metrics_of(tmp_path / "killed")) == 2
    assert running.wait() == 1
    running.start()
    main(train_config(tmp_path / "killed", manifest, running.base_url, resume=True))
    assert [call["name"][-5:] for call in running.get("/seen") if call["path"] == "load"] == ["step2"]
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "run")
    weights = [(tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes() for out in ("run", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "behind", "loads"),
    [
        ({"sync_steps": 2, "max_staleness": 1}, [(0, 0), (0, 1), (2, 0)], 2),
        ({"sync_steps": 0, "max_staleness": 2}, [(0, 0), (0, 1), (0, 2)], 0),
    ],
    ids=str,
)
def test_staleness_is_recorded_and_bounded(
    running: ServerProcess, manifest: Path, tmp_path: Path, options: dict[str, int], behind: list[Any], loads: int
) -> None:
    running.post("/control", kind="none")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "mine.txt").write_text("kept")
    main(train_config(tmp_path / "run", manifest, running.base_url, adapter_dir=shared, **options))
    assert [(line["policy_step"], line["staleness"]) for line in metrics_of(tmp_path / "run")] == behind
    assert sum(call["path"] == "load" for call in running.get("/seen")) == loads
    assert [path.name for path in shared.iterdir()] == ["mine.txt"]


def test_a_server_without_adapter_loading_is_refused(running: ServerProcess, manifest: Path, tmp_path: Path) -> None:
    running.post("/control", kind="no adapters")
    with pytest.raises(UserError, match=r"/load_lora_adapter answers 404 .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        main(train_config(tmp_path / "run", manifest, running.base_url))
    running.post("/control", kind="none")


def test_two_processes_learn_from_what_one_of_them_asks_for(
    running: ServerProcess, manifest: Path, tmp_path: Path
) -> None:
    running.post("/control", kind="none")
    options: dict[str, Any] = {"sampler": "openai", "base_url": running.base_url, "steps": 2, "max_retries": 0}
    assert run_training(train_arguments(manifest, tmp_path / "one", **options)) == 0
    alone = running.get("/seen")
    running.post("/control", kind="none")
    two = train_arguments(manifest, tmp_path / "two", **options)
    assert exit_codes(start_ranks(tmp_path / "logs", 2, run_training, two)) == [0, 0]
    assert [call["path"] for call in running.get("/seen")] == [call["path"] for call in alone]
    for line, other in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert (line["policy_step"], line["staleness"]) == (other["policy_step"], other["staleness"])
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full": True}, "--full trains none"),
        ({"server_api": "chat"}, "training needs the tokens as sampled; use completions"),
        ({"sync_steps": 3}, "weights up to 2 steps old; give --max-staleness 2"),
        ({"sync_steps": 0, "max_staleness": 1}, "weights up to 2 steps old; give --max-staleness 2"),
        ({"sync_steps": -1}, "--sync-steps: expected at least 0, got -1"),
        ({"method": "lmsi"}, "--sampler: --method lmsi has no such option; leave it out"),
        ({"base_url": None}, "give the server's --base-url"),
        ({"sampler": "transformers"}, "--base-url has no effect without --sampler openai"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(replace(train_config(tmp_path / "run", tmp_path, "http://localhost/v1"), **changes))
    assert not (tmp_path / "run").exists()


def test_export_from_transformers_serve(served_folder: Path, tmp_path: Path) -> None:
    """A server made by others: messages go out, the text that comes back is encoded again."""
    process = transformers_serve(served_folder / "model")
    try:
        where = served_folder / "model", served_folder / "questions.jsonl"
        common: dict[str, Any] = {"sampler": "openai", "base_url": process.base_url, "server_api": "transformers"}
        common |= {"concurrency": 1, "max_retries": 0, "limit": 5, "hallucination_score": "agreement"}
        common |= {"question_filter": "all", "max_new_tokens": 6}
        export(export_config(tmp_path, *where, "sampled", **common))
        export(export_config(tmp_path, *where, "again", **common))
        export(export_config(tmp_path, *where, "other", **common, seed=1))
        export(export_config(tmp_path, *where, "greedy", **common, temperature=0.0))
        with pytest.raises(UserError, match=r"/completions answers 4\d\d .* with --resume"):
            export(export_config(tmp_path, *where, "ids", **{**common, "server_api": "completions"}))
    finally:
        process.kill()
    read = {name: read_manifest(tmp_path / name).rollouts for name in ("sampled", "again", "other", "greedy")}
    texts = {name: [rollout.text for rollout in rollouts.values()] for name, rollouts in read.items()}
    assert texts["sampled"] == texts["again"] != texts["other"]
    loaded = load_model(served_folder / "model")
    for rollout in read["sampled"].values():
        encoded = loaded.tokenizer(rollout.text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert list(rollout.completion_ids) == encoded + [2] * (rollout.finish_reason == "stop")
        assert rollout.mean_logprob is None
    groups = [texts["sampled"][start : start + 3] for start in range(0, 15, 3)]
    assert sum(len(set(group)) == 3 for group in groups) >= 4  # not greedy, whatever the server's default

    builder = PromptBuilder(loaded.tokenizer, PromptConfig())
    prompts = [
        Prompt(q.id, builder.student(q)) for q in load_questions(str(served_folder / "questions.jsonl"), limit=5)
    ]
    config = SamplingConfig(num_generations=1, temperature=0.0, max_new_tokens=6)
    own = {group[0].question_id: group[0].text for group in sample(loaded, prompts, config)}
    assert {key[0]: rollout.text for key, rollout in read["greedy"].items()} == own


@pytest.mark.smollm2
def test_the_embedded_model_from_both_servers(smollm2: LoadedModel) -> None:
    folder = Path(smollm2.model.name_or_path)
    builder = PromptBuilder(smollm2.tokenizer, PromptConfig())
    questions = load_questions("world-facts", split="test", limit=2)
    prompts = [Prompt(question.id, builder.student(question)) for question in questions]
    messages = {question.id: builder.messages(question) for question in questions}
    sampled = SamplingConfig(num_generations=2, temperature=0.8, max_new_tokens=12)
    greedy = SamplingConfig(num_generations=1, temperature=0.0, max_new_tokens=12)
    process = lora_server(folder)
    try:
        groups = list(Server(ServerConfig(process.base_url, str(folder)), smollm2).sample(prompts, sampled))
    finally:
        process.kill()
    assert len(groups) == 2
    for prompt in prompts:
        config = replace(sampled, seed=request_seed(prompt.question_id, 0, ""))
        (own,) = sample(smollm2, [Prompt("", prompt.token_ids)], config)
        (group,) = (group for group in groups if group[0].question_id == prompt.question_id)
        assert [rollout.completion_ids for rollout in group] == [rollout.completion_ids for rollout in own]
        assert [rollout.mean_logprob for rollout in group] == pytest.approx([r.mean_logprob for r in own], abs=1e-3)
    process = transformers_serve(folder)
    try:
        server = Server(ServerConfig(process.base_url, str(folder), api="transformers"), smollm2)
        texts = {group[0].question_id: group[0].text for group in server.sample(prompts, greedy, messages=messages)}
    finally:
        process.kill()
    assert texts == {group[0].question_id: group[0].text for group in sample(smollm2, prompts, greedy)}
