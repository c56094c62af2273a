"""Writing a manifest, and reading it with every check."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from neurosig.manifest.rows import NESTED, FileEntry, Header, QuestionRow, Reason, RolloutRow
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file, sha256_text, write_atomic
from neurosig.runtime.strict import RowT, first_problem, read_rows
from neurosig.sampling.rollouts import Rollout

FORMAT = "neurosig-manifest"
SCHEMA_VERSION = "1.4"
HEADER = "manifest.json"
QUESTIONS, ROLLOUTS, SIGNALS, NEURONS = "questions.jsonl", "rollouts.jsonl", "signals.safetensors", "neurons.csv"
TEACHER_ROLLOUTS = "teacher_rollouts.jsonl"
FILES = (QUESTIONS, ROLLOUTS, SIGNALS, NEURONS)
"""Files of every manifest; one with a second stage also has `TEACHER_ROLLOUTS`."""

OF_OTHERS = ("nearest", "nearest_first", "random", "random_within_kind", "trajectory", "final_layer", "mutual", "none")
"""Context policies that never show a question its own rollout."""
READ_BY_TRAINING: Mapping[str, tuple[str, ...]] = {
    "model": ("id", "weights"),
    "tokenizer": ("sha256", "chat_template_sha256"),
    "options": (
        *("answer_format", "template", "system", "instruction", "choice_instruction"),
        *("student_thinking", "teacher_thinking", "demonstration_thoughts", "keep_truncated"),
        *("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"),
    ),
}
"""Required entries of the header's open fields."""
BEFORE_1_3 = {"teacher_thinking": None, "demonstration_thoughts": True, "keep_truncated": True, "positions": "all"}
"""What an export did before these were options; ``enable_thinking`` and ``trace`` were the names of two others."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A verified manifest in memory.

    Attributes:
        folder: Where it is.
        header: ``manifest.json``.
        rows: ``questions.jsonl``.
        rollouts: (question id, rollout id) -> a rollout of the student.
        teacher_rollouts: The same of the teacher with its context; empty without a second stage.
    """

    folder: Path
    header: Header
    rows: tuple[QuestionRow, ...]
    rollouts: Mapping[tuple[str, int], Rollout]
    teacher_rollouts: Mapping[tuple[str, int], Rollout] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """K, the rollouts of each question: what the rows hold, whatever the export's options say.

        Raises:
            UserError: Questions have different numbers of rollouts.
        """
        sizes = sorted({len(row.answers) for row in self.rows if row.vote is not None})
        if len(sizes) != 1:
            found = " and ".join(map(str, sizes)) or "none"
            raise UserError(f"manifest {self.folder}: every question needs the same number of rollouts, found {found}")
        return sizes[0]

    @property
    def selected(self) -> list[QuestionRow]:
        return [row for row in self.rows if row.selected]


