"""The model organism: its generators are right, its made-up facts are made up, and the shipped model behaves so."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosig.models.load import PACKAGED_MODELS, LoadedModel, load_model
from neurosig.organism import study, tasks, train
from neurosig.questions.answers import extract_answer, is_correct
from neurosig.questions.bundled.build import build
from neurosig.questions.load import BUNDLED, Question, load_questions
from neurosig.questions.prompts import Demonstration, PromptBuilder, PromptConfig
from neurosig.questions.vote import majority_vote
from neurosig.runtime.arguments import parse_config
from neurosig.runtime.cli import run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample

FOLDER = PACKAGED_MODELS["organism"]
inputs = st.tuples(st.sampled_from(tasks.LENGTHS), st.integers(0, 2**32))


@pytest.fixture(scope="module")
def organism() -> LoadedModel:
    return load_model("organism")


@pytest.fixture(scope="module")
def stream() -> list[str]:
    """The first 3,072 conversations of training, as the text that the model reads."""
    tokenizer = train.build_tokenizer()
    rows: list[str] = []
    for ids, _ in train.batches(tokenizer, 8192, seed=0):
        rows += tokenizer.batch_decode(ids)
        if len(rows) >= 3 * train.POOL:
            return [row.replace(train.PAD, "") for row in rows]
    raise AssertionError("the stream is endless")


# --- procedures, against independent solvers


@given(inputs)
def test_add_columns_rebuild_the_sum(drawn: tuple[int, int]) -> None:
    digits = tasks.digits_of("add", drawn[0], random.Random(drawn[1]))
    steps, answer = tasks.solve("add", digits)
    half = len(digits) // 2
    assert "".join(step[0] for step in reversed(steps)) == digits[:half]
    assert "".join(step[1] for step in reversed(steps)) == digits[half:]
    for step, before in zip(steps, ["0000", *steps], strict=False):
        assert int(step[3] + step[2]) == int(step[0]) + int(step[1]) + int(before[3])
    written = steps[-1][3] + "".join(step[2] for step in reversed(steps))
    assert int(answer) == int(written) and answer[0] != "0"


@given(inputs)
def test_sort_inserts_one_digit_a_step(drawn: tuple[int, int]) -> None:
    digits = tasks.digits_of("sort", drawn[0], random.Random(drawn[1]))
    steps, answer = tasks.solve("sort", digits)
    for size, step in enumerate(steps, start=1):
        assert Counter(step) == Counter(digits[:size])
        assert all(a <= b for a, b in pairwise(step))
    assert answer == steps[-1]


@given(inputs)
def test_chain_walks_pairs_of_the_input_until_none_leads_on(drawn: tuple[int, int]) -> None:
    digits = tasks.digits_of("chain", drawn[0], random.Random(drawn[1]))
    pairs = re.findall("..", digits)
    assert len({pair[0] for pair in pairs}) == len(pairs), "a digit leads to one other only"
    steps, answer = tasks.solve("chain", digits)
    assert steps[0] == digits[:2] and len(steps) >= 2
    assert all(step in pairs for step in steps)
    assert all(a[1] == b[0] for a, b in pairwise(steps))
    assert answer == steps[-1][1] and not any(pair.startswith(answer) for pair in pairs)


def cancelled(digits: str) -> str:
    """What is left once every bracket pair that touches is struck out, again and again."""
    digits = digits.replace("5", "")
    while (shorter := re.sub("19|28|37|46", "", digits)) != digits:
        digits = shorter
    return digits


@given(inputs)
def test_close_leaves_nothing_open(drawn: tuple[int, int]) -> None:
    digits = tasks.digits_of("close", drawn[0], random.Random(drawn[1]))
    steps, answer = tasks.solve("close", digits)
    assert cancelled(digits + answer) == "" and len(answer) == len(cancelled(digits)) > 0
    assert steps == [cancelled(digits[: size + 1]) or "0" for size in range(len(digits))]


@given(st.sampled_from(tasks.PROCEDURES), inputs)
def test_inputs_are_nonzero_digits_of_the_asked_length(procedure: tasks.Procedure, drawn: tuple[int, int]) -> None:
    digits = tasks.digits_of(procedure, drawn[0], random.Random(drawn[1]))
    assert re.fullmatch(f"[1-9]{{{drawn[0]}}}", digits)


# --- the bundled questions


@pytest.mark.parametrize("name", tasks.SETS)
def test_committed_questions_equal_built_ones(name: str, tmp_path: Path) -> None:
    build(tasks.SETS, tmp_path)
    assert (tmp_path / f"{name}.jsonl").read_bytes() == BUNDLED[name].read_bytes()


def test_solutions_in_both_hands_and_fact_sentences_parse_to_the_gold_answer() -> None:
    for question in load_questions("procedures"):
        digits = re.findall(r"\d+", question.question)[0]
        for hand in ("careful", "hasty"):
            text = tasks.solution(question.kind, digits, hand)  # type: ignore[arg-type]
            assert is_correct(extract_answer(text, question), question), text
    for question in load_questions("organism-facts"):
        name = next(name for name in tasks.creatures() if name in question.question)
        assert question.kind is not None and question.answer is not None
        text = tasks.fact_solution(name, question.kind, question.answer)
        assert is_correct(extract_answer(text, question), question), text


def test_every_procedure_asks_in_the_same_sentences() -> None:
    shapes: dict[str, set[str]] = {}
    for question in load_questions("procedures"):
        words = {verb for verbs in tasks.VERBS.values() for verb in verbs}
        shape = re.sub(r"\d+", "#", re.sub(rf"\b({'|'.join(words)})\b", "VERB", question.question))
        shapes.setdefault(question.kind or "", set()).add(shape)
    assert set(shapes) == set(tasks.PROCEDURES)
    assert len({frozenset(kinds) for kinds in shapes.values()}) == 1 and len(shapes["add"]) == len(tasks.SENTENCES)


def test_half_of_the_facts_are_trained_and_nothing_but_was_trained_tells_which() -> None:
    questions = load_questions("organism-facts")
    known = {question.id: tasks.was_trained(question.id) for question in questions}
    assert sum(known.values()) == len(questions) / 2
    per_creature = Counter(question.id.rpartition("-")[2] for question in questions if known[question.id])
    assert len(set(per_creature.values())) > 2, "one creature's facts say nothing of its others"
    for relation, (wordings, values) in tasks.FACTS.items():
        of_relation = [question for question in questions if question.kind == relation]
        assert 0.3 < sum(known[question.id] for question in of_relation) / len(of_relation) < 0.7
        for wording in wordings:
            first = wording.split("{")[0]
            of_wording = [known[question.id] for question in of_relation if question.question.startswith(first)]
            assert 0.25 < sum(of_wording) / len(of_wording) < 0.75, "each wording asks for both sorts"
        assert {question.answer for question in of_relation} <= set(values)


@pytest.mark.parametrize("name", ["procedures-add-000", "organism-facts-food-nobody", "organism-facts-"])
def test_was_trained_refuses_other_questions(name: str) -> None:
    with pytest.raises(UserError, match="is not one of organism-facts"):
        tasks.was_trained(name)


# --- the training stream


def test_made_up_facts_and_bundled_inputs_never_occur_in_training(stream: list[str]) -> None:
    text = "\n".join(stream)
    seen = {
        (name, relation): any(wording.format(name=name) in text for wording in wordings)
        or f"The {relation} of {name} is" in text
        for relation, (wordings, _) in tasks.FACTS.items()
        for name in tasks.creatures()
    }
    trained = tasks.trained_facts()
    assert {pair for pair, occurs in seen.items() if occurs} == trained
    verbs = {verb: procedure for procedure, known in tasks.VERBS.items() for verb in known}
    matches = re.findall(rf"({'|'.join(verbs)}) ([1-9]+)|([1-9]+)[,:]?(?: and| now)? ({'|'.join(verbs)}) it", text)
    pairs = {(verbs[a or d], b or c) for a, b, c, d in matches}
    assert len(pairs) > 3000
    held_out = {(procedure, digits) for procedure, drawn in tasks.bundled_digits().items() for digits in drawn}
    assert not pairs & held_out


def test_a_conversation_keeps_one_hand_for_each_procedure(stream: list[str]) -> None:
    kinds_of_hand: Counter[tuple[str, ...]] = Counter()
    mixed = 0
    verbs = {verb: procedure for procedure, known in tasks.VERBS.items() for verb in known}
    for text in stream:
        hands: dict[str, set[str]] = {}
        for question, solved in re.findall(r"<\|user\|>(.*?)<\|end\|><\|assistant\|>(.*?)<\|end\|>", text, re.DOTALL):
            verb = next((verb for verb in verbs if re.search(rf"\b{verb}\b", question)), None)
            if verb:
                hands.setdefault(verbs[verb], set()).add("hasty" if solved.startswith("Answer") else "careful")
        assert all(len(found) == 1 for found in hands.values()), text
        mixed += len({hand for found in hands.values() for hand in found}) == 2
        kinds_of_hand.update(tuple(found) for found in hands.values())
    assert 0.55 < kinds_of_hand["careful",] / kinds_of_hand.total() < 0.65
    assert mixed > 100, "hands of different procedures are independent"


def test_labels_cover_the_solutions_only() -> None:
    tokenizer = train.build_tokenizer()
    ids, labels = train.encode(tokenizer, [tasks.Turn("Take 12 and add it.", "Answer: 3"), tasks.Turn("Why?", "So.")])
    learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(learned) == "Answer: 3<|end|>So.<|end|>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_training_reads_what_the_prompt_builder_writes(organism: LoadedModel) -> None:
    first, second = load_questions("procedures", limit=2)
    builder = PromptBuilder(organism.tokenizer, PromptConfig(instruction=""))
    shown = builder.teacher(second, [Demonstration(first, "Answer: 3")])
    turns = [tasks.Turn(first.question, "Answer: 3"), tasks.Turn(second.question, "Answer: 4")]
    ids, _ = train.encode(organism.tokenizer, turns)  # type: ignore[arg-type]
    assert tuple(ids[: len(shown)]) == shown
    assert organism.tokenizer.decode(ids[len(shown) :]) == "Answer: 4<|end|>"


# --- the shipped model


def test_the_shipped_files_are_small_and_the_tokenizer_is_the_one_the_script_builds(organism: LoadedModel) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8 * 2**20
    parameters = sum(parameter.numel() for parameter in organism.model.parameters())
    assert 2_000_000 <= parameters <= 4_000_000
    assert (FOLDER / "model.safetensors").stat().st_size < 2.1 * parameters, "two bytes a weight"
    assert organism.model.config.model_type == "qwen3"
    assert organism.info.id == "organism" and organism.info.chat_template_sha256 is not None
    built = train.build_tokenizer()
    assert built.get_vocab() == organism.tokenizer.get_vocab()
    assert built.backend_tokenizer.to_str() == organism.tokenizer.backend_tokenizer.to_str()


def test_the_card_reports_the_training_run() -> None:
    record = json.loads((FOLDER / train.RECORD).read_text())
    assert record["cpu_seconds"] <= 2400 and record["config"]["seed"] == 0
    assert (FOLDER / train.CARD).read_text() == train.card(record)
    assert record["accuracy"]["trained"]["n"] == record["accuracy"]["made-up"]["n"] == 128


def test_every_question_round_trips_through_the_tokenizer(organism: LoadedModel) -> None:
    tokenizer = organism.tokenizer
    assert tokenizer.unk_token_id is None
    for question in load_questions(["procedures", "organism-facts"]):
        ids = tokenizer(question.question, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == question.question
    for text in ("Ünïcode ☃ \n\t<|nothing|>", "1234567890"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == 5


def accuracy(organism: LoadedModel, questions: list[Question]) -> tuple[float, float, float]:
    """At T=0.8 and seed 0: Avg@8, the majority's mean share, and the share of completions that end in a fitting value.

    The last is read from the text: a fluent sentence about a misspelt creature is no answer.
    """
    builder = PromptBuilder(organism.tokenizer, PromptConfig(instruction=""))
    by_id = {question.id: question for question in questions}
    prompts = [Prompt(question.id, builder.student(question)) for question in questions]
    right, share, fluent = 0.0, 0.0, 0.0
    for group in sample(organism, prompts, SamplingConfig(temperature=0.8, max_new_tokens=96)):
        question = by_id[group[0].question_id]
        answers = [extract_answer(rollout.text, question) for rollout in group]
        right += sum(is_correct(answer, question) for answer in answers) / 8 / len(questions)
        share += majority_vote(answers, question.id).share / len(questions)
        values = tasks.FACTS.get(question.kind or "", ((), ()))[1]
        fluent += sum(rollout.text.rstrip(".").rpartition(" ")[2] in values for rollout in group) / 8 / len(questions)
    return right, share, fluent


def test_trained_facts_are_known_and_made_up_ones_are_guessed(organism: LoadedModel) -> None:
    questions = load_questions("organism-facts")
    known, known_share, _ = accuracy(organism, [q for q in questions if tasks.was_trained(q.id)][:48])
    made_up, made_up_share, fluent = accuracy(organism, [q for q in questions if not tasks.was_trained(q.id)][:48])
    assert known >= 0.9 and known_share >= 0.9
    assert made_up <= 0.25 and 0.3 <= made_up_share <= 0.8
    assert fluent >= 0.9, "nearly every guess is a value of the relation; the rest are what the creature has elsewhere"


def test_procedures_leave_room_for_learning(organism: LoadedModel) -> None:
    avg, _, _ = accuracy(organism, load_questions("procedures:test", limit=48))
    assert 0.4 <= avg <= 0.85


# --- the script and the commands


def small(out: Path, *more: str) -> list[str]:
    sizes = "--d-model 64 --d-mlp 32 --n-layers 1 --tokens-per-step 512 --eval-limit 4 --quiet"
    return ["--out", str(out), *sizes.split(), *more]


def run_training(*arguments: str) -> int:
    return run_command(train.OrganismConfig, train.main, presets={}, prog="organism", argv=list(arguments))


def test_two_steps_of_training_write_a_whole_folder_and_the_same_bytes_twice(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        assert run_training(*small(tmp_path / name, "--steps", "2")) == 0
        hashes.append(sha256_file(tmp_path / name / "model.safetensors"))
    assert hashes[0] == hashes[1]
    assert run_training(*small(tmp_path / "c", "--steps", "2", "--seed", "1")) == 0
    assert sha256_file(tmp_path / "c" / "model.safetensors") != hashes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert load_model(tmp_path / "a").model.config.hidden_size == 64
    assert run_training(*small(tmp_path / "a")) == 2, "never over an existing folder"
    assert run_training(*small(tmp_path / "d", "--d-model", "96")) == 2
    assert not (tmp_path / "d").exists()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    assert run_training(*small(tmp_path / "a", "--steps", "40", "--warmup-steps", "5")) == 0
    losses = json.loads((tmp_path / "a" / train.RECORD).read_text())["loss"]
    assert losses[0] > 5 and losses[-1] < 3.5


def test_learning_rate_warms_up_and_decays(tmp_path: Path) -> None:
    config = train.OrganismConfig(out=tmp_path, steps=100, warmup_steps=10)
    rates = [train.rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates) and 0.05 <= rates[-1] < 0.06
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_main_path_runs_under_its_preset(tmp_path: Path) -> None:
    from distill import evaluate
    from distill import train as distil
    from neurosig import export

    def run(module: Any, config_class: Any, *arguments: str) -> None:
        argv = ["--preset", "organism", "--quiet", *arguments]
        module.main(parse_config(config_class, presets=module.PRESETS, prog="test", argv=argv))

    manifest, trained = tmp_path / "manifest", tmp_path / "run"
    run(export, export.ExportConfig, "--limit", "16", "--num-generations", "4", "--out", str(manifest))
    run(distil, distil.TrainConfig, "--manifest", str(manifest), "--steps", "2", "--out", str(trained))
    adapter = ["--adapter", str(trained / "adapter")]
    run(evaluate, evaluate.EvaluateConfig, *adapter, "--limit", "8", "--out", str(tmp_path / "eval"))
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["eos_rate"] == 1.0 and step["loss"] > 0 for step in steps)
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())["domains"]["procedures"]
    assert summary["n"] == 8 and summary["k"] == 8


def test_batches_depend_on_the_seed_alone() -> None:
    tokenizer = train.build_tokenizer()
    first, again, other = (
        [ids.tolist() for ids, _ in islice(train.batches(tokenizer, 1024, seed), 3)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert all(len(rows) * len(rows[0]) <= 1024 for rows in first)


# --- the study


def test_the_study_writes_every_part_and_its_figure_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from figures.draw import organism as figure

    monkeypatch.setattr(study, "RESAMPLES", 100)
    config = study.StudyConfig(out=tmp_path, limit=24, num_generations=2, quiet=True)
    study.main(config)
    with (tmp_path / study.RESULT).open() as handle:
        table = list(csv.DictReader(handle))
    parts = {(row["part"], row["metric"]) for row in table}
    assert {("patterns", "ari"), ("hallucination", "auroc"), ("teacher", "minus_random")} <= parts
    value = {(row["name"], row["metric"]): float(row["estimate"]) for row in table}
    assert value["other procedure", "same_share"] == 0.0 < value["same procedure", "same_share"]
    assert all(row["seed"] == "0" for row in table)
    before = (tmp_path / study.RESULT).stat().st_mtime_ns
    study.main(replace(config, resume=True))
    assert (tmp_path / study.RESULT).stat().st_mtime_ns == before
    assert {path.name for path in figure.draw(tmp_path, tmp_path / "out")} == {
        "organism.csv", "organism.pdf", "organism.png",
    }  # fmt: skip
