"""Located neurons over kinds and domains: what is pooled, what survives, and what the probe owes to the kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from neurosig.export import main as export
from neurosig.exported import Exported, join_gold
from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.planted import PlantedConfig, PlantedData, plant
from neurosig.hallucination.probe import agreement_labels
from neurosig.intervene.interventions import choose_neurons
from neurosig.locate.__main__ import LocateConfig, main
from neurosig.locate.analysis import Power, locate_over_kinds, planned, transfer, within_kinds
from neurosig.locate.pooled import Pooled, entities, pool
from neurosig.manifest import QuestionRow
from neurosig.neurons.sites import FFNSites
from neurosig.questions.load import Question
from neurosig.runtime.errors import UserError
from tests.support.exports import K, write_lines, write_world
from tests.support.flow import export_config, save_tiny

SMALL = {"n_layers": 6, "d_mlp": 400, "set_size": 120}
PROBE = ProbeConfig(pairs=15, folds=4)


def pooled_of(data: PlantedData, k: int, domains: int = 1) -> Pooled:
    """Planted data whose topics are kinds, as if from exports of ``domains`` domains."""
    questions = np.repeat(np.arange(len(data.labels) // k), k)
    groups = {"kind": data.topics, "entity": questions, "domain": data.topics % domains}
    names = {column: [str(one) for one in np.unique(values)] for column, values in groups.items()}
    return Pooled(data.contributions(), data.labels, questions, groups, names, PROBE, k, 6, 400, 120)


def exported_world(folder: Path, domain: str, first: int = 0, **options: Any) -> Path:
    write_world(folder, first)
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    rows = [row | {"kind": "even" if i % 2 else "odd", "domain": domain} for i, row in enumerate(lines)]
    write_lines(folder / "questions.jsonl", rows)
    files: dict[str, Any] = {"rollouts": folder / "rollouts.jsonl", "num_generations": K, "probe_inverse_penalty": 3.0}
    export(export_config(folder, folder / "model", folder / "questions.jsonl", **files, **options))
    return folder / "manifest"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("locate")
    return exported_world(folder / "a", "letters"), exported_world(folder / "b", "numbers", first=40)


def test_the_command_writes_tables_that_an_intervention_takes(
    exports: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(LocateConfig(manifest=exports, out=tmp_path / "out", pairs=4, permutations=1, quiet=True))
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "located.json").read_text())
    assert printed.index("Power: ") < printed.index("Stable over questions")  # what can be found is said first
    assert all(line in printed for line in record["findings"])
    assert {row["left_out"] for row in record["auroc"]} == {"question", "entity", "kind", "domain"}
    groups = {row["left_out"]: row["groups"] for row in record["auroc"]}
    assert (groups["question"], groups["kind"], groups["domain"]) == (80, 4, 2)
    located, stable, surviving = (
        pd.read_csv(tmp_path / "out" / f"{name}_neurons.csv") for name in ("located", "stable", "surviving")
    )
    assert len(located) >= len(stable) >= len(surviving) and stable["stable"].all() and surviving["survives"].all()
    assert len(located) and (located["kinds_agreeing"] <= located["kinds"]).all() and located["domains"].max() == 2
    signals = Exported(exports[0]).signals
    blocks = tuple("x" for _ in range(signals.n_layers))
    sites = FFNSites(blocks, blocks, blocks, "head", d_mlp=signals.d_mlp, d_model=4, gated=True)
    chosen, _ = choose_neurons(tmp_path / "out" / "located_neurons.csv", sites, "all")
    assert len(chosen) == len(located)


def test_contributions_and_labels_are_those_of_each_export(exports: tuple[Path, Path]) -> None:
    both = [Exported(folder) for folder in exports]
    pooled = pool(both, [join_gold(one.manifest)[0] for one in both])
    assert pooled.names["kind"] == ["letters/even", "letters/odd", "numbers/even", "numbers/odd"]
    assert pooled.names["domain"] == ["letters", "numbers"] and len(pooled.labels) == 2 * 40 * K
    dense = pooled.contributions.toarray()
    for start, one in zip((0, 40), both, strict=True):
        for index, (name, row) in enumerate(one.rows.items()):
            assert row.vote is not None
            for rollout in range(K):
                place, own = (start + index) * K + rollout, one.place[name, rollout]
                ids = one.signals.neuron_ids[own]
                values = one.signals.contributions[own].float()
                assert np.allclose(dense[place][ids[ids >= 0].numpy()], values[ids >= 0].numpy())
                assert pooled.questions[place] == start + index
            label = agreement_labels(np.array([row.vote.count / row.vote.n]), ProbeConfig())[0]
            assert (pooled.labels[(start + index) * K :][:K] == label).all()
    known, guessed = pooled.labelled()
    votes = [row.vote for one in both for row in one.rows.values()]
    assert known == sum(vote is not None and vote.count / vote.n >= ProbeConfig().agree_share for vote in votes)
    assert planned(pooled, Power(0.6, {0.5: 1.0}))[0].startswith(f"{known} questions agree and {guessed} split, in 4 ")


def test_exports_that_cannot_be_pooled_are_refused(exports: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'question "q00" is in \S+ and \S+; give each question once'):
        main(LocateConfig(manifest=(exports[0], exports[0]), out=tmp_path / "out", quiet=True))
    folder = write_world(tmp_path / "other", 80)
    save_tiny(folder / "model", seed=1)
    files: dict[str, Any] = {"rollouts": folder / "rollouts.jsonl", "num_generations": K}
    export(export_config(folder, folder / "model", folder / "questions.jsonl", **files))
    with pytest.raises(UserError, match=r"another model than \S+; give exports of one"):
        main(LocateConfig(manifest=(exports[0], folder / "manifest"), out=tmp_path / "out", quiet=True))
    for options, named in (
        ({"probe_labels": "contrast"}, r"probe_labels \(agreement there, contrast now\)"),
        ({"positions": "all"}, r"positions \(answer there, all now\)"),
    ):
        another = exported_world(tmp_path / next(iter(options)), "numbers", 80, **options)
        with pytest.raises(UserError, match=f"its neurons are not comparable: {named}"):
            main(LocateConfig(manifest=(exports[0], another), out=tmp_path / "out", quiet=True))
    assert not (tmp_path / "out").exists()


def row_of(name: str, kind: str) -> QuestionRow:
    return QuestionRow.model_construct(question_id=name, domain="geography", kind=kind)


def test_questions_about_one_thing_are_one_entity() -> None:
    rows = [
        row_of("geography-capital-kenya", "capital"),
        row_of("geography-continent-kenya", "continent"),
        row_of("geography-capital_country-nairobi", "capital_country"),
        row_of("geography-continent-chad", "continent"),
    ]
    answers = ("Nairobi", "Africa", "Kenya", "Africa")
    gold = {
        row.question_id: Question(row.question_id, "geography", "?", answer=a)
        for row, a in zip(rows, answers, strict=True)
    }
    few = entities(rows, gold)
    assert len(set(few)) == 1  # two questions of the answer Africa are about it
    many = {f"x{i}": Question(f"x{i}", "geography", "?", answer="Africa") for i in range(2)}
    found = entities(rows, gold | many)
    assert found[0] == found[1] == found[2] != found[3]  # four are not
    without = entities(rows, {})
    assert without[0] == without[1] and len(set(without)) == 3


def test_an_auroc_within_kinds_counts_no_pair_between_them() -> None:
    scores = np.array([0.1, 0.2, 0.9, 0.8, 0.85])
    labels, kinds = np.array([0, 1, 0, 1, -1]), np.array([0, 0, 1, 1, 1])
    assert within_kinds(scores, labels, kinds) == 0.5  # won in the first kind, lost in the second
    assert np.isnan(within_kinds(scores, labels, np.arange(5)))


def test_planted_neurons_survive_and_markers_of_hard_kinds_do_not() -> None:
    sizes: dict[str, Any] = {
        "n_questions": 240,
        "num_generations": 3,
        "n_planted": 6,
        "n_topics": 4,
        "seed": 1,
        **SMALL,
    }
    clean = plant(PlantedConfig(effect=1.0, **sizes))
    table = locate_over_kinds(pooled_of(clean, 3, domains=2), PROBE).table
    found = (table["layer"] * 400 + table["index"])[table["survives"]]
    assert np.isin(clean.planted, found).sum() >= 4 and np.isin(found, clean.planted).mean() >= 0.8
    marked = plant(
        PlantedConfig(effect=0.0, decoy="kind", hard_kinds=2, confounding=0.95, decoy_effect=3.0, n_decoys=6, **sizes)
    )
    table = locate_over_kinds(pooled_of(marked, 3, domains=2), PROBE).table
    flat = table["layer"] * 400 + table["index"]
    assert (
        np.isin(flat[table["stable"]], marked.decoys).any()
        and not np.isin(flat[table["survives"]], marked.decoys).any()
    )


def test_permutations_within_kinds_keep_what_the_kind_says() -> None:
    """Labels that only the kind decides: the probe's AUROC is high, and so is that of the permuted labels."""
    data = plant(
        PlantedConfig(
            160,
            2,
            6,
            0.0,
            4,
            decoy="kind",
            hard_kinds=2,
            confounding=0.9,
            decoy_effect=3.0,
            n_decoys=6,
            seed=2,
            **SMALL,
        )
    )
    rows = {row.left_out: row for row in transfer(pooled_of(data, 2), replace(PROBE, inverse_penalty=1.0), 9)}
    assert set(rows) == {"question", "entity", "kind"}  # one domain: nothing to leave out
    question = rows["question"]
    assert question.auroc > 0.7 and question.null > 0.7
    assert question.within < 0.6 and question.p_within > 0.1
    planted = plant(PlantedConfig(160, 2, 6, 1.2, 4, seed=2, **SMALL))
    rows = {row.left_out: row for row in transfer(pooled_of(planted, 2), replace(PROBE, inverse_penalty=1.0), 9)}
    assert rows["question"].within > 0.8 and rows["kind"].within > 0.75 and rows["question"].p_within == 0.1
