"""How views become HTML: one inert, self-contained block for JupyterLab, VS Code, Colab and a saved page.

No script, no network, no style sheet and no SVG: JupyterLab's sanitizer removes these from a notebook that is not
trusted, and keeps the tags, attributes and inline styles used here. Text and lines inherit the notebook's colour, and
cells with a background set their text colour too, so that light and dark themes both work. Model text is escaped, cut
at `LONGEST` characters, isolated in its direction and kept from MathJax; its control and bidi characters are made
visible.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from neurosig.report.words import MEANING
from neurosig.runtime.cli import printable, visible
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import absent

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "views.html.jinja"
LONGEST = 2000
"""Characters shown of one model text, followed by the number of the remaining ones."""
FEW = 12
"""Views that a static page names one by one; more are one closed list."""

_SEQUENTIAL = ("#fdf6e3", "#f3d9a4", "#e8ad5f", "#c9722f", "#8c3d1c", "#4a1a10")
_DIVERGING = ("#0b4f7d", "#4f9bc9", "#c4dff0", "#f7f4ee", "#f6cfae", "#d97f3f", "#8c3d0d")
_LEVELS = 240
"""Colours of a scale; a multiple of the steps between the stops of both."""

_LINE = "1px solid rgba(128,128,128,.35)"
STYLE: Mapping[str, str] = {
    "view": "font:14px/1.45 system-ui, sans-serif;max-width:72rem",
    "title": "font-size:1.05em;font-weight:600;margin:.6em 0 .2em",
    "p": "margin:.25em 0 .5em",
    "soft": "opacity:.72;font-size:.86em",
    "quoted": "white-space:pre-wrap;overflow-wrap:break-word",
    "token": "border-radius:2px;padding:.1em .12em;margin-right:1px;white-space:pre-wrap;overflow-wrap:break-word",
    "below": "border-bottom:3px solid #808080",
    "tokens": "line-height:1.9",
    "scale": "display:inline-block;width:9rem;height:.8em;vertical-align:-1px;border:1px solid rgba(128,128,128,.6)",
    "cell": "display:inline-block;padding:.1em .3em;margin:1px;border-radius:2px",
    "pair": "display:flex;flex-wrap:wrap;gap:1.2rem",
    "side": "flex:1 1 20rem;min-width:0",
    "wide": "overflow:auto;max-height:36rem",
    "table": "border-collapse:collapse;font-size:13px;margin:.3em 0;table-layout:auto;border:0",
    "th": f"padding:.15em .55em;text-align:left;vertical-align:top;border:0;border-bottom:{_LINE};white-space:normal",
    "td": f"padding:.15em .55em;text-align:left;vertical-align:top;border:0;border-bottom:{_LINE};white-space:normal;"
    "max-width:28rem;overflow-wrap:break-word",
    "number": f"padding:.15em .55em;text-align:right;vertical-align:top;border:0;border-bottom:{_LINE};"
    "white-space:nowrap",
    "map": "border-collapse:collapse;font-size:12px;margin:.2em 0;table-layout:fixed;width:100%;border:0",
    "map_row": "width:9rem;padding:0 .5em 0 0;text-align:right;font-weight:400;border:0;line-height:1.25;"
    "white-space:nowrap;overflow:hidden;text-overflow:ellipsis",
    "map_layer": "padding:0;text-align:center;font-weight:400;font-size:10px;border:0;white-space:nowrap",
    "fold": "margin:.2em 0",
    "summary": "cursor:pointer",
    "chip": "border-radius:3px;padding:0 .45em;font-size:.9em;background:#5d6570;color:#ffffff",
    "good": "border-radius:3px;padding:0 .45em;font-size:.9em;background:#0072b2;color:#ffffff",
    "bad": "border-radius:3px;padding:0 .45em;font-size:.9em;background:#e69f00;color:#111111",
}
"""Inline styles, of which JupyterLab's sanitizer keeps every property and value."""


class View:
    """Something to look at: HTML in a notebook, text in a terminal, numbers as a table."""

    macro: ClassVar[str]
    """Its macro in the template; it gets the view."""

    def _repr_html_(self) -> str:
        return render(self.macro, self)

    def text(self) -> str:
        """The view in plain text."""
        raise NotImplementedError

    def frame(self) -> pd.DataFrame:
        """The view's numbers, one row each."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.text()

    def save(self, path: str | Path) -> Path:
        """Write the view as a page of its own; returns its path."""
        from neurosig.runtime.files import write_atomic

        page = _environment().from_string(_PAGE).render(body=Markup(self._repr_html_()))
        write_atomic(path, page)
        return Path(path)


@dataclass(repr=False)
class Choice(View):
    """Several views, one at a time: a slider with ipywidgets, a list to open without.

    Attributes:
        name: Name of the choice, such as "layer".
        views: Label -> view, in order.
        start: Label shown first; the first one by default.
        shown: Labels that a page without a kernel shows open; by default only ``start``.
    """

    name: str
    views: Mapping[str, View]
    start: str | None = None
    shown: Sequence[str] = ()
    macro: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        if not self.views:
            raise UserError(f"choice of {self.name}: there is nothing to choose from")
        for label in [*self.shown, *([] if self.start is None else [self.start])]:
            if label not in self.views:
                raise UserError(f'choice of {self.name}: "{printable(label)}" is not among its labels')

    @property
    def first(self) -> str:
        return next(iter(self.views)) if self.start is None else self.start

    @property
    def opened(self) -> list[str]:
        return list(self.shown or [self.first])

    @property
    def closed(self) -> list[str]:
        return [label for label in self.views if label not in self.opened]

    @property
    def folded(self) -> bool:
        """Whether the closed views are one closed list instead of a line each."""
        return len(self.closed) > FEW

    def text(self) -> str:
        labels = ", ".join(short(label, 40) for label in self.views)
        return f"{self.name}: {labels}\n{self.views[self.first].text()}"

    def frame(self) -> pd.DataFrame:
        """The numbers of all views, under their labels."""
        import pandas as pd

        frames = {label: view.frame() for label, view in self.views.items()}
        return pd.concat(frames, names=[self.name])

    def widget(self) -> Any:
        """The slider with its view below.

        Raises:
            UserError: ipywidgets is not installed.
        """
        try:
            import ipywidgets
        except ImportError as error:
            raise UserError(f"a slider: {absent('ipywidgets')}") from error
        options = [(short(label, 90), label) for label in self.views]
        style: dict[str, Any] = {"options": options, "value": self.first, "description": short(self.name, 20)}
        wide = ipywidgets.Layout(width="min(100%, 44rem)")
        is_long = max(len(label) for label, _ in options) > 12
        control = (ipywidgets.Dropdown if is_long else ipywidgets.SelectionSlider)(layout=wide, **style)
        shown = ipywidgets.HTML(self.views[self.first]._repr_html_())

        def change(event: Mapping[str, Any]) -> None:
            shown.value = self.views[event["new"]]._repr_html_()

        control.observe(change, names="value")
        return ipywidgets.VBox([control, shown])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The slider, and a static form for pages without a kernel."""
        still = {"text/html": self._repr_html_(), "text/plain": self.text()}
        try:
            live = self.widget()._repr_mimebundle_()
        except UserError:
            return still
        return {**live, **still}


