"""Reuse the rollouts and traced neurons of a finished export: another selection then takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neurosig.exported import Exported
from neurosig.models.load import LoadedModel
from neurosig.neurons.contributions import ActiveSets
from neurosig.questions.load import Question
from neurosig.runtime.cli import CommonConfig, config_record
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import Shapes, option_names
from neurosig.sampling.rollouts import Rollout


def reused(
    folder: Path, config: CommonConfig, loaded: LoadedModel, questions: Sequence[Question], dataset_sha256: str
) -> tuple[dict[str, list[Rollout]], ActiveSets]:
    """Rollouts by question and their active sets, equal to those of sampling and tracing again.

    Args:
        folder: The finished export.
        config: Options of the current export.
        loaded: Its model.
        questions: Its questions.
        dataset_sha256: Their hash.

    Raises:
        UserError: Model, questions or an option that shapes rollouts or traces differ; the message names them.
    """
    exported = Exported(folder)
    header = exported.manifest.header
    earlier = {**header.model, "tokenizer": header.tokenizer["sha256"], "dataset": header.dataset["sha256"]}
    here = {**loaded.info.as_dict(), "tokenizer": loaded.info.tokenizer_sha256, "dataset": dataset_sha256}
    changed = [name for name in ("weights", "dtype", "tokenizer", "dataset") if earlier.get(name) != here[name]]
    options = config_record(config)
    of_the_file = () if options["rollouts"] is None else ("num_generations",)
    shaping = option_names(type(config), Shapes.ROLLOUTS, Shapes.TRACES)
    changed += [n for n in shaping if n not in of_the_file and header.options.get(n) != options[n]]
    if changed:
        by_id = {question.id: question for question in questions}
        other = [
            f'"{row.question_id}" on line {by_id[row.question_id].line}'
            for row in exported.manifest.rows
            if row.question_id in by_id and by_id[row.question_id].text_sha256 != row.text_sha256
        ]
        texts = f" ({len(other)} questions have another text, the first is {other[0]})" if other else ""
        raise UserError(
            f"--reuse {folder}: its rollouts and traces are not those of this export, these differ: "
            f"{', '.join(changed)}{texts}; give the same options or leave --reuse out"
        )
    signals = exported.signals
    return dict(exported.rollouts), ActiveSets(signals.neuron_ids, signals.contributions, signals.hidden_states)
