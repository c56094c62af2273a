"""From a question record to the fields of a Question, whatever shape its choices and its answer have.

`adapt` takes one record and returns ``Fields``, or None for an item without choices and without a short answer. It
raises UserError; its message names the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from neurosig.questions.columns import (
    ASKED,
    Columns,
    Record,
    chosen,
    got,
    optional_text,
    required_text,
    structured,
    text_list,
    text_or_number,
)
from neurosig.questions.released import as_read
from neurosig.runtime.errors import UserError

OTHER_WORD = {"Yes": "True", "No": "False", "True": "Yes", "False": "No"}
OTHER_NAMES = {
    "question": ("question_stem",),
    "choices": ("options",),
    "answer": ("answerKey",),
    "kind": ("task", "category", "subject"),
}
"""Field -> the names of columns that replace it, in the order in which they are tried."""
ROLES = ("system", "user", "assistant")
LETTERED = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):])\s+(\S.*)", re.DOTALL)

Turn = tuple[str, str]
"""Role and text of a message before the question."""


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one question with checked types; `Question` checks the contents.

    Attributes:
        id: None where the record has none.
        answer: The gold answer; of a multiple-choice question a letter, or a text that still has to be parsed.
        answer_column: Where it is from, for messages.
    """

    id: str | None
    domain: str
    question: str
    choices: tuple[str, ...] | None
    answer: str | None
    aliases: tuple[str, ...]
    kind: str | None
    answer_space: str | tuple[tuple[str, ...], ...] | None = None
    system: str | None = None
    earlier_turns: tuple[Turn, ...] = ()
    as_is: bool = False
    privileged_context: str | None = None
    answer_column: str = "answer"


def adapt(record: Record, line: int, stem: str, columns: Columns, found: set[str]) -> Fields | None:
    """The fields of a record of any known shape; None for an open-ended item.

    Args:
        record: one parsed record.
        line: its 1-based line.
        stem: the domain where the record names none.
        columns: where fields have other names; with one of question, prompt, messages, choices and answer among them,
            the record is not taken for an item of a released set.
        found: gets the names of those columns that the record has.
    """
    values = chosen(record, columns, found) if columns else {}
    renamed = values.keys() & set(ASKED)
    if values.keys() & {*ASKED, "choices", "answer"}:
        others = {*ASKED, *OTHER_NAMES["question"]} if renamed else set()
        shape: Record = {name: value for name, value in record.items() if name not in others}
    else:
        read = as_read(record, line, stem)
        if read is None:
            return None
        shape = read
    return adapt_record({**shape, **values} if values else shape, stem)


def adapt_record(record: Record, stem: str) -> Fields:
    """The fields of a record with our names or `OTHER_NAMES`.

    ``question`` is asked with our instruction line; a ``prompt``, or the last of ``messages``, is sent as it is. The
    ``instruction`` of an item without choices is put before its question, as it says which words answer it.
    """
    question, as_is, turns = asked_text(record)
    choices, labels, as_given = labelled_choices(named(record, "choices"))
    column = next((name for name in ("answer", *OTHER_NAMES["answer"]) if record.get(name) is not None), "answer")
    answer, aliases = gold_answers(record, column, has_choices=bool(choices))
    if choices:
        answer = letter_of(answer, choices, as_given, labels, column)
        aliases = tuple(str(letter_of(alias, choices, as_given, labels, "aliases")) for alias in aliases)
    instruction = optional_text(record, "instruction")
    if instruction and not choices and not as_is and question.strip():
        question = f"{instruction.strip()}\n\n{question}"
    if as_is and (lacking := [choice for choice in choices if choice not in question]):
        raise UserError(
            f'field "choices": a prompt is sent as it is, and this one lacks the choice {got(lacking[0])[4:]}; have '
            "the choices listed with --fields question=COLUMN instead"
        )
    domain = text_or_number(record, "domain")
    system = next((text for role, text in turns if role == "system"), optional_text(record, "system"))
    return Fields(
        id=text_or_number(record, "id"),
        domain=stem if domain is None else domain,
        question=question,
        choices=choices or (() if isinstance(record.get("choices"), list) else None),
        answer=answer,
        aliases=tuple(alias for alias in dict.fromkeys(aliases) if alias != answer),
        kind=kind_of(record),
        answer_space=answer_space(record),
        system=system or None,
        earlier_turns=tuple(turn for turn in turns if turn[0] != "system"),
        as_is=as_is,
        privileged_context=joined_text(record, "privileged_context"),
        answer_column=column,
    )


