"""Views show the numbers they were given, as HTML in which model text does nothing."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup, Tag

from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import PAD
from neurosig.neurons.sites import ffn_sites, w_out
from neurosig.neurons.token_trace import largest_neurons, trace_tokens, vocabulary_effect
from neurosig.neurons.tracer import NeuronTracer
from neurosig.patterns.similarity import jaccard
from neurosig.runtime.errors import UserError
from neurosig.views.explorer import Choice, Explorer, NeighbourBrowser, TokenLayerMap
from neurosig.views.html import LONGEST, View, bounds, shade
from neurosig.views.tokens import LayerNeurons, token_label
from tests.support.flow import make_manifest, save_tiny
from tests.support.parsers import UNCUT
from tests.support.tiny import ARCHS, Arch, tiny_model
from tests.support.views import HOSTILE, example_views

PROMPT, COMPLETION = [1, 7, 9, 30, 40], [50, 61, 72, 83]


def parsed(view: View) -> BeautifulSoup:
    return BeautifulSoup(view._repr_html_(), "html.parser")


class Balance(HTMLParser):
    """Fails where a tag is closed that is not the open one."""

    VOID = ("img", "br", "meta", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> while {self.open[-3:]} are open"
        self.open.pop()


# HTML


@pytest.mark.parametrize("kind", example_views(""))
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_model_text_stays_inert(kind: str, text: str) -> None:
    view, plain = example_views(text)[kind], example_views("plain text")[kind]
    html = view._repr_html_()
    balance = Balance()
    balance.feed(html)
    assert not balance.open
    page = parsed(view)
    shape = [
        [tag.name for tag in soup.find_all(True) if tag.name not in ("span", "bdi", "small")]
        for soup in (page, parsed(plain))
    ]
    assert shape[0] == shape[1]
    assert not page.find_all(["script", "img", "iframe", "object", "link", "a", "form"])
    assert not page.find_all(["style", "svg"])
    for tag in page.find_all(True):
        assert not any(name.startswith("on") or name in ("href", "src", "srcset") for name in tag.attrs), tag
    assert not any(ord(char) < 32 and char != "\n" for char in html)
    assert not any(char in html for char in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200b")
    assert "49" not in page.get_text() or "7 * 7" not in text
    assert len(html) < 300_000
    assert text == HOSTILE[-2] or ("http://" not in html and "https://" not in html)


@pytest.mark.parametrize("kind", example_views(""))
def test_mathjax_finds_no_formula(kind: str) -> None:
    """Neither delimiter shares a text node with what it would delimit, and the whole block is marked."""
    page = parsed(example_views("costs $x$ or \\(y\\)")[kind])
    root = page.find(True)
    assert isinstance(root, Tag) and {"tex2jax_ignore", "mathjax_ignore"} <= set(root["class"])
    texts = [str(node) for node in page.find_all(string=True)]
    assert any(text == "$" for text in texts)
    for text in texts:
        assert "$" not in text.replace("$", "", 1) and (text == "$" or "$" not in text)
        assert "\\(" not in text


@pytest.mark.parametrize("kind", example_views(""))
def test_no_view_needs_the_network(kind: str) -> None:
    html = example_views("plain")[kind]._repr_html_()
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html


def test_long_text_is_cut_and_says_by_how_much() -> None:
    page = parsed(example_views("A" * 1_000_000)["neighbours"])
    first = page.find("bdi", class_="quoted")
    assert first is not None and first.get_text() == "A" * LONGEST
    assert f"{1_000_000 - LONGEST:,} more characters" in page.get_text()


def test_plain_text_is_printable_on_a_terminal() -> None:
    for text in HOSTILE:
        for view in example_views(text).values():
            shown = repr(view)
            assert "\x1b" not in shown and "\u202e" not in shown and len(shown) < 20_000


def test_the_saved_page_forbids_everything_but_its_style(tmp_path: Path) -> None:
    page = BeautifulSoup(example_views("x")["card"].save(tmp_path / "card.html").read_text(), "html.parser")
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})
    assert isinstance(policy, Tag) and policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "Neuron L4/9" in page.get_text()


def test_whatever_has_a_background_sets_its_ink() -> None:
    """So a cell reads in a light and in a dark notebook: contrast of 4.5 at least, the threshold of WCAG AA."""
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        for value in np.linspace(low, high, 41):
            background, ink = (part.split(":")[1] for part in shade(float(value), low, high).split(";"))
            lighter, darker = sorted((luminance(background), luminance(ink)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (value, background, ink)


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_scales_start_at_zero_or_are_symmetric() -> None:
    assert bounds([0.25, 2.0]) == (0.0, 2.0)
    assert bounds([-1.0, 0.5]) == (-1.0, 1.0)
    assert bounds([]) == (0.0, 1.0) and bounds([0.0]) == (0.0, 1.0)
    assert shade(-1.0, -1.0, 1.0) != shade(1.0, -1.0, 1.0)


def test_tokens_show_their_boundaries() -> None:
    assert [token_label(text) for text in (" Paris", "a b", "\n", "", " ")] == ["·Paris", "a b", "⏎", "∅", "·"]


# Numbers


def test_the_heat_map_shows_its_tensor() -> None:
    view = example_views("plain")["map"]
    assert isinstance(view, TokenLayerMap)
    page = parsed(view)
    rows = page.select("table.map tbody tr")
    found = torch.tensor([[float(cell["title"].rsplit(": ", 1)[1]) for cell in row.select("td")] for row in rows])
    torch.testing.assert_close(found.T, view.values)
    assert [cell["title"].split(":")[0] for cell in rows[0].select("td")] == ["L0", "L1", "L2"]
    assert [row.find("th").get_text() for row in rows] == ["plain", "·ok", "⏎", "∅"]  # type: ignore[union-attr]
    assert [cell.get_text() for cell in page.select("thead th")] == ["layer", "L0", "L1", "L2"]
    styles = [[cell["style"].split(";")[2] for cell in row.select("td")] for row in rows]
    assert styles[2][1] == shade(-1.5, -2.0, 2.0).split(";")[0] and len({one for row in styles for one in row}) == 9
    assert view.frame().loc[(2, "\n"), "L1"] == -1.5 and view.frame().shape == (4, 3)


def test_the_card_shows_its_numbers() -> None:
    page = parsed(example_views("plain")["card"])
    text = " ".join(page.get_text().split())
    assert "Neuron L4/9 layer 4, index 9" in text and "weighs it +0.500: it points to guessing" in text
    assert "Active in 3 of 12 rollouts, with a mean contribution of 0.0625" in text
    assert "weight 0.5; stable no" in text and "in the 1 rollouts below, not in all" in text
    assert "plain 0.500, value -0.125" in text
    assert [token["title"] for token in page.select(".example .token")] == ["0.5", "-0.25", "0.125", "0"]
    assert ["border-bottom" in token["style"] for token in page.select(".example .token")] == [
        False,
        True,
        False,
        False,
    ]


def test_a_value_below_0_pushes_the_other_way() -> None:
    page = parsed(example_views("plain")["card"])
    rows = [[" ".join(cell.get_text().split()) for cell in row.select("th, td")] for row in page.select("tr[class]")]
    assert rows == [
        ["below 0 (at 2 of the 3 tokens)", "plain +2.500", "plain -1.500"],
        ["above 0 (at 1 of the 3 tokens)", "plain +1.500", "plain -2.500"],
    ]


def test_the_comparison_shows_both_sides() -> None:
    page = parsed(example_views("plain")["comparison"])
    assert len(page.select(".side")) == 2 and len(page.select(".side .token")) == 8
    assert "Jaccard similarity 0.250, 5 neurons shared" in " ".join(page.get_text().split())
    rows = [[cell.get_text() for cell in row.select("td")] for row in page.select("table.larger")[0].select("tbody tr")]
    assert rows == [["L1/2", "0.5000", "0.2500", "-0.75"], ["L0/3", "0.2500", "0.0000", ""]]
    cells = page.select(".by-layer .cell")
    assert [cell.get_text() for cell in cells] == ["L0 0.50", "L1 0.12", "L2 0.00"]
    assert all(shade(value, 0.0, 1.0) in cell["style"] for cell, value in zip(cells, (0.5, 0.125, 0.0), strict=True))


def test_the_browser_shows_context_and_reasons() -> None:
    page = parsed(example_views("plain")["neighbours"])
    rows = [
        [cell.get_text(" ", strip=True) for cell in row.select("td")]
        for row in page.select("table.neighbours tbody tr")
    ]
    assert rows[0][:3] == ["1 context", "0.6250", "17"] and rows[0][5] == "L1/2 12%"
    assert rows[1][:3] == ["2", "0.5000", "11"] and rows[1][5] == "none"
    assert len(page.select("ol li")) == 1
    assert "0.375 on average" in page.get_text() and "the same scale for every question: 0" in page.get_text()
    assert shade(0.625, 0.0, 1.0) in page.select("table.neighbours tbody td")[1]["style"]


# Sliders


def test_a_choice_without_ipywidgets_is_a_list_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "ipywidgets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    view = example_views("plain")["choice"]
    assert isinstance(view, Choice)
    with pytest.raises(UserError, match="ipywidgets"):
        view.widget()
    assert set(view._repr_mimebundle_()) == {"text/html", "text/plain"}
    page = parsed(view)
    assert [bool(tag.has_attr("open")) for tag in page.select("details")] == [True, False]
    assert len(page.select("table.map")) == 2


def test_a_slider_changes_what_is_shown() -> None:
    views = {str(layer): example_views(f"layer {layer}")["map"] for layer in range(3)}
    choice = Choice("layer", views, start="1")
    control, shown = choice.widget().children
    assert control.value == "1" and "layer 1" in BeautifulSoup(shown.value, "html.parser").p.get_text()  # type: ignore[union-attr]
    control.value = "2"
    assert shown.value == views["2"]._repr_html_()
    bundle = choice._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/html"] == choice._repr_html_()


def test_a_choice_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to choose"):
        Choice("layer", {})
    with pytest.raises(UserError, match="not among its labels"):
        Choice("layer", {"a": example_views("x")["map"]}, start="b")


# One rollout, token by token


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("score", ["cett", "magnitude", "unembed"])
def test_the_mean_over_tokens_is_what_the_active_set_holds(arch: Arch, score: Any) -> None:
    model = tiny_model(arch)
    tracer = NeuronTracer(model, TraceConfig(score=score, set_size=12))
    trace = trace_tokens(tracer, PROMPT, COMPLETION)
    sets = tracer.trace([PROMPT], [COMPLETION])
    assert trace.contributions.shape == (tracer.sites.n_layers, len(COMPLETION), tracer.sites.d_mlp)
    mean = trace.contributions.mean(dim=1).flatten()
    torch.testing.assert_close(mean[sets.neuron_ids[0].long()], sets.contributions[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(trace.contributions[:, 0], trace.contributions[:, 1])


def test_the_values_are_the_down_projections_input() -> None:
    model = tiny_model("qwen3")
    tracer, seen = NeuronTracer(model), {}
    trace = trace_tokens(tracer, PROMPT, COMPLETION)
    module = model.get_submodule(tracer.sites.layers[1])
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.update(value=inputs[0][0]))
    with torch.no_grad():
        model(torch.tensor([PROMPT + COMPLETION]))
    hook.remove()
    torch.testing.assert_close(trace.values[1], seen["value"][len(PROMPT) :], rtol=1e-4, atol=1e-5)


def test_the_largest_neurons_are_the_largest() -> None:
    trace = trace_tokens(NeuronTracer(tiny_model("qwen3")), PROMPT, COMPLETION)
    indices, contributions = largest_neurons(trace, 1, 3)
    torch.testing.assert_close(contributions, trace.contributions[1].topk(3).values)
    torch.testing.assert_close(trace.contributions[1].gather(1, indices), contributions)


def test_the_effect_on_the_vocabulary_is_what_a_value_of_one_adds_before_the_norm() -> None:
    model = tiny_model("gpt2")  # Conv1D keeps one neuron per row
    tracer = NeuronTracer(model)
    effect = vocabulary_effect(tracer, 1, 5)
    direction = w_out(model, ffn_sites(model).layers[1])[5]
    torch.testing.assert_close(effect, model.get_output_embeddings()(direction).detach())
    with pytest.raises(UserError, match=r"neuron L2/5: the model has layers 0 to 1"):
        vocabulary_effect(tracer, 2, 5)


# From an export


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """An export of a random model that has no neurons of its own in the table: five are given."""
    folder = tmp_path_factory.mktemp("views")
    manifest = make_manifest(folder, num_demonstrations=2, set_size=24, max_new_tokens=6, answer_parser=UNCUT)
    table = folder / "neurons.csv"
    table.write_text("layer,index,weight,stable\n0,3,0.5,True\n1,7,-0.25,False\n1,2,0.125,False\n")
    return Explorer(manifest, neurons=table, gold=False)


def test_the_explorer_finds_the_exports_own_numbers(explorer: Explorer) -> None:
    name = explorer.selected[0]
    row, rollout = explorer.row(name), explorer.rollout(name, 1)
    view = explorer.heat_map(name, 1)
    place = explorer.exported.place[name, 1]
    active, signals = explorer.active(rollout), explorer.exported.signals
    stored = signals.contributions[place].float().view(2, -1).mean(dim=1)  # layer_mean: equally many per layer
    torch.testing.assert_close(view.values.mean(dim=1), stored, rtol=2e-3, atol=1e-4)
    assert view.question == row.question and len(view.tokens) == len(rollout.completion_ids_without_eos)
    assert active.sum() == (signals.neuron_ids[place] != PAD).sum()
    assert "rollout 1 (3 from 0)" in view.which and view.note.startswith("Mean over the layer's active neurons of CETT")


def test_a_rollout_sampled_now_is_shown_and_not_the_representative(explorer: Explorer) -> None:
    name, other = explorer.selected[:2]
    stored = explorer.rollout(name, 0)
    made = replace(stored, text="another", completion_ids=stored.completion_ids[::-1])
    view = explorer.heat_map(name, made)
    assert view.which == "a rollout that is not in the export: another"
    assert view.tokens == explorer.texts(made.completion_ids_without_eos)
    sets = explorer.tracer.trace([explorer.prompt_ids(name)], [made.completion_ids_without_eos])
    torch.testing.assert_close(
        view.values.mean(dim=1), sets.contributions.view(2, -1).mean(dim=1), rtol=2e-3, atol=1e-4
    )
    with pytest.raises(UserError, match=f'answers question "{name}", not "{other}"'):
        explorer.heat_map(other, made)


def test_layers_start_where_the_probe_has_most_evidence(explorer: Explorer) -> None:
    name = explorer.selected[0]
    evidence = explorer.heat_map(name, 0, quantity="evidence").values.abs().sum(dim=1)
    choice = explorer.layers(name, 0)
    assert choice.first == str(int(evidence.argmax())) and evidence.max() > 0


def test_evidence_is_weight_times_contribution(explorer: Explorer) -> None:
    name = explorer.selected[0]
    trace, view = explorer.trace(name, 0), explorer.heat_map(name, 0, quantity="evidence")
    expected = torch.zeros_like(view.values)
    ids, values = explorer.exported.signals.neuron_ids, explorer.exported.signals.contributions.float()
    for layer, index, weight in ((0, 3, 0.5), (1, 7, -0.25), (1, 2, 0.125)):
        contributions = values[ids == layer * explorer.exported.signals.d_mlp + index]
        if len(contributions):
            expected[layer] += weight / contributions.max() * trace.contributions[layer, :, index]
    torch.testing.assert_close(view.values, expected, rtol=1e-3, atol=1e-5)
    assert expected.any()


def test_layers_cover_the_model(explorer: Explorer) -> None:
    choice = explorer.layers(explorer.selected[0], 0, count=4)
    assert list(choice.views) == ["0", "1"]
    view = choice.views["1"]
    assert isinstance(view, LayerNeurons) and view.weights == {7: -0.25, 2: 0.125}
    trace = explorer.trace(explorer.selected[0], 0)
    torch.testing.assert_close(torch.tensor(view.contributions), trace.contributions[1].topk(4).values)


def test_the_card_of_a_neuron(explorer: Explorer) -> None:
    ids, values, d_mlp = (
        explorer.exported.signals.neuron_ids,
        explorer.exported.signals.contributions.float(),
        explorer.exported.signals.d_mlp,
    )
    flat = int(ids.flatten().mode().values)  # the neuron most often active
    card = explorer.neuron(flat // d_mlp, flat % d_mlp, examples=2, tokens=5)
    assert (card.active, card.rollouts) == (int((ids == flat).sum()), len(ids))
    assert card.mean == pytest.approx(float(values[ids == flat].mean()), rel=1e-3)
    assert card.examples[0].mean == pytest.approx(float(values[ids == flat].max()), rel=1e-3)
    assert float(card.examples[0].tokens.values.mean()) == pytest.approx(card.examples[0].mean, rel=2e-3)
    assert card.examples[0].question != card.examples[1].question
    effect = vocabulary_effect(explorer.tracer, card.layer, card.index)
    assert [value for _, value in card.raised] == pytest.approx(effect.topk(5).values.tolist())
    assert [value for _, value in card.lowered] == pytest.approx((-(-effect).topk(5).values).tolist())
    tops = [value for _, value, _ in card.top_tokens]
    assert tops == sorted(tops, reverse=True) and tops[0] == max(float(e.tokens.values.max()) for e in card.examples)


def test_facts_come_from_the_table(explorer: Explorer) -> None:
    assert explorer.located == [(0, 3), (1, 7), (1, 2)]
    assert explorer.neuron(1, 7).facts == {"weight": -0.25, "stable": False}
    assert "it points to knowing" in explorer.neuron(1, 7).sentence
    assert explorer.neuron(1, 60).facts == {"weight": 0.0} and explorer.neuron(1, 60).sentence == "Not in the probe."


def test_the_comparison_of_two_rollouts(explorer: Explorer) -> None:
    name = explorer.contrasting[0]
    row = explorer.row(name)
    view = explorer.compare(name)
    assert [side.verdict for side in view.sides] == ["majority", "minority"]  # no gold answer is near
    assert view.sides[0].answer == row.pseudo_label != view.sides[1].answer
    keys = range(len(row.answers))
    pairs = [
        (a, b)
        for a in keys
        for b in keys
        if (row.answers[a], row.answers[b]) == (view.sides[0].answer, view.sides[1].answer)
    ]
    sets = {k: explorer.exported.signals.neuron_ids[explorer.exported.place[name, k]] for k in keys}
    assert any(view.similarity == pytest.approx(float(jaccard(sets[a][None], sets[b][None]))) for a, b in pairs)
    for side, other in (view.sides, view.sides[::-1]):
        assert [row[1] - row[2] for row in side.larger] == sorted(
            (row[1] - row[2] for row in side.larger), reverse=True
        )
        assert side.larger[0][1] > side.larger[0][2] and side.larger != other.larger
    either = 2 * int((sets[0] != PAD).sum()) - view.shared
    assert view.similarity == pytest.approx(view.shared / either)
    assert view.by_layer.shape == (2,)


def test_gold_answers_turn_majorities_into_verdicts(explorer: Explorer) -> None:
    judged = Explorer(explorer.manifest.folder, model=explorer.loaded)
    name = next(iter(judged.exported.rows))
    assert judged.verdict(judged.row(name), 0) == "wrong" and judged.compare(name, 0, 1).gold == "GOLD0"
    assert not explorer.gold and not judged.contrasting  # every rollout of a random model is wrong
    with pytest.raises(UserError, match="same verdict"):
        judged.compare(name)


def test_neighbours_agree_with_the_manifest(explorer: Explorer) -> None:
    for name in explorer.selected:
        row, view = explorer.row(name), explorer.neighbours(name, count=3)
        assert [view.neighbours[place].question for place in view.context] == [
            explorer.row(item.question_id).question for item in row.context
        ]
        for item, place in zip(row.context, view.context, strict=True):
            assert view.neighbours[place].similarity == pytest.approx(item.similarity, abs=1e-6)
        nearest = [neighbour.similarity for neighbour in view.neighbours]
        assert nearest == sorted(nearest, reverse=True) and [n.rank for n in view.neighbours] == [1, 2, 3]
        assert sorted(n.rank for n in view.neighbours if n.used) == [1, 2]  # the policy is nearest
        assert all(neighbour.question != row.question for neighbour in view.neighbours)
    assert view.policy == "nearest" and view.decision == "selected"


def test_shared_neurons_are_shared_and_the_rarest_come_first(explorer: Explorer) -> None:
    name = explorer.selected[0]
    own_set = set(
        explorer.exported.signals.neuron_ids[explorer.exported.place[name, explorer.representative(name)]].tolist()
    )
    for neighbour in explorer.neighbours(name).neighbours:
        named = [tuple(map(int, text[1:].split("/"))) for text, _ in neighbour.reasons]
        assert {layer * explorer.exported.signals.d_mlp + index for layer, index in named} <= own_set
        shares = [share for _, share in neighbour.reasons]
        assert shares == sorted(shares) and all(2 / len(explorer.exported.rows) <= share <= 1 for share in shares)


def test_a_choice_over_questions_and_neurons(explorer: Explorer) -> None:
    chosen = explorer.choice(explorer.neighbours, explorer.selected[:3])
    assert len(chosen.views) == 3 and all(isinstance(view, NeighbourBrowser) for view in chosen.views.values())
    assert list(explorer.cards(explorer.located).views) == ["L0/3", "L1/7", "L1/2"]


def test_what_is_not_there_is_an_error(explorer: Explorer) -> None:
    with pytest.raises(UserError, match='no question "nobody"'):
        explorer.heat_map("nobody")
    with pytest.raises(UserError, match="has rollouts 0 to 2, not 9"):
        explorer.trace(explorer.selected[0], 9)


def test_another_model_is_refused(explorer: Explorer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the model that made it"):
        _ = Explorer(explorer.manifest.folder, model=str(save_tiny(tmp_path, seed=1))).loaded
