"""Multiple choice by log-likelihood, and greedy answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import neurosig.sampling.choice_scoring
from distill.evaluate import main
from distill.results import choice_row, summarise_choices
from figures.grid.rows import Run, evaluation_rows
from neurosig.models.load import LoadedModel, ModelInfo
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.errors import UserError
from neurosig.sampling.choice_scoring import completions, score_choices
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support.flow import WORDS
from tests.support.runs import evaluate_config, write_choices
from tests.support.tiny import ARCHS, Arch, OtherArch, tiny_model, tiny_tokenizer

INFO = ModelInfo("tiny", None, {}, "", "", None, "float32", "sdpa")
QUESTIONS = [
    Question("short", "d", "Which?", ("yes", "not at all, never")),
    Question("long", "d", "Which of these many colours is the nicest?", ("red", "navy blue", "<|im_end|>", "red ")),
    Question("other", "e", "Who?", tuple(WORDS)),
]


def scoring(tmp_path: Path, out: str = "eval", **changes: Any) -> Any:
    questions = write_choices(tmp_path / "choices.jsonl")
    return evaluate_config(tmp_path, out, questions=(str(questions),), scoring="loglikelihood", **changes)


@pytest.mark.parametrize("arch", [*ARCHS, "gemma2"])
@pytest.mark.parametrize("form", ["letter", "text"])
def test_log_likelihoods_are_those_of_a_plain_forward(arch: Arch | OtherArch, form: Any) -> None:
    """Prompts padded, shared over their choices and cut into batches, against one unpadded row at a time."""
    model, tokenizer = tiny_model(arch), tiny_tokenizer()
    builder = PromptBuilder(tokenizer, PromptConfig())
    prompts = {question.id: builder.student(question) for question in QUESTIONS}
    todo = [Prompt(name, ids) for name, ids in prompts.items()]
    by_id = {question.id: question for question in QUESTIONS}
    groups = list(score_choices(LoadedModel(model, tokenizer, INFO), todo, by_id, form, batch_rows=7))
    assert sorted(group[0].question_id for group in groups) == sorted(by_id)
    for group in groups:
        question, prompt = by_id[group[0].question_id], prompts[group[0].question_id]
        assert [rollout.text for rollout in group] == completions(question, form, "assistant\n")
        for rollout in group:
            assert tokenizer.decode(rollout.completion_ids) == rollout.text
            assert 2 not in rollout.completion_ids  # a choice that reads <|im_end|> stays text
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *rollout.completion_ids]])).logits[0, len(prompt) - 1 : -1]
            log_p = logits.log_softmax(-1)[
                torch.arange(len(rollout.completion_ids)), torch.tensor(rollout.completion_ids)
            ]
            assert rollout.mean_logprob == pytest.approx(float(log_p.mean()), abs=2e-5)


def scored(question: Question, means: list[float], lengths: list[int]) -> list[Rollout]:
    return [
        Rollout(question.id, place, "", (5,) * length, "length", mean)
        for place, (mean, length) in enumerate(zip(means, lengths, strict=True))
    ]


def test_the_answer_is_the_likeliest_choice() -> None:
    """Sums and means choose differently; the confidence is the softmax of what chose; equals go to the first."""
    question = Question("a", "d", "Which?", ("x", "y", "z"), answer="B")
    group = scored(question, [-2.0, -1.0, -3.0], [1, 3, 1])
    by_sum, by_mean = choice_row(question, group, "letter"), choice_row(question, group, "text")
    assert (by_sum["scores"], by_sum["winner"], by_sum["correct"]) == ([-2.0, -3.0, -3.0], "a", 0)
    assert (by_mean["scores"], by_mean["winner"], by_mean["correct"]) == ([-2.0, -1.0, -3.0], "b", 1)
    assert by_mean["confidence"] == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)))
    assert choice_row(question, scored(question, [-1.0, -1.0, -1.0], [1, 1, 1]), "letter")["winner"] == "a"
    block = summarise_choices([{**by_mean, "id": f"q{i}", "correct": i % 4 > 0} for i in range(40)], seed=0)["d"]
    assert block["accuracy"]["estimate"] == 0.75 and block["chance"] == pytest.approx(1 / 3)
    assert 0.55 < block["accuracy"]["low"] < 0.7 < 0.8 < block["accuracy"]["high"] < 0.95
    assert block["ece"]["estimate"] == pytest.approx(0.75 - by_mean["confidence"], abs=5e-4)
    assert block["signed_gap"] == pytest.approx(by_mean["confidence"] - 0.75)


def test_what_is_scored_goes_on_where_the_prompt_ends() -> None:
    question = Question("a", "d", "Which?", ("no ", "yes"))
    assert completions(question, "letter", "user\nWhich?\nassistant\n") == ["Answer: A", "Answer: B"]
    assert completions(question, "text", "assistant\n") == ["no", "yes"]
    assert completions(question, "letter", "Question: Which?\nAnswer:") == [" A", " B"]
    assert completions(question, "text", "Question: Which?\nAnswer:") == [" no", " yes"]


def test_an_evaluation_by_log_likelihood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, which verify and a resumed run reproduce; whatever the sampling options say."""
    calls: list[Any] = []
    means = neurosig.sampling.choice_scoring._mean_logprobs
    monkeypatch.setattr(
        neurosig.sampling.choice_scoring, "_mean_logprobs", lambda *args: calls.append(args) or means(*args)
    )
    main(scoring(tmp_path, batch_rows=8))
    batches = len(calls)
    read = {name: (tmp_path / "eval" / name).read_bytes() for name in ("results.parquet", "rollouts.jsonl")}
    rows = pyarrow.parquet.read_table(tmp_path / "eval" / "results.parquet").to_pylist()
    assert [(row["question_id"], row["choices"], len(row["scores"])) for row in rows] == [
        (f"q{index}", 2 + index % 4, 2 + index % 4) for index in range(8)
    ]
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert {domain: block["n"] for domain, block in summary["domains"].items()} == {"colour": 4, "tone": 4}
    right = [row["correct"] for row in rows if row["domain"] == "tone"]
    assert summary["domains"]["tone"]["accuracy"]["estimate"] == sum(right) / 4
    assert not (tmp_path / "eval" / ".rollouts.log").exists()
    verify(VerifyConfig(folder=tmp_path / "eval", quiet=True))

    score = score_choices

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, group in enumerate(score(*args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield group

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(neurosig.sampling.choice_scoring, "score_choices", interrupted)
        main(scoring(tmp_path, "broken", batch_rows=8, temperature=0.3))
    for changes in ({"choice_form": "text"}, {"scoring": "sampling"}):
        with pytest.raises(UserError, match=r"differ from the interrupted run: .*choice_form"):
            config = scoring(tmp_path, "broken", batch_rows=8, resume=True)
            main(type(config)(**{**vars(config), **changes}))
    calls.clear()
    main(scoring(tmp_path, "broken", batch_rows=8, resume=True))
    assert 1 < len(calls) < batches
    assert {name: (tmp_path / "broken" / name).read_bytes() for name in read} == read


SPACE = (("red",), ("navy blue", "navy"), ("green", "emerald green"), ("not at all, never",))


def test_members_of_an_answer_space_are_scored_by_their_first_name() -> None:
    """After the prompt and after the prompt without its question, both opened with ``Answer:``, token by token."""
    model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    builder = PromptBuilder(tokenizer, PromptConfig())
    questions = {name: Question(name, "d", f"Which is {name}?", answer_space=SPACE) for name in ("one", "the other")}
    todo = [Prompt(name, builder.student(question)) for name, question in questions.items()]
    priors = {name: builder.without_question(question) for name, question in questions.items()}
    loaded = LoadedModel(model, tokenizer, INFO)
    groups = list(score_choices(loaded, todo, questions, "letter", priors=priors, batch_rows=3))
    opening = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    for group in groups:
        assert [rollout.text for rollout in group] == [" red", " navy blue", " green", " not at all, never"] * 2
        prompt = builder.student(questions[group[0].question_id])
        for place, rollout in enumerate(group):
            before = [
                *(prompt if place < 4 else builder.encode([{"role": "user", "content": PromptConfig().instruction}]))
            ]
            before += opening
            ids = list(rollout.completion_ids)
            with torch.no_grad():
                logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
            log_p = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
            assert rollout.mean_logprob == pytest.approx(float(log_p.mean()), abs=2e-5)
    resumed = list(score_choices(loaded, todo, questions, "letter", priors=priors, batch_rows=3, done={"one"}))
    assert [group for group in groups if group[0].question_id != "one"] == resumed


def test_the_prior_takes_away_what_a_common_answer_has_anyway() -> None:
    question = Question("a", "d", "Which?", answer="emerald green", answer_space=SPACE)
    group = scored(question, [-1.0, -3.0, -2.0, -3.0, -0.5, -3.0, -4.0, -2.0], [1, 2, 2, 1] * 2)
    row = choice_row(question, group, "letter", mutual_info=True)
    assert (row["choices"], row["winner"], row["correct"]) == (4, "red", 0)
    assert (row["winner_mutual_info"], row["correct_mutual_info"]) == ("green", 1)  # by another name of the member
    assert row["scores"] == [-1.0, -3.0, -2.0, -3.0] and row["scores_mutual_info"] == [-0.5, 0.0, 2.0, -1.0]
    assert "winner_mutual_info" not in choice_row(question, group[:4], "letter")
    block = summarise_choices([row, {**row, "question_id": "b"}], seed=0)["d"]
    assert (block["accuracy"]["estimate"], block["accuracy_mutual_info"]["estimate"]) == (0, 1)
    assert block["chance"] == 0.25


@pytest.mark.parametrize("choices", [True, False])
def test_both_rankings_are_reported(tmp_path: Path, choices: bool) -> None:
    path = write_choices(tmp_path / "choices.jsonl")
    if not choices:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record |= {"choices": None, "answer": "green", "answer_space": [list(names) for names in SPACE]}
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options: dict[str, Any] = {"questions": (str(path),), "scoring": "loglikelihood", "mutual_info": True}
    main(evaluate_config(tmp_path, **options))
    block = json.loads((tmp_path / "eval" / "summary.json").read_text())["domains"]["tone"]
    rows = pyarrow.parquet.read_table(tmp_path / "eval" / "results.parquet").to_pylist()
    for name in ("accuracy", "accuracy_mutual_info"):
        right = [row[name.replace("accuracy", "correct")] for row in rows if row["domain"] == "tone"]
        assert block[name]["estimate"] == sum(right) / 4
    verify(VerifyConfig(folder=tmp_path / "eval", quiet=True))


def test_tampered_choices_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(scoring(tmp_path, choice_form="text"))
    path = tmp_path / "eval" / "results.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[2]["correct"] = 1 - rows[2]["correct"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match="2 of 4 checks failed"):
        verify(VerifyConfig(folder=tmp_path / "eval", quiet=True))
    assert 'question "q2": correct is' in capsys.readouterr().out


def test_tables_of_votes_refuse_it(tmp_path: Path) -> None:
    main(scoring(tmp_path))
    with pytest.raises(UserError, match="eval: scored by log-likelihood, without votes"):
        evaluation_rows(Run("base", "", 0), tmp_path / "eval")


def test_what_cannot_be_scored_is_named_before_the_model_loads(tmp_path: Path) -> None:
    config = scoring(tmp_path)
    config.model = "nowhere"
    free = {"id": "q9", "domain": "colour", "question": "Is it nice?", "choices": None, "answer": "yes"}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((tmp_path / "choices.jsonl").read_text() + json.dumps(free) + "\n")
    words = ["--model", "nowhere", "--questions", str(mixed), "--scoring", "loglikelihood", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "distill.evaluate", *words, "--out", str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(
        'error: question "q9" (line 9) has no choices and no answer space, which --scoring loglikelihood'
    )
    assert not (tmp_path / "run").exists()
    config.sampler, config.base_url = "openai", "http://localhost:1/v1"
    with pytest.raises(UserError, match="leave out --sampler openai"):
        main(config)


def test_weights_that_hold_nan_score_nothing(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    todo = [Prompt("short", (5, 6, 7))]
    loaded = LoadedModel(model, tiny_tokenizer(), INFO)
    with pytest.raises(UserError, match='choices of question "short"; the first layer is lm_head '):
        list(score_choices(loaded, todo, {"short": QUESTIONS[0]}, "letter"))


def test_greedy_answers_are_the_same_whatever_the_seed(tmp_path: Path) -> None:
    """--temperature 0 --num-generations 1, as --help says."""
    for out, seed in (("one", 0), ("two", 9)):
        main(evaluate_config(tmp_path, out, temperature=0.0, num_generations=1, seed=seed))
    main(evaluate_config(tmp_path, "three", temperature=0.0, num_generations=3))
    ids_of = {
        out: [
            json.loads(line)["completion_ids"] for line in (tmp_path / out / "rollouts.jsonl").read_text().splitlines()
        ]
        for out in ("one", "two", "three")
    }
    assert ids_of["one"] == ids_of["two"] and ids_of["three"] == [ids for ids in ids_of["one"] for _ in range(3)]
    block = json.loads((tmp_path / "one" / "summary.json").read_text())["domains"]["colour"]
    assert block["k"] == 1 and block["avg_at_k"] == block["maj_at_k"]
