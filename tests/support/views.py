"""One view of every kind with given text, hostile texts, and what JupyterLab's sanitizer leaves of a view."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from html.parser import HTMLParser

import numpy as np
import torch

from neurosig.views.explorer import Choice
from neurosig.views.frames import Table
from neurosig.views.html import View
from neurosig.views.kinds import Neighbour, NeighbourBrowser, NeuronCard, NeuronExample, RolloutComparison, Side
from neurosig.views.tokens import LayerNeurons, TokenLayerMap, Tokens

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m",
    "abc\u202edcb",
    "costs $x$ or \\(y\\) or $$z$$",
    "&amp;lt;b&gt; \" ' `",
    "{{ 7 * 7 }}{% raw %}",
    "https://example.org/pixel.png",
    "A" * 1_000_000,
)


def example_views(text: str) -> dict[str, View]:
    """Every kind of view with this text wherever a model or a file can put text."""
    texts = [text, " ok", "\n", ""]
    values = torch.tensor([[0.5, -0.25, 0.125, 0.0], [1.0, 0.75, -1.5, 0.25], [0.0, 0.0, 0.0, 2.0]])
    tokens = Tokens.of(texts, values[0], [False, True, False, False])
    heat = TokenLayerMap(text, texts, values, "evidence", "note", text)
    side = Side("right", text, tokens, {"probe score": 0.25}, [("L1/2", 0.5, 0.25, -0.75), ("L0/3", 0.25, 0.0, None)])
    near = Neighbour(text, text, text, 1, True, 0.625, 17, [("L1/2", 0.125)])
    far = Neighbour(text, text, text, 2, False, 0.5, 11, [])
    return {
        "map": heat,
        "layer": LayerNeurons(text, 1, texts, [[3, 1]] * 4, [[0.5, 0.25]] * 4, {3: 0.5}, text),
        "card": NeuronCard(
            4,
            9,
            {"weight": 0.5, "stable": False},
            3,
            12,
            0.0625,
            [(text, 0.5, -0.125), (text, 0.25, -2.0), (text, 0.125, 0.5)],
            [(text, 1.5)],
            [(text, -2.5)],
            [NeuronExample(text, text, 0.375, tokens)],
        ),
        "comparison": RolloutComparison(text, text, (side, side), 0.25, 5, np.array([0.5, 0.125, 0.0])),
        "neighbours": NeighbourBrowser(text, text, text, text, text, [0], [near, far], 0.375),
        "choice": Choice("layer", {text[:50]: heat, "other": heat}),
    }


def example_table(text: str) -> Table:
    """A table with this text in its cells, its index and a column's name."""
    return Table({"nll": [0.5, 2.0], text[:50]: [text, None], "method": ["nopsd", "base"]}, index=[text[:50], "b"])


