"""An export as DataFrames: one row each, whole texts, no model and no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import neurosig
from neurosig.manifest import NEURONS, SIGNALS, read_manifest
from neurosig.manifest.rows import QuestionRow
from neurosig.runtime.errors import UserError
from neurosig.views.explorer import Explorer
from neurosig.views.frames import MOST_ROWS, Table, decision
from tests.support.commands import loaded_after
from tests.support.flow import make_manifest
from tests.support.parsers import UNCUT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("frames")
    return make_manifest(place, num_demonstrations=2, set_size=24, max_new_tokens=6, answer_parser=UNCUT)


@pytest.fixture(scope="module")
def export(folder: Path) -> Explorer:
    return neurosig.read_export(folder, gold=False)


def test_every_row_of_the_manifest_is_a_row(export: Explorer, folder: Path) -> None:
    manifest = read_manifest(folder)
    assert list(export.questions.index) == list(export.scores.index) == [row.question_id for row in manifest.rows]
    assert dict(export.scores.iloc[1]) == manifest.rows[1].scores
    assert list(zip(export.rollouts["question_id"], export.rollouts["rollout_id"], strict=True)) == list(
        manifest.rollouts
    )
    assert list(export.rollouts["text"]) == [rollout.text for rollout in manifest.rollouts.values()]
    found = export.contexts.groupby("question_id", sort=False)["demonstration_id"].apply(list).to_dict()
    assert found == {row.question_id: [item.question_id for item in row.context] for row in manifest.rows}
    assert list(export.contexts["place"].unique()) == [1, 2]
    for row in manifest.rows:
        own = export.rollouts[export.rollouts["question_id"] == row.question_id]
        assert own["answer"].dropna().tolist() == [answer for answer in row.answers if answer is not None]
        assert (own["verdict"] == "majority").sum() == (row.vote.count if row.pseudo_label and row.vote else 0)


def test_the_probe_score_is_that_of_the_signals_file(export: Explorer) -> None:
    assert export.rollouts["probe_score"].tolist() == export.exported.signals.probe_scores.tolist()


def test_the_neurons_have_their_role_and_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / NEURONS).write_text(
        "role,layer,index,active_share,weight,stability,kinds,kinds_agreeing,cluster,lift,q\n"
        "hallucination,1,7,0.5,-0.25,0.5,2,1,,,\npattern,0,3,0.25,,,,,1,2.5,0.01\n"
    )
    export = Explorer(folder, gold=False, neurons=tmp_path / NEURONS)
    assert export.neurons[["neuron", "role"]].to_numpy().tolist() == [["L1/7", "hallucination"], ["L0/3", "pattern"]]
    assert export.located == [(1, 7)] and export.neurons["cluster"].isna().tolist() == [True, False]
    with pytest.raises(UserError, match="no such file"):
        Explorer(folder, neurons=tmp_path / "nothing.csv")
    (tmp_path / "wrong.csv").write_text("layer,neuron\n1,2\n")
    with pytest.raises(UserError, match="expected the columns layer, index and weight"):
        Explorer(folder, neurons=tmp_path / "wrong.csv")


def test_reading_needs_no_model_and_no_torch(folder: Path) -> None:
    frames = "e.questions, e.rollouts, e.scores, e.neurons, e.contexts, e.questions._repr_html_()"
    statement = f"import neurosig; e = neurosig.read_export({str(folder)!r}); {frames}"
    assert loaded_after(statement, "torch", "nnsight", "transformers", "sklearn") == set()


def test_signals_of_another_export_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "export"
    shutil.copytree(folder, copy)
    export = Explorer(copy, gold=False)
    (copy / SIGNALS).write_bytes(b"damaged")
    with pytest.raises(UserError, match="export again"):
        _ = export.rollouts


def test_a_table_stays_a_table_and_keeps_its_texts(export: Explorer) -> None:
    long = "long " * 1000
    table = export.questions.assign(question=long)
    assert isinstance(table, Table) and isinstance(table.sort_values("line").head(2), pd.DataFrame)
    assert table["question"].iloc[0] == long and f"{len(long) - 300:,} more characters" in table._repr_html_()
    many = Table({"a": range(MOST_ROWS + 5)})
    assert f"The first {MOST_ROWS} of {MOST_ROWS + 5} rows" in many._repr_html_()


def test_a_decision_judges_no_answer(export: Explorer) -> None:
    options = export.manifest.header.options | {"hallucination_score": "probe_score"}
    row: QuestionRow = export.manifest.rows[0]
    for reason in ("hallucination", "score"):
        assert decision(row.model_copy(update={"reason": reason}), options) == "probe score too high"
    lowest = options | {"keep_scores": "highest"}
    assert decision(row.model_copy(update={"reason": "score"}), lowest) == "probe score too low"
    assert "hallucination" not in set(export.overview()["decision"])


def test_a_context_fixes_what_only_the_teacher_answers_right_and_breaks_the_reverse(tmp_path: Path) -> None:
    options = {"teacher_rollouts": 2, "answer_parser": UNCUT, "question_filter": "neuron_only", "num_demonstrations": 2}
    folder = make_manifest(tmp_path, **options)
    votes = neurosig.read_export(folder).effects.set_index("question_id")
    differing = votes.index[
        votes["student"].notna() & votes["teacher"].notna() & (votes["student"] != votes["teacher"])
    ]
    fixed, broken = differing[:2]
    path, gold = tmp_path / "questions.jsonl", {fixed: votes["teacher"][fixed], broken: votes["student"][broken]}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(record | {"answer": gold.get(record["id"], "GOLD")}) for record in records]
    path.write_text("\n".join(lines) + "\n")
    export = neurosig.read_export(folder)
    found = export.effects.set_index("question_id")
    outcomes = {name: "wrong" for name in found.index} | {fixed: "fix", broken: "break"}
    assert found["outcome_strict"].to_dict() == outcomes
    for name in ("entropy_gap", "belief_shift"):
        assert found[name].to_dict() == export.scores.loc[found.index, name].to_dict()
    with pytest.raises(UserError, match="no gold answers to them; export labelled questions"):
        _ = neurosig.read_export(folder, gold=False).effects


def test_without_a_second_stage_there_are_no_effects(folder: Path) -> None:
    with pytest.raises(
        UserError, match="no rollouts of a teacher; export labelled questions with --teacher-rollouts 5"
    ):
        _ = neurosig.read_export(folder).effects
