"""Rollouts from real server processes on loopback: one of the tests with vLLM's API, and `transformers serve`."""

from __future__ import annotations

import json
import logging
import math
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from distill.evaluate import EvaluateConfig
from distill.evaluate import main as evaluate
from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.models.load import LoadedModel, load_model
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.http import ServerConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from neurosig.sampling.server import Server, request_seed
from tests.support.flow import export_config, file_bytes, save_tiny
from tests.support.served import ROOT, ServerProcess

pytestmark = pytest.mark.xdist_group("servers")

PROMPTS = [Prompt(f"q{n}", tuple(range(20, 30 + n))) for n in range(6)]
SAMPLING = SamplingConfig(num_generations=3, max_new_tokens=4, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def loaded(served_folder: Path) -> LoadedModel:
    return load_model(served_folder / "model")


def server(process: ServerProcess, loaded: LoadedModel, **changes: Any) -> Server:
    defaults = {"timeout": 20.0, "max_retries": 0, "concurrency": 1}
    return Server(ServerConfig(process.base_url, loaded.info.id, **{**defaults, **changes}), loaded)


def options(process: ServerProcess, **changes: Any) -> dict[str, Any]:
    return {"sampler": "openai", "base_url": process.base_url, "concurrency": 1, "max_retries": 0, **changes}


def by_question(groups: Iterator[list[Rollout]]) -> dict[str, list[Rollout]]:
    return {group[0].question_id: group for group in groups}


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.0}, {"top_p": 0.6, "top_k": 40, "repetition_penalty": 1.3}], ids=str
)
def test_token_ids_and_log_probabilities_are_those_sampled_here(
    process: ServerProcess, loaded: LoadedModel, changes: dict[str, Any]
) -> None:
    config = replace(SAMPLING, **changes)
    groups = by_question(server(process, loaded, concurrency=4).sample(PROMPTS, config, salt="step3"))
    assert set(groups) == {prompt.question_id for prompt in PROMPTS}
    for prompt in PROMPTS:
        seed = request_seed(prompt.question_id, config.seed, "step3")
        (own,) = sample(loaded, [Prompt("", prompt.token_ids)], replace(config, seed=seed))
        group = groups[prompt.question_id]
        assert [rollout.rollout_id for rollout in group] == [0, 1, 2]
        for served, here in zip(group, own, strict=True):
            assert (served.completion_ids, served.text, served.finish_reason) == (
                here.completion_ids, here.text, here.finish_reason,
            )  # fmt: skip
            assert served.mean_logprob == pytest.approx(here.mean_logprob, abs=1e-5)
            assert served.mean_entropy is served.mean_self_certainty is None
    assert len({rollout.completion_ids for group in groups.values() for rollout in group}) > 6 or not config.temperature
    (sent, *_) = process.get("/seen")
    explicit = {"top_p", "top_k", "repetition_penalty", "min_p", "presence_penalty", "frequency_penalty", "seed"}
    assert explicit <= set(sent)
    assert (sent["temperature"], sent["add_special_tokens"]) == (config.temperature, False)


def test_seeds_differ_by_question_salt_and_seed() -> None:
    seeds = [request_seed("a", 0, ""), request_seed("b", 0, ""), request_seed("a", 1, ""), request_seed("a", 0, "x")]
    seeds.append(request_seed("a", 0, "", 1))
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**31 for seed in seeds)


def test_questions_that_are_done_are_not_asked_again(process: ServerProcess, loaded: LoadedModel) -> None:
    groups = by_question(server(process, loaded).sample(PROMPTS, SAMPLING, done={"q0", "q1", "q2", "q3"}))
    assert set(groups) == {"q4", "q5"}
    assert len(process.get("/seen")) == 2
    assert not list(server(process, loaded).sample(PROMPTS, SAMPLING, done={f"q{n}" for n in range(6)}))


