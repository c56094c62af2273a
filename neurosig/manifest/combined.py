"""Several manifests as one, for a training on all of their questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neurosig.manifest.files import READ_BY_TRAINING, Manifest
from neurosig.manifest.rows import Header, QuestionRow
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text
from neurosig.runtime.provenance import differences, explain
from neurosig.sampling.rollouts import Rollout


@dataclass(frozen=True, kw_only=True)
class Combined(Manifest):
    """The questions and rollouts of one or more manifests, under the first one's header.

    Of several, ``header.content_sha256`` is a hash of theirs and of their weights. An id that several manifests have
    becomes ``N:id``, with the manifest's number from 1.

    Attributes:
        parts: The manifests, in the order given.
        weights: Factor of each on its questions' weights in the loss.
        part_of: Question id -> number of its manifest, from 1.
    """

    parts: tuple[Manifest, ...]
    weights: tuple[float, ...]
    part_of: Mapping[str, int]

    def record(self) -> list[dict[str, Any]]:
        """What a run's record says of several manifests: hash, weight and selected questions of each."""
        return [
            {"sha256": part.header.content_sha256, "weight": weight, "selected": len(part.selected)}
            for part, weight in zip(self.parts, self.weights, strict=True)
            if len(self.parts) > 1
        ]

    def counts(self, question_ids: Collection[str]) -> dict[str, int]:
        """Metrics of a step: its questions of each manifest, as ``questions_of_manifest_1``; none if there is one."""
        found = Counter(self.part_of.get(name) for name in question_ids)
        numbers = range(1, len(self.parts) + 1) if len(self.parts) > 1 else ()
        return {f"questions_of_manifest_{number}": found[number] for number in numbers}


def combine(manifests: Sequence[Manifest], weights: Sequence[float] = (), *, free: Collection[str] = ()) -> Combined:
    """All questions of the manifests.

    Args:
        manifests: At least one.
        weights: One positive factor per manifest; none: 1 each.
        free: Options in which the manifests may differ, because the command line gives them.

    Raises:
        UserError: The manifests come from other models, tokenizers, templates, prompts or parsers, each of which is
            named with both values; one is given twice; or the weights do not fit.
    """
    first, several = manifests[0], len(manifests) > 1
    weights = tuple(weights) or (1.0,) * len(manifests)
    if len(weights) != len(manifests) or not all(weight > 0 for weight in weights):
        raise UserError(f"--manifest-weights: expected {len(manifests)} numbers above 0, one per --manifest")
    seen: dict[str, Path] = {}
    for one in manifests:
        if (digest := one.header.content_sha256) in seen:
            raise UserError(f"--manifest {one.folder}: has the content of {seen[digest]}; name each manifest once")
        seen[digest] = one.folder
        if pairs := differences(_compared(first.header, free), _compared(one.header, free)):
            raise UserError(
                f"--manifest {one.folder}: cannot be trained on together with {first.folder}, these differ: "
                f"{explain(pairs, 'there', 'here')}; export both alike"
            )
    if not several:
        part_of = dict.fromkeys((row.question_id for row in first.rows), 1)
        parts: Any = {"parts": (first,), "weights": weights, "part_of": part_of}
        return Combined(first.folder, first.header, first.rows, first.rollouts, **parts)
    ids = Counter(row.question_id for one in manifests for row in one.rows)
    rows: list[QuestionRow] = []
    rollouts: dict[tuple[str, int], Rollout] = {}
    part_of = {}
    for number, (one, weight) in enumerate(zip(manifests, weights, strict=True), start=1):
        names = {
            r.question_id: f"{number}:{r.question_id}" if ids[r.question_id] > 1 else r.question_id for r in one.rows
        }
        part_of |= dict.fromkeys(names.values(), number)
        rows += [_renamed(row, names, weight) for row in one.rows]
        for (name, index), rollout in one.rollouts.items():
            rollouts[names[name], index] = replace(rollout, question_id=names[name])
    text = "".join(f"{one.header.content_sha256} {w:g}\n" for one, w in zip(manifests, weights, strict=True))
    header = first.header.model_copy(update={"content_sha256": sha256_text(text)})
    parts = {"parts": tuple(manifests), "weights": weights, "part_of": part_of}
    return Combined(first.folder, header, tuple(rows), rollouts, **parts)


def _compared(header: Header, free: Collection[str]) -> dict[str, Any]:
    options = {name: header.options[name] for name in READ_BY_TRAINING["options"] if name not in free}
    options.pop("template", None)  # its content is the tokenizer's chat template
    model = {"weights": header.model["weights"], "adapter": header.model.get("adapter")}
    return {**model, "tokenizer": header.tokenizer, "answers": header.answers, **options}


def _renamed(row: QuestionRow, names: Mapping[str, str], weight: float) -> QuestionRow:
    context = tuple(item.model_copy(update={"question_id": names[item.question_id]}) for item in row.context)
    changed = {"question_id": names[row.question_id], "context": context, "weight": row.weight * weight}
    return row.model_copy(update=changed)
