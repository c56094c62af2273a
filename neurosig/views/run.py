"""A finished export together with the model that made it, as the views need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.exported import Exported, join_gold
from neurosig.hallucination.locate import read_neurons
from neurosig.manifest import QuestionRow
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import PAD
from neurosig.neurons.token_trace import TokenTrace, trace_tokens
from neurosig.neurons.tracer import NeuronTracer
from neurosig.patterns.similarity import mean_pairwise_jaccard
from neurosig.questions.answers import is_correct
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout


class ExportedRun(Exported):
    """A finished export with its model.

    Attributes:
        loaded: The model.
        tracer: Traces it as the export did.
        gold: Questions with gold answers by id, for verdicts only; empty without.
        weights: The probe's weights on raw contributions (it was fitted on contributions scaled to at most 1).
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
        """Read the export and load the model that made it.

        Args:
            folder: Folder of ``neurosig.export``.
            model: The loaded model, or the name or folder to load instead of the manifest's; its weights must match.
            adapter: Where the manifest's adapter is, if not where it was (`neurosig.models.run_folder.find_adapter`).
            neurons: Table of neurons to use instead of the manifest's, such as ``report/located_neurons.csv``.
            gold: Whether to look up gold answers, to call rollouts right or wrong instead of majority or minority.

        Raises:
            UserError: The export cannot be read, or the model is not the one that made it.
        """
        super().__init__(folder)
        header, options = self.manifest.header, self.manifest.header.options
        if neurons is not None:
            self.neurons = read_neurons(neurons)
        if not isinstance(model, LoadedModel):
            name = str(header.model["id"]) if model is None else model
            where = header.adapter(None if adapter is None else Path(adapter))
            model = load_model(name, dtype=options["dtype"], template=options["template"], adapter=where)
        if (model.info.weights, model.info.adapter) != (header.model["weights"], header.model.get("adapter")):
            raise UserError(
                f"{folder}: made by {header.model['id']}{' with an adapter' if header.model.get('adapter') else ''}, "
                f"not by {model.info.id}{' with this one' if model.info.adapter else ''}; give the model that made it"
            )
        self.loaded = model
        self.tracer = NeuronTracer(
            model.model,
            TraceConfig(
                value=options["neuron_value"],
                score=options["contribution"],
                active=options["active_set"],
                set_size=options["set_size"],
                positive_only=options["positive_only"],
            ),
        )
        self._builder = PromptBuilder(model.tokenizer, header.prompt_config())
        self.gold: Mapping[str, Question] = join_gold(self.manifest)[0] if gold else {}
        self.weights = self._dense_weights()

    @property
    def selected(self) -> list[str]:
        """Ids of the selected questions, in input order."""
        return [row.question_id for row in self.manifest.selected]

    @property
    def contrasting(self) -> list[str]:
        """Ids of the questions whose rollouts differ in their verdict, the most even splits first."""
        splits = []
        for name, row in self.rows.items():
            trusted = sum(self.trusted(row, index) for index in range(len(row.answers)))
            if 0 < trusted < len(row.answers):
                splits.append((abs(trusted - len(row.answers) / 2), name))
        return [name for _, name in sorted(splits, key=lambda pair: pair[0])]

    @property
    def located(self) -> list[tuple[int, int]]:
        """Layer and index of the probe's neurons, heaviest first."""
        order = self.neurons["weight"].abs().sort_values(ascending=False, kind="stable").index
        return [(int(self.neurons["layer"][i]), int(self.neurons["index"][i])) for i in order]

    @property
    def represented(self) -> list[str]:
        """Ids of the questions with a majority answer, in input order."""
        return list(self.representatives)

    def representative_sets(self, question_ids: Sequence[str]) -> Int[Tensor, "questions size"]:
        """Active set of each question's representative rollout."""
        return self.signals.neuron_ids[[self.place[name, self.representative(name)] for name in question_ids]]

    def overview(self) -> pd.DataFrame:
        """One row per question: kind, text, majority answer and its share, verdict, agreement of its active sets."""
        table = []
        for name, row in self.rows.items():
            assert row.vote is not None
            places = [self.place[name, index] for index in range(len(row.answers))]
            table.append(
                {
                    "id": name,
                    "kind": row.kind or row.domain,
                    "question": row.question,
                    "majority": row.pseudo_label,
                    "share": row.vote.count / row.vote.n,
                    "verdict": self.verdict(row, self.representative(name)),
                    "neuron_agreement": mean_pairwise_jaccard(self.signals.neuron_ids[places]),
                    "decision": row.reason.replace("_", " "),
                    "representative": self.rollout(name, None).text,
                }
            )
        return pd.DataFrame(table).set_index("id")

    def prompt_ids(self, question_id: str) -> tuple[int, ...]:
        """The prompt that the question's rollouts continue."""
        return self._builder.student(self.row(question_id).as_question())

    def representative(self, question_id: str) -> int:
        """Rollout id of the representative; without a majority answer, of the rollout with the lowest probe score."""
        row = self.row(question_id)
        if row.question_id in self.representatives:
            return self.representatives[row.question_id]
        return min(
            range(len(row.answers)), key=lambda k: float(self.signals.probe_scores[self.place[row.question_id, k]])
        )

    def trace(self, question_id: str, rollout_id: int | None = None) -> TokenTrace:
        """Every neuron at every token of a rollout, the representative one by default."""
        return trace_tokens(
            self.tracer, self.prompt_ids(question_id), self.rollout(question_id, rollout_id).completion_ids_without_eos
        )

    def row(self, question_id: str) -> QuestionRow:
        """A question's row.

        Raises:
            UserError: There is no such question, or it was too long to trace.
        """
        if question_id not in self.rows:
            raise UserError(f'no question "{question_id}" with rollouts in {self.manifest.folder}')
        return self.rows[question_id]

    def rollout(self, question_id: str, rollout_id: int | None) -> Rollout:
        """A rollout, the representative one by default.

        Raises:
            UserError: There is no such rollout.
        """
        chosen = self.representative(question_id) if rollout_id is None else rollout_id
        if (question_id, chosen) not in self.manifest.rollouts:
            count = len(self.row(question_id).answers)
            raise UserError(f'question "{question_id}" has rollouts 0 to {count - 1}, not {chosen}')
        return self.manifest.rollouts[question_id, chosen]

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

    def text_of(self, token: int) -> str:
        """Text of one token."""
        return str(self.loaded.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Text of each token."""
        return [self.text_of(token) for token in ids]

    def name_of(self, neuron: int) -> str:
        """``layer.index`` of a flat id."""
        return f"{neuron // self.signals.d_mlp}.{neuron % self.signals.d_mlp}"

    def active(self, place: int) -> Bool[Tensor, "layer neuron"]:
        """Active set of the rollout in this row of the signals as a mask."""
        ids = self.signals.neuron_ids[place]
        mask = torch.zeros(self.signals.n_neurons, dtype=torch.bool)
        mask[ids[ids != PAD].long()] = True
        return mask.view(self.signals.n_layers, self.signals.d_mlp)

    def facts(self, layer: int, index: int) -> dict[str, float | bool]:
        """The neuron's row in the table, and as ``pattern ...`` what it is as a pattern neuron of the manifest; a
        neuron outside the table has weight 0."""

        def row(table: pd.DataFrame) -> dict[Any, Any]:
            found = table[(table["layer"] == layer) & (table["index"] == index)].drop(columns=["layer", "index"])
            return {} if found.empty else found.iloc[0].dropna().to_dict()

        pattern = row(self.pattern_neurons)
        record = (row(self.neurons) or {"weight": 0.0}) | {
            f"pattern {name}": pattern[name] for name in ("cluster", "lift", "q") if pattern
        }
        return {
            str(name): bool(value) if isinstance(value, bool | np.bool_) else float(value)
            for name, value in record.items()
        }

    def _dense_weights(self) -> Float[Tensor, "layer neuron"]:
        signals = self.signals
        largest = torch.zeros(signals.n_neurons)
        kept = signals.neuron_ids != PAD
        largest.scatter_reduce_(
            0, signals.neuron_ids[kept].long(), signals.contributions[kept].float().abs(), reduce="amax"
        )
        weights = torch.zeros_like(largest)
        flat = torch.from_numpy((self.neurons["layer"] * signals.d_mlp + self.neurons["index"]).to_numpy(copy=True))
        raw = torch.from_numpy(self.neurons["weight"].to_numpy(copy=True)).float()
        weights[flat] = torch.where(largest[flat] > 0, raw / largest[flat].clamp(min=1e-12), 0.0)
        return weights.view(signals.n_layers, signals.d_mlp)
