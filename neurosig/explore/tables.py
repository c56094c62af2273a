"""How traces are shown: tables of neurons, dimensions and effects on a logit; one line in a terminal; HTML."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neurosig.explore.attribution import Directions
from neurosig.explore.forward import Keep, Stream
from neurosig.neurons.contributions import PAD
from neurosig.neurons.reduction import layer_scores
from neurosig.neurons.sites import w_out
from neurosig.runtime.cli import printable
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.explore.traces import Traces

logger = logging.getLogger(__name__)

NEURON_COLUMNS = ("text", "layer", "neuron", "contribution", "position", "token", "next_token", "effect")
SHOWN = 5
"""Neurons per text of a notebook's table."""
TEXTS = 4
"""Texts of a notebook's table."""
FIRST = 15
"""Neurons that a notebook shows of a probe or a comparison."""
CELL = "padding:2px 8px;border-bottom:1px solid rgba(128,128,128,.4);background:transparent;color:inherit"
TABLE = "border-collapse:collapse;background:transparent;color:inherit;font-size:90%"


def neuron_rows(run: Traces, text: int, top: int) -> list[tuple[Any, ...]]:
    """Rows of `NEURON_COLUMNS` of one text, the largest contribution first."""
    ids, contributions = run.sets.neuron_ids[text], run.sets.contributions[text]
    order = contributions.masked_fill(ids == PAD, -torch.inf).argsort(descending=True, stable=True)[:top]
    chosen = [(*divmod(int(ids[place]), run.sites.d_mlp), float(contributions[place])) for place in order]
    chosen = [row for row, place in zip(chosen, order.tolist(), strict=True) if ids[place] != PAD]
    by_layer: dict[int, list[int]] = {}
    for layer, neuron, _ in chosen:
        by_layer.setdefault(layer, []).append(neuron)
    read = run.texts[text]
    at = run.value_at(text)

    def keep(layer: int, value: Tensor, made: Tensor, act: Tensor) -> tuple[Tensor, Tensor] | None:
        if layer not in by_layer:
            return None
        scores = _scores(run, layer, act if run.config.value == "act" else value, made, read.ids, at)
        return value[:, by_layer[layer]].cpu(), scores[:, by_layer[layer]].cpu()

    stream, why = _stream_or_why(run, text, at, keep)
    kept = stream.kept if stream else run.neurons(text, keep)
    if stream is None:
        logger.warning("no direct effects: %s", why)
    following, names = _next_tokens(run, text, at, stream)
    directions = stream and Directions(run.model.model, run.sites, stream, following)
    found: dict[tuple[int, int], tuple[int, float]] = {}
    for layer, neurons in by_layer.items():
        values, scores = kept[layer]
        places = scores.argmax(dim=0).tolist()
        effects = directions.neurons(layer, values, neurons) if directions else torch.full(values.shape, torch.nan)
        found |= {
            (layer, neuron): (place, float(effects[place, column]))
            for column, (neuron, place) in enumerate(zip(neurons, places, strict=True))
        }
    rows = []
    for layer, neuron, contribution in chosen:
        place, effect = found[layer, neuron]
        position = run.read_at[text][place]
        rows.append((text, layer, neuron, contribution, position, read.tokens[position], names[place], effect))
    return rows


def dimension_rows(run: Traces, text: int, vectors: Float[Tensor, "layer d"], top: int) -> list[tuple[Any, ...]]:
    """Text, layer or module, dimension and value of the largest entries, by size."""
    flat = vectors.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[:top].tolist()
    places = (divmod(place, vectors.shape[1]) for place in order)
    return [
        (text, layer if len(vectors) > 1 else run.site, dimension, float(vectors[layer, dimension]))
        for layer, dimension in places
    ]


