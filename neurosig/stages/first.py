"""The first stage of an export: votes over the student's rollouts, the probe on them, and selection's candidates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neurosig.hallucination.probe import ProbeResult
from neurosig.hallucination.scores import QuestionSignals, fitted_probe
from neurosig.manifest import DemonstrationRecord
from neurosig.models.load import LoadedModel
from neurosig.neurons.contributions import ActiveSets
from neurosig.neurons.sites import FFNSites, ffn_sites
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.cli import PhaseTimer
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from neurosig.selection.choose import Candidate
from neurosig.selection.config import SelectionConfig
from neurosig.selection.rows import candidates_of, contexts_before
from neurosig.stages.second import TeacherRun, representative_states, with_teacher

if TYPE_CHECKING:
    from neurosig.export_config import ExportConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FirstStage:
    """What is known before any context, on the main process.

    Attributes:
        config: The options, with the K and the set size that apply.
        questions: Question id -> question.
        groups: Question id -> its rollouts.
        sets: Their active sets.
        sites: The model's neurons.
        reader: How they were parsed.
        signals: Question id -> its rollouts, answers and sets.
        probe: The probe fitted on them.
        candidates: The questions as selection sees them.
    """

    config: ExportConfig
    questions: Mapping[str, Question]
    groups: Mapping[str, Sequence[Rollout]]
    sets: ActiveSets
    sites: FFNSites
    reader: AnswerReader
    signals: Mapping[str, QuestionSignals]
    probe: ProbeResult
    candidates: Sequence[Candidate]

    def contexts(self) -> dict[str, list[DemonstrationRecord]]:
        """See `neurosig.selection.rows.contexts_before`."""
        own = [name for name, question in self.questions.items() if question.privileged_context is not None]
        return contexts_before(self.candidates, self.config.part(SelectionConfig), own)

    def with_contexts(self, contexts: Mapping[str, Sequence[DemonstrationRecord]]) -> FirstStage:
        """The same with each question's demonstrations in its signals."""
        signals = {name: replace(signal, context=contexts.get(name, ())) for name, signal in self.signals.items()}
        return replace(self, signals=signals)

    def with_teacher(self, loaded: LoadedModel, prompts: Mapping[str, Prompt], run: TeacherRun) -> FirstStage:
        """The same with what the teacher did; where states are compared, with that of its most frequent answer."""
        signals, states = with_teacher(self.config, loaded, self.reader, self.questions, self.signals, prompts, run)
        candidates = self.candidates
        if self.config.question_filter == "redundancy":
            candidates = [replace(one, state=states.get(one.question_id, one.state)) for one in candidates]
        return replace(self, signals=signals, candidates=candidates)


def first_stage(
    config: ExportConfig,
    loaded: LoadedModel,
    reader: AnswerReader,
    questions: Sequence[Question],
    fold_groups: Mapping[str, str] | None,
    prompts: Mapping[str, Prompt],
    traced: tuple[Mapping[str, Sequence[Rollout]], ActiveSets],
    read_at: Mapping[str, Sequence[Sequence[int]]],
    timer: PhaseTimer,
) -> FirstStage:
    """Votes, the probe and the candidates of the traced rollouts, whose neurons were read at ``read_at``."""
    groups, sets = traced
    sites = ffn_sites(loaded.model)
    config = _with_k(config, len(next(iter(groups.values()))))
    config = replace(config, set_size=config.trace_config().sized(sites.n_layers, sites.d_mlp).set_size)
    by_id = {question.id: question for question in questions}
    with timer.phase("score and select"):
        signals = _signals(reader, by_id, groups, read_at, sets)
        probe = fitted_probe(
            signals,
            n_neurons=sites.n_layers * sites.d_mlp,
            n_layers=sites.n_layers,
            probe=config.probe_config(),
            fold_groups=fold_groups,
        )
        lengths = {name: len(prompt.token_ids) for name, prompt in prompts.items()}
        by_rollout = probe.scores.reshape(len(signals), -1)
        candidates = candidates_of(questions, signals, by_rollout, config.part(SelectionConfig), lengths)
    if config.needs_states:
        with timer.phase("read the answers"):
            chosen = {one.question_id: one.representative or 0 for one in candidates}
            states = representative_states(config, loaded, by_id, signals, chosen, prompts)
            candidates = [replace(one, state=states[one.question_id]) for one in candidates]
    return FirstStage(config, by_id, groups, sets, sites, reader, signals, probe, candidates)


def _signals(
    reader: AnswerReader,
    by_id: Mapping[str, Question],
    groups: Mapping[str, Sequence[Rollout]],
    read_at: Mapping[str, Sequence[Sequence[int]]],
    sets: ActiveSets,
) -> dict[str, QuestionSignals]:
    signals, start = {}, 0
    for name, group in groups.items():
        stop = start + len(group)
        ids, values, hidden = (tensor[start:stop] for tensor in sets)
        n_traced = sum(map(len, read_at[name]))
        signals[name] = QuestionSignals(group, reader.read(group, by_id[name]), ids, values, hidden, n_traced)
        start = stop
    return signals


def _with_k(config: ExportConfig, k: int) -> ExportConfig:
    """The options, with the K that ``--rollouts`` holds."""
    if k != config.num_generations:
        logger.info(
            "K=%d, as %s holds; --num-generations %d does not apply", k, config.rollouts, config.num_generations
        )
    return replace(config, num_generations=k)
