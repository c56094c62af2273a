"""Reuse the rollouts and traced neurons of a finished export: another selection then takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neurosig.exported import Exported
from neurosig.models.load import LoadedModel
from neurosig.neurons.config import PARSED, TraceConfig
from neurosig.neurons.contributions import ActiveSets
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.registry import Kind, find
from neurosig.runtime.cli import CommonConfig, config_record
from neurosig.runtime.errors import UserError
from neurosig.runtime.provenance import differences, explain
from neurosig.runtime.recorded import BY_CONTENT
from neurosig.runtime.shapes import Shapes, option_names
from neurosig.sampling.rollouts import Rollout


def reused(
    folder: Path,
    config: CommonConfig,
    loaded: LoadedModel,
    questions: Sequence[Question],
    dataset_sha256: str,
    rollouts_sha256: str | None,
    reader: AnswerReader,
) -> tuple[dict[str, list[Rollout]], ActiveSets]:
    """Rollouts by question and their active sets, equal to those of sampling and tracing again.

    Args:
        folder: The finished export.
        config: Options of the current export.
        loaded: Its model.
        questions: Its questions.
        dataset_sha256: Their hash.
        rollouts_sha256: Hash of the file of ``--rollouts``, which may have moved since.
        reader: How answers are parsed, which some ``--positions`` depend on.

    Raises:
        UserError: Model, questions or an option that shapes rollouts or traces differ; the message names them with both
            values.
    """
    exported = Exported(folder)
    header = exported.manifest.header
    info, options = loaded.info.as_dict(), config_record(config)
    there = {
        **{"weights": header.model["weights"], "dtype": header.model["dtype"], "dataset": header.dataset["sha256"]},
        "adapter": header.model.get("adapter"),
        **{"tokenizer": header.tokenizer["sha256"], "chat_template": header.tokenizer["chat_template_sha256"]},
        "rollouts": header.sampling.get("rollouts_sha256"),
    }
    here = {
        **{"weights": info["weights"], "dtype": info["dtype"], "dataset": dataset_sha256},
        "adapter": info["adapter"],
        **{"tokenizer": info["tokenizer_sha256"], "chat_template": info["chat_template_sha256"]},
        "rollouts": rollouts_sha256,
    }
    of_the_file = () if options["rollouts"] is None else ("num_generations",)
    for name in option_names(type(config), Shapes.ROLLOUTS, Shapes.TRACES):
        if name not in there and name not in BY_CONTENT and name not in of_the_file:
            there[name], here[name] = header.options.get(name), options[name]
    if options["positions"] in PARSED:
        for side, record in ((there, header.answers), (here, reader.record())):
            side["answers"] = {name: value for name, value in record.items() if name != "vote_merge"}
    kinds: tuple[Kind, ...] = ("contribution", "active_set")
    for name in kinds:
        found = find(name, options[name])
        there[f"{name}_sha256"], here[f"{name}_sha256"] = header.functions.get(str(there[name])), found.sha256
    signals = exported.signals
    for side in (there, here):
        trace = TraceConfig(active=side["active_set"], set_size=side["set_size"])
        side["set_size"] = trace.sized(signals.n_layers, signals.d_mlp).set_size
    if changed := differences(there, here):
        by_id = {question.id: question for question in questions}
        other = [
            f'"{row.question_id}" on line {by_id[row.question_id].line}'
            for row in exported.manifest.rows
            if row.question_id in by_id and by_id[row.question_id].text_sha256 != row.text_sha256
        ]
        texts = f" ({len(other)} questions have another text, the first is {other[0]})" if other else ""
        raise UserError(
            f"--reuse {folder}: its rollouts and traces are not those of this export, these differ: "
            f"{explain(changed, 'there', 'here')}{texts}; give the same options or leave --reuse out"
        )
    return dict(exported.rollouts), ActiveSets(signals.neuron_ids, signals.contributions, signals.hidden_states)
