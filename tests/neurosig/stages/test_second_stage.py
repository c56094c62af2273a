"""The second stage: the teacher's rollouts, what is measured on them, and every published selector on the organism."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurosig.export import PRESETS, ExportConfig
from neurosig.export import main as export
from neurosig.hallucination.belief import jensen_shannon, votes_belief
from neurosig.hallucination.context_scores import SCORES
from neurosig.manifest import read_manifest
from neurosig.models.completion_hidden import completion_entropies
from neurosig.models.load import load_model
from neurosig.neurons.answer_states import PROJECTED, answer_states, possible_answers
from neurosig.neurons.tracer import NeuronTracer
from neurosig.questions.load import Question
from neurosig.questions.prompts import Demonstration, PromptBuilder
from neurosig.questions.statement import answer_words
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from tests.support.flow import (
    export_config,
    file_bytes,
    killed_while_sampling,
    make_manifest,
    save_tiny,
    write_questions,
)
from tests.support.parsers import UNCUT

SECOND: dict[str, Any] = {"teacher_rollouts": 2, "answer_parser": UNCUT, "question_filter": "neuron_only"}
CHOICES = Question("q", "d", "Which?", ("red", "blue", "green"))
PLACE = Question("q", "d", "Where?", answer_space=(("Africa",), ("Asia",), ("South America", "Latin America")))


@pytest.mark.parametrize(
    ("text", "answer", "question", "found"),
    [
        ("B, not A. Answer: B", "b", CHOICES, "B"),
        ("The answer is (c).", "c", CHOICES, "c)."),
        ("BAD luck", "b", CHOICES, None),
        ("It is in Africa, yes Africa.", "africa", PLACE, "Africa."),
        ("It is **Latin America**", "south america", PLACE, "Latin America**"),
        ("Nothing of the kind", "africa", PLACE, None),
        ("It costs $1,200.", "1200", Question("q", "d", "How much?"), "1,200."),
    ],
)
def test_where_an_answer_begins(text: str, answer: str, question: Question, found: str | None) -> None:
    words = answer_words(text, answer, question)
    assert (None if words is None else text[words[0] :]) == found


def test_possible_answers() -> None:
    assert possible_answers(CHOICES) == ("A", "B", "C")
    assert possible_answers(PLACE) == ("Africa", "Asia", "South America")
    assert possible_answers(Question("q", "d", "How?")) == ()


@pytest.mark.slow
def test_states_and_beliefs_are_those_of_a_plain_forward_pass() -> None:
    """On SmolLM2: every state, and the softmax over the first tokens of the answers where the answer begins."""
    loaded = load_model("smollm2-135m")
    builder = PromptBuilder(loaded.tokenizer, ExportConfig(model="m", questions=("q",), out=Path("o")).prompt_config())
    texts = [("In Africa.", "africa", PLACE), ("I would say: Asia", "asia", PLACE), ("Answer: B", "b", CHOICES)]
    rows = []
    for text, answer, question in texts:
        ids = (*loaded.tokenizer(text)["input_ids"], loaded.eos_token_ids[0])
        rows.append((builder.student(question), Rollout("q", 0, text, ids, "stop"), answer, question))
    prompts, rollouts, answers, questions = map(list, zip(*rows, strict=True))
    states = answer_states(loaded, prompts, rollouts, answers, questions, temperature=0.5)
    assert states.trajectory.shape == (3, PROJECTED)
    firsts = [(" Africa", " Asia", " South"), (" Africa", " Asia", " South"), (" A", " B", " C")]
    places = [1, 4, 2]
    for row, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
        ids = [*prompt, *rollout.completion_ids[:-1]]
        with torch.no_grad():
            out = loaded.model(torch.tensor([ids]), output_hidden_states=True)
        at = len(prompt) + places[row]
        torch.testing.assert_close(states.final[row], out.hidden_states[-1][0, at], atol=2e-4, rtol=1e-4)
        tokens = [loaded.tokenizer(text)["input_ids"][0] for text in firsts[row]]
        expected = (out.logits[0, at - 1, tokens] / 0.5).softmax(0)
        belief = states.beliefs[row]
        assert belief is not None
        assert list(belief.values()) == pytest.approx(expected.tolist(), abs=1e-4)
        alone = answer_states(loaded, [prompt], [rollout], [answers[row]], [questions[row]], temperature=0.5)
        torch.testing.assert_close(alone.trajectory[0], states.trajectory[row], atol=1e-4, rtol=1e-3)
    assert set(states.beliefs[2] or {}) == {"a", "b", "c"}


def test_trajectories_keep_their_cosines() -> None:
    """Projected to 64 signs: on average the cosine of the full trajectories, with an error of about one in eight."""
    from neurosig.neurons.answer_states import _signs

    signs = _signs(6, 40)
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(200, 6, 40, generator=generator), dim=-1)
    b = torch.nn.functional.normalize(a + torch.randn(200, 6, 40, generator=generator), dim=-1)
    full = (a * b).sum((1, 2)) / 6
    pairs = [torch.einsum("nld,ldp->np", one, signs) for one in (a, b)]
    cosine = torch.nn.functional.cosine_similarity(*pairs)
    assert abs(float((cosine - full).mean())) < 0.03 and 0.09 < float((cosine - full).std()) < 0.16


def test_entropies_are_those_of_the_whole_logits(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny(tmp_path / "model")), dtype="float32")
    prompts, completions = [(5, 6, 7), (8, 9)], [(10, 11, 12), (13, 14)]
    for prompt, completion, found in zip(
        prompts, completions, completion_entropies(loaded.model, prompts, completions), strict=True
    ):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
        p = logits.softmax(-1)
        assert found == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-5)


def test_what_the_manifest_holds_of_the_teacher_is_what_the_teacher_does(tmp_path: Path) -> None:
    """Contexts, set sizes, agreement, entropy gap and belief shift, each measured again from the files."""
    folder = make_manifest(tmp_path, **SECOND, hallucination_score="entropy_gap", keep_scores="highest")
    manifest = read_manifest(folder)
    asked = [row for row in manifest.rows if "belief_shift" in row.scores]
    assert asked and len(manifest.teacher_rollouts) == 2 * len(asked)
    assert manifest.header.files["teacher_rollouts.jsonl"].rows == len(manifest.teacher_rollouts)
    loaded = load_model(str(tmp_path / "model"), dtype="float32")
    teacher = PromptBuilder(loaded.tokenizer, manifest.header.teacher_prompt_config())
    student = PromptBuilder(loaded.tokenizer, manifest.header.prompt_config())
    tracer = NeuronTracer(loaded.model, export_config(tmp_path, tmp_path, tmp_path).trace_config())
    reader = manifest.header.answer_reader()
    by_id = {row.question_id: row for row in manifest.rows}
    selected = [row for row in asked if row.selected]
    assert len(selected) == math.ceil(len(asked) / 2)
    assert min(row.scores["entropy_gap"] for row in selected) >= max(
        row.scores["entropy_gap"] for row in asked if not row.selected
    )
    for row in selected:
        shown = [
            Demonstration(by_id[one.question_id].as_question(), manifest.rollouts[one.question_id, one.rollout_id].text)
            for one in row.context
        ]
        prompt = teacher.teacher(row.as_question(), shown)
        group = [manifest.teacher_rollouts[row.question_id, place] for place in range(2)]
        sets = tracer.trace([prompt] * 2, [one.completion_ids_without_eos for one in group])
        assert row.scores["teacher_set_size"] == float((sets.neuron_ids >= 0).sum(1).double().mean())
        reading = reader.read(group, row.as_question())
        assert row.scores["teacher_agreement"] == reading.vote.share
        own = [manifest.rollouts[row.question_id, place] for place in range(3)]
        ids = [one.completion_ids for one in own]
        before, after = (
            completion_entropies(loaded.model, [one] * 3, ids) for one in (student.student(row.as_question()), prompt)
        )
        assert row.scores["entropy_gap"] == pytest.approx(np.mean(before) - np.mean(after), abs=1e-5)
        if None not in (*row.answers, *reading.answers) and len({*row.raw_answers, *reading.raw_answers}) == 5:
            shift = jensen_shannon(votes_belief(row.answers), votes_belief(reading.answers))
            assert row.scores["belief_shift"] == pytest.approx(shift, abs=1e-6)


def test_no_context_changes_nothing(tmp_path: Path) -> None:
    """The teacher without a context is the student: no entropy gap."""
    manifest = read_manifest(make_manifest(tmp_path, **SECOND, context_policy="none"))
    gaps = [row.scores["entropy_gap"] for row in manifest.rows if "entropy_gap" in row.scores]
    assert gaps and all(abs(gap) < 1e-6 for gap in gaps)
    assert not any("context_information" in row.scores for row in manifest.rows)


def test_an_interrupted_second_stage_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the teacher samples; the finished export has the bytes of an uninterrupted one."""
    monkeypatch.setattr("neurosig.sampling.sampler.WINDOW", 1)
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl")
    options = {**SECOND, "batch_rows": 6}
    export(export_config(tmp_path, model, questions, "straight", **options))
    export(export_config(tmp_path, model, questions, "first", **{**options, "teacher_rollouts": 0}))
    with killed_while_sampling(3):
        export(export_config(tmp_path, model, questions, "broken", reuse=tmp_path / "first", **options))
    log = tmp_path / "broken" / ".work" / "teacher" / "rollouts.log"
    assert len(log.read_bytes().splitlines()) == 1 + 3
    export(export_config(tmp_path, model, questions, "broken", reuse=tmp_path / "first", resume=True, **options))
    assert file_bytes(tmp_path / "broken") == file_bytes(tmp_path / "straight")
    assert not (tmp_path / "broken" / ".work").exists()