def render(macro: str, view: Any) -> str:
    """A view's block of HTML."""
    module: Any = _environment().get_template(TEMPLATE).module
    return str(module.block(_body(macro, view)))


def _body(macro: str, view: Any) -> Markup:
    body: Markup = getattr(_environment().get_template(TEMPLATE).module, macro)(view)
    return body


def short(text: str, longest: int) -> str:
    """Text on one printable line of at most ``longest`` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def model_text(text: str | None, longest: int = LONGEST) -> Markup:
    """Model text as an inert element: see this module's docstring."""
    if text is None:
        return Markup('<span style="opacity:.72">none</span>')
    cut = visible(text[:longest])
    left = len(text) - longest
    # MathJax never joins a formula across an element
    inert = str(escape(cut)).replace("$", "<span>$</span>").replace("\\", "<span>\\</span>")
    more = f' <small style="opacity:.72">… {left:,} more characters</small>' if left > 0 else ""
    return Markup(f'<bdi class="quoted" style="{STYLE["quoted"]}">{inert}</bdi>{more}')


def shade(value: float, low: float, high: float) -> str:
    """Inline style of a cell: background on the scale and an ink that reads on it.

    From white to dark for values of one sign, blue over white to orange for values of both.
    """
    return _shade(low < 0, _level(value, low, high))


def cells(values: Sequence[float], low: float, high: float, names: Sequence[str]) -> Markup:
    """Table cells without text, coloured by `shade`; each number is the cell's title."""
    styles = [_shade(low < 0, _level(value, low, high), ink=False) for value in values]
    made = (
        f'<td style="padding:0;border:0;{style}" title="{name}: {value:.6g}"></td>'
        for name, value, style in zip(names, values, styles, strict=True)
    )
    return Markup("".join(made))  # names of layers and numbers, no text of a model


def gradient(low: float) -> str:
    """The scale of `shade` from ``low`` to its other end as a CSS gradient."""
    return f"background:linear-gradient(90deg, {', '.join(_stops(low < 0))})"


def bounds(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Ends of the scale for these values: from 0, or the same distance to both sides of it."""
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    if array.size == 0:
        return 0.0, 1.0
    low, high = float(array.min()), float(array.max())
    if low < 0:
        reach = max(-low, high)
        return -reach, reach
    return 0.0, high or 1.0


def _stops(diverging: bool) -> tuple[str, ...]:
    return _DIVERGING if diverging else _SEQUENTIAL


def _level(value: float, low: float, high: float) -> int:
    if value != value:
        return 0
    return round(_LEVELS * min(1.0, max(0.0, (value - low) / ((high - low) or 1.0))))


@functools.cache
def _shade(diverging: bool, level: int, *, ink: bool = True) -> str:
    stops = _stops(diverging)
    position = level / _LEVELS * (len(stops) - 1)
    left = min(int(position), len(stops) - 2)
    rgb = [a + (b - a) * (position - left) for a, b in zip(_rgb(stops[left]), _rgb(stops[left + 1]), strict=True)]
    background = f"background:#{''.join(f'{round(255 * channel):02x}' for channel in rgb)}"
    channels = [channel / 12.92 if channel <= 0.03928 else ((channel + 0.055) / 1.055) ** 2.4 for channel in rgb]
    luminance = float(np.dot(channels, (0.2126, 0.7152, 0.0722)))
    readable = "#000000" if luminance > 0.179 else "#ffffff"  # where both have a contrast of 4.58
    return f"{background};color:{readable}" if ink else background


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red, green, blue


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "model_text": model_text,
        "shade": shade,
        "cells": cells,
        "short": lambda text, longest: text if len(text) <= longest else text[: longest - 1] + "…",
    }
    environment.globals |= {"gradient": gradient, "s": STYLE, "body_of": lambda view: _body(view.macro, view)}
    environment.globals["meaning"] = lambda name: MEANING.get(str(name), "")
    return environment


def _finalize(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return visible(value if len(value) <= LONGEST else value[:LONGEST] + "…")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>neurosig</title>
</head><body style="margin:1.5rem auto;max-width:72rem;padding:0 1rem">{{ body }}</body></html>
"""
