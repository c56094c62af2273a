"""Look at an export: rollouts, neurons and neighbours as HTML in a notebook, as text in a terminal.

    explorer = Explorer("runs/demo/manifest")
    explorer.heat_map(explorer.contrasting[0])     # one row per layer, one column per token
    explorer.neuron(8, 463)                        # its tokens, examples, weight and effect on the vocabulary
    explorer.compare(explorer.contrasting[0])      # a right and a wrong rollout side by side
    explorer.neighbours(explorer.selected[0])      # why the teacher sees what it sees
    explorer.neuron(8, 463).save("neuron.html")

`Explorer.choice` puts a slider over several views. Nothing here changes the model or the export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from neurosig.neurons.contributions import PAD
from neurosig.neurons.token_trace import (
    active_contribution,
    largest_neurons,
    vocabulary_effect,
    weighted_evidence,
)
from neurosig.patterns.similarity import jaccard
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice
from neurosig.views.html import Choice, View
from neurosig.views.kinds import (
    LayerNeurons,
    Neighbour,
    NeighbourBrowser,
    NeuronCard,
    NeuronExample,
    RolloutComparison,
    Side,
    TokenLayerMap,
    Tokens,
)
from neurosig.views.run import ExportedRun

__all__ = [
    "Choice",
    "Explorer",
    "LayerNeurons",
    "NeighbourBrowser",
    "NeuronCard",
    "RolloutComparison",
    "TokenLayerMap",
    "View",
]

Quantity = Literal["contribution", "evidence"]

_NOTES: dict[Quantity, tuple[str, str]] = {
    "contribution": (
        "mean contribution of the active neurons",
        "How much of a layer's FFN output its active neurons make up, token by token.",
    ),
    "evidence": (
        "the probe's evidence",
        "Contribution of each probe neuron times its weight, summed over a layer: above 0 points to guessing.",
    ),
}


class Explorer(ExportedRun):
    """Makes views of a finished export: see this module's examples."""

    def heat_map(
        self, question_id: str, rollout_id: int | None = None, *, quantity: Quantity = "contribution"
    ) -> TokenLayerMap:
        """How much a rollout's active neurons contribute (``contribution``), or the probe's evidence (``evidence``), by
        layer and token."""
        check_choice("quantity", quantity, Quantity)
        rollout = self.rollout(question_id, rollout_id)
        trace = self.trace(question_id, rollout.rollout_id)
        if quantity == "evidence":
            values = weighted_evidence(trace, self.weights)
        else:
            values = active_contribution(trace, self.active(self.place[question_id, rollout.rollout_id]))
        title, note = _NOTES[quantity]
        return TokenLayerMap(
            self.row(question_id).question, self.texts(rollout.completion_ids_without_eos), values, title, note
        )

    def layers(self, question_id: str, rollout_id: int | None = None, *, count: int = 6) -> Choice:
        """Each token's largest contributors, with a slider over the layers."""
        rollout = self.rollout(question_id, rollout_id)
        trace, texts = self.trace(question_id, rollout.rollout_id), self.texts(rollout.completion_ids_without_eos)
        views: dict[str, View] = {}
        for layer in range(self.signals.n_layers):
            indices, contributions = largest_neurons(trace, layer, count)
            located = self.neurons[self.neurons["layer"] == layer]
            weights = dict(zip(located["index"].tolist(), located["weight"].tolist(), strict=True))
            views[str(layer)] = LayerNeurons(
                self.row(question_id).question, layer, texts, indices.tolist(), contributions.tolist(), weights
            )
        return Choice("layer", views)

    def neuron(self, layer: int, index: int, *, examples: int = 3, tokens: int = 10) -> NeuronCard:
        """The card of one neuron.

        Args:
            layer: Its layer.
            index: Its index there.
            examples: Number of rollouts on the card, those with its largest mean contributions, one per question.
            tokens: Tokens named in each list.

        Raises:
            UserError: There is no such neuron.
        """
        effect = vocabulary_effect(self.tracer, layer, index)
        order = effect.sort(descending=True, stable=True).indices
        ids, flat = self.signals.neuron_ids, layer * self.signals.d_mlp + index
        places, columns = (ids == flat).nonzero(as_tuple=True)
        means = self.signals.contributions[places, columns].float()
        keys = list(self.manifest.rollouts)
        shown: dict[str, tuple[int, float]] = {}
        for place in means.argsort(descending=True, stable=True).tolist():
            name, rollout_id = keys[int(places[place])]
            if len(shown) < examples:
                shown.setdefault(name, (rollout_id, float(means[place])))
        cards, tops = [], []
        for name, (rollout_id, mean) in shown.items():
            rollout, trace = self.manifest.rollouts[name, rollout_id], self.trace(name, rollout_id)
            texts = self.texts(rollout.completion_ids_without_eos)
            here, values = trace.contributions[layer, :, index], trace.values[layer, :, index]
            tops += list(zip(texts, here.tolist(), values.tolist(), strict=True))
            row = self.row(name)
            cards.append(NeuronExample(row.question, row.answers[rollout_id], mean, Tokens.of(texts, here)))
        return NeuronCard(
            layer=layer,
            index=index,
            facts=self.facts(layer, index),
            active=len(places),
            rollouts=len(ids),
            mean=float(means.mean()) if len(means) else 0.0,
            top_tokens=sorted(tops, key=lambda top: -top[1])[:tokens],
            raised=[(self.text_of(token), float(effect[token])) for token in order[:tokens].tolist()],
            lowered=[(self.text_of(token), float(effect[token])) for token in order.flip(0)[:tokens].tolist()],
            examples=cards,
        )

    def compare(self, question_id: str, trusted: int | None = None, doubtful: int | None = None) -> RolloutComparison:
        """Two rollouts of a question side by side.

        Args:
            question_id: One of `contrasting`, unless both rollouts are named.
            trusted: A right (without gold answers a majority) rollout; default: the one with the lowest probe score.
            doubtful: A wrong (a minority) one; default: the one with the highest probe score.

        Raises:
            UserError: All rollouts have the same verdict, and none was named.
        """
        row = self.row(question_id)
        probe = {k: float(self.signals.probe_scores[self.place[row.question_id, k]]) for k in range(len(row.answers))}
        sides = {verdict: [k for k in probe if self.trusted(row, k) == verdict] for verdict in (True, False)}
        if (trusted is None and not sides[True]) or (doubtful is None and not sides[False]):
            raise UserError(
                f'question "{row.question_id}": all its rollouts have the same verdict; choose one of contrasting'
            )
        left = min(sides[True], key=probe.__getitem__) if trusted is None else trusted
        right = max(sides[False], key=probe.__getitem__) if doubtful is None else doubtful
        pair = [self.place[row.question_id, self.rollout(row.question_id, k).rollout_id] for k in (left, right)]
        active = [self.active(place) for place in pair]
        both, either = active[0] & active[1], active[0] | active[1]
        evidence = [weighted_evidence(self.trace(row.question_id, k), self.weights).sum(dim=0) for k in (left, right)]
        reach = max(1e-9, *(float(values.abs().max()) for values in evidence))
        shown = []
        for k, place, other, values in zip((left, right), pair, reversed(active), evidence, strict=True):
            rollout = self.manifest.rollouts[row.question_id, k]
            tokens = Tokens(self.texts(rollout.completion_ids_without_eos), values.numpy(), -reach, reach)
            numbers = {"probe score": probe[k], "tokens": float(len(rollout.completion_ids_without_eos))}
            for name in ("mean_logprob", "mean_entropy"):
                if getattr(rollout, name) is not None:
                    numbers[name.replace("_", " ").replace("logprob", "log-probability")] = getattr(rollout, name)
            shown.append(Side(self.verdict(row, k), row.answers[k], tokens, numbers, self._only(place, other)))
        gold = self.gold.get(row.question_id)
        return RolloutComparison(
            question=row.question,
            gold=None if gold is None else gold.answer,
            sides=(shown[0], shown[1]),
            similarity=float(both.sum() / either.sum().clamp(min=1)),
            shared=int(both.sum()),
            by_layer=(both.sum(dim=1) / either.sum(dim=1).clamp(min=1)).numpy(),
        )

    def neighbours(self, question_id: str, *, count: int = 6, reasons: int = 5) -> NeighbourBrowser:
        """The selected questions nearest to a question, which of them its teacher sees, and the neurons they share.

        A question without a majority answer has no signature, as in the export, and so shares none.

        Args:
            question_id: The question.
            count: Number of nearest selected questions; questions of the context are always included.
            reasons: Number of shared neurons named for each.
        """
        row, options = self.row(question_id), self.manifest.header.options
        names = self.represented if row.pseudo_label is not None else [*self.represented, row.question_id]
        sets = self.representative_sets(names)
        own = names.index(row.question_id)
        if row.pseudo_label is None:
            sets[own] = PAD
        similarity = jaccard(sets[[own]], sets)[0]
        pool = [
            i
            for i, name in enumerate(names)
            if self.rows[name].selected and self.rows[name].text_sha256 != row.text_sha256
        ]
        pool.sort(key=lambda i: -float(similarity[i]))
        rank = {names[i]: place for place, i in enumerate(pool, start=1)}
        context, privileged = [item.question_id for item in row.context], row.privileged_context
        shown = [names[i] for i in pool[:count]]
        shown += [name for name in context if name not in shown]
        used, counts = sets[sets != PAD].unique(return_counts=True)
        share = dict(zip(used.tolist(), (counts / len(names)).tolist(), strict=True))
        active, neighbours = set(sets[own][sets[own] != PAD].tolist()), []
        for name in shown:
            i, other = names.index(name), self.rows[name]
            shared = sorted(active & set(sets[i].tolist()), key=lambda neuron: (share[neuron], neuron))
            neighbours.append(
                Neighbour(
                    question=other.question,
                    response=self.rollout(name, self.representative(name)).text,
                    kind=other.kind or other.domain,
                    rank=rank.get(name, 0),
                    used=name in context,
                    similarity=float(similarity[i]),
                    shared=len(shared),
                    reasons=[(self.name_of(neuron), share[neuron]) for neuron in shared[:reasons]],
                )
            )
        every = jaccard(sets, sets)
        return NeighbourBrowser(
            question=row.question,
            answer=row.pseudo_label,
            kind=row.kind or row.domain,
            decision=row.reason.replace("_", " "),
            policy=str(options["context_policy"] if privileged is None else "its own privileged context").replace(
                "_", " "
            ),
            context=[shown.index(name) for name in context],
            neighbours=neighbours,
            typical=float((every.sum() - every.trace()) / max(1, len(names) * (len(names) - 1))),
        )

    def choice(self, view: Callable[[str], View], question_ids: Sequence[str]) -> Choice:
        """A slider over questions: ``explorer.choice(explorer.neighbours, explorer.selected[:8])``."""
        labels = {f"{self.row(name).question} [{name}]": name for name in question_ids}
        return Choice("question", {label: view(name) for label, name in labels.items()})

    def cards(self, neurons: Sequence[tuple[int, int]]) -> Choice:
        """A slider over the cards of several neurons: ``explorer.cards(explorer.located[:6])``."""
        return Choice("neuron", {f"{layer}.{index}": self.neuron(layer, index) for layer, index in neurons})

    def _only(self, place: int, other: Tensor, count: int = 8) -> list[tuple[str, float, float | None]]:
        """The rollout's largest contributors that are not in another set: name, contribution, probe weight."""
        ids, values = self.signals.neuron_ids[place], self.signals.contributions[place].float()
        kept = [(neuron, value) for neuron, value in zip(ids.tolist(), values.tolist(), strict=True) if neuron != PAD]
        own = [(neuron, value) for neuron, value in kept if not other.flatten()[neuron]]
        heaviest = sorted(own, key=lambda pair: -abs(pair[1]))[:count]
        known = {layer * self.signals.d_mlp + index: (layer, index) for layer, index in self.located}
        return [
            (self.name_of(neuron), value, float(self.facts(*known[neuron])["weight"]) if neuron in known else None)
            for neuron, value in heaviest
        ]
