"""A finished export together with the model that made it, which is loaded when a view first needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from neurosig.exported import Exported, join_gold
from neurosig.manifest import NEURONS, Manifest, QuestionRow
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.config import TraceConfig, neuron_name
from neurosig.questions.answers import is_correct
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from neurosig.views import frames
from neurosig.views.frames import Table

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from neurosig.neurons.token_trace import TokenTrace
    from neurosig.neurons.tracer import NeuronTracer


class ExportedRun:
    """A finished export with its model.

    Attributes:
        exported: The export as tensors, as `neurosig.report` and the figures read it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | LoadedModel | None = None,
        adapter: str | Path | None = None,
        neurons: str | Path | None = None,
        gold: bool = True,
    ) -> None:
        """Read the export; the model is loaded when a view first needs it.

        Args:
            folder: Folder of ``neurosig.export``.
            model: The loaded model, or the name or folder to load instead of the manifest's; its weights must match.
            adapter: Where the manifest's adapter is, if not where it was (`neurosig.models.run_folder.find_adapter`).
            neurons: Table of neurons to use instead of the manifest's, such as ``report/located_neurons.csv``.
            gold: Whether to look up gold answers, to call rollouts right or wrong instead of majority or minority.

        Raises:
            UserError: The export cannot be read, or the loaded model is not the one that made it.
        """
        self.exported = Exported(folder)
        self._model, self._adapter, self._reads_gold = model, adapter, gold
        self._neurons_path = self.manifest.folder / NEURONS if neurons is None else Path(neurons)
        if neurons is not None:
            _ = self.neurons
        if isinstance(model, LoadedModel):
            _ = self.loaded

    @property
    def manifest(self) -> Manifest:
        """Header, rows and rollouts."""
        return self.exported.manifest

    @cached_property
    def questions(self) -> Table:
        """One row per input question, by ``question_id``.

        Columns: ``line`` of its file, ``domain``, ``kind``, ``question``, ``choices``, ``pseudo_label`` (the majority
        answer, none without any answer), ``votes`` for it, ``rollouts`` (K), ``n_tied``, ``vote_share`` (votes over K),
        ``selected``, ``reason`` of the manifest, ``decision`` (the same in words), ``weight`` in the loss,
        ``demonstrations`` (number in the teacher's context).
        """
        return frames.questions(self.exported)

    @cached_property
    def rollouts(self) -> Table:
        """One row per rollout.

        Columns: ``question_id``, ``rollout_id``, whole ``text``, ``answer`` (the candidate it votes for),
        ``raw_answer`` as read, ``verdict`` (right or wrong by the gold answer, else majority or minority), ``tokens``,
        ``finish_reason``, ``mean_logprob``, ``mean_entropy``, ``mean_self_certainty`` (nats per token),
        ``probe_score`` (cross-fitted; higher points to guessing).
        """
        return frames.rollouts(self.exported, self.verdict)

    @cached_property
    def scores(self) -> Table:
        """One row per question, by ``question_id``; one column per score, higher is less trustworthy."""
        return frames.scores(self.exported)

    @cached_property
    def neurons(self) -> Table:
        """One row per neuron and role.

        Columns: ``neuron`` (such as L19/696), ``role`` (``hallucination``: in the probe; ``pattern``: marks a cluster),
        ``layer``, ``index``, and those of `neurosig.selection.neuron_table` or of the table given.

        Raises:
            UserError: The table is missing or malformed.
        """
        return frames.neurons(self._neurons_path)

    @cached_property
    def contexts(self) -> Table:
        """One row per question and demonstration of its teacher's context.

        Columns: ``question_id``, ``place`` in the prompt from 1, ``demonstration_id`` and ``rollout_id`` of the
        demonstration, its ``similarity`` to the question, its text as ``demonstration``, its ``response``.
        """
        return frames.contexts(self.exported)

    @cached_property
    def effects(self) -> Table:
        """What its context did to the teacher's answer, one row per question that the teacher was asked.

        Columns: ``question_id``, ``selected``, majority answers of ``student`` and ``teacher``, ``outcome_strict`` and
        ``outcome_lenient`` (``fix``: only the teacher is right, ``break``: only the student is, ``right``, ``wrong``:
        both), and the scores of the second stage, such as ``belief_shift`` (nats), ``entropy_gap`` (nats per token).

        Raises:
            UserError: There are no teacher rollouts, or no gold answers.
        """
        from neurosig.report.effects import effects
        from neurosig.statistics.auroc import AnalysisConfig

        found = effects(self.exported, self.gold, AnalysisConfig())
        if found is None:
            lacking = "gold answers to them" if self.manifest.teacher_rollouts else "rollouts of a teacher"
            raise UserError(
                f"{self.manifest.folder}: no {lacking}; export labelled questions with --teacher-rollouts 5"
            )
        return Table(found.questions)

    def overview(self) -> Table:
        """One row per question with rollouts: ``kind``, ``question``, ``majority`` answer and its ``share`` of the
        votes, ``verdict``, ``neuron_agreement`` of its active sets, ``decision``, ``representative`` rollout."""
        from neurosig.patterns.similarity import mean_pairwise_jaccard

        table, options = [], self.manifest.header.options
        for name, row in self.exported.rows.items():
            assert row.vote is not None
            places = [self.exported.place[name, index] for index in range(len(row.answers))]
            table.append(
                {
                    "id": name,
                    "kind": row.kind or row.domain,
                    "question": row.question,
                    "majority": row.pseudo_label,
                    "share": row.vote.count / row.vote.n,
                    "verdict": self.verdict(row, self.representative(name)),
                    "neuron_agreement": mean_pairwise_jaccard(self.exported.signals.neuron_ids[places]),
                    "decision": frames.decision(row, options),
                    "representative": self.rollout(name, None).text,
                }
            )
        return Table(pd.DataFrame(table).set_index("id"))

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model that made the export.

        Raises:
            UserError: It cannot be loaded, or it is another one.
        """
        header, options, model = self.manifest.header, self.manifest.header.options, self._model
        if not isinstance(model, LoadedModel):
            name = str(header.model["id"]) if model is None else model
            where = header.adapter(None if self._adapter is None else Path(self._adapter))
            model = load_model(name, dtype=options["dtype"], template=options["template"], adapter=where)
        if (model.info.weights, model.info.adapter) != (header.model["weights"], header.model.get("adapter")):
            made = f"made by {header.model['id']}{' with an adapter' if header.model.get('adapter') else ''}"
            raise UserError(
                f"{self.manifest.folder}: {made}, not by {model.info.id}"
                f"{' with this one' if model.info.adapter else ''}; give the model that made it"
            )
        return model

    @cached_property
    def tracer(self) -> NeuronTracer:
        """Traces as the export did."""
        from neurosig.neurons.tracer import NeuronTracer

        options = self.manifest.header.options
        config = TraceConfig(
            value=options["neuron_value"],
            score=options["contribution"],
            active=options["active_set"],
            set_size=options["set_size"],
            positive_only=options["positive_only"],
        )
        return NeuronTracer(self.loaded.model, config)

    @cached_property
    def gold(self) -> Mapping[str, Question]:
        """Questions with gold answers by id, for verdicts only; empty without."""
        return join_gold(self.manifest)[0] if self._reads_gold else {}

    @cached_property
    def weights(self) -> Float[Tensor, "layer neuron"]:
        """The probe's weights on raw contributions (it was fitted on contributions scaled to at most 1)."""
        import torch

        from neurosig.neurons.contributions import PAD

        signals, table = self.exported.signals, self.hallucination_neurons
        largest = torch.zeros(signals.n_neurons)
        kept = signals.neuron_ids != PAD
        largest.scatter_reduce_(
            0, signals.neuron_ids[kept].long(), signals.contributions[kept].float().abs(), reduce="amax"
        )
        weights = torch.zeros_like(largest)
        flat = torch.from_numpy((table["layer"] * signals.d_mlp + table["index"]).to_numpy(copy=True))
        raw = torch.from_numpy(table["weight"].to_numpy(copy=True)).float()
        weights[flat] = torch.where(largest[flat] > 0, raw / largest[flat].clamp(min=1e-12), 0.0)
        return weights.view(signals.n_layers, signals.d_mlp)

    @property
    def selected(self) -> list[str]:
        """Ids of the selected questions, in input order."""
        return [row.question_id for row in self.manifest.selected]

    @property
    def contrasting(self) -> list[str]:
        """Ids of the questions whose rollouts differ in their verdict, the most even splits first."""
        splits = []
        for name, row in self.exported.rows.items():
            trusted = sum(self.trusted(row, index) for index in range(len(row.answers)))
            if 0 < trusted < len(row.answers):
                splits.append((abs(trusted - len(row.answers) / 2), name))
        return [name for _, name in sorted(splits, key=lambda pair: pair[0])]

    @property
    def hallucination_neurons(self) -> pd.DataFrame:
        """The probe's rows of `neurons`."""
        return self.neurons[self.neurons["role"] == "hallucination"]

    @property
    def located(self) -> list[tuple[int, int]]:
        """Layer and index of the probe's neurons, heaviest first."""
        table = self.hallucination_neurons
        table = table.loc[table["weight"].abs().sort_values(ascending=False, kind="stable").index]
        return [(int(layer), int(index)) for layer, index in zip(table["layer"], table["index"], strict=True)]

    @property
    def represented(self) -> list[str]:
        """Ids of the questions with a majority answer, in input order."""
        return list(self.exported.representatives)

    def representative_sets(self, question_ids: Sequence[str]) -> Int[Tensor, "questions size"]:
        """Active set of each question's representative rollout."""
        places = [self.exported.place[name, self.representative(name)] for name in question_ids]
        return self.exported.signals.neuron_ids[places]

    def prompt_ids(self, question_id: str) -> tuple[int, ...]:
        """The prompt that the question's rollouts continue."""
        builder = PromptBuilder(self.loaded.tokenizer, self.manifest.header.prompt_config())
        return builder.student(self.row(question_id).as_question())

    def representative(self, question_id: str) -> int:
        """Rollout id of the representative; without a majority answer, of the rollout with the lowest probe score."""
        row = self.row(question_id)
        if row.question_id in self.exported.representatives:
            return self.exported.representatives[row.question_id]
        probe, place = self.exported.signals.probe_scores, self.exported.place
        return min(range(len(row.answers)), key=lambda k: float(probe[place[row.question_id, k]]))

    def row(self, question_id: str) -> QuestionRow:
        """A question's row.

        Raises:
            UserError: There is no such question, or it was too long to trace.
        """
        if question_id not in self.exported.rows:
            raise UserError(f'no question "{question_id}" with rollouts in {self.manifest.folder}')
        return self.exported.rows[question_id]

    def rollout(self, question_id: str, rollout: int | Rollout | None) -> Rollout:
        """A rollout of the export by its id, the representative one by default; a rollout made elsewhere stays itself.

        Raises:
            UserError: There is no such rollout, or it answers another question.
        """
        if isinstance(rollout, Rollout):
            if rollout.question_id != self.row(question_id).question_id:
                raise UserError(f'the rollout answers question "{rollout.question_id}", not "{question_id}"')
            return rollout
        chosen = self.representative(question_id) if rollout is None else rollout
        if (question_id, chosen) not in self.manifest.rollouts:
            count = len(self.row(question_id).answers)
            raise UserError(f'question "{question_id}" has rollouts 0 to {count - 1}, not {chosen}')
        return self.manifest.rollouts[question_id, chosen]

    def is_exported(self, rollout: Rollout) -> bool:
        """Whether the rollout is one of the export's."""
        return self.manifest.rollouts.get((rollout.question_id, rollout.rollout_id)) == rollout

    def which(self, rollout: Rollout) -> str:
        """A rollout in words: its number, its answer and verdict; of one made elsewhere, its text."""
        row = self.row(rollout.question_id)
        if not self.is_exported(rollout):
            return f"a rollout that is not in the export: {rollout.text}"
        k = rollout.rollout_id
        role = ", the representative one" if k == self.representative(row.question_id) else ""
        return f"rollout {k} ({len(row.answers)} from 0){role}; answer {row.answers[k]} ({self.verdict(row, k)})"

    def trusted(self, row: QuestionRow, rollout_id: int) -> bool:
        """Whether the rollout is right or, without a gold answer, agrees with the majority."""
        answer, gold = row.answers[rollout_id], self.gold.get(row.question_id)
        if gold is not None:
            return is_correct(answer, gold)
        return answer is not None and answer == row.pseudo_label

    def verdict(self, row: QuestionRow, rollout_id: int) -> str:
        """``right`` or ``wrong``; without a gold answer ``majority`` or ``minority``."""
        trusted = self.trusted(row, rollout_id)
        if row.question_id in self.gold:
            return "right" if trusted else "wrong"
        return "majority" if trusted else "minority"

    def trace(self, question_id: str, rollout: int | Rollout | None = None) -> TokenTrace:
        """Every neuron at every token of a rollout, the representative one by default."""
        from neurosig.neurons.token_trace import trace_tokens

        chosen = self.rollout(question_id, rollout)
        return trace_tokens(self.tracer, self.prompt_ids(question_id), chosen.completion_ids_without_eos)

    def text_of(self, token: int) -> str:
        """Text of one token."""
        return str(self.loaded.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Text of each token."""
        return [self.text_of(token) for token in ids]

    def name_of(self, neuron: int) -> str:
        """Name of a flat id, such as L19/696."""
        return neuron_name(*divmod(neuron, self.exported.signals.d_mlp))

    def active(self, rollout: Rollout) -> Bool[Tensor, "layer neuron"]:
        """Active set of a rollout as a mask: the export's, or traced now for a rollout made elsewhere."""
        import torch

        from neurosig.neurons.contributions import PAD

        signals = self.exported.signals
        if self.is_exported(rollout):
            ids = signals.neuron_ids[self.exported.place[rollout.question_id, rollout.rollout_id]]
        else:
            prompt = self.prompt_ids(rollout.question_id)
            ids = self.tracer.trace([prompt], [rollout.completion_ids_without_eos]).neuron_ids[0]
        mask = torch.zeros(signals.n_neurons, dtype=torch.bool)
        mask[ids[ids != PAD].long()] = True
        return mask.view(signals.n_layers, signals.d_mlp)

    def facts(self, layer: int, index: int) -> dict[str, float | bool]:
        """The neuron's rows in `neurons`, and as ``pattern ...`` what it is as a pattern neuron of the manifest; a
        neuron outside the table has weight 0."""

        def row(table: pd.DataFrame) -> dict[Any, Any]:
            found = table[(table["layer"] == layer) & (table["index"] == index)]
            found = found.drop(columns=["layer", "index", "neuron", "role"], errors="ignore")
            return {} if found.empty else found.iloc[0].dropna().to_dict()

        pattern = row(self.exported.pattern_neurons)
        record = (row(self.hallucination_neurons) or {"weight": 0.0}) | {
            f"pattern {name}": pattern[name] for name in ("cluster", "lift", "q") if pattern
        }
        return {
            str(name): bool(value) if isinstance(value, bool | np.bool_) else float(value)
            for name, value in record.items()
        }