@pytest.mark.parametrize("kind", ["429", "500", "hang", "truncated"])
def test_what_may_pass_is_sent_again_after_a_pause(process: ServerProcess, loaded: LoadedModel, kind: str) -> None:
    process.post("/control", kind=kind, times=2)
    timeout = 0.75 if kind == "hang" else 20.0
    served = server(process, loaded, max_retries=2, timeout=timeout)
    (group,) = served.sample(PROMPTS[:1], SAMPLING)
    assert len(group) == 3
    first, second, third = (call["time"] for call in process.get("/seen"))
    least = {"429": (0.3, 0.3), "500": (0.37, 0.75), "hang": (0.0, 0.0), "truncated": (0.37, 0.75)}[
        kind
    ]  # Retry-After; half a second, doubled
    assert (second - first, third - second) >= least and third - second >= least[1]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("429", {"max_retries": 1}, '/completions answers 429 ({"error":{"message":"slow down"'),
        ("500", {}, '/completions answers 500 ({"error":{"message":"a fault of the server"'),
        ("hang", {"timeout": 0.3, "max_retries": 1}, "no answer within 0.3 s, 2 times; see --request-timeout"),
        ("redirect", {}, "answers 307"),
        ("truncated", {}, "out of reach (peer closed connection without sending complete message body"),
    ],
)
def test_retries_that_run_out_are_one_sentence(
    process: ServerProcess, loaded: LoadedModel, kind: str, changes: dict[str, Any], message: str
) -> None:
    process.post("/control", kind=kind, times=9)
    with pytest.raises(UserError) as fault:
        list(server(process, loaded, **changes).sample(PROMPTS[:1], SAMPLING))
    process.post("/control", kind="none")
    assert str(fault.value).startswith(f'server {process.base_url}: question "q0": ')
    assert message in str(fault.value)
    assert str(fault.value).endswith("finished rollouts are kept: repair the server and rerun with --resume")


def test_a_server_that_is_not_there_is_one_sentence(process: ServerProcess, loaded: LoadedModel) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = ServerConfig(f"http://127.0.0.1:{probe.getsockname()[1]}/v1", "m", max_retries=0)
        with pytest.raises(UserError, match=r'question "q0": out of reach \(.*\); finished rollouts are kept: repair'):
            list(Server(nowhere, loaded).sample(PROMPTS[:1], SAMPLING))


def test_a_server_that_fails_on_seeds_is_asked_without(
    process: ServerProcess, served_folder: Path, tmp_path: Path
) -> None:
    process.post("/control", kind="no seeds", times=99)
    where = served_folder / "model", served_folder / "questions.jsonl"
    with pytest.raises(
        UserError, match=r"answers 500 .*if the server fails on per-request seeds, begin again with --no-s"
    ):
        export(export_config(tmp_path, *where, **options(process)))
    process.post("/control", kind="no seeds", times=99)
    export(export_config(tmp_path, *where, **options(process, served_seeds=False, overwrite=True)))
    sent = process.get("/seen")
    process.post("/control", kind="none")
    assert len(sent) == 8 and not any("seed" in call for call in sent)
    assert read_manifest(tmp_path / "manifest").header.options["served_seeds"] is False
    with pytest.raises(UserError, match=r"served_seeds \(false before, true now\)"):
        export(export_config(tmp_path, *where, **options(process, resume=True)))


