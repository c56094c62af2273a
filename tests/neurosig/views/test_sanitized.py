"""Views keep their layout where a front end removes style sheets, and stay quick for long answers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from bs4 import BeautifulSoup

from neurosig.views.explorer import Choice, LayerNeurons, TokenLayerMap
from neurosig.views.html import bounds, gradient, shade
from neurosig.views.tokens import MOST_PAGES, PAGE
from tests.support.views import HOSTILE, example_table, example_views, sanitized

KINDS = [*example_views(""), "table"]


def html_of(kind: str, text: str = "plain") -> str:
    view: Any = example_table(text) if kind == "table" else example_views(text)[kind]
    return str(view._repr_html_())


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrusted_notebook_keeps_the_whole_layout(kind: str) -> None:
    html = html_of(kind)
    left, dropped = sanitized(html)
    assert not dropped
    before, after = (BeautifulSoup(page, "html.parser") for page in (html, left))
    assert [(tag.name, tag.get("style")) for tag in before.find_all(True)] == [
        (tag.name, tag.get("style")) for tag in after.find_all(True)
    ]
    assert before.get_text() == after.get_text()


def test_the_sanitizer_of_the_test_removes_what_jupyterlab_removes() -> None:
    left, dropped = sanitized(
        "<style>p { color: red }</style><svg><text>1</text></svg>"
        '<p onclick="x()" style="position:sticky;width:2rem">a</p>'
    )
    assert left == '1<p style="width:2rem">a</p>'
    assert dropped == ["<style>", "<svg>", "<text>", "p onclick", "position: sticky"]


def test_sides_stand_side_by_side_and_tables_scroll_inside() -> None:
    page = BeautifulSoup(sanitized(html_of("comparison"))[0], "html.parser")
    assert "display:flex" in page.select(".pair")[0]["style"] and len(page.select(".pair > .side")) == 2
    for kind in ("layer", "card", "neighbours", "table"):
        page = BeautifulSoup(html_of(kind), "html.parser")
        assert all("overflow:auto" in table.parent["style"] for table in page.select("table"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_colour_is_made_paler_by_an_opacity(kind: str) -> None:
    page = BeautifulSoup(html_of(kind), "html.parser")
    coloured = [tag for tag in page.find_all(True) if "background" in tag.get("style", "")]
    assert coloured or kind == "table"
    for tag in coloured:
        assert not any("opacity" in one.get("style", "") for one in [tag, *tag.parents] if one.name != "[document]")


def test_the_bar_of_a_legend_has_the_colours_of_its_cells() -> None:
    for low in (0.0, -1.0):
        stops = gradient(low).removeprefix("background:linear-gradient(90deg, ").rstrip(")").split(", ")
        for place, stop in enumerate(stops):
            value = low + (1 - low) * place / (len(stops) - 1)
            assert shade(value, low, 1.0).split(";")[0] == f"background:{stop}"


def test_2000_tokens_are_pages_that_are_drawn_at_once() -> None:
    values = torch.rand(30, 2000)
    values[:, 1000:1030] += 5
    view = TokenLayerMap("q", [f" token{i}" for i in range(2000)], values, "contribution")
    start = time.perf_counter()
    html = view._repr_html_()
    assert time.perf_counter() - start < 2 and len(html) < 10_000_000
    pages = view.pages
    assert [(page.first, page.last) for page in pages[:2]] == [(1, PAGE), (PAGE + 1, 2 * PAGE)]
    assert [page.first <= 1001 <= page.last for page in pages] == [page.is_open for page in pages]
    assert html.count("<details") == len(pages) == 32 and html.count(" open>") == 1
    assert repr(view).count("\n") == 31 and "tokens 961 to 1024 of 2000" in repr(view)


def test_what_is_not_on_a_page_is_counted() -> None:
    n = PAGE * (MOST_PAGES + 2)
    view = TokenLayerMap("q", ["a"] * n, torch.ones(2, n), "contribution")
    assert f"{2 * PAGE} further tokens" in view._repr_html_() and len(view.frame()) == n
    layer = LayerNeurons("q", 1, ["a"] * 100, [[3]] * 100, [[float(i)] for i in range(100)], {})
    page = BeautifulSoup(layer._repr_html_(), "html.parser")
    assert len(page.select("tbody tr")) == PAGE and "The 64 of 100 tokens" in page.get_text()
    assert page.select("tbody td")[0].get_text() == "L1/3 36.000" and len(layer.frame()) == 100


def test_a_long_choice_opens_a_few_and_folds_the_rest() -> None:
    heat = example_views("x")["map"]
    choice = Choice("layer", {str(layer): heat for layer in range(30)}, start="7", shown=("7", "12"))
    page = BeautifulSoup(choice._repr_html_(), "html.parser")
    folds = [tag for tag in page.find_all("details") if tag.find_parent("details") is None]
    assert [tag.summary.get_text() for tag in folds] == ["layer 7", "layer 12", "28 more by layer"]  # type: ignore[union-attr]
    assert [tag.has_attr("open") for tag in folds] == [True, True, False]


def test_a_scale_of_nothing_finite_is_still_drawn() -> None:
    assert bounds([float("nan"), float("inf"), 1.0]) == (0.0, 1.0)
    assert "nan" in TokenLayerMap("q", ["a"], torch.tensor([[float("nan")]]), "x")._repr_html_()


@pytest.mark.parametrize("text", HOSTILE[:-1], ids=lambda text: ascii(text[:12]))
def test_a_table_escapes_and_explains(text: str) -> None:
    html = html_of("table", text)
    page, plain = (BeautifulSoup(one, "html.parser") for one in (html, html_of("table")))
    shapes = [[tag.name for tag in one.find_all(True) if tag.name != "span"] for one in (page, plain)]
    assert shapes[0] == shapes[1] and not any(ord(char) < 32 and char != "\n" for char in html)
    assert "nopsd: N-OPSD" in page.get_text() and "perplexity" in page.select("th")[1]["title"]
    assert [cell.get_text() for cell in page.select("tbody td")][1::4] == ["0.5", "2"]