def attribution_table(run: Traces, text: int, position: int, token: int | None, by: str, top: int) -> pd.DataFrame:
    """`Traces.attribution` of one text at one position."""

    def keep(layer: int, value: Tensor, made: Tensor, act: Tensor) -> Tensor:
        return value

    stream = run.stream(text, [position], keep)
    following, names = _next_tokens(run, text, [position], stream)
    if token is not None:
        following, names = torch.tensor([token]), [str(run.model.tokenizer.decode([token]))]
    directions = Directions(run.model.model, run.sites, stream, following)
    parts = directions.parts()
    rows: list[tuple[Any, ...]]
    if by == "sublayers":
        rows = [("embedding", None, float(parts.embedding[0]))]
        for layer in range(run.sites.n_layers):
            rows.append(("attention", layer, float(parts.attention[layer, 0])))
            rows.append(("ffn", layer, float(parts.ffn[layer, 0])))
        rows.append(("bias", None, float(parts.bias[0])))
        table = pd.DataFrame(rows, columns=["part", "layer", "effect"]).astype({"layer": "Int64"})
    else:
        effects = torch.stack([directions.neurons(layer, kept)[0].cpu() for layer, kept in enumerate(stream.kept)])
        order = effects.flatten().abs().argsort(descending=True, stable=True)[:top].tolist()
        rows = [
            (*divmod(place, run.sites.d_mlp), float(stream.kept[place // run.sites.d_mlp][0, place % run.sites.d_mlp]))
            for place in order
        ]
        rows = [(*row, float(effects[row[0], row[1]])) for row in rows]
        table = pd.DataFrame(rows, columns=["layer", "neuron", "value", "effect"])
    table.attrs = {"logit": float(parts.logit[0]), "next_token": names[0], "position": position}
    return table


def _scores(
    run: Traces, layer: int, value: Tensor, made: Tensor, ids: Sequence[int], at: Sequence[int]
) -> Float[Tensor, "token neuron"]:
    """Contributions of a layer's neurons at the positions, as the tracer defines them."""
    model = run.model.model
    weight = w_out(model, run.sites.layers[layer])
    following = [ids[position + 1] for position in at] if run.tracer.about_next else None
    next_ids = None if following is None else torch.tensor([following], device=value.device)
    output = made[None] if run.tracer.with_output else None
    head = model.get_output_embeddings().weight
    return layer_scores(run.tracer.contribution, value[None], output, weight, head, None, next_ids)[0]


def _stream_or_why(run: Traces, text: int, at: Sequence[int], keep: Keep) -> tuple[Stream | None, str]:
    try:
        return run.stream(text, at, keep), ""
    except UserError as error:
        return None, str(error)


def _next_tokens(
    run: Traces, text: int, at: Sequence[int], stream: Stream | None
) -> tuple[Int[Tensor, " token"], list[str]]:
    """The token after each position; after a text's last token the one that the model thinks likeliest."""
    ids = run.texts[text].ids
    following = [ids[position + 1] if position + 1 < len(ids) else -1 for position in at]
    decode: Callable[[list[int]], Any] = run.model.tokenizer.decode
    if -1 in following:
        place = following.index(-1)
        if stream is None:
            return torch.tensor(following), [decode([token]) if token >= 0 else "" for token in following]
        with torch.no_grad():
            following[place] = int(run.model.model.get_output_embeddings()(stream.hidden[place]).argmax())
    return torch.tensor(following), [str(decode([token])) for token in following]


def summary(run: Traces) -> str:
    """Model, number of texts, site, positions, special tokens and notes, on one line."""
    info = run.model.info
    what = f"{len(run)} text{'s' * (len(run) != 1)} through {info.id}{' with an adapter' * (info.adapter is not None)}"
    read = sum(map(len, run.read_at))
    tokens = f"{read} token{'s' * (read != 1)} read, never the first of a text"
    parts = [what, f"sites {run.site}", f"positions {run.positions} ({tokens})"]
    parts.append("special tokens: the tokenizer's before a prompt or the chat template's, none around a completion")
    parts += [str(change) for change in run.changes]
    return printable(f"Traces({'; '.join([*parts, *run.notes])})")


def page(run: Traces, top: int) -> str:
    """The same as a page of its own, light or dark as the reader's browser is, which loads nothing from elsewhere."""
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>neurosig</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{html(run, top)}</body></html>\n'


def html(run: Traces, top: int = SHOWN) -> str:
    """The summary and the top of the table, with all text escaped, inline styles only and the page's own colours."""
    shown = run[:TEXTS]
    frame = shown.to_frame(top)
    more = f"<div>{len(run) - len(shown)} more texts</div>" if len(run) > len(shown) else ""
    listed = "".join(
        f"<div>{index}: {_shown(text.prompt)}<b>{_shown(text.completion)}</b></div>"
        for index, text in enumerate(shown.texts)
    )
    body = f"<div>{escape(summary(run))}</div>{listed}{more}{table(frame)}"
    return framed(body)


def framed(body: str) -> str:
    """A block that takes the page's colours, so that it is legible in the dark and in the light."""
    return f'<div style="color:inherit;background:transparent">{body}</div>'


def neurons_html(text: str, neurons: pd.DataFrame) -> str:
    """A sentence and the first neurons of a table, escaped, inline styles only and the page's own colours."""
    more = len(neurons) - FIRST
    tail = f"<div>{more} more neurons</div>" if more > 0 else ""
    return framed(f"<div>{escape(text)}</div>{table(neurons.head(FIRST))}{tail}")


def table(frame: pd.DataFrame) -> str:
    """A table as HTML; every cell is escaped, also its control and bidi characters."""
    head = "".join(f'<th style="{CELL};text-align:right">{escape(str(name))}</th>' for name in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f'<td style="{CELL};text-align:right">{cell(value)}</td>' for value in row) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f'<table style="{TABLE}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def cell(value: object) -> str:
    """One value of a table: numbers to four places, texts quoted."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4f}"
    return escape(printable(repr(value)) if isinstance(value, str) else str(value))


def _shown(text: str, most: int = 200) -> str:
    return escape(printable(text if len(text) <= most else f"{text[:most]}..."))
