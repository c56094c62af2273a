"""The bundled sets: built from the fact tables, unique, split in every kind, right where we checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from neurosig.questions.bundled import build
from neurosig.questions.load import BUNDLED, Question, load_questions, split_of
from neurosig.runtime.errors import UserError

NAMES = ("geography", "language", "chemistry")
KINDS = {
    "geography": {"capital", "capital_country", "continent"},
    "language": {"antonym", "plural", "past_tense", "demonym"},
    "chemistry": {"symbol", "element", "atomic_number", "formula", "compound"},
}


@pytest.fixture(scope="module")
def everything() -> dict[str, Question]:
    return {question.id: question for question in load_questions(list(NAMES))}


@pytest.mark.parametrize("name", NAMES)
def test_committed_file_equals_built_file(name: str, tmp_path: Path) -> None:
    build.build(directory=tmp_path)
    assert (tmp_path / f"{name}.jsonl").read_bytes() == BUNDLED[name].read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_counts_kinds_and_domain(name: str) -> None:
    questions = load_questions(name)
    assert len(questions) >= 420
    assert {question.kind for question in questions} == KINDS[name]
    assert {question.domain for question in questions} == {name}
    assert all(question.choices is None and question.answer for question in questions)


def test_each_language_kind_has_at_least_110_questions() -> None:
    counts = Counter(question.kind for question in load_questions("language"))
    assert min(counts.values()) >= 110


def test_texts_are_unique_over_all_sets(everything: dict[str, Question]) -> None:
    assert len({question.text_sha256 for question in everything.values()}) == len(everything)
    assert len({question.question.casefold() for question in everything.values()}) == len(everything)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_is_in_every_split_and_splits_partition(name: str) -> None:
    parts = {split: load_questions(f"{name}:{split}") for split in ("train", "dev", "test")}
    for part in parts.values():
        assert {question.kind for question in part} == KINDS[name]
    ids = [question.id for part in parts.values() for question in part]
    assert sorted(ids) == sorted(question.id for question in load_questions(name))


# (id, first 8 bytes of sha256("neurosig:" + id) mod 100, split): the edges 45 and 60 from both sides.
BUCKETS = [
    ("q4", 0, "train"),
    ("q387", 44, "train"),
    ("q159", 45, "dev"),
    ("q74", 59, "dev"),
    ("q15", 60, "test"),
    ("q17", 99, "test"),
]


@pytest.mark.parametrize(("question_id", "bucket", "split"), BUCKETS)
def test_split_of_follows_the_hash(question_id: str, bucket: int, split: str) -> None:
    digest = hashlib.sha256(f"neurosig:{question_id}".encode()).hexdigest()
    assert int(digest[:16], 16) % 100 == bucket
    assert split_of(question_id) == split


@pytest.mark.parametrize("name", NAMES)
def test_first_questions_hold_every_kind(name: str) -> None:
    assert {question.kind for question in load_questions(name, limit=6)} == KINDS[name]


@pytest.mark.parametrize("name", NAMES)
def test_aliases_never_repeat_the_answer(name: str) -> None:
    for question in load_questions(name):
        assert question.answer not in question.aliases
        assert len(set(question.aliases)) == len(question.aliases)


FACTS = [
    ("geography-capital-france", "Paris", ()),
    ("geography-capital-australia", "Canberra", ()),
    ("geography-capital_country-nairobi", "Kenya", ()),
    ("geography-continent-mongolia", "Asia", ()),
    ("geography-continent-jamaica", "North America", ()),
    ("geography-capital-ukraine", "Kyiv", ("Kiev",)),
    ("language-antonym-tight", "loose", ()),
    ("language-plural-ox", "oxen", ()),
    ("language-plural-cactus", "cacti", ("cactuses",)),
    ("language-past_tense-teach", "taught", ()),
    ("language-past_tense-burn", "burned", ("burnt",)),
    ("language-demonym-denmark", "Dane", ("Danish",)),
    ("chemistry-symbol-tungsten", "W", ()),
    ("chemistry-element-hg", "mercury", ("quicksilver",)),
    ("chemistry-element-al", "aluminium", ("aluminum",)),
    ("chemistry-atomic_number-gold", "79", ()),
    ("chemistry-atomic_number-oganesson", "118", ()),
    ("chemistry-formula-sulfuric-acid", "H2SO4", ("H₂SO₄",)),
    ("chemistry-compound-nahco3", "sodium bicarbonate", ("baking soda",)),
]


@pytest.mark.parametrize(("question_id", "answer", "aliases"), FACTS)
def test_fact(everything: dict[str, Question], question_id: str, answer: str, aliases: tuple[str, ...]) -> None:
    question = everything[question_id]
    assert question.answer == answer
    assert set(aliases) <= set(question.aliases)


def test_formulas_hold_only_element_symbols() -> None:
    symbols = {row["symbol"] for row in build.read_facts("elements")}
    for row in build.read_facts("compounds"):
        for formula in [row["formula"], *filter(None, row["formula_aliases"].split("|"))]:
            assert atoms(formula).keys() <= symbols, formula


def test_formula_aliases_have_the_same_atoms() -> None:
    for row in build.read_facts("compounds"):
        for alias in filter(None, row["formula_aliases"].split("|")):
            assert atoms(alias) == atoms(row["formula"]), row["name"]


def test_formula_parser_of_this_test() -> None:
    assert atoms("Ca(OH)2") == {"Ca": 1, "O": 2, "H": 2}
    assert atoms("CH3COOH") == {"C": 2, "H": 4, "O": 2}


def atoms(formula: str) -> Counter[str]:
    """Atom counts of a formula with at most one level of brackets."""
    total: Counter[str] = Counter()
    for group, times, symbol, count in re.findall(r"\(([^)]*)\)(\d*)|([A-Z][a-z]?)(\d*)", formula):
        if group:
            for key, value in atoms(group).items():
                total[key] += value * int(times or 1)
        else:
            total[symbol] += int(count or 1)
    return total


def test_no_city_state_is_asked_for_its_capital(everything: dict[str, Question]) -> None:
    for question in everything.values():
        if question.kind == "capital_country":
            assert question.answer is not None
            assert question.answer not in question.question
        if question.kind == "capital":
            assert question.answer not in question.question.removesuffix("?").split()


def test_disputed_capitals_are_not_asked(everything: dict[str, Question]) -> None:
    for country in ("israel", "bolivia", "south-africa", "sri-lanka", "singapore"):
        assert f"geography-capital-{country}" not in everything
        assert f"geography-continent-{country}" in everything
    assert "geography-continent-russia" not in everything


def test_world_facts_names_the_geography_set() -> None:
    assert load_questions("world-facts:dev") == load_questions("geography:dev")


def test_bundled_lines_are_plain_records() -> None:
    for name in NAMES:
        for line in BUNDLED[name].read_text(encoding="utf-8").splitlines():
            assert list(json.loads(line)) == [
                "id", "domain", "kind", "question", "choices", "answer", "aliases", "answer_space",
            ]  # fmt: skip


def test_fact_table_with_a_missing_cell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plurals.tsv").write_text("noun\tplural\taliases\nox\toxen\t\ncat\tcats\n", encoding="utf-8")
    monkeypatch.setattr(build, "FACTS_DIR", tmp_path)
    with pytest.raises(UserError, match=r"plurals\.tsv:3: expected 3 tab-separated cells"):
        build.read_facts("plurals")