_LENGTH = r"[+-]?([0-9]*[.])?[0-9]+(e-?[0-9]*)?(px|em|rem|ex|in|cm|mm|pt|pc)|0"
_PERCENT = r"[+]?([0-9]*[.])?[0-9]+(e-?[0-9]*)?%"
_SPACES = rf"((({_LENGTH}|{_PERCENT})|auto)\s*){{1,4}}"
_COLOUR = r"\#[0-9a-f]{6}|rgba\(\s*\d{1,3}\s*,\s*\d{1,3}\s*,\s*\d{1,3}\s*,\s*[.][0-9]+\s*\)|transparent"
_BORDER = rf"(({_LENGTH}|solid|{_COLOUR})\s*)+"
STYLES: Mapping[str, str] = {
    "background": rf"{_COLOUR}|linear-gradient\(90deg(,\s*({_COLOUR})(\s+{_PERCENT})?)+\)",
    "border": _BORDER,
    "border-bottom": _BORDER,
    "border-collapse": "collapse|separate",
    "border-radius": _SPACES,
    "color": r"\#[0-9a-f]{6}",
    "cursor": "auto|crosshair|default|pointer|move|text|wait|help|progress",
    "display": "inline|block|list-item|inline-block|table|flex|inline-flex|grid|inline-grid|none",
    "flex": rf"[0-9]+\s+[0-9]+\s+({_LENGTH}|{_PERCENT}|auto)",
    "flex-wrap": "nowrap|wrap|wrap-reverse",
    "font": r"14px/1\.45 system-ui, sans-serif",
    "font-size": rf"small|medium|large|{_LENGTH}|{_PERCENT}",
    "font-weight": "normal|bold|bolder|lighter|[1-9]00",
    "gap": rf"({_LENGTH}|{_PERCENT})",
    "height": rf"{_LENGTH}|{_PERCENT}|auto",
    "line-height": rf"normal|[+]?([0-9]*[.])?[0-9]+|{_LENGTH}|{_PERCENT}",
    "margin": _SPACES,
    "margin-right": _SPACES,
    "max-height": rf"{_LENGTH}|{_PERCENT}|none|auto",
    "max-width": rf"{_LENGTH}|{_PERCENT}|none|auto",
    "min-width": rf"{_LENGTH}|{_PERCENT}|auto",
    "opacity": r"[+]?(1([.][0]+)?|0?([.][0-9]+)?)",
    "overflow": "visible|hidden|scroll|auto",
    "overflow-wrap": "normal|break-word",
    "padding": _SPACES,
    "position": "static|relative|absolute",
    "table-layout": "auto|fixed",
    "text-align": "left|right|center|justify",
    "text-overflow": "clip|ellipsis",
    "vertical-align": rf"baseline|sub|super|top|text-top|middle|bottom|text-bottom|{_LENGTH}",
    "white-space": "normal|pre|nowrap|pre-wrap|pre-line",
    "width": rf"{_LENGTH}|{_PERCENT}|auto",
}
"""Inline styles that the sanitizer of JupyterLab 4.6 keeps (packages/apputils/src/sanitizer.ts): the properties that
views use, each with a part of the values it allows. It keeps no ``position: sticky``, ``writing-mode``,
``overflow-wrap: anywhere`` nor ``font-variant-numeric``."""
TAGS = frozenset(
    {"b", "bdi", "br", "details", "div", "h4", "i", "li", "ol", "p", "small", "span", "summary", "table", "tbody"}
    | {"td", "tfoot", "th", "thead", "tr", "ul"}
)
"""Part of its tags; neither style, script nor svg are among them."""
ATTRIBUTES = frozenset({"class", "dir", "id", "lang", "style", "title", "open", "colspan", "rowspan", "scope"})


class Sanitizer(HTMLParser):
    """What JupyterLab shows of an output of a notebook that is not trusted, by the rules above."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []
        self.dropped: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in ("style", "script")
        if tag not in TAGS:
            self.dropped.append(f"<{tag}>")
            return
        shown = []
        for name, value in attrs:
            kept = self._style(value or "") if name == "style" else value
            if name in ATTRIBUTES and kept != "":
                shown.append(name if kept is None else f'{name}="{escape(kept)}"')
            elif name not in ATTRIBUTES:
                self.dropped.append(f"{tag} {name}")
        self.kept.append(f"<{' '.join([tag, *shown])}>")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("style", "script")
        if tag in TAGS:
            self.kept.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.kept.append(escape(data, quote=False))

    def _style(self, style: str) -> str:
        kept = []
        for part in filter(None, style.split(";")):
            name, _, value = (piece.strip() for piece in part.partition(":"))
            if name in STYLES and re.fullmatch(STYLES[name], value, re.IGNORECASE):
                kept.append(f"{name}:{value}")
            else:
                self.dropped.append(f"{name}: {value}")
        return ";".join(kept)


def sanitized(html: str) -> tuple[str, list[str]]:
    """What is left of a page, and what was dropped."""
    sanitizer = Sanitizer()
    sanitizer.feed(html)
    sanitizer.close()
    return "".join(sanitizer.kept), sanitizer.dropped
