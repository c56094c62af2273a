"""Finished rollouts, and the append-only log from which sampling resumes."""

from __future__ import annotations

import json
import logging
import time
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from neurosig.questions.thoughts import MARKS, thought_of
from neurosig.runtime.cli import progress
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_parquet
from neurosig.runtime.keyed_log import KeyedLog
from neurosig.runtime.shapes import check_choice

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]
RolloutPart = Literal["answer", "thought", "all"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion of one question.

    Attributes:
        question_id: The question it answers.
        rollout_id: Index among the K rollouts of that question.
        text: Decoded completion without special tokens.
        completion_ids: Completion tokens as sampled, with the end-of-sequence token if there is one.
        finish_reason: ``stop`` at an end-of-sequence token, ``length`` when cut off.
        mean_logprob: Mean log-probability of its tokens at temperature 1, in nats; ``None`` if made elsewhere.
        mean_entropy: Mean entropy of the model's next-token distribution at temperature 1, in nats.
        mean_self_certainty: Mean KL divergence of that distribution from the uniform one, KL(U || p), in nats
            (Intuitor, arXiv 2505.19590).
        answer_start: Index of the first completion token after the last thought that was closed; 0 without one.
    """

    question_id: str
    rollout_id: int
    text: str
    completion_ids: tuple[int, ...]
    finish_reason: FinishReason
    mean_logprob: float | None = None
    mean_entropy: float | None = None
    mean_self_certainty: float | None = None
    answer_start: int = 0

    def __post_init__(self) -> None:
        check_choice("finish_reason", self.finish_reason, FinishReason)

    @property
    def completion_ids_without_eos(self) -> tuple[int, ...]:
        """The completion without its closing end-of-sequence token, unless that is its only token."""
        ended = self.finish_reason == "stop" and len(self.completion_ids) > 1
        return self.completion_ids[:-1] if ended else self.completion_ids

    def positions(self, part: RolloutPart) -> range:
        """Indices of the part's tokens in `completion_ids_without_eos`; of all of them where it has no such part."""
        n = len(self.completion_ids_without_eos)
        found = {"answer": range(self.answer_start, n), "thought": range(min(self.answer_start, n))}.get(part)
        return found or range(n)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def completion_text(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[int]) -> str:
    """Text of a completion without special tokens, but with the marks of a thought (`neurosig.questions.thoughts`).

    Some tokenizers count these as special, and without them a thought would read like the answer.

    Args:
        tokenizer: The model's.
        completion_ids: The completion without its end-of-sequence token.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    named = {tokenizer.backend_tokenizer.token_to_id(mark): mark for pair in MARKS for mark in pair}
    lost = {token: mark for token, mark in named.items() if token in completion_ids and not decode([token])}
    parts, start = [], 0
    for place, token in enumerate(completion_ids):
        if token in lost:
            parts += [decode(completion_ids[start:place]), lost[token]]
            start = place + 1
    return "".join([*parts, decode(completion_ids[start:])])


def answer_start(decode: Callable[[Sequence[int]], str], completion_ids: Sequence[int], text: str | None = None) -> int:
    """Index of the first token after the last thought that is closed; 0 without one.

    Args:
        decode: Token ids -> text with the marks of a thought.
        completion_ids: The completion without its end-of-sequence token.
        text: Its text, if known: nothing is decoded where that closes no thought.
    """
    if text is not None and not thought_of(text).closed:
        return 0
    closed = thought_of(decode(completion_ids)).closed
    if not closed:
        return 0
    return bisect_left(range(len(completion_ids)), closed, key=lambda n: thought_of(decode(completion_ids[:n])).closed)


class RolloutLog(KeyedLog):
    """Append-only log with one line per question, so that a killed run loses at most the question being written.

    The key is everything that determines the rollouts (model, prompts, sampling).

    Raises:
        UserError: See `KeyedLog`.
    """

    def __init__(self, path: str | Path, key: Mapping[str, Any]):
        self.groups: dict[str, list[Rollout]] = {}
        super().__init__(path, key)

    def read(self, line: Any) -> None:
        group = [parse_rollout(fields) for fields in line]
        self.groups[group[0].question_id] = group

    def append(self, group: Sequence[Rollout]) -> None:
        """Add one question's rollouts and flush them to disk."""
        self.write([asdict(rollout) for rollout in group])
        self.groups[group[0].question_id] = list(group)

    def extend(
        self,
        groups: Iterable[Sequence[Rollout]],
        *,
        total: int,
        desc: str,
        quiet: bool = False,
    ) -> dict[str, list[Rollout]]:
        """Append questions as they finish; returns all rollouts by question.

        A progress bar of ``total`` shows the tokens per second.
        """
        with progress(total=total, desc=desc, quiet=quiet) as bar:
            bar.update(len(self.groups))
            start, tokens = time.perf_counter(), 0
            for group in groups:
                self.append(group)
                tokens += sum(len(rollout.completion_ids) for rollout in group)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update(len(self.groups) - bar.n)
        return self.groups


def parse_rollout(fields: Mapping[str, Any]) -> Rollout:
    """A ``Rollout`` from its JSON fields."""
    return Rollout(**{**fields, "completion_ids": tuple(fields["completion_ids"])})


def read_rollouts(path: str | Path) -> dict[str, list[Rollout]]:
    """The rollouts of a ``rollouts.jsonl`` by question, both in the order of the file.

    Raises:
        UserError: The file is missing, or a line is no rollout.
    """
    path = Path(path)
    groups: dict[str, list[Rollout]] = {}
    if not path.is_file():
        raise UserError(f"{path}: no such file; the rollouts were not kept")
    for number, fields in _json_lines(path):
        try:
            rollout = parse_rollout(fields)
        except (LookupError, TypeError) as error:
            raise UserError(f"{path}:{number}: no rollout ({error})") from error
        groups.setdefault(rollout.question_id, []).append(rollout)
    return groups


def read_external_rollouts(
    path: str | Path,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int], bool], str],
    eos_token_ids: Sequence[int],
    vocabulary: int,
    question_ids: Collection[str],
) -> dict[str, list[Rollout]]:
    """Read rollouts made elsewhere, such as on a vLLM cluster, grouped by question.

    Each line is an object with ``question_id`` and ``text``; ``completion_ids`` (or ``token_ids``, vLLM's name) and
    ``finish_reason`` (``stop`` where it is unknown) are optional. Without ids, ``encode`` tokenises the text. A
    completion that was not cut off ends with an end-of-sequence token, which is added if it is missing. Lines of other
    questions are counted and left out.

    Args:
        path: JSONL file.
        encode: text -> token ids; special tokens in the text are encoded as text.
        decode: (token ids, whether to skip special tokens) -> text.
        eos_token_ids: Ids that end a completion; the first is the one that is added.
        vocabulary: Rows of the model's input embedding.
        question_ids: The questions whose rollouts are wanted.

    Returns:
        Question id -> its K rollouts; every question has the same K, that of the file.

    Raises:
        UserError: Naming file and line: not JSON, a missing field, ids beyond the vocabulary or of another text, a
            question with another number of rollouts than the first; or a question without rollouts.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"rollouts {path}: no such file")
    groups: dict[str, list[Rollout]] = {}
    first_line: dict[str, int] = {}
    others: Counter[str] = Counter()
    for number, fields in _json_lines(path):
        place = f"{path}:{number}"
        for name in ("question_id", "text"):
            if not isinstance(fields.get(name), str):
                raise UserError(f"{place}: {name}: expected a string, got {json.dumps(fields.get(name))[:60]}")
        question_id: str = fields["question_id"]
        if question_id not in question_ids:
            others[question_id] += 1
            continue
        group = groups.setdefault(question_id, [])
        first_line.setdefault(question_id, number)
        ids, reason = _completion(place, fields, encode, decode, eos_token_ids, vocabulary)
        start = answer_start(lambda part: decode(part, False), ids, fields["text"])
        group.append(Rollout(question_id, len(group), fields["text"], ids, reason, answer_start=start))
    if others:
        logger.info(
            "%s: %d rollouts of %d other questions are left out; the first is \"%s\"",
            path, others.total(), len(others), next(iter(others)),
        )  # fmt: skip
    absent = [name for name in question_ids if name not in groups]
    if absent:
        raise UserError(
            f'{path}: no rollouts for {len(absent)} of {len(question_ids)} questions, the first is "{min(absent)}"; '
            "use --limit or add them"
        )
    first, *rest = groups
    for name in rest:
        if len(groups[name]) != len(groups[first]):
            raise UserError(
                f'{path}:{first_line[name]}: question "{name}" has {len(groups[name])} rollouts, "{first}" on line '
                f"{first_line[first]} has {len(groups[first])}; every question needs the same number"
            )
    return groups


def _completion(
    place: str,
    fields: Mapping[str, Any],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int], bool], str],
    eos_token_ids: Sequence[int],
    vocabulary: int,
) -> tuple[tuple[int, ...], FinishReason]:
    """Completion ids and finish reason of a line of `read_external_rollouts`."""
    text, reason = fields["text"], cast(FinishReason, fields.get("finish_reason") or "stop")
    if reason not in ("stop", "length"):
        raise UserError(f'{place}: finish_reason: expected "stop" or "length", got {json.dumps(reason)}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: text: a lone surrogate at character {error.start}") from error
    name = "token_ids" if "token_ids" in fields else "completion_ids"
    given = fields.get(name)
    ids = list(encode(text)) if given is None else given
    if not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        raise UserError(f"{place}: {name}: expected a list of token ids, got {json.dumps(given)[:60]}")
    if ids and max(ids) >= vocabulary:
        raise UserError(
            f"{place}: {name}: token id {max(ids)}, but the model has {vocabulary}; pass the model that sampled it"
        )
    ended = bool(ids) and ids[-1] in eos_token_ids
    body = ids[:-1] if ended else ids
    if given is not None and _letters(text) not in {
        _letters(decoded) for decoded in (decode(body, True), decode(body, False), decode(ids, False))
    }:
        raise UserError(
            f"{place}: {name}: they decode to {json.dumps(decode(body, True)[:60])}, the text is "
            f"{json.dumps(text[:60])}; give the ids of this text, or leave {name} out"
        )
    if reason == "stop" and not ended:
        ids = [*ids, eos_token_ids[0]]
    if not ids:
        raise UserError(f"{place}: an empty completion that was cut off; leave it out")
    return tuple(ids), reason


def _letters(text: str) -> str:
    """Text as far as decoders agree on it: without spaces, which they clean up, and a character cut in half."""
    return "".join(unicodedata.normalize("NFKC", text).split()).rstrip("\ufffd")


def check_fit(
    path: str | Path,
    groups: Mapping[str, Sequence[Rollout]],
    prompt_lengths: Mapping[str, int],
    max_length: int,
) -> None:
    """Check that the model can read rollouts made elsewhere after their prompts.

    Args:
        path: Their file, for the message.
        groups: Rollouts by question.
        prompt_lengths: Question id -> tokens of its prompt.
        max_length: Positions of the model.

    Raises:
        UserError: A rollout is too long; the message names file, question and rollout.
    """
    for name, before in prompt_lengths.items():
        for rollout in groups[name]:
            place = f'{path}: rollout {rollout.rollout_id} of question "{name}"'
            if before + len(rollout.completion_ids) > max_length:
                raise UserError(
                    f"{place}: {len(rollout.completion_ids)} tokens after a prompt of {before} exceed the model's "
                    f"{max_length} positions; leave it out or cut it short"
                )


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: invalid JSON ({error})") from error
            if not isinstance(fields, dict):
                raise UserError(f"{path}:{number}: expected an object, got {type(fields).__name__}")
            yield number, fields


def write_rollouts(path: Path, step: int, rollouts: Iterable[tuple[Rollout, str | None, bool]]) -> None:
    """Write the rollouts of a training step as Parquet, each with its answer and whether it is in the loss.

    Raises:
        UserError: The disk is full.
    """
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int32()
    columns = {"question_id": text, "rollout_id": number, "text": text, "completion_ids": pyarrow.list_(number)}
    columns |= {"finish_reason": text, "mean_logprob": pyarrow.float64()}
    rows = [
        {"step": step, **{name: getattr(rollout, name) for name in columns}, "answer": answer, "in_loss": in_loss}
        for rollout, answer, in_loss in rollouts
    ]
    schema = pyarrow.schema({"step": number, **columns, "answer": text, "in_loss": pyarrow.bool_()})
    path.parent.mkdir(exist_ok=True)
    write_parquet(path, rows, schema=schema, compression="zstd")