def write_manifest(
    folder: Path,
    rows: Sequence[QuestionRow],
    rollouts: Iterable[Rollout],
    *,
    signals: bytes,
    neurons_csv: str,
    header: Mapping[str, Any],
    teacher_rollouts: Iterable[Rollout] = (),
) -> Header:
    """Write the manifest's files, then its header.

    Args:
        folder: An existing folder.
        rows: One row per input question, in input order.
        rollouts: In the order of ``rows``.
        signals: The bytes of ``signals.safetensors``.
        neurons_csv: The text of ``neurons.csv``.
        header: ``tool``, ``model``, ``tokenizer``, ``dataset``, ``sampling``, ``options``, ``answers``, ``lengths``;
            ``notes`` and ``functions``, if any.
        teacher_rollouts: Of a second stage, in the order of ``rows``.
    """
    rollout_lines = [rollout.to_json() for rollout in rollouts]
    contents: dict[str, tuple[bytes, int | None]] = {
        QUESTIONS: ("".join(row.model_dump_json() + "\n" for row in rows).encode(), len(rows)),
        ROLLOUTS: ("".join(line + "\n" for line in rollout_lines).encode(), len(rollout_lines)),
        SIGNALS: (signals, None),
        NEURONS: (neurons_csv.encode(), neurons_csv.count("\n") - 1),
    }
    if teacher := [rollout.to_json() for rollout in teacher_rollouts]:
        contents[TEACHER_ROLLOUTS] = ("".join(line + "\n" for line in teacher).encode(), len(teacher))
    files = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "rows": count}
        for name, (data, count) in contents.items()
    }
    reasons = Counter(row.reason for row in rows)
    body = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        **header,
        "counts": {
            "questions": len(rows),
            **{reason: reasons[reason] for reason in get_args(Reason) if reasons[reason]},
        },
        "files": files,
    }
    body = json.loads(json.dumps(body))
    body["content_sha256"] = _content_sha256(body)
    for name, (data, _) in contents.items():
        write_atomic(folder / name, data)
    write_atomic(folder / HEADER, json.dumps(body, indent=1, sort_keys=True) + "\n")
    return Header.model_validate(body)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and verify a manifest.

    Raises:
        UserError: The export is incomplete, a file changed after export, a row is malformed, belongs to no question or
            appears twice, or a context points nowhere or at its own question. The message names file, line and field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"manifest {folder}: no such folder")
    if not (folder / HEADER).is_file():
        raise UserError(f"manifest {folder}: incomplete export (no {HEADER}); rerun neurosig.export with --resume")
    header = _parse_header(folder / HEADER, (folder / HEADER).read_bytes())
    contents = {name: _verified(folder, name, entry) for name, entry in header.files.items()}
    rows = _read_rows(folder / QUESTIONS, contents[QUESTIONS], QuestionRow, header.files[QUESTIONS].rows)
    by_id = _by_id(folder / QUESTIONS, rows)
    rollouts, teacher = (
        _rollouts_of(folder / name, contents[name], header.files[name].rows, by_id) if name in contents else {}
        for name in (ROLLOUTS, TEACHER_ROLLOUTS)
    )
    _verify_contexts(folder / QUESTIONS, by_id, rollouts, header.options)
    return Manifest(folder, header, tuple(rows), rollouts, teacher)


def _rollouts_of(
    path: Path, data: bytes, expected: int | None, by_id: Mapping[str, QuestionRow]
) -> dict[tuple[str, int], Rollout]:
    rollouts: dict[tuple[str, int], Rollout] = {}
    for number, row in enumerate(_read_rows(path, data, RolloutRow, expected), start=1):
        place, key = f"{path}:{number}", (row.question_id, row.rollout_id)
        if row.question_id not in by_id:
            raise UserError(f'{place}: $.question_id: no question "{row.question_id}"')
        if key in rollouts:
            raise UserError(f'{place}: $.rollout_id: rollout {row.rollout_id} of "{row.question_id}" appears twice')
        rollouts[key] = Rollout(**row.model_dump())
    return rollouts


def _parse_header(path: Path, text: bytes) -> Header:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON ({error})") from error
    version = str(raw.get("schema_version")) if isinstance(raw, dict) else "none"
    if version in ("1.0", "1.1"):
        raise UserError(f"{path}: schema version {version} has other fields than {SCHEMA_VERSION}; export again")
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise UserError(
            f"{path}: schema version {version}, this neurosig reads {SCHEMA_VERSION}; upgrade or export again"
        )
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error, Header, NESTED)}") from error
    if header.content_sha256 != _content_sha256(raw):
        raise UserError(f"{path}: content_sha256 differs from the header's content; export again")
    (options := header.options).update({"positions": options.pop("trace")} if "trace" in options else {})
    if version == "1.2":
        options.update({**BEFORE_1_3, "student_thinking": options.get("enable_thinking"), **options})
    needed = ((part, name) for part, names in READ_BY_TRAINING.items() for name in names)
    if gap := next((f"{part}.{name}" for part, name in needed if name not in getattr(header, part)), None):
        raise UserError(f"{path}: $.{gap}: field required; export again")
    if lacking := AnswerReader().record().keys() ^ header.answers.keys():
        raise UserError(f"{path}: $.answers.{min(lacking)}: field missing or unknown; export again")
    if absent := sorted({*FILES} - {*header.files}):
        raise UserError(f"{path}: files: {', '.join(absent)} missing; export again")
    return header


