"""Take over the rollouts and traced neurons of a finished export, so that another selection costs seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neurosig.exported import Exported
from neurosig.models.load import LoadedModel
from neurosig.neurons.contributions import ActiveSets
from neurosig.questions.load import Question
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout

DECIDES = (
    *("model", "questions", "split", "limit", "rollouts", "system", "instruction", "choice_instruction"),
    *("enable_thinking", "template", "num_generations", "temperature", "top_p", "top_k", "repetition_penalty"),
    *(
        "sampler",
        "served_model",
        "server_api",
        "served_logprobs",
        "max_new_tokens",
        "seed",
        "neuron_value",
        "contribution",
        "active_set",
        "set_size",
        "positive_only",
    ),
)
"""Options that shape rollouts and traces; both exports must agree on them."""


def reused(
    folder: Path, options: Mapping[str, Any], loaded: LoadedModel, questions: Sequence[Question], dataset_sha256: str
) -> tuple[dict[str, list[Rollout]], ActiveSets]:
    """Rollouts by question and their active sets, as sampling and tracing again would give them.

    Args:
        folder: The finished export.
        options: Those of the export at hand.
        loaded: Its model.
        questions: Its questions.
        dataset_sha256: Their hash.

    Raises:
        UserError: The finished export was made otherwise; what differs is named.
    """
    exported = Exported(folder)
    header = exported.manifest.header
    made = {**header.model, "tokenizer": header.tokenizer["sha256"], "dataset": header.dataset["sha256"]}
    here = {**loaded.info.as_dict(), "tokenizer": loaded.info.tokenizer_sha256, "dataset": dataset_sha256}
    changed = [name for name in ("weights", "dtype", "tokenizer", "dataset") if made.get(name) != here[name]]
    known = [name for name in DECIDES if name != "model" and name in header.options]  # an older export knew fewer
    changed += [name for name in known if header.options[name] != options[name]]
    if changed:
        by_id = {question.id: question for question in questions}
        other = [
            f'"{row.id}" on line {by_id[row.id].line}'
            for row in exported.manifest.rows
            if row.id in by_id and by_id[row.id].text_sha256 != row.text_sha256
        ]
        texts = f" ({len(other)} questions have another text, the first is {other[0]})" if other else ""
        raise UserError(
            f"--reuse {folder}: its rollouts and traces are not those of this export, these differ: "
            f"{', '.join(changed)}{texts}; give the same options or leave --reuse out"
        )
    signals = exported.signals
    return dict(exported.rollouts), ActiveSets(signals.ids, signals.values, signals.hidden)
