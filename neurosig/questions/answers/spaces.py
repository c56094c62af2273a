"""Answer spaces: all possible answers of a free-form question, each with its names. A space never tells which is right.

The bundled spaces are the columns of the fact tables that also make the bundled question sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from neurosig.questions.answers.normal import normalise
from neurosig.questions.bundled.build import read_facts

if TYPE_CHECKING:
    from neurosig.questions.load import Question

Member = tuple[str, ...]
"""The names of one possible answer; the first is canonical."""

_COLUMNS: Mapping[str, tuple[str, str, str | None]] = {
    "continents": ("continents", "continent", "aliases"),
    "countries": ("countries", "country", "country_aliases"),
    "capitals": ("countries", "capital", "capital_aliases"),
    "nationalities": ("demonyms", "demonym", "aliases"),
    "element-symbols": ("elements", "symbol", None),
    "element-names": ("elements", "name", "aliases"),
    "atomic-numbers": ("elements", "atomic_number", None),
}
"""Space -> table, its column, and the column of the aliases."""


def names() -> tuple[str, ...]:
    """Names of the bundled answer spaces."""
    return tuple(_COLUMNS)


def members(question: Question) -> tuple[Member, ...]:
    """The members of a question's answer space; () where it has none.

    Raises:
        KeyError: The space has a name that is not one of `names`.
    """
    space = question.answer_space
    if space is None:
        return ()
    return _bundled(space) if isinstance(space, str) else space


def canonical(answer: str, question: Question) -> str:
    """The normalised canonical name of the member that ``answer``, normalised, is a name of; else ``answer`` itself."""
    return _canonical_names(members(question)).get(answer, answer)


@cache
def _canonical_names(space: tuple[Member, ...]) -> dict[str, str]:
    """Normalised name -> canonical name; a name that several members share stays itself."""
    names: dict[str, set[str]] = {}
    for member in space:
        for name in member:
            names.setdefault(normalise(name), set()).add(normalise(member[0]))
    return {name: next(iter(found)) for name, found in names.items() if len(found) == 1}


@cache
def _bundled(name: str) -> tuple[Member, ...]:
    return tuple(dict.fromkeys(_rows(*_COLUMNS[name])))


def _rows(table: str, column: str, aliases: str | None) -> Iterator[Member]:
    for row in read_facts(table):
        if row[column]:
            others = row[aliases].split("|") if aliases else []
            yield tuple(dict.fromkeys((row[column].removeprefix("the "), *filter(None, others))))
