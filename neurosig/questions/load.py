"""Questions: the record, the bundled sets, and sources such as files, folders and Hugging Face data sets.

    load_questions("world-facts:train")
    load_questions(["my.jsonl", "hf:TIGER-Lab/MMLU-Pro:test"], limit=500)
    load_questions("exam.csv", fields=("question=stem", "choices=A,B,C,D", "answer=key"))

A question has its gold answer for evaluation only; ``without_answers`` removes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from neurosig.questions.answers.normal import normalise
from neurosig.questions.columns import Columns, columns_of, got, parse_fields, shown
from neurosig.questions.formats import Fields, Turn, adapt
from neurosig.questions.gold import is_completion, parse_gold
from neurosig.questions.records import FORMATS, Rows, format_of, read_file, read_hub, read_jsonl, read_saved_dataset
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text

__all__ = ["Question", "Split", "load_questions", "split_of", "without_answers"]

log = logging.getLogger(__name__)

Split = Literal["train", "dev", "test"]
SPLITS = ("train", "dev", "test", "all")
DATA_DIR = Path(__file__).parent / "bundled"
BUNDLED = {
    "geography": DATA_DIR / "geography.jsonl",
    "language": DATA_DIR / "language.jsonl",
    "chemistry": DATA_DIR / "chemistry.jsonl",
    "world-facts": DATA_DIR / "geography.jsonl",
    "procedures": DATA_DIR / "procedures.jsonl",
    "organism-facts": DATA_DIR / "organism-facts.jsonl",
}
IN_FOLDERS = (".jsonl", ".parquet", ".csv", ".tsv")
"""Endings of the files of a folder that are read; tables only where it has no others; a .json may be any."""
NO_ID = "?"
UNPRINTABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Question:
    """One question; ``answer`` and ``aliases`` are gold and used in evaluation only.

    Raises:
        UserError: a text is empty or contains NUL or a lone surrogate, there are fewer than 2 or more than 26 choices,
            a gold answer is not the letter of a choice or not in the answer space, or the answer space is unknown,
            empty, ambiguous or beside choices. The message names the field.
    """

    id: str
    domain: str
    question: str
    choices: tuple[str, ...] | None = None
    """Texts of choices A, B, ...; None for a free-form question."""
    answer: str | None = None
    """Gold answer: the letter of a choice, or text for a free-form question."""
    aliases: tuple[str, ...] = ()
    """Further gold answers in the same form."""
    kind: str | None = None
    """Type within the domain, such as "capital"; only the within-kind controls use it."""
    line: int = 0
    """1-based line or row of the source; 0: not from a file."""
    answer_space: str | tuple[tuple[str, ...], ...] | None = None
    """All possible answers of a free-form question, each with its aliases, or the name of a bundled space such as
    "countries"; None: not known. It never tells which is right."""
    system: str | None = None
    """Its own system message, which replaces that of the command's options."""
    earlier_turns: tuple[Turn, ...] = ()
    """Role ("user" or "assistant") and text of the chat before the question."""
    as_is: bool = False
    """Whether the text is a whole prompt, sent without lettered choices and instruction line."""
    privileged_context: str | None = None
    """What the teacher sees with the question instead of demonstrations, such as a reference solution."""

    def __post_init__(self) -> None:
        for name in ("id", "domain", "question"):
            check_text(getattr(self, name), name)
        object.__setattr__(self, "question", self.question.strip())
        for name in ("answer", "kind", "system", "privileged_context"):
            if getattr(self, name) is not None:
                check_text(getattr(self, name), name)
        for role, text in self.earlier_turns:
            check_text(text, "earlier_turns")
            if role not in ("user", "assistant"):
                raise UserError(f'field "earlier_turns": expected turns of user and assistant, {got(role)}')
        for alias in self.aliases:
            check_text(alias, "aliases")
        if self.choices is not None:
            check_choices(self)
        if self.answer_space is not None:
            check_answer_space(self)

    @property
    def text_sha256(self) -> str:
        """SHA-256 of NFC(question), a newline, and the NFC choices joined by newlines.

        What else the student reads of the question follows: its system message, its earlier turns, and that it is sent
        as it is.
        """
        turns = (("system", self.system), *self.earlier_turns, ("as_is", "" if self.as_is else None))
        more = [f"\0{role}\0{text}" for role, text in turns if text is not None]
        lines = (self.question, *(self.choices or ("",)), *more)
        return sha256_text("\n".join(unicodedata.normalize("NFC", text) for text in lines))