def _content_sha256(header: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps({k: v for k, v in header.items() if k != "content_sha256"}, sort_keys=True))


def _verified(folder: Path, name: str, entry: FileEntry) -> bytes:
    """The hashed bytes of a file with rows; of another, whose hash is checked too, none."""
    path = folder / name
    if "\0" in name or Path(name).name != name or path.resolve().parent != folder.resolve():
        raise UserError(f'{folder / HEADER}: files["{name}"]: path leaves the manifest folder')
    if not path.is_file():
        raise UserError(f"{path}: missing, though {HEADER} lists it; export again")
    data = path.read_bytes() if name in (QUESTIONS, ROLLOUTS, TEACHER_ROLLOUTS) else b""
    if (hashlib.sha256(data).hexdigest() if data else sha256_file(path)) != entry.sha256:
        raise UserError(f"{path}: sha256 differs from {HEADER}; it was changed after export, export again")
    return data


def _read_rows(path: Path, data: bytes, kind: type[RowT], expected: int | None) -> list[RowT]:
    rows = read_rows(path, data, kind, NESTED)
    if len(rows) != expected:
        raise UserError(f"{path}: {len(rows)} rows, {HEADER} says {expected}; export again")
    return rows


def _by_id(path: Path, rows: Sequence[QuestionRow]) -> dict[str, QuestionRow]:
    """Rows by id in file order, after checking that ids are unique and each row is consistent."""
    by_id: dict[str, QuestionRow] = {}
    for number, row in enumerate(rows, start=1):
        if row.question_id in by_id:
            raise UserError(
                f'{path}:{number}: $.question_id: "{row.question_id}" appears on an earlier line; export again'
            )
        try:
            question = row.as_question()
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if question.text_sha256 != row.text_sha256:
            raise UserError(f"{path}:{number}: $.text_sha256: not the hash of this question; export again")
        if row.selected != (row.reason == "selected"):
            raise UserError(f'{path}:{number}: $.selected: contradicts the reason "{row.reason}"; export again')
        if row.vote is not None and row.vote.n != len(row.answers):
            raise UserError(f"{path}:{number}: $.vote.n: {row.vote.n}, but there are {len(row.answers)} answers")
        if len(row.raw_answers) != len(row.answers):
            raise UserError(f"{path}:{number}: $.raw_answers: {len(row.raw_answers)} of {len(row.answers)} answers")
        by_id[row.question_id] = row
    return by_id


def _verify_contexts(
    path: Path,
    by_id: Mapping[str, QuestionRow],
    rollouts: Mapping[tuple[str, int], Rollout],
    options: Mapping[str, Any],
) -> None:
    own_too = options.get("context_policy") not in OF_OTHERS
    for number, row in enumerate(by_id.values(), start=1):
        if row.privileged_context is not None and row.context:
            raise UserError(f"{path}:{number}: $.context: demonstrations beside a privileged_context; export again")
        for index, item in enumerate(row.context):
            where = f"{path}:{number}: $.context[{index}]"
            if (item.question_id, item.rollout_id) not in rollouts:
                raise UserError(f'{where}: no rollout {item.rollout_id} of question "{item.question_id}"')
            if rollouts[item.question_id, item.rollout_id].finish_reason == "length" and not options["keep_truncated"]:
                raise UserError(f"{where}: a rollout that was cut off is no demonstration; export again")
            own = own_too and item.question_id == row.question_id
            if not own and by_id[item.question_id].text_sha256 == row.text_sha256:
                raise UserError(f"{where}: a question is its own context")
