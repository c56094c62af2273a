"""Adapt each known shape of a question record to the fields of a Question.

Adapters take one record and return ``Fields``, or None for an item without choices and without a short answer. They
raise UserError; its message names the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from neurosig.runtime.errors import UserError

Record = Mapping[str, Any]

OTHER_WORD = {"Yes": "True", "No": "False", "True": "Yes", "False": "No"}


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one question with checked types; `Question` checks the contents."""

    id: str
    domain: str
    question: str
    choices: tuple[str, ...] | None
    answer: str | None
    aliases: tuple[str, ...]
    kind: str | None
    answer_space: str | tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class FieldMap:
    """Column names of a multiple-choice set; None: the set has no such column.

    Without ``id`` the id is ``DOMAIN-LINE``; without ``domain`` the domain is the file's stem. ``choices`` may be one
    column (a list, ``{"text": [...], "label": [...]}`` or ``{"A": ..., "B": ...}``) or a tuple with one column per
    choice. The answer may be a letter, a label, a 0-based index or the text of a choice.
    """

    question: str = "question"
    choices: str | tuple[str, ...] | None = "choices"
    answer: str | None = "answer"
    id: str | None = None
    domain: str | None = None
    kind: str | None = None


def got(value: object) -> str:
    """A short, terminal-safe rendering of a bad value and its type."""
    return f"got {ascii(value)[:60]} ({type(value).__name__})"


def shown(text: str) -> str:
    """At most 60 characters of a record's own text, on one line."""
    return repr(text[:60])[1:-1]


def columns_of(record: Record) -> str:
    """The names of a record's fields for a message, at most 20 of them."""
    named = ", ".join(shown(name) for name in list(record)[:20])
    return named + (f" and {len(record) - 20} more" if len(record) > 20 else "")


def adapt(record: Record, line: int, stem: str, field_map: FieldMap | None) -> Fields | None:
    """The fields of a record of any known shape; None for an open-ended item.

    Args:
        record: one parsed record.
        line: its 1-based line, part of the id where the record has none.
        stem: the domain where the record names none.
        field_map: column names; without them the shape is guessed from the fields.
    """
    if field_map is not None:
        return adapt_mapped(record, line, stem, field_map)
    if "answerKey" in record:
        return adapt_sciknoweval(record, line, stem)
    if "question_id" in record and "options" in record:
        return adapt_mmlu_pro(record)
    return adapt_native(record, stem)


def adapt_native(record: Record, stem: str) -> Fields:
    """Our own shape: id, question, and optionally domain, kind, choices, answer, aliases or answers, answer_space.

    ``task``, ``category`` or ``subject`` may replace ``kind``. The ``instruction`` of an item without choices is put
    before the question, as it says which words answer it.
    """
    choices = text_list(record, "choices")
    answers = text_list(record, "answers") or ()
    answer = optional_text(record, "answer")
    if answer is None and answers:
        answer = answers[0]
    domain = optional_text(record, "domain")
    question = required_text(record, "question")
    instruction = optional_text(record, "instruction")
    if instruction and choices is None and question.strip():
        question = f"{instruction.strip()}\n\n{question}"
    aliases = (*(text_list(record, "aliases") or ()), *answers, *other_words(record, answer))
    kinds = (optional_text(record, name) for name in ("kind", "task", "category", "subject"))
    return Fields(
        id=required_text(record, "id"),
        domain=stem if domain is None else domain,
        question=question,
        choices=choices,
        answer=answer,
        aliases=tuple(alias for alias in dict.fromkeys(aliases) if alias != answer),
        kind=next((kind for kind in kinds if kind), None),
        answer_space=answer_space(record),
    )


def adapt_sciknoweval(record: Record, line: int, stem: str) -> Fields | None:
    """SciKnowEval (and ARC) as released: choices {text, label}, answerKey, answer, type, details, prompt."""
    choices, labels = labelled_choices(record.get("choices"), "choices")
    details = record["details"] if isinstance(record.get("details"), dict) else {}
    domain = (optional_text(record, "domain") or stem).lower()
    task = optional_text(details, "task")
    question = required_text(record, "question")
    if choices:
        answer = letter_of(optional_text(record, "answerKey"), choices, labels, "answerKey")
    elif record.get("type") in ("true_or_false", "filling"):
        answer = required_text(record, "answer")
        prompt = record.get("prompt")
        instruction = optional_text(prompt if isinstance(prompt, dict) else {"default": prompt}, "default")
        if instruction and question.strip():
            question = f"{instruction.strip()}\n\n{question}"
    else:
        return None
    places = (domain, details.get("level"), task, details.get("subtask"), line)
    made_id = "-".join(dict.fromkeys(slug(str(part)) for part in places if part))
    return Fields(
        id=made_id if record.get("id") is None else required_text(record, "id"),
        domain=domain,
        question=question,
        choices=choices or None,
        answer=answer,
        aliases=other_words(record, answer),
        kind=task,
    )