WITHOUT_GOLD = tuple(name for name in Question.__dataclass_fields__ if name not in ("id", "answer", "aliases"))
"""Fields of a question besides its id and its gold answer."""


def check_text(value: str, name: str) -> None:
    """Raise UserError if a text is empty or cannot be written as UTF-8."""
    if not value.strip():
        raise UserError(f'field "{name}": expected text, {got(value)}')
    if bad := UNPRINTABLE.search(value):
        what = "a NUL character" if bad[0] == "\x00" else f"the lone surrogate U+{ord(bad[0]):04X}"
        raise UserError(f'field "{name}": holds {what} at character {bad.start() + 1}')


def check_choices(question: Question) -> None:
    """Raise UserError if choices are too few, too many or empty, or a gold answer is not the letter of one."""
    choices = question.choices or ()
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise UserError(f'field "choices": expected null or 2 to 26 texts, got {len(choices)}')
    for choice in choices:
        check_text(choice, "choices")
    letters = ascii_uppercase[: len(choices)]
    gold = {"aliases": question.aliases, "answer": (question.answer,) if question.answer is not None else ()}
    for name, answers in gold.items():
        for answer in answers:
            if len(answer) != 1 or answer not in letters:
                raise UserError(f'field "{name}": expected a letter of A-{letters[-1]}, {got(answer)}')


@dataclass(frozen=True, slots=True)
class Ids:
    """Ids read so far: where each is from, and how often an id was made of the same text."""

    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    repeats: Counter[str] = field(default_factory=Counter)

    def made(self, name: str) -> str:
        """An id made of a text's hash, with a number from the second time on."""
        self.repeats[name] += 1
        return name if self.repeats[name] == 1 else f"{name}-{self.repeats[name]}"


_SPACE_NAMES: dict[str | tuple[tuple[str, ...], ...], frozenset[str]] = {}
"""Checked answer spaces: their names, normalised."""


def check_answer_space(question: Question) -> None:
    """Raise UserError if the answer space is no set of answers, or the gold answer is not one of them."""
    space = question.answer_space
    if space is None or question.choices is not None:
        raise UserError('field "answer_space": the choices are all possible answers; leave out one of the two fields')
    if space not in _SPACE_NAMES:
        _SPACE_NAMES[space] = _names_of_space(question)
    if question.answer is not None and normalise(question.answer) not in _SPACE_NAMES[space]:
        raise UserError(f'field "answer": not a member of field "answer_space", {got(question.answer)}')


def _names_of_space(question: Question) -> frozenset[str]:
    from neurosig.questions.answers.spaces import members, names

    if isinstance(question.answer_space, str):
        if question.answer_space not in names():
            raise UserError(
                f'field "answer_space": no such space, {got(question.answer_space)}; the bundled ones are '
                f"{', '.join(names())}"
            )
        return frozenset(normalise(name) for member in members(question) for name in member)
    found: set[str] = set()
    for member in members(question):
        for name in member:
            check_text(name, "answer_space")
        own = {normalise(name) for name in member}
        if not member or "" in own:
            raise UserError(f'field "answer_space": a member without a letter or digit, {got(list(member))}')
        if twice := found & own:
            raise UserError(f'field "answer_space": "{shown(min(twice))}" is in two members')
        if len(set(member)) < len(member):
            raise UserError(f'field "answer_space": a member has the same name twice, {got(list(member))}')
        found |= own
    if not found:
        raise UserError('field "answer_space": expected at least one member, got an empty list')
    return frozenset(found)


