"""How views become HTML: one inert, self-contained block for JupyterLab, VS Code and a saved page.

No script and no network. Text and lines inherit the notebook's colour, and cells with a background set their text
colour too, so that light and dark themes both work. Model text is escaped, cut at `LONGEST` characters, isolated in its
direction and kept from MathJax; its control and bidi characters are made visible.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from neurosig.report.html import visible
from neurosig.runtime.cli import printable
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import absent

TEMPLATE = "views.html.jinja"
LONGEST = 2000
"""Characters shown of one model text, followed by the number of the remaining ones."""

_SEQUENTIAL = ("#fdf6e3", "#f3d9a4", "#e8ad5f", "#c9722f", "#8c3d1c", "#4a1a10")
_DIVERGING = ("#0b4f7d", "#4f9bc9", "#c4dff0", "#f7f4ee", "#f6cfae", "#d97f3f", "#8c3d0d")


class View:
    """Something to look at: HTML in a notebook, text in a terminal."""

    macro: ClassVar[str]
    """Its macro in the template; it gets the view."""

    def _repr_html_(self) -> str:
        return render(self.macro, self)

    def text(self) -> str:
        """The view in plain text."""
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
    """

    name: str
    views: Mapping[str, View]
    start: str | None = None
    macro: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        if not self.views:
            raise UserError(f"choice of {self.name}: there is nothing to choose from")
        if self.start is not None and self.start not in self.views:
            raise UserError(f'choice of {self.name}: "{printable(self.start)}" is not among its labels')

    @property
    def first(self) -> str:
        return next(iter(self.views)) if self.start is None else self.start

    def text(self) -> str:
        labels = ", ".join(short(label, 40) for label in self.views)
        return f"{self.name}: {labels}\n{self.views[self.first].text()}"

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
    """A view's block of HTML, with the style it needs."""
    module: Any = _environment().get_template(TEMPLATE).module
    return str(module.block(_body(macro, view)))


def _body(macro: str, view: Any) -> Markup:
    body: Markup = getattr(_environment().get_template(TEMPLATE).module, macro)(view)
    return body


def short(text: str, longest: int) -> str:
    """Text on one printable line of at most ``longest`` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def model_text(text: str | None) -> Markup:
    """Model text as an inert element: see this module's docstring."""
    if text is None:
        return Markup('<span class="none">none</span>')
    cut = visible(text[:LONGEST])
    left = len(text) - LONGEST
    # MathJax never joins a formula across an element
    inert = str(escape(cut)).replace("$", "<span>$</span>").replace("\\", "<span>\\</span>")
    more = f' <small class="soft">… {left:,} more characters</small>' if left > 0 else ""
    return Markup(f'<bdi class="quoted">{inert}</bdi>{more}')


def shade(value: float, low: float, high: float) -> str:
    """Inline style of a cell: background on the scale and an ink that reads on it.

    From white to dark for values of one sign, blue over white to orange for values of both.
    """
    stops, place = _scale(value, low, high)
    position = place * (len(stops) - 1)
    left = min(int(position), len(stops) - 2)
    rgb = [a + (b - a) * (position - left) for a, b in zip(_rgb(stops[left]), _rgb(stops[left + 1]), strict=True)]
    channels = [channel / 12.92 if channel <= 0.03928 else ((channel + 0.055) / 1.055) ** 2.4 for channel in rgb]
    luminance = float(np.dot(channels, (0.2126, 0.7152, 0.0722)))
    ink = "#000000" if luminance > 0.179 else "#ffffff"  # where both have a contrast of 4.58
    return f"background:#{''.join(f'{round(255 * channel):02x}' for channel in rgb)};color:{ink}"


def gradient(low: float, high: float) -> str:
    """The scale of `shade` as a CSS gradient, from ``low`` to ``high``."""
    stops = ", ".join(shade(low + (high - low) * step / 8, low, high).split(";")[0][11:] for step in range(9))
    return f"background:linear-gradient(90deg, {stops})"


def bounds(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Ends of the scale for these values: from 0, or the same distance to both sides of it."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return 0.0, 1.0
    low, high = float(array.min()), float(array.max())
    if low < 0:
        reach = max(-low, high)
        return -reach, reach
    return 0.0, high or 1.0


def _scale(value: float, low: float, high: float) -> tuple[tuple[str, ...], float]:
    stops = _DIVERGING if low < 0 else _SEQUENTIAL
    return stops, min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))


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
        "short": lambda text, longest: text if len(text) <= longest else text[: longest - 1] + "…",
    }
    environment.globals |= {"gradient": gradient, "body_of": lambda view: _body(view.macro, view)}
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
