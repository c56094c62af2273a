"""The rollouts of several exports of one model as one problem: contributions, labels, and what each question is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse

from neurosig.exported import Exported
from neurosig.hallucination.config import ProbeConfig
from neurosig.manifest import QuestionRow
from neurosig.questions.answers.normal import normalise
from neurosig.questions.load import Question
from neurosig.report.against import ALIKE
from neurosig.report.refits import Refits
from neurosig.runtime.errors import UserError
from neurosig.runtime.provenance import differences, explain

SHARED_ANSWER = 3
"""An answer of more questions than this, such as a continent, makes no entity of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """Rollouts of several exports, in their order.

    Attributes:
        contributions: What the probe reads, [rollouts, neurons].
        labels: 1 guessed, 0 known, -1 unlabelled (`neurosig.hallucination.probe.rollout_labels`).
        questions: Index of each rollout's question.
        groups: ``kind``, ``entity`` and ``domain`` -> index of each rollout's group.
        names: The same -> the names of the groups.
        config: Options of the probe, those of the first export.
        k: Rollouts per question; the largest number, where exports differ.
        n_layers: Layers of the model.
        d_mlp: Neurons per layer.
        set_size: Neurons of an active set.
    """

    contributions: sparse.csr_array
    labels: Int[np.ndarray, " rollouts"]
    questions: Int[np.ndarray, " rollouts"]
    groups: Mapping[str, Int[np.ndarray, " rollouts"]]
    names: Mapping[str, Sequence[str]]
    config: ProbeConfig
    k: int
    n_layers: int
    d_mlp: int
    set_size: int

    def labelled(self) -> tuple[int, int]:
        """Questions that agree, and questions that split."""
        known, guessed = (len(np.unique(self.questions[self.labels == label])) for label in (0, 1))
        return known, guessed


def pool(exports: Sequence[Exported], gold: Sequence[Mapping[str, Question]]) -> Pooled:
    """Put exports together.

    Args:
        exports: Finished exports.
        gold: For each export its questions with gold answers, by id; only to tell which ask about the same entity.

    Raises:
        UserError: Their models, what was traced or what the probe learns differ, or a question is in two of them.
    """
    first = exports[0]
    parts = [Refits(one) for one in exports]
    seen: dict[str, str] = {}
    for one, part in zip(exports, parts, strict=True):
        folder = one.manifest.folder
        if any(one.manifest.header.model.get(x) != first.manifest.header.model.get(x) for x in ("weights", "adapter")):
            raise UserError(f"--manifest {folder}: another model than {first.manifest.folder}'s; give exports of one")
        if pairs := differences(_read_and_learned(parts[0]), _read_and_learned(part)):
            raise UserError(f"--manifest {folder}: its neurons are not comparable: {explain(pairs, 'there')}")
        for name in one.rows:
            if name in seen:
                raise UserError(f'question "{name}" is in {seen[name]} and {folder}; give each question once')
            seen[name] = str(folder)
    rows = [row for one in exports for row in one.rows.values()]
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    owners = np.concatenate([part.owners + start for part, start in zip(parts, starts, strict=False)])
    named = {
        "kind": [f"{row.domain}/{row.kind}" if row.kind else row.domain for row in rows],
        "entity": entities(rows, {name: question for part in gold for name, question in part.items()}),
        "domain": [row.domain for row in rows],
    }
    coded = {column: np.unique(values, return_inverse=True) for column, values in named.items()}
    signals = first.signals
    return Pooled(
        sparse.csr_array(sparse.vstack([part.contributions() for part in parts])),
        np.concatenate([part.labels for part in parts]),
        owners,
        {column: codes[owners] for column, (_, codes) in coded.items()},
        {column: values.tolist() for column, (values, _) in coded.items()},
        parts[0].config,
        max(one.manifest.k for one in exports),
        signals.n_layers,
        signals.d_mlp,
        signals.neuron_ids.shape[1],
    )


def _read_and_learned(part: Refits) -> dict[str, Any]:
    options = part.exported.manifest.header.options
    learned = ("labels", "values", "agree_share", "split_share")
    return {name: options[name] for name in ALIKE} | {f"probe_{name}": getattr(part.config, name) for name in learned}


def entities(rows: Sequence[QuestionRow], gold: Mapping[str, Question]) -> list[str]:
    """What each question asks about: questions of one id's ending, or of one another's answers, are of one entity.

    ``geography-capital-kenya`` and ``geography-continent-kenya`` share the ending after domain and kind; the country
    whose capital is Nairobi has the answer Kenya. Without gold answers only endings count.
    """
    own = [
        {normalise(row.question_id.removeprefix(f"{row.domain}-{row.kind}-").replace("-", " "))}
        | ({normalise(str(answer))} if (answer := getattr(gold.get(row.question_id), "answer", None)) else set())
        for row in rows
    ]
    counts = Counter(normalise(str(question.answer)) for question in gold.values())
    first: dict[str, int] = {}
    root = list(range(len(rows)))

    def find(place: int) -> int:
        while root[place] != place:
            place = root[place]
        return place

    for place, names in enumerate(own):
        for name in sorted(name for name in names if counts[name] <= SHARED_ANSWER):
            root[find(place)] = find(first.setdefault(name, place))
    return [rows[find(place)].question_id for place in range(len(rows))]
