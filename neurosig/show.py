"""Show which neurons take part in one text, as a table in the terminal, as JSON or as a page.

    python -m neurosig.show smollm2-135m "The capital of France is" " Paris."
    python -m neurosig.show smollm2-135m "Who wrote Hamlet?" --chat --top 5 --json

Calls `neurosig.trace` on the text and prints `Traces.to_frame`. ``--json`` prints one object: ``format``
("neurosig.show"), ``version`` (1; it rises when a field changes its meaning or goes), ``model``, ``adapter`` (SHA-256
or null), ``sites``, ``positions``, ``notes``, ``prompt``, ``completion``, ``tokens`` (``index``, ``id``, ``text``,
``read``: whether the token counts) and ``rows``, the table's, largest first: for FFN neurons ``layer``, ``neuron``,
``contribution``, ``position``, ``token``, ``next_token``, ``effect`` (null where it cannot be told), for other sites
``layer`` or ``module``, ``dimension``, ``value``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from neurosig.runtime.cli import CommonConfig, printable, run_command
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import AtLeast, Shapes

if TYPE_CHECKING:
    import pandas as pd

    from neurosig.explore.traces import Traces

FORMAT, VERSION = "neurosig.show", 1


@dataclass(kw_only=True)
class ShowConfig(CommonConfig):
    """Trace one text and print its largest neurons, where each contributes most, and what it adds to the next token.

    Special tokens: the prompt gets those of the tokenizer once, the completion none. The first token of the text runs
    but is never read.
    """

    model: Annotated[Positional[str], Shapes.MODEL]
    """Hub id, folder, GGUF file, or smollm2-135m (embedded)."""
    prompt: Annotated[Positional[str], Shapes.ROLLOUTS]
    """What the model reads first."""
    completion: Annotated[Positional[str | None], Shapes.ROLLOUTS, Section.OPTIONS] = None
    """What follows it, usually with a space first; without one the prompt's own tokens are read."""
    adapter: Annotated[Path | None, Shapes.MODEL] = None
    """A trained model: folder of a distill.train run, its adapter/ or one of its checkpoints/step-N."""
    chat: Annotated[bool, Shapes.ROLLOUTS] = False
    """Put the prompt as the user's message into the model's chat template, as a tuned model was taught."""
    template: Annotated[str | None, Shapes.ROLLOUTS] = None
    """'plain' or a Jinja file to use instead of the tokenizer's chat template; for --chat."""
    positions: Annotated[str, Shapes.TRACES, Section.NEURONS] = "answer"
    """Tokens whose mean is taken: answer, statement, answer_words, thought, all, answer_start, prompt_end, prompt, or
    tokens of the completion such as 0, -1, 0:3."""
    sites: Annotated[str, Shapes.TRACES] = "ffn"
    """What is read: ffn (neurons), residual, attention_out, or a module's path such as model.layers.3.mlp.gate_proj."""
    top: Annotated[int, Shapes.TRACES, AtLeast(1)] = 20
    """Rows of the table."""
    dtype: Annotated[str, Shapes.MODEL, Section.RESOURCES] = "auto"
    """Parameter dtype; auto: float32 on CPU, bfloat16 on an accelerator."""
    device: Annotated[str | None, Shapes.RESOURCES] = None
    """torch device; default: the first accelerator, else the CPU."""
    json: Annotated[bool, Shapes.PLACE, Section.OUTPUT] = False
    """Print one JSON object instead of the table; python -m pydoc neurosig.show lists its fields."""
    html: Annotated[Path | None, Shapes.PLACE] = None
    """Also write the table to this file, a page of its own that loads nothing from elsewhere; an earlier one is
    replaced."""


def main(config: ShowConfig) -> None:
    """Trace the text of ``config`` and print its table.

    Raises:
        UserError: See `neurosig.models.load.load_model` and `neurosig.explore.traces.trace`.
    """
    from neurosig.explore.tables import page
    from neurosig.explore.traces import trace
    from neurosig.models.load import load_model
    from neurosig.runtime.extras import check_installed
    from neurosig.runtime.files import write_atomic

    check_installed("neurosig.show", "nnsight", "pandas")
    model = load_model(
        config.model, dtype=config.dtype, device=config.device, template=config.template, adapter=config.adapter
    )
    prompt: Any = [{"role": "user", "content": config.prompt}] if config.chat else config.prompt
    text = prompt if config.completion is None else (prompt, config.completion)
    run = trace(model, [text], positions=config.positions, sites=config.sites, progress=False)
    frame = run.to_frame(config.top).drop(columns="text")
    if config.html is not None:
        write_atomic(config.html, page(run, config.top))
    if config.json:
        print(json.dumps(_record(run, frame), allow_nan=False))
        return
    print(repr(run))
    print(printable(f"{run.texts[0].prompt}|{run.texts[0].completion}"))
    shown = frame.map(lambda value: printable(repr(value)) if isinstance(value, str) else value)
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.4f}", na_rep=""))


def _record(run: Traces, frame: pd.DataFrame) -> dict[str, Any]:
    text, read = run.texts[0], set(run.read_at[0])
    rows = [
        {name: None if value != value else value for name, value in row.items()} for row in frame.to_dict("records")
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": run.model.info.id,
        "adapter": run.model.info.adapter,
        "sites": run.site,
        "positions": run.positions,
        "notes": list(run.notes),
        "prompt": text.prompt,
        "completion": text.completion,
        "tokens": [
            {"index": index, "id": token, "text": shown, "read": index in read}
            for index, (token, shown) in enumerate(zip(text.ids, text.tokens, strict=True))
        ],
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(run_command(ShowConfig, main, presets={}, prog="python -m neurosig.show"))
