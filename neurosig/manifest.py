"""The selection manifest: the only thing that export passes to distillation.

A folder of ``questions.jsonl`` (one row per input question, in input order), ``rollouts.jsonl``,
``signals.safetensors``, ``neurons.csv`` and, written last, ``manifest.json``: its presence means that the export is
complete. It has no gold answer. Same inputs and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from neurosig.models.load import ModelInfo
from neurosig.questions.load import WITHOUT_GOLD, Question
from neurosig.questions.prompts import PromptConfig, teacher_config
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file, sha256_text, write_atomic
from neurosig.runtime.strict import RowT, Strict, first_problem, read_rows
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout

FORMAT = "neurosig-manifest"
SCHEMA_VERSION = "1.3"
HEADER = "manifest.json"
QUESTIONS, ROLLOUTS, SIGNALS, NEURONS = "questions.jsonl", "rollouts.jsonl", "signals.safetensors", "neurons.csv"
FILES = (QUESTIONS, ROLLOUTS, SIGNALS, NEURONS)

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

Reason = Literal["selected", "too_long", "no_parse", "tie", "low_agreement", "cut_off", "hallucination", "no_context"]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class VoteRecord(Strict):
    """A majority vote: votes of the winner, number of rollouts, and number of candidates with that many votes."""

    count: Count
    n: Annotated[Count, Field(ge=1)]
    n_tied: Count


class DemonstrationRecord(Strict):
    """One demonstration of the teacher's context: a rollout of another question, and how similar that question is."""

    question_id: str
    rollout_id: Count
    similarity: float


class QuestionRow(Strict):
    """One input question and the decisions about it.

    Attributes:
        answer_space: See `neurosig.questions.load.Question`, as for the four fields after it.
        privileged_context: Its teacher sees it instead of demonstrations, so ``context`` is empty.
        raw_answers: What the parser read in each of the K rollouts, ``None`` in one without an answer.
        answers: The candidate that each rollout votes for; see `neurosig.questions.reader.Reading`.
        pseudo_label: The majority answer.
        scores: All hallucination scores, higher is less trustworthy.
        selected: Whether distillation trains on the question.
        reason: Why it is selected or not.
        context: The teacher's demonstrations in prompt order.
        weight: Weight of its rollouts in the loss.
    """

    question_id: str
    line: Count
    domain: str
    kind: str | None
    question: str
    choices: tuple[str, ...] | None
    text_sha256: str
    answer_space: str | tuple[tuple[str, ...], ...] | None = None
    system: str | None = None
    earlier_turns: tuple[tuple[str, str], ...] = ()
    as_is: bool = False
    privileged_context: str | None = None
    raw_answers: tuple[str | None, ...] = ()
    answers: tuple[str | None, ...]
    vote: VoteRecord | None
    pseudo_label: str | None
    scores: dict[str, float]
    selected: bool
    reason: Reason
    context: tuple[DemonstrationRecord, ...]
    weight: Annotated[float, Field(ge=0)]

    def as_question(self) -> Question:
        """The question, without a gold answer."""
        return Question(id=self.question_id, **{name: getattr(self, name) for name in WITHOUT_GOLD})


class RolloutRow(Strict):
    """A line of ``rollouts.jsonl``; the fields of `Rollout`."""

    question_id: str
    rollout_id: Count
    text: str
    completion_ids: tuple[Count, ...] = Field(min_length=1)
    finish_reason: Literal["stop", "length"]
    mean_logprob: float | None
    mean_entropy: float | None
    mean_self_certainty: float | None
    answer_start: Count = 0


class FileEntry(Strict):
    """Hash, bytes and rows (``None`` for a file without rows) of one file of the manifest."""

    sha256: str
    bytes: Count
    rows: Count | None


NESTED: Mapping[str, type[Strict]] = {"vote": VoteRecord, "context": DemonstrationRecord, "files": FileEntry}


