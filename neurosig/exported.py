"""Read a finished export: its manifest, the signals of its rollouts, and the neurons of its probe.

    exported = Exported("runs/demo/manifest")
    places = [exported.place[item] for item in exported.representatives.items()]
    exported.signals.neuron_ids[places]        # the representative active set of each question with a majority answer

The manifest is read and verified at once; signals and neurons are read when first used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from neurosig.manifest import NEURONS, SIGNALS, Manifest, QuestionRow, read_manifest
from neurosig.questions.load import Question, load_questions
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout

if TYPE_CHECKING:
    import pandas as pd

    from neurosig.neurons.signals_file import Signals


class Exported:
    """A finished export.

    Attributes:
        manifest: Header, rows and rollouts.
        rows: Question id -> row, for the questions with rollouts (all but those that were too long), in input order.
        rollouts: Question id -> its K rollouts, in the order of the row's answers.
        place: (question id, rollout id) -> row of that rollout in ``signals``.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read and verify the manifest.

        Raises:
            UserError: See `neurosig.manifest.read_manifest`.
        """
        self.manifest = read_manifest(folder)
        self.rows: Mapping[str, QuestionRow] = {
            row.question_id: row for row in self.manifest.rows if row.vote is not None
        }
        self.rollouts: Mapping[str, list[Rollout]] = {
            name: [self.manifest.rollouts[name, index] for index in range(len(row.answers))]
            for name, row in self.rows.items()
        }
        self.place: Mapping[tuple[str, int], int] = {key: place for place, key in enumerate(self.manifest.rollouts)}

    @cached_property
    def signals(self) -> Signals:
        """Active sets, contributions, hidden states and probe scores of all rollouts.

        Raises:
            UserError: The file is damaged (`neurosig.neurons.signals_file.read_signals`) or of other rollouts.
        """
        from neurosig.neurons.signals_file import read_signals

        path = self.manifest.folder / SIGNALS
        signals = read_signals(path)
        if len(signals.neuron_ids) != len(self.place):
            raise UserError(f"{path}: {len(signals.neuron_ids)} rows for {len(self.place)} rollouts; export again")
        return signals

    @cached_property
    def neurons(self) -> pd.DataFrame:
        """The hallucination neurons, those of the export's probe: ``layer``, ``index``, ``active_share``, ``weight``.

        Since schema 1.4 also their ``stability``, ``kinds`` and ``kinds_agreeing``
        (`neurosig.selection.neuron_table`).

        Raises:
            UserError: See `neurosig.hallucination.locate.read_neurons`.
        """
        from neurosig.hallucination.locate import read_neurons

        return read_neurons(self.manifest.folder / NEURONS)

    @cached_property
    def pattern_neurons(self) -> pd.DataFrame:
        """The neurons that mark a cluster of signatures: ``layer``, ``index``, ``active_share``, ``cluster``, ``lift``
        and ``q``; none in a manifest of a schema before 1.4.

        Raises:
            UserError: See `neurosig.hallucination.locate.read_neurons`.
        """
        from neurosig.hallucination.locate import read_neurons

        return read_neurons(self.manifest.folder / NEURONS, "pattern")

    @cached_property
    def representatives(self) -> Mapping[str, int]:
        """Question id -> rollout id of its representative, for the questions with a majority answer."""
        from neurosig.patterns.signatures import representative

        probe, rollouts = self.signals.probe_scores.tolist(), self.manifest.rollouts
        cut_off_too = self.manifest.header.options["keep_truncated"]
        chosen = {}
        for name, row in self.rows.items():
            keys = [(name, index) for index in range(len(row.answers))]
            usable = [cut_off_too or rollouts[key].finish_reason == "stop" for key in keys]
            scores = [probe[self.place[key]] for key in keys]
            chosen[name] = representative(row.answers, row.pseudo_label, scores, usable)
        return {name: rollout_id for name, rollout_id in chosen.items() if rollout_id is not None}


def join_gold(
    manifest: Manifest, sources: Sequence[str] = (), fields: Sequence[str] = (), *, required: bool = False
) -> tuple[dict[str, Question], str | None]:
    """Questions with gold answers by id, and why some or all are missing (``None`` when none is).

    Args:
        manifest: The manifest.
        sources: Question files or bundled sets (`neurosig.questions.load.load_questions`); default: the manifest's.
        fields: Their columns with other names; default: as the manifest's were read.
        required: Raise when they cannot be read.

    Raises:
        UserError: ``required``, and a source is missing or malformed.
    """
    sources = sources or manifest.header.dataset["sources"]
    options = manifest.header.options
    fields = fields or options.get("fields", ())
    try:
        read = load_questions(sources, split=str(options.get("split", "all")), fields=fields)
        labelled = {question.id: question for question in read}
    except UserError as error:
        if required:
            raise
        return {}, f"{error}; name the question files with --questions"
    rows = [row for row in manifest.rows if row.vote is not None]
    gold = {}
    lacking: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        match = labelled.get(row.question_id)
        if match is None:
            lacking["not in the question files"].append(f'"{row.question_id}"')
        elif match.text_sha256 != row.text_sha256:
            lacking["there with another text"].append(f'"{row.question_id}" on line {match.line}')
        elif match.answer is None:
            lacking["there without an answer"].append(f'"{row.question_id}" on line {match.line}')
        else:
            gold[row.question_id] = match
    if not lacking:
        return gold, None
    parts = ", ".join(f"{len(which)} {what} (the first is {which[0]})" for what, which in lacking.items())
    return gold, f"of {len(rows)} questions {parts} ({', '.join(sources)})"