def named(record: Record, field: str) -> Any:
    """The value of a field, or of the first of its `OTHER_NAMES` that is not empty."""
    values = (record.get(name) for name in (field, *OTHER_NAMES[field]))
    return next((value for value in values if value not in (None, "")), None)


def kind_of(record: Record) -> str | None:
    """The kind; what replaces it counts where it is a text or a number, as such names have many meanings."""
    others = (record.get(name) for name in OTHER_NAMES["kind"])
    other = next((value for value in others if type(value) in (str, int) and value != ""), None)
    return text_or_number(record, "kind") or text_or_number({"kind": other}, "kind")


def asked_text(record: Record) -> tuple[str, bool, tuple[Turn, ...]]:
    """What is asked, whether it is sent as it is, and the turns before it."""
    for name in ("question", *OTHER_NAMES["question"]):
        if record.get(name) is not None:
            if not isinstance(as_is := record.get("as_is", False), bool):
                raise UserError(f'field "as_is": expected true or false, {got(as_is)}')
            return required_text(record, name), as_is, earlier_turns(record)
    for name in ("prompt", "messages"):
        value = structured(record.get(name)) if name == "messages" else record.get(name)
        if isinstance(value, list):
            *before, (role, text) = turns_of(value, name)
            if role != "user":
                raise UserError(f'field "{name}": the last message is from the {role}; expected the user\'s question')
            return text, True, tuple(before)
        if value is not None and name == "messages":
            raise UserError(f'field "messages": expected a list of messages with role and content, {got(value)}')
    if record.get("prompt") is not None:
        return required_text(record, "prompt"), True, ()
    try:
        return required_text(record, "question"), False, ()
    except UserError as error:
        how = "" if "question" in record else "; name the column that asks it: --fields question=COLUMN"
        raise UserError(f"{error}{how}") from None


def earlier_turns(record: Record) -> tuple[Turn, ...]:
    """The field of that name: pairs of role and text, as `Question` has them."""
    pairs = record.get("earlier_turns") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f'field "earlier_turns": expected a list of pairs of role and text, {got(pairs)}')
    return turns_of([{"role": role, "content": text} for role, text in pairs], "earlier_turns") if pairs else ()


def turns_of(messages: Sequence[Any], name: str) -> tuple[Turn, ...]:
    """Role and text of chat messages, of which only the first may be the system's."""
    turns = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f'field "{name}[{place}]": expected an object with role and content, {got(message)}')
        role, content = message["role"], f"{name}[{place}].content"
        if role not in ROLES or (role == "system" and place):
            expected = ", ".join(ROLES) if not place else "user, assistant"
            raise UserError(f'field "{name}[{place}].role": expected one of {expected}, {got(role)}')
        turns.append((str(role), required_text({content: message["content"]}, content)))
    if not turns:
        raise UserError(f'field "{name}": expected a list of messages, got an empty one')
    return tuple(turns)