def test_an_answer_that_is_unfinished_is_asked_for_once_more_and_then_kept(
    process: ServerProcess, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    served = server(process, loaded)
    (whole,) = served.sample(PROMPTS[:1], SAMPLING)
    process.post("/control", kind="abort")
    (once,) = served.sample(PROMPTS[:1], SAMPLING)
    assert [len(rollout.completion_ids) for rollout in once] == [4, 4, 4] and once != whole
    first, second = process.get("/seen")
    assert first["seed"] != second["seed"]
    process.post("/control", kind="abort", times=2)
    groups = by_question(served.sample(PROMPTS[:2], SAMPLING))
    assert [len(rollout.completion_ids) for rollout in groups["q0"]] == [2, 4, 4]
    assert groups["q0"][0].finish_reason == "length"
    assert len(process.get("/seen")) == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "the server left rollouts unfinished twice, which count as cut off: 1 abort"


def test_questions_are_asked_in_their_order_and_few_wait_at_once(process: ServerProcess, loaded: LoadedModel) -> None:
    """Memory does not grow with the questions, and the rollouts of a question come together."""
    many = [Prompt(f"q{n}", PROMPTS[0].token_ids) for n in range(20_000)]
    messages = {prompt.question_id: [{"role": "user", "content": prompt.question_id}] for prompt in many}
    tracemalloc.start()
    answers = server(process, loaded, api="chat", concurrency=2).sample(many, SAMPLING, messages=messages)
    groups = list(islice(answers, 20))
    _, peak = tracemalloc.get_traced_memory()
    answers.close()
    tracemalloc.stop()
    assert peak < 20e6
    contents = [call["messages"][0]["content"] for call in process.get("/seen")][:60]
    assert {group[0].question_id for group in groups} <= {f"q{n}" for n in range(22)}
    assert all(abs(int(name[1:]) - place // 3) <= 2 for place, name in enumerate(contents))


HOSTILE = [
    ("no ids", "choices.0.token_ids: Input should be a valid array; vLLM 0.10.2 and newer returns it, for other"),
    ("strings", "choices.0.token_ids.0: Input should be a valid integer"),
    ("booleans", "choices.0.token_ids.0: Input should be a valid integer"),
    ("floats", "choices.0.token_ids.0: Input should be a valid integer"),
    ("no tokens", "choices.0.token_ids: 0 of at most 4 ids"),
    ("outside", "choices.0.token_ids: an id outside the vocabulary of 300"),
    ("negative", "choices.0.token_ids: an id outside the vocabulary of 300"),
    ("too long", "choices.0.token_ids: 10000 of at most 4 ids"),
    ("goes on", "choices.0.token_ids: it continues after an end-of-sequence token"),
    ("stops short", "choices.0.finish_reason: length, after 1 of 4 tokens"),
    ("no end", "choices.0.finish_reason: stop, without one of the model's end-of-sequence tokens"),
    ("no logprobs", "choices.0.logprobs: expected one for each of 4 tokens"),
    ("few logprobs", "choices.0.logprobs: expected one for each of 4 tokens"),
    ("nan", "choices.0.logprobs.token_logprobs.0: Input should be a finite number"),
    ("above zero", "choices.0.logprobs: a log-probability above 0"),
    ("twice", "choices: expected 3, numbered from 0, got 3"),
    ("too many", "choices: expected 3, numbered from 0, got 6"),
    ("too few", "choices: expected 3, numbered from 0, got 2"),
    ("no choices", "choices: Input should be a valid array"),
    ("html", "answer: Invalid JSON"),
    ("half", "answer: Invalid JSON: EOF"),
    ("nested", "answer: Invalid JSON: recursion limit exceeded"),
    ("gzip", "answer: compressed, although the request forbids it"),
    ("huge", "answer: more than"),
    ("other model", "differ by"),
    ("scaled", "they are taken at temperature 3"),
]


@pytest.mark.parametrize(("kind", "message"), HOSTILE, ids=[kind for kind, _ in HOSTILE])
def test_an_answer_that_is_not_what_was_asked_for_is_one_sentence(
    process: ServerProcess, loaded: LoadedModel, kind: str, message: str
) -> None:
    config = replace(SAMPLING, temperature=3.0) if kind == "scaled" else SAMPLING
    process.post("/control", kind=kind)
    with pytest.raises(UserError) as fault:
        list(server(process, loaded).sample(PROMPTS[:1], config))
    assert str(fault.value).startswith(f'server {process.base_url}: question "q0": ')
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_server_of_other_weights_is_refused_unless_nothing_is_compared(
    process: ServerProcess, loaded: LoadedModel, tmp_path: Path
) -> None:
    other = load_model(save_tiny(tmp_path / "other", seed=1))
    config = ServerConfig(process.base_url, loaded.info.id, max_retries=0)
    with pytest.raises(UserError, match="it serves other weights than"):
        list(Server(config, other).sample(PROMPTS, SAMPLING))
    groups = list(Server(replace(config, logprobs=False), other).sample(PROMPTS, SAMPLING))
    assert len(groups) == 6 and all(rollout.mean_logprob is None for group in groups for rollout in group)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, "--base-url localhost:8000: expected an address such as"),
        ({"base_url": "http://me:secret@host/v1"}, "leave the password out"),
        ({"timeout": 0.0}, "--request-timeout: expected at least 0.001, got 0.0"),
        ({"timeout": math.nan}, "--request-timeout: expected"),
        ({"max_retries": -1}, "--max-retries: expected at least 0, got -1"),
        ({"concurrency": 0}, "--concurrency: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as fault:
        ServerConfig(**{"base_url": "http://localhost/v1", "model": "m", **changes})
    assert "secret" not in str(fault.value)


def test_the_way_there_is_chosen_by_name_only(served_folder: Path, process: ServerProcess, tmp_path: Path) -> None:
    where = served_folder / "model", served_folder / "questions.jsonl"
    with pytest.raises(UserError, match="give the server's --base-url"):
        export(export_config(tmp_path, *where, sampler="openai"))
    with pytest.raises(UserError, match="no effect without --sampler openai"):
        export(export_config(tmp_path, *where, base_url=process.base_url))
    assert not (tmp_path / "manifest").exists()
    with pytest.raises(UserError, match="chat has no field for --top-k"):
        export(export_config(tmp_path, *where, "chat", **options(process, server_api="chat", top_k=5)))
    with pytest.raises(UserError, match="answers 404"):
        export(export_config(tmp_path, *where, "absent", **options(process, served_model="absent")))


def test_a_missing_package_is_named() -> None:
    code = "import sys; sys.modules['openai'] = None\nimport neurosig.sampling.server"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "the openai package is missing; run `pip install 'neurosig[server]'`" in done.stderr


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    served_folder: Path,
    process: ServerProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="neurosig")  # an earlier command may have made it quiet
    export(export_config(tmp_path, served_folder / "model", served_folder / "questions.jsonl", **options(process)))
    assert {call["key"] for call in process.get("/seen")} == {"Bearer sk-very-secret"}
    written = b"".join(path.read_bytes() for path in (tmp_path / "manifest").iterdir())
    assert b"very-secret" not in written and "very-secret" not in caplog.text
    assert f"rollouts come from {process.base_url} (model {served_folder / 'model'}, completions API)" in caplog.text


def test_a_killed_server_costs_no_finished_rollout(running: ServerProcess, served_folder: Path, tmp_path: Path) -> None:
    """Export and evaluation continue where the server died: each question is sent once, and the files are equal."""
    where = served_folder / "model", served_folder / "questions.jsonl"
    changed = options(running, hallucination_score="mean_logprob")
    running.post("/control", kind="none")
    export(export_config(tmp_path, *where, "straight", **changed))
    common: dict[str, Any] = {"model": str(where[0]), "questions": (str(where[1]),), "num_generations": 2}
    common |= {"max_new_tokens": 4, "quiet": True, **options(running)}
    evaluate(EvaluateConfig(out=tmp_path / "eval-straight", **common))

    for kind in ("export", "evaluate"):
        running.post("/control", kind="die", after=5)
        run = {
            "export": lambda: export(export_config(tmp_path, *where, "broken", **changed, resume=True)),
            "evaluate": lambda: evaluate(EvaluateConfig(out=tmp_path / "eval-broken", **common, resume=True)),
        }[kind]
        with pytest.raises(UserError, match=r"out of reach .*--no-served-seeds; .* repair the server and rerun with"):
            run()
        assert running.wait() == 1
        running.start()
        run()
        assert len(running.get("/seen")) == 3  # of 8, five were kept
    assert file_bytes(tmp_path / "broken") == file_bytes(tmp_path / "straight")
    for name in ("results.parquet", "rollouts.jsonl"):
        read = [(tmp_path / out / name).read_bytes() for out in ("eval-broken", "eval-straight")]
        assert read[0] == read[1]
    header = read_manifest(tmp_path / "straight").header.options
    assert header["sampler"] == "openai" and header["server_api"] == "completions" and "base_url" not in header
    scores = read_manifest(tmp_path / "straight").rows[0].scores
    assert "mean_logprob" in scores and "entropy" not in scores and "self_certainty" not in scores
    summary = json.loads((tmp_path / "eval-straight" / "summary.json").read_text())
    assert summary["domains"]["colour"]["mean_entropy"] is None
    rows = pyarrow.parquet.read_table(tmp_path / "eval-straight" / "results.parquet").to_pylist()
    assert all(row["mean_entropy"] is None and row["mean_logprob"] < 0 for row in rows)
    with pytest.raises(UserError, match="--hallucination-score entropy: the rollouts of http"):
        export(export_config(tmp_path, *where, "entropy", **options(running), hallucination_score="entropy"))