def adapt_mmlu_pro(record: Record) -> Fields:
    """MMLU-Pro as released: question_id, options ("N/A" dropped), answer, answer_index, category."""
    options = text_list(record, "options") or ()
    answer = optional_text(record, "answer")
    kept = [index for index, option in enumerate(options) if option.strip() != "N/A"]
    if answer is not None:
        index = ascii_uppercase.find(answer) if len(answer) == 1 else -1
        if index not in kept:
            raise UserError(f'field "answer": not a letter of one of the {len(kept)} options, {got(answer)}')
        if record.get("answer_index", index) != index:
            other = got(record["answer_index"])
            raise UserError(f'field "answer_index": contradicts answer {answer}, {other}')
        answer = ascii_uppercase[kept.index(index)]
    return Fields(
        id=f"mmlu_pro-{text_or_number(record, 'question_id')}",
        domain="mmlu_pro",
        question=required_text(record, "question"),
        choices=tuple(options[index] for index in kept),
        answer=answer,
        aliases=(),
        kind=optional_text(record, "category"),
    )


def adapt_mapped(record: Record, line: int, stem: str, names: FieldMap) -> Fields:
    """Any multiple-choice set, read by the column names of a FieldMap."""
    columns = [names.question, names.answer, names.id, names.domain, names.kind]
    columns += [names.choices] if isinstance(names.choices, str) else list(names.choices or ())
    for column in columns:
        if column is not None and column not in record:
            raise UserError(f'field "{column}": in the field map but not in the record ({columns_of(record)})')
    if isinstance(names.choices, tuple):
        choices: tuple[str, ...] = tuple(required_text(record, name) for name in names.choices)
        labels: tuple[str, ...] = ()
    else:
        listed = record[names.choices] if names.choices else None
        choices, labels = labelled_choices(listed, str(names.choices))
    answer = record[names.answer] if names.answer else None
    if answer is not None and choices:
        answer = letter_of(answer, choices, labels, str(names.answer))
    elif answer is not None:
        answer = text_or_number(record, str(names.answer))
    domain = text_or_number(record, names.domain) if names.domain else stem
    return Fields(
        id=text_or_number(record, names.id) if names.id else f"{domain}-{line}",
        domain=domain,
        question=required_text(record, names.question),
        choices=choices or None,
        answer=answer,
        aliases=(),
        kind=optional_text(record, names.kind) if names.kind else None,
    )


def labelled_choices(value: object, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and labels of choices given as a list, as {text, label} or as {label: text}; () without choices."""
    if value is None:
        return (), ()
    if isinstance(value, dict) and {"text", "label"} <= value.keys():
        texts, labels = text_list(value, "text") or (), text_list(value, "label") or ()
        if len(texts) != len(labels):
            raise UserError(f'field "{name}": {len(texts)} texts but {len(labels)} labels')
        return texts, labels
    if isinstance(value, dict):
        used = tuple(label for label in value if value[label] is not None)
        return tuple(required_text(value, label) for label in used), used
    return text_list({name: value}, name) or (), ()


def answer_space(record: Record) -> str | tuple[tuple[str, ...], ...] | None:
    """All possible answers: the name of a bundled space, a list of texts, or a list of lists, an answer and aliases."""
    value: Any = record.get("answer_space")
    if value is None or isinstance(value, str):
        return value
    members: list[Any] = [[item] if isinstance(item, str) else item for item in value] if type(value) is list else [0]
    if not all(isinstance(member, list) and all(isinstance(name, str) for name in member) for member in members):
        raise UserError(
            f'field "answer_space": expected the name of a space, a list of texts or a list of lists of texts, '
            f"{got(value)}"
        )
    return tuple(tuple(member) for member in members)


def letter_of(answer: object, choices: tuple[str, ...], labels: tuple[str, ...], name: str) -> str | None:
    """The letter of the choice that a label, a letter, a 0-based index or a choice's text names."""
    if answer is None:
        return None
    letters = ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    for known in (labels or tuple(letters), choices):
        if answer in known:
            return letters[known.index(answer)]
    raise UserError(f'field "{name}": not one of the {len(choices)} choices, {got(answer)}')


def other_words(record: Record, answer: str | None) -> tuple[str, ...]:
    """The alias "True" of a gold "Yes" and so on: the benchmark's instructions and its gold answers disagree."""
    return (OTHER_WORD[answer],) if record.get("type") == "true_or_false" and answer in OTHER_WORD else ()


def slug(text: str) -> str:
    """``text`` with everything but letters, digits, "_" and "." as one hyphen."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def optional_text(record: Record, name: str) -> str | None:
    """The text of a field, or None if it is absent or null."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f'field "{name}": expected text, {got(value)}')
    return value


def required_text(record: Record, name: str) -> str:
    """The text of a required field."""
    if record.get(name) is None:
        state = "null" if name in record else f"missing; the record has {columns_of(record) or 'no field'}"
        raise UserError(f'field "{name}": expected text, got {state}')
    return optional_text(record, name) or ""


def text_or_number(record: Record, name: str) -> str:
    """A text or integer field as text."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return required_text(record, name)


def text_list(record: Record, name: str) -> tuple[str, ...] | None:
    """A list of texts as a tuple, or None if it is absent or null."""
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f'field "{name}": expected a list of texts, {got(value)}')
    return tuple(value)
