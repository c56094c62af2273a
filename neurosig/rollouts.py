"""Finished rollouts, and the append-only store that sampling resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from neurosig.errors import UserError
from neurosig.fsio import write_atomic

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion of one question.

    Attributes:
        question_id: The question it answers.
        rollout_id: Index among the K rollouts of that question.
        text: Decoded completion without special tokens.
        token_ids: Completion tokens as sampled, the end-of-sequence token included when there is one.
        finish_reason: ``stop`` at an end-of-sequence token, ``length`` when cut off.
        mean_logprob: Mean log-probability of its tokens at temperature 1, in nats; ``None`` if made elsewhere.
        mean_entropy: Mean entropy of the model's next-token distribution at temperature 1, in nats.
    """

    question_id: str
    rollout_id: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    mean_logprob: float | None = None
    mean_entropy: float | None = None

    @property
    def body_ids(self) -> tuple[int, ...]:
        """Tokens that carry the answer: without the closing end-of-sequence token, unless it is the only one."""
        ended = self.finish_reason == "stop" and len(self.token_ids) > 1
        return self.token_ids[:-1] if ended else self.token_ids

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


class RolloutLog:
    """Append-only log of whole question groups, so that a killed run loses at most the group being written.

    The first line is the key of everything that determines the rollouts (model, prompts, sampling); a log whose
    key differs is never continued. A torn last line is dropped and sampled again.
    """

    def __init__(self, path: str | Path, key: Mapping[str, Any]):
        self.path = Path(path)
        self.key = json.loads(json.dumps(key))
        self.groups: dict[str, list[Rollout]] = {}
        if self.path.exists():
            self._reopen()
        else:
            write_atomic(self.path, json.dumps({"key": self.key}) + "\n")

    def append(self, group: Sequence[Rollout]) -> None:
        """Add one question's finished rollouts and flush them to disk."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps([asdict(rollout) for rollout in group], ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.groups[group[0].question_id] = list(group)

    def _reopen(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        found = json.loads(lines[0])["key"]
        changed = sorted(name for name in {*found, *self.key} if found.get(name) != self.key.get(name))
        if changed:
            raise UserError(
                f"{self.path.parent}: cannot resume, these differ from the interrupted run: {', '.join(changed)}; "
                "use the same options or --overwrite"
            )
        for line in lines[1:-1]:
            group = [parse_rollout(fields) for fields in json.loads(line)]
            self.groups[group[0].question_id] = group
        write_atomic(self.path, b"\n".join(lines[:-1]) + b"\n")


def parse_rollout(fields: Mapping[str, Any]) -> Rollout:
    """A ``Rollout`` from its JSON fields."""
    return Rollout(**{**fields, "token_ids": tuple(fields["token_ids"])})


def read_external_rollouts(
    path: str | Path, encode: Any, eos_token_id: int, known_ids: set[str]
) -> dict[str, list[Rollout]]:
    """Read rollouts made elsewhere (a vLLM cluster, say), grouped by question.

    Each line is an object with ``question_id`` and ``text``; ``token_ids`` and ``finish_reason`` are optional.
    Without ``token_ids`` the text is encoded by ``encode`` and, unless cut off, closed with the end-of-sequence
    token.

    Args:
        path: JSONL file.
        encode: text -> token ids, special tokens in the text taken as text.
        eos_token_id: The id that closes a finished completion.
        known_ids: Ids of the questions at hand.

    Raises:
        UserError: Naming file and line: not JSON, a missing field, an unknown question, groups of unequal size.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"rollouts {path}: no such file")
    groups: dict[str, list[Rollout]] = {}
    for number, fields in _json_lines(path):
        question_id, text = fields.get("question_id"), fields.get("text")
        for name, value in (("question_id", question_id), ("text", text)):
            if not isinstance(value, str):
                raise UserError(f"{path}:{number}: {name}: expected a string, got {json.dumps(value)[:60]}")
        if question_id not in known_ids:
            raise UserError(f'{path}:{number}: question_id "{question_id}" is in none of the question files')
        reason = fields.get("finish_reason", "stop")
        if reason not in ("stop", "length"):
            raise UserError(f'{path}:{number}: finish_reason: expected "stop" or "length", got {json.dumps(reason)}')
        given = fields.get("token_ids")
        ids = tuple(given) if given else (*encode(text), *((eos_token_id,) if reason == "stop" else ()))
        if not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise UserError(f"{path}:{number}: token_ids: expected a non-empty list of token ids")
        group = groups.setdefault(str(question_id), [])
        group.append(Rollout(str(question_id), len(group), str(text), ids, reason))
    sizes = {len(group) for group in groups.values()}
    if len(sizes) != 1:
        raise UserError(f"{path}: every question needs the same number of rollouts, found {sorted(sizes) or 'none'}")
    absent = sorted(known_ids - set(groups))
    if absent:
        raise UserError(
            f'{path}: no rollouts for {len(absent)} of {len(known_ids)} questions, the first is "{absent[0]}"; '
            "use --limit or add them"
        )
    return groups


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
