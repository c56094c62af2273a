"""Write the bundled question sets from the fact tables: ``python -m neurosig.questions.bundled.build``.

Tables are tab-separated; ``|`` separates the aliases within a cell. A state without an undisputed single capital or
continent (several capitals, two continents, city states) has an empty cell there and no question about it. The output
depends on the tables alone, so two runs give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic

DATA_DIR = Path(__file__).parent
FACTS_DIR = DATA_DIR / "facts"
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

Record = dict[str, Any]


def read_facts(name: str) -> list[dict[str, str]]:
    """Rows of ``facts/NAME.tsv``.

    Raises:
        UserError: A row has too few or too many cells; the message names its line.
    """
    path = FACTS_DIR / f"{name}.tsv"
    table = io.StringIO(path.read_text(encoding="utf-8"))
    reader = csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
    rows = []
    for number, row in enumerate(reader, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path}:{number}: expected {len(reader.fieldnames or ())} tab-separated cells")
        rows.append(row)
    return rows


def slug(text: str) -> str:
    """Lower-case ASCII letters and digits, everything else one hyphen: "São Tomé" -> "sao-tome"."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower().replace("'", "")).strip("-")


SPACES = {
    "capital": "capitals",
    "capital_country": "countries",
    "continent": "continents",
    "demonym": "nationalities",
    "symbol": "element-symbols",
    "element": "element-names",
    "atomic_number": "atomic-numbers",
}
"""The answer space of each kind whose possible answers are known (`neurosig.questions.answers.spaces`)."""


def record(domain: str, kind: str, key: str, question: str, answer: str, aliases: list[str]) -> Record:
    """One record of a bundled set; aliases that repeat the answer are dropped."""
    others = [alias for alias in dict.fromkeys(aliases) if alias and alias != answer]
    return {
        "id": f"{domain}-{kind}-{slug(key)}",
        "domain": domain,
        "kind": kind,
        "question": question,
        "choices": None,
        "answer": answer,
        "aliases": others,
        "answer_space": SPACES.get(kind),
    }


def geography() -> Iterator[Record]:
    """Capitals, countries of capitals and continents of the sovereign states."""
    for row in read_facts("countries"):
        country, capital, continent = row["country"], row["capital"], row["continent"]
        bare = country.removeprefix("the ")
        capital_aliases = row["capital_aliases"].split("|")
        country_aliases = row["country_aliases"].split("|")
        if capital:
            question = f"What is the capital of {country}?"
            yield record("geography", "capital", bare, question, capital, capital_aliases)
        if capital and bare not in capital and capital not in bare:
            question = f"{capital} is the capital of which country?"
            yield record("geography", "capital_country", capital, question, bare, [country, *country_aliases])
        if continent:
            question = f"{country[0].upper()}{country[1:]} is located in which continent?"
            aliases = ["Australia and Oceania"] if continent == "Oceania" else []
            yield record("geography", "continent", bare, question, continent, aliases)


def interleave(*kinds: Iterable[Record]) -> Iterator[Record]:
    """One record of each kind in turn, so that the first n lines of a set contain every kind."""
    for group in zip_longest(*kinds):
        yield from (item for item in group if item is not None)


def language() -> Iterator[Record]:
    """Antonyms, irregular and regular plurals, past tenses and demonyms."""
    return interleave(
        words("antonym", "antonyms", "word", 'The opposite of "{}" is which word?'),
        words("plural", "plurals", "noun", 'The plural of "{}" is which word?'),
        words("past_tense", "past_tenses", "verb", 'What is the past tense of "{}"?'),
        words("demonym", "demonyms", "country", "What is the nationality of a person from {}?"),
    )


def words(kind: str, table: str, column: str, template: str) -> Iterator[Record]:
    """Questions of one table: ``column`` fills the template, the column ``kind`` has the answer."""
    for row in read_facts(table):
        key, aliases = row[column], row["aliases"].split("|")
        yield record("language", kind, key.removeprefix("the "), template.format(key), row[kind], aliases)


def chemistry() -> Iterator[Record]:
    """Symbols, names and atomic numbers of the elements; formulas and names of common compounds."""
    about_elements = [elements(kind) for kind in ("symbol", "element", "atomic_number")]
    return interleave(*about_elements, formulas(), compounds())


def elements(kind: str) -> Iterator[Record]:
    """One question per element: its ``symbol``, its ``atomic_number``, or the ``element`` of a symbol."""
    for row in read_facts("elements"):
        name, symbol = row["name"], row["symbol"]
        if kind == "element":
            question = f"Which chemical element has the symbol {symbol}?"
            yield record("chemistry", kind, symbol, question, name, row["aliases"].split("|"))
        else:
            quantity = "chemical symbol" if kind == "symbol" else "atomic number"
            yield record("chemistry", kind, name, f"What is the {quantity} of {name}?", row[kind], [])


def formulas() -> Iterator[Record]:
    """The formula of each compound, with subscript digits as an alias."""
    for row in read_facts("compounds"):
        forms = [row["formula"], *row["formula_aliases"].split("|")]
        aliases = [*forms, *(text.translate(SUBSCRIPTS) for text in forms)]
        question = f"What is the chemical formula of {row['name']}?"
        yield record("chemistry", "formula", row["name"], question, row["formula"], aliases)


def compounds() -> Iterator[Record]:
    """The compound of each formula that names one common substance."""
    for row in read_facts("compounds"):
        if row["one_compound"] == "yes":
            question = f"What is the name of the compound {row['formula']}?"
            aliases = row["name_aliases"].split("|")
            yield record("chemistry", "compound", row["formula"], question, row["name"], aliases)


SETS: Mapping[str, Callable[[], Iterator[Record]]] = {
    "geography": geography,
    "language": language,
    "chemistry": chemistry,
}


def to_jsonl(records: Iterator[Record]) -> str:
    """The records as JSON lines, non-ASCII letters kept."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records)


def build(sets: Mapping[str, Callable[[], Iterator[Record]]] = SETS, directory: Path = DATA_DIR) -> None:
    """Write ``NAME.jsonl`` of every set into ``directory``."""
    for name, records in sets.items():
        write_atomic(directory / f"{name}.jsonl", to_jsonl(records()))


if __name__ == "__main__":
    build()