def labelled_choices(value: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Texts of choices without a letter of their own, their labels if they have any, and their texts as given.

    Choices may be a list of texts or of {text, label}, an object {text: [...], label: [...]} or one of label: text.
    """
    value = structured(value)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "text" in item for item in value):
        value = {name: [item.get(name) for item in value] for name in ("text", "label") if name in value[0]}
    labels: tuple[str, ...] = ()
    if value is None:
        return (), (), ()
    if isinstance(value, Mapping) and "text" in value and value.keys() <= {"text", "label"}:
        texts, labels = text_list(value, "text") or (), text_list(value, "label") or ()
        if labels and len(texts) != len(labels):
            raise UserError(f'field "choices": {len(texts)} texts but {len(labels)} labels')
    elif isinstance(value, Mapping):
        labels = tuple(str(label) for label in value if value[label] is not None)
        used = (text for text in value.values() if text is not None)
        texts = tuple(text_or_number({"choices": text}, "choices") or "" for text in used)
    else:
        texts = text_list({"choices": value}, "choices") or ()
    return without_letters(texts), labels, texts


def without_letters(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Choices that carry their letters, "A. x", "(B) y", "c) z", without them; others as they are."""
    found = [LETTERED.fullmatch(choice) for choice in choices]
    letters = "".join((match[1] or match[2]).upper() for match in found if match)
    return tuple(match[3] for match in found if match) if letters == ascii_uppercase[: len(choices)] else choices


def gold_answers(record: Record, column: str, *, has_choices: bool) -> tuple[Any, tuple[str, ...]]:
    """The gold answer as the column has it, and the further ones; of a list the first is the answer.

    Without choices it is a text; with choices it may be the number of one.
    """
    answer, answers = record.get(column), record.get("answers")
    if isinstance(answers, Mapping) and "text" in answers:  # SQuAD's, which also say where the text is
        answers = answers["text"]
    if isinstance(answer, list):
        answer, answers = None, answer
    listed = text_list({"answers": answers}, "answers", numbers=True) or ()
    further = [*(text_list(record, "aliases", numbers=True) or ()), *listed]
    if answer == "" and column != "answer":  # a released split without gold answers
        answer = None
    if answer is None and listed:
        answer = listed[0]
    if isinstance(answer, bool) and not has_choices:
        answer, further = ("Yes" if answer else "No"), [str(answer), *further]
    elif answer is not None and not (has_choices and isinstance(answer, int)):
        answer = text_or_number({column: answer}, column)
    if record.get("type") == "true_or_false" and answer in OTHER_WORD:
        further.append(OTHER_WORD[answer])  # the benchmark's instructions and its gold answers disagree
    return answer, tuple(further)


def letter_of(
    answer: Any, choices: Sequence[str], as_given: Sequence[str], labels: Sequence[str], name: str
) -> str | None:
    """The letter of the choice that a label, a letter, a choice's text or a 0-based index names.

    A number is a label where labels are numbers, else an index. A text that names none is returned as it is.
    """
    if answer is None:
        return None
    letters, is_number = ascii_uppercase[: len(choices)], isinstance(answer, int)
    for known in (labels,) if is_number else (labels or letters, as_given, choices, letters):
        if str(answer) in [*known]:
            return letters[[*known].index(str(answer))]
    is_index = type(answer) is int or (isinstance(answer, str) and answer.isdecimal() and len(answer) < 3)
    if is_index and not any(label.isdecimal() for label in labels) and 0 <= int(answer) < len(letters):
        return letters[int(answer)]
    if is_number:
        raise UserError(f'field "{name}": expected a letter of A-{letters[-1]}, {got(answer)}')
    return str(answer)


def answer_space(record: Record) -> str | tuple[tuple[str, ...], ...] | None:
    """All possible answers: the name of a bundled space, a list of texts, or a list of lists, an answer and aliases."""
    value: Any = structured(record.get("answer_space"))
    if value is None or isinstance(value, str):
        return value
    members: list[Any] = [[item] if isinstance(item, str) else item for item in value] if type(value) is list else [0]
    if not all(isinstance(member, list) and all(isinstance(name, str) for name in member) for member in members):
        raise UserError(
            f'field "answer_space": expected the name of a space, a list of texts or a list of lists of texts, '
            f"{got(value)}"
        )
    return tuple(tuple(member) for member in members)


def joined_text(record: Record, name: str) -> str | None:
    """The text of a field, or its texts as paragraphs; None if they are empty."""
    value = record.get(name)
    text = "\n\n".join(text_list(record, name) or ()) if isinstance(value, list) else optional_text(record, name) or ""
    return text.strip() or None