def test_a_teacher_prompt_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the teacher prompt of \d+ tokens and \d+ new tokens exceed .*; lower"):
        make_manifest(tmp_path, **SECOND, num_demonstrations=7, max_new_tokens=40, max_context_tokens=10**6)


def test_changed_teacher_rollouts_are_refused(tmp_path: Path) -> None:
    folder = make_manifest(tmp_path, **SECOND)
    path = folder / "teacher_rollouts.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"rollout_id": 0', '"rollout_id": 5', 1))
    with pytest.raises(UserError, match=r"teacher_rollouts\.jsonl: sha256 differs"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"teacher_rollouts\.jsonl: missing"):
        read_manifest(folder)


PUBLISHED = ("published", "inflow", "consistency", "redundancy", "mutual", "full", "canon", "u-opsd")


def test_every_published_selector_is_a_preset() -> None:
    for name in PUBLISHED:
        ExportConfig(**{"model": "m", "questions": ("q",), "out": Path("o"), **PRESETS[name]})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_selector_on_the_organism(name: str, tmp_path: Path) -> None:
    """It selects its share, with the contexts it names, and the scores it needs."""
    organism = {"model": "organism", "questions": ("procedures",), "limit": 60, "max_new_tokens": 96}
    wording = {"instruction": "", "choice_instruction": "", "quiet": True}
    config = ExportConfig(**{"out": tmp_path / "m", **organism, **wording, **PRESETS[name]})  # type: ignore[arg-type]
    export(config)
    manifest = read_manifest(tmp_path / "m")
    rows, fraction = manifest.selected, config.keep_fraction
    asked = [row for row in manifest.rows if row.vote is not None and row.pseudo_label is not None]
    if name in ("published", "inflow", "consistency", "mutual", "redundancy"):
        assert len(rows) == math.ceil(fraction * len(asked))
    elif name == "full":
        assert len(rows) == 60
    assert all(len(row.context) == {"consistency": 0, "canon": 1, "u-opsd": 1}.get(name, 3) for row in rows)
    own = name in ("canon", "u-opsd")
    assert all((item.question_id == row.question_id) == own for row in rows for item in row.context)
    assert bool(manifest.teacher_rollouts) == (name in ("published", "inflow", "consistency", "redundancy"))
    score = config.hallucination_score
    if score in SCORES:
        kept = [row.scores[score] for row in rows]
        left = [row.scores[score] for row in asked if not row.selected]
        assert max(kept) <= min(left) if config.keep_scores == "lowest" else min(kept) >= max(left)
    assert manifest.header.options["context_policy"] == config.context_policy


def test_without_any_context_the_teacher_is_not_asked(tmp_path: Path) -> None:
    """As where no rollout has an answer."""
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl")
    config = export_config(tmp_path, model, questions, **{**SECOND, "answer_parser": None, "num_generations": 1})
    with pytest.raises(UserError, match="none of 8 questions has a context, so that --teacher-rollouts 2 has nothing"):
        export(config)
