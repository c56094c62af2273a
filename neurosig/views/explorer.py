"""Look at an export: rollouts, neurons and neighbours as HTML in a notebook, as text in a terminal.

    export = neurosig.read_export("runs/demo/manifest")
    export.rollouts                            # DataFrames: questions, rollouts, scores, neurons, contexts
    question = export.contrasting[0]
    export.heat_map(question)                  # one row per token, one column per layer
    export.neuron(8, 463)                      # its tokens, examples, weight and effect on the vocabulary
    export.compare(question)                   # a right and a wrong rollout side by side
    export.neighbours(export.selected[0])      # why the teacher sees what it sees
    export.neuron(8, 463).save("neuron.html")

`Explorer.choice` puts a slider over several views, `View.frame` gives a view's numbers. The model is loaded when a view
first needs it; nothing here changes it or the export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from neurosig.models.load import LoadedModel
from neurosig.neurons.config import neuron_name
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice
from neurosig.sampling.rollouts import Rollout
from neurosig.views import frames
from neurosig.views.html import Choice, View
from neurosig.views.kinds import Neighbour, NeighbourBrowser, NeuronCard, NeuronExample, RolloutComparison, Side
from neurosig.views.run import ExportedRun
from neurosig.views.tokens import LayerNeurons, TokenLayerMap, Tokens

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = [
    "Choice",
    "Explorer",
    "LayerNeurons",
    "NeighbourBrowser",
    "NeuronCard",
    "RolloutComparison",
    "TokenLayerMap",
    "View",
    "read_export",
]

Quantity = Literal["contribution", "evidence"]

_CONTRIBUTIONS: Mapping[str, str] = {
    "cett": "CETT, the norm of what a neuron adds to its layer's FFN output over the norm of that output. It is a "
    "ratio of norms, not a share: what neurons add can cancel, so a layer's ratios can sum to far more than 1.",
    "magnitude": "the norm of what a neuron adds to its layer's FFN output.",
    "unembed": "what a neuron adds directly to the next token's logit.",
}
"""What a contribution is, by the option ``contribution`` of the export."""
_EVIDENCE = (
    "Contribution of each probe neuron times its weight, summed over a layer: above 0 points to guessing."
    " The probe itself reads means over a rollout's tokens."
)
_OPENED = 3
"""Layers that a page without a kernel shows open."""


def read_export(
    folder: str | Path,
    *,
    model: str | LoadedModel | None = None,
    adapter: str | Path | None = None,
    neurons: str | Path | None = None,
    gold: bool = True,
) -> Explorer:
    """Read a finished export: its tables as DataFrames, its views in a notebook.

    Args:
        folder: Folder of ``neurosig.export``.
        model: The loaded model, or the name or folder to load instead of the manifest's; its weights must match.
        adapter: Where the manifest's adapter is, if not where it was.
        neurons: Table of neurons to use instead of the manifest's, such as ``report/located_neurons.csv``.
        gold: Whether to look up gold answers, to call rollouts right or wrong instead of majority or minority.

    Raises:
        UserError: The export cannot be read, or the loaded model is not the one that made it.
    """
    return Explorer(folder, model=model, adapter=adapter, neurons=neurons, gold=gold)


class Explorer(ExportedRun):
    """Makes views of a finished export: see this module's examples."""

    def heat_map(
        self, question_id: str, rollout: int | Rollout | None = None, *, quantity: Quantity = "contribution"
    ) -> TokenLayerMap:
        """How much a rollout's active neurons contribute (``contribution``), or the probe's evidence (``evidence``), by
        token and layer.

        Args:
            question_id: The question.
            rollout: Id of one of its rollouts, or a rollout sampled now; default: the representative one.
            quantity: What the cells hold.
        """
        check_choice("quantity", quantity, Quantity)
        from neurosig.neurons.token_trace import active_contribution, weighted_evidence

        chosen = self.rollout(question_id, rollout)
        trace = self.trace(question_id, chosen)
        if quantity == "evidence":
            values, title, note = weighted_evidence(trace, self.weights), "the probe's evidence", _EVIDENCE
            if self.manifest.header.options.get("probe_values") == "layer_z":
                note += " This export's probe reads contributions relative to their layer's, the map as they are."
        else:
            values, score = active_contribution(trace, self.active(chosen)), str(self.tracer.config.score)
            title = "mean contribution per active neuron"
            note = f"Mean over the layer's active neurons of {_CONTRIBUTIONS.get(score, f'the score {score}.')}"
        texts = self.texts(chosen.completion_ids_without_eos)
        return TokenLayerMap(self.row(question_id).question, texts, values, title, note, self.which(chosen))

    def layers(self, question_id: str, rollout: int | Rollout | None = None, *, count: int = 6) -> Choice:
        """Each token's ``count`` largest contributors, with a slider over the layers.

        It starts at the layer with the most evidence of the probe; without any, with the largest contributions.
        """
        from neurosig.neurons.token_trace import largest_neurons, weighted_evidence

        chosen = self.rollout(question_id, rollout)
        trace, texts = self.trace(question_id, chosen), self.texts(chosen.completion_ids_without_eos)
        question, which, table = self.row(question_id).question, self.which(chosen), self.hallucination_neurons
        views: dict[str, View] = {}
        strength = weighted_evidence(trace, self.weights).abs().sum(dim=1)
        largest = []
        for layer in range(len(trace.contributions)):
            indices, contributions = largest_neurons(trace, layer, count)
            largest.append(contributions.sum())
            located = table[table["layer"] == layer]
            weights = dict(zip(located["index"].tolist(), located["weight"].tolist(), strict=True))
            views[str(layer)] = LayerNeurons(
                question, layer, texts, indices.tolist(), contributions.tolist(), weights, which
            )
        if not strength.any():
            strength = strength.new_tensor(largest)
        shown = [str(layer) for layer in strength.argsort(descending=True, stable=True)[:_OPENED].tolist()]
        return Choice("layer", views, start=shown[0], shown=shown)

    def neuron(self, layer: int, index: int, *, examples: int = 3, tokens: int = 10) -> NeuronCard:
        """The card of one neuron.

        Args:
            layer: Its layer.
            index: Its index there.
            examples: Number of rollouts on the card, those with its largest mean contributions, one per question; its
                largest tokens are looked for in these.
            tokens: Tokens named in each list.

        Raises:
            UserError: There is no such neuron.
        """
        from neurosig.neurons.token_trace import vocabulary_effect

        effect = vocabulary_effect(self.tracer, layer, index)
        order = effect.sort(descending=True, stable=True).indices
        signals = self.exported.signals
        ids, flat = signals.neuron_ids, layer * signals.d_mlp + index
        places, columns = (ids == flat).nonzero(as_tuple=True)
        means = signals.contributions[places, columns].float()
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
            tokens_shown = Tokens.of(texts, here, (values < 0).tolist())
            cards.append(NeuronExample(row.question, row.answers[rollout_id], mean, tokens_shown))
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
        row, scores, place = self.row(question_id), self.exported.signals.probe_scores, self.exported.place
        probe = {k: float(scores[place[row.question_id, k]]) for k in range(len(row.answers))}
        sides = {verdict: [k for k in probe if self.trusted(row, k) == verdict] for verdict in (True, False)}
        if (trusted is None and not sides[True]) or (doubtful is None and not sides[False]):
            raise UserError(
                f'question "{row.question_id}": all its rollouts have the same verdict; choose one of contrasting'
            )
        left = min(sides[True], key=probe.__getitem__) if trusted is None else trusted
        right = max(sides[False], key=probe.__getitem__) if doubtful is None else doubtful
        pair = [self.rollout(row.question_id, k) for k in (left, right)]
        active = [self.active(rollout) for rollout in pair]
        both, either = active[0] & active[1], active[0] | active[1]
        evidence, means = self._evidence_and_means(pair)
        reach = max(1e-9, *(float(values.abs().max()) for values in evidence))
        shown = []
        for rollout, values, here, there in zip(pair, evidence, means, reversed(means), strict=True):
            tokens = Tokens(self.texts(rollout.completion_ids_without_eos), values.numpy(), -reach, reach)
            numbers = {
                "probe score": probe[rollout.rollout_id],
                "tokens": float(len(rollout.completion_ids_without_eos)),
            }
            for name in ("mean_logprob", "mean_entropy"):
                if getattr(rollout, name) is not None:
                    numbers[name.replace("_", " ").replace("logprob", "log-probability")] = getattr(rollout, name)
            k = rollout.rollout_id
            shown.append(Side(self.verdict(row, k), row.answers[k], tokens, numbers, self._larger(here, there)))
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
        from neurosig.neurons.contributions import PAD
        from neurosig.patterns.similarity import jaccard

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
            if self.exported.rows[name].selected and self.exported.rows[name].text_sha256 != row.text_sha256
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
            i, other = names.index(name), self.exported.rows[name]
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
            decision=frames.decision(row, options),
            policy=str(options["context_policy"] if privileged is None else "its own privileged context").replace(
                "_", " "
            ),
            context=[shown.index(name) for name in context],
            neighbours=neighbours,
            typical=float((every.sum() - every.trace()) / max(1, len(names) * (len(names) - 1))),
        )

    def choice(self, view: Callable[[str], View], question_ids: Sequence[str]) -> Choice:
        """A slider over questions: ``export.choice(export.neighbours, export.selected[:8])``."""
        labels = {f"{self.row(name).question} [{name}]": name for name in question_ids}
        return Choice("question", {label: view(name) for label, name in labels.items()})

    def cards(self, neurons: Sequence[tuple[int, int]]) -> Choice:
        """A slider over the cards of several neurons, by layer and index: ``export.cards(export.located[:6])``."""
        return Choice("neuron", {neuron_name(*pair): self.neuron(*pair) for pair in neurons})

    def _evidence_and_means(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[list[Float[Tensor, " token"]], list[Float[Tensor, " neuron"]]]:
        """The probe's evidence at each token, and every neuron's mean contribution over the tokens."""
        from neurosig.neurons.token_trace import weighted_evidence

        evidence, means = [], []
        for rollout in rollouts:
            trace = self.trace(rollout.question_id, rollout)
            evidence.append(weighted_evidence(trace, self.weights).sum(dim=0))
            means.append(trace.contributions.mean(dim=1).flatten())
        return evidence, means

    def _larger(
        self, here: Float[Tensor, " neuron"], there: Float[Tensor, " neuron"], count: int = 8
    ) -> list[tuple[str, float, float, float | None]]:
        """The neurons whose mean contribution is larger here, inside the active sets or not, by the difference."""
        known = {layer * self.exported.signals.d_mlp + index for layer, index in self.located}
        order = (here.abs() - there.abs()).nan_to_num(0.0, 0.0, 0.0).topk(min(count, len(here)))
        larger = [
            neuron for neuron, gain in zip(order.indices.tolist(), order.values.tolist(), strict=True) if gain > 0
        ]
        d_mlp = self.exported.signals.d_mlp
        return [
            (
                self.name_of(neuron),
                float(here[neuron]),
                float(there[neuron]),
                float(self.facts(*divmod(neuron, d_mlp))["weight"]) if neuron in known else None,
            )
            for neuron in larger
        ]