class Header(Strict):
    """``manifest.json``. ``model`` and ``tokenizer`` are the fingerprints of the model that made the rollouts,
    ``answers`` is the record of their `AnswerReader`, ``lengths`` their `neurosig.sampling.lengths.completion_lengths`;
    ``notes`` say what an option could not decide, such as a cut through equal scores."""

    format: Literal["neurosig-manifest"]
    schema_version: str
    content_sha256: str
    tool: dict[str, str]
    model: dict[str, Any]
    tokenizer: dict[str, str | None]
    dataset: dict[str, Any]
    sampling: dict[str, Any]
    options: dict[str, Any]
    answers: dict[str, Any]
    counts: dict[str, int]
    lengths: dict[str, float] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    notes: list[str] = Field(default_factory=list)

    def answer_reader(self, answer_parser: str | None = None) -> AnswerReader:
        """How the rollouts were parsed and merged; see `AnswerReader.from_record`."""
        return AnswerReader.from_record(self.answers, answer_parser)

    def prompt_config(self) -> PromptConfig:
        """Wording of the student's prompts."""
        names = ("system", "instruction", "choice_instruction", "student_thinking")
        return PromptConfig(*(self.options[name] for name in names))

    def teacher_prompt_config(self) -> PromptConfig:
        """Wording of the teacher's prompts."""
        own = self.options["teacher_thinking"], self.options["demonstration_thoughts"]
        return teacher_config(self.prompt_config(), *own)

    def adapter(self, given: Path | None = None) -> Path | None:
        """Where the adapter is that made the manifest: ``given``, or where it was; ``None`` if there was none."""
        recorded = self.options.get("adapter")
        return given if given is not None or recorded is None else Path(recorded)

    def sampling_config(self, *, num_generations: int, seed: int, **changes: Any) -> SamplingConfig:
        """The export's sampling options with another K and seed, and with ``changes``."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
        options = {name: self.options[name] for name in names} | changes
        return SamplingConfig(num_generations=num_generations, seed=seed, **options)

    def differences(self, model: ModelInfo) -> list[str]:
        """What of ``model`` is not of the model that made the manifest: weights, adapter, tokenizer, chat template."""

        def short(digest: Mapping[str, str] | str | None) -> str:
            return str(next(iter(digest.values()), None) if isinstance(digest, Mapping) else digest)[:12]

        pairs = (
            ("weights", self.model["weights"], model.weights),
            ("adapter", self.model.get("adapter"), model.adapter),
            ("tokenizer", self.tokenizer["sha256"], model.tokenizer_sha256),
            ("chat template", self.tokenizer["chat_template_sha256"], model.chat_template_sha256),
        )
        return [f"{what} {short(made)} against {short(here)}" for what, made, here in pairs if made != here]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A verified manifest in memory."""

    folder: Path
    header: Header
    rows: tuple[QuestionRow, ...]
    rollouts: Mapping[tuple[str, int], Rollout]

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
) -> Header:
    """Write the manifest's files, then its header.

    Args:
        folder: An existing folder.
        rows: One row per input question, in input order.
        rollouts: In the order of ``rows``.
        signals: The bytes of ``signals.safetensors``.
        neurons_csv: The text of ``neurons.csv``.
        header: ``tool``, ``model``, ``tokenizer``, ``dataset``, ``sampling``, ``options``, ``answers``, ``lengths``;
            ``notes``, if any.
    """
    rollout_lines = [rollout.to_json() for rollout in rollouts]
    contents: dict[str, tuple[bytes, int | None]] = {
        QUESTIONS: ("".join(row.model_dump_json() + "\n" for row in rows).encode(), len(rows)),
        ROLLOUTS: ("".join(line + "\n" for line in rollout_lines).encode(), len(rollout_lines)),
        SIGNALS: (signals, None),
        NEURONS: (neurons_csv.encode(), neurons_csv.count("\n") - 1),
    }
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
    rollouts: dict[tuple[str, int], Rollout] = {}
    rollout_rows = _read_rows(folder / ROLLOUTS, contents[ROLLOUTS], RolloutRow, header.files[ROLLOUTS].rows)
    for number, row in enumerate(rollout_rows, start=1):
        place, key = f"{folder / ROLLOUTS}:{number}", (row.question_id, row.rollout_id)
        if row.question_id not in by_id:
            raise UserError(f'{place}: $.question_id: no question "{row.question_id}"')
        if key in rollouts:
            raise UserError(f'{place}: $.rollout_id: rollout {row.rollout_id} of "{row.question_id}" appears twice')
        rollouts[key] = Rollout(**row.model_dump())
    _verify_contexts(folder / QUESTIONS, by_id, rollouts, header.options)
    return Manifest(folder, header, tuple(rows), rollouts)


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
    data = path.read_bytes() if name in (QUESTIONS, ROLLOUTS) else b""
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
    majority = options.get("context_policy") == "majority_solution"
    for number, row in enumerate(by_id.values(), start=1):
        if row.privileged_context is not None and row.context:
            raise UserError(f"{path}:{number}: $.context: demonstrations beside a privileged_context; export again")
        for index, item in enumerate(row.context):
            where = f"{path}:{number}: $.context[{index}]"
            if (item.question_id, item.rollout_id) not in rollouts:
                raise UserError(f'{where}: no rollout {item.rollout_id} of question "{item.question_id}"')
            if rollouts[item.question_id, item.rollout_id].finish_reason == "length" and not options["keep_truncated"]:
                raise UserError(f"{where}: a rollout that was cut off is no demonstration; export again")
            own = majority and item.question_id == row.question_id
            if not own and by_id[item.question_id].text_sha256 == row.text_sha256:
                raise UserError(f"{where}: a question is its own context")