def load_questions(
    sources: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    limit: int | None = None,
    fields: Sequence[str] = (),
) -> list[Question]:
    """Read and check the questions of one or more sources, in order.

    Args:
        sources: a bundled set (``geography``, ``language``, ``chemistry``; ``world-facts`` is geography;
            ``procedures`` and ``organism-facts`` are the model organism's), optionally with ``:train``, ``:dev``,
            ``:test`` or ``:all``; a .jsonl, .json, .csv or .tsv file, also as .gz or .zst, or a .parquet file; a
            folder of such files or one written by ``datasets.save_to_disk``; or ``hf:ORG/NAME[/SET][:SPLIT]``.
        split: split of the bundled sets whose source names none (default: all).
        limit: return only the first ``limit`` questions, after all were read and checked.
        fields: ``FIELD=COLUMN`` words for the fields whose columns have other names
            (`neurosig.questions.columns.parse_fields`); a bundled set needs none.

    Returns:
        The questions. One without an id gets the first 16 digits of its ``text_sha256``, and a number if the same
        question was read before.

    Raises:
        UserError: a source is missing, empty, unreadable or of unknown format; a record is malformed; no record has a
            column of ``fields``; or an id occurs twice. The message names file, line and field.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not listed:
        raise UserError(f"no dataset; name a file, a folder, hf:ORG/NAME or one of {', '.join(BUNDLED)}")
    if split is not None and split not in SPLITS:
        raise UserError(f'split "{split}" is not one of {", ".join(SPLITS)}')
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    questions: list[Question] = []
    columns = parse_fields(fields)
    ids = Ids()
    for source in listed:
        read = read_source(str(source), split, columns, ids)
        log.info("%s: %d questions", source, len(read))
        questions += read
    warn_repeated_texts(questions)
    return questions[:limit]


def read_source(source: str, split: str | None, columns: Columns, ids: Ids) -> list[Question]:
    """The questions of one source; their ids are added to ``ids``."""
    name, _, part = source.partition(":")
    if name in BUNDLED:
        if part and part not in SPLITS:
            raise UserError(f'dataset {source}: split "{part}" is not one of {", ".join(SPLITS)}')
        wanted = part or split or "all"
        rows = read_jsonl(BUNDLED[name])
        bundled = checked(rows, str(BUNDLED[name]), name, {}, ids)
        return [question for question in bundled if wanted in ("all", split_of(question.id))]
    if name == "hf":
        repo, _, hub_split = part.partition(":")
        org, *names = repo.split("/")
        if len(names) not in (1, 2):
            raise UserError(f"dataset {source}: expected hf:ORG/NAME, hf:ORG/NAME/SET or one of them with :SPLIT")
        rows = read_hub(f"{org}/{names[0]}", names[1] if names[1:] else None, hub_split or None)
        questions = list(checked(rows, source, "-".join(names), columns, ids))
    else:
        questions = [
            question
            for path, rows in files_of(Path(source))
            for question in checked(rows, str(path), format_of(path)[0], columns, ids)
        ]
    if not questions:
        raise UserError(f"dataset {source}: 0 questions")
    return questions


def files_of(path: Path) -> Iterator[tuple[Path, Rows]]:
    """The files of a path, each with its rows; a folder is searched in sorted order."""
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            yield path, read_saved_dataset(path)
            return
        inside = sorted(file for file in path.rglob("*") if format_of(file)[1] in IN_FOLDERS and file.is_file())
        ours = [file for file in inside if format_of(file)[1] in IN_FOLDERS[:2]]
        if not inside:
            raise UserError(f"dataset {path}: is a directory without {', '.join(IN_FOLDERS)} files")
        for file in ours or inside:  # a table beside them is no set of questions as a rule
            yield file, read_file(file)
    elif not path.exists():
        raise UserError(f"dataset {path}: no such file; the bundled sets are {', '.join(BUNDLED)}")
    elif format_of(path)[1] in FORMATS:
        yield path, read_file(path)
    else:
        raise UserError(f'dataset {path}: unknown format "{path.suffix}"; expected {", ".join(FORMATS)}')


def checked(rows: Rows, where: str, stem: str, columns: Columns, ids: Ids) -> Iterator[Question]:
    """Questions of rows; their ids are checked against ``ids``, open-ended records are skipped and counted."""
    skipped, found = 0, set[str]()
    record: Mapping[str, Any] = {}
    for line, record in rows:
        try:
            fields = adapt(record, line, stem, columns, found)
            if fields is None:
                skipped += 1
                continue
            question = _question(fields, line, ids)
        except UserError as error:
            raise UserError(f"{where}:{line}: {error}") from None
        if question.id in ids.places:
            file, earlier = ids.places[question.id]
            place = f"on line {earlier}" if file == where else f"in {file}:{earlier}"
            raise UserError(f'{where}:{line}: id "{shown(question.id)}" already {place}; ids must be unique')
        ids.places[question.id] = (where, line)
        yield question
    if record and (unknown := [name for names in columns.values() for name in names if name not in found]):
        has = columns_of(record)
        raise UserError(f'{where}: --fields: no record has a column "{shown(unknown[0])}"; the last one has {has}')
    if skipped:
        log.warning("%s: skipped %d open-ended records (no choices and no short answer)", where, skipped)


def _question(fields: Fields, line: int, ids: Ids) -> Question:
    """The question, with an id, and with gold answers parsed as completions are where they need it."""
    values: dict[str, Any] = {name: getattr(fields, name) for name in fields.__slots__ if name != "answer_column"}
    values |= {"line": line, "id": NO_ID if fields.id is None else fields.id}
    letters = [*ascii_uppercase[: len(fields.choices or ())]]
    golds = (fields.answer, *fields.aliases)
    if any(gold is not None and (gold not in letters if letters else is_completion(gold)) for gold in golds):
        unlabelled = Question(**{**values, "answer": None, "aliases": ()})
        answer, *aliases = (gold and parse_gold(gold, unlabelled) for gold in golds)
        for name, gold in ((fields.answer_column, answer), *(("aliases", alias) for alias in aliases)):
            if letters and gold is not None and gold not in letters:
                raise UserError(f'field "{name}": expected a letter of A-{letters[-1]}, {got(gold)}')
        values |= {"answer": answer, "aliases": tuple(aliases)}
    question = Question(**values)
    return question if fields.id is not None else replace(question, id=ids.made(question.text_sha256[:16]))


def warn_repeated_texts(questions: Sequence[Question]) -> None:
    """Warn once, with a count and an example, if questions share text and choices under different ids."""
    first: dict[str, str] = {}
    pairs = [
        (earlier, question.id)
        for question in questions
        if (earlier := first.setdefault(question.text_sha256, question.id)) != question.id
    ]
    if pairs:
        log.warning("%d questions repeat the text of another id (first: %s and %s)", len(pairs), *pairs[0])


def without_answers(questions: Iterable[Question]) -> list[Question]:
    """The same questions in the same order, without ``answer`` and ``aliases``."""
    return [replace(question, answer=None, aliases=()) for question in questions]


def questions_sha256(questions: Iterable[Question]) -> str:
    """Hash of ids, texts, answer spaces and gold answers, in order."""
    hashed = [[q.id, q.text_sha256, q.answer_space, q.answer, *q.aliases] for q in questions]
    return sha256_text(json.dumps(hashed))


def split_of(question_id: str) -> Split:
    """Fixed split of an id by SHA-256 of ``neurosig:ID``: 45% train, 15% dev, 40% test."""
    bucket = int.from_bytes(hashlib.sha256(f"neurosig:{question_id}".encode()).digest()[:8], "big") % 100
    return "train" if bucket < 45 else "dev" if bucket < 60 else "test"
