"""The report's section on single neurons: the probe along its path, the stable neurons, and a control."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurosig.exported import Exported
from neurosig.hallucination.config import ProbeConfig, ProbeLabels
from neurosig.hallucination.controls import RandomNeurons, random_neuron_auroc
from neurosig.hallucination.locate import FittedProbe, HallucinationProbe
from neurosig.hallucination.probe import probe_matrix, rollout_labels, too_few
from neurosig.neurons.config import neuron_name
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config
from neurosig.statistics.metrics import format_interval

RANDOM_DRAWS = 10


@dataclass(frozen=True, slots=True)
class Located:
    """The probe that `neurosig.hallucination.locate.HallucinationProbe` fitted to an export, and its control.

    Attributes:
        probe: The fitted probe; its penalty is chosen by cross-validation.
        random: Probes on the same number of random neurons; ``None`` where the probe kept none.
        known: Questions it was fitted on as known.
        guessed: Questions it was fitted on as guessed.
        labels: What it learned (`ProbeConfig.labels`); under ``contrast`` the same questions have both.
    """

    probe: FittedProbe
    random: RandomNeurons | None
    known: int
    guessed: int
    labels: ProbeLabels = "agreement"

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def path(self) -> list[dict[Hashable, Any]]:
        return self.probe.path.to_dict("records")

    @property
    def table(self) -> list[dict[Hashable, Any]]:
        rows = self.probe.neurons.to_dict("records")
        return [{"neuron": neuron_name(row.pop("layer"), row.pop("index")), **row} for row in rows]

    @property
    def sentence(self) -> str:
        """The finding in words, made from the numbers."""
        probe, stable = self.probe, int(self.probe.stability.stable.sum())
        contrast = self.labels == "contrast"
        learned = (
            f"rollouts inside and outside the majority of {self.known} questions"
            if contrast
            else f"{self.known} questions whose rollouts agree, {self.guessed} whose rollouts split"
        )
        text = (
            f"Labels without gold: {learned}. Cross-validation by question keeps {len(probe.columns)} neurons; they "
            f"predict a {'rollout' if contrast else 'question'}'s side with "
            f"AUROC {probe.auroc:.3f} where they did not see it"
        )
        if self.random is not None:
            low, high = self.random.low, self.random.high
            verdict = "more" if probe.auroc > high else "less" if probe.auroc < low else "no more that is detectable"
            text += (
                f"; as many random neurons with {format_interval(self.random.auroc, low, high, '.3f')} "
                f"({len(self.random.draws)} draws), so the located ones predict {verdict}"
            )
        return (
            f"{text}. {stable or 'No'} neuron{'s are' if stable > 1 else ' is'} stable: selected in at least "
            f"{probe.stability.threshold:.0%} of {2 * probe.stability.pairs} halves of the questions, a rule under "
            f"which at most {probe.stability.expected_false:.2f} false ones are expected."
        )


def locate(exported: Exported, *, seed: int, quiet: bool) -> Located | str:
    """Fit the probe with the labels and shares that the export used; or say why that cannot be done."""
    options: Mapping[str, Any] = exported.manifest.header.options
    config = ProbeConfig(
        agree_share=options["probe_agree_share"],
        split_share=options["probe_split_share"],
        inverse_penalty=None,
        folds=options["probe_folds"],
        labels=options.get("probe_labels", "agreement"),
        values=options.get("probe_values", "contribution"),
        fold_seeds=1,
        seed=seed,
    )
    rows = exported.rows.values()
    owners = [question_id for question_id, _ in exported.place]
    by_row = rollout_labels([row.answers for row in rows], [row.pseudo_label for row in rows], config)
    keys = [(row.question_id, index) for row in rows for index in range(len(row.answers))]
    label_of = dict(zip(keys, by_row.tolist(), strict=True))
    labels = np.array([label_of[key] for key in exported.place])
    shortage = too_few(labels, np.unique(owners, return_inverse=True)[1], config)
    if exported.manifest.k == 1:
        shortage = "with one rollout per question, none can agree or split"
    if shortage:
        return f"Single neurons cannot be located: {shortage}."
    signals = exported.signals
    contributions = probe_matrix(
        signals.neuron_ids.numpy(), signals.contributions.float().numpy(), signals.n_layers, signals.n_neurons, config
    )
    try:
        probe = HallucinationProbe(config).fit(contributions, labels, owners, d_mlp=signals.d_mlp, quiet=quiet)
    except UserError as error:
        return f"Single neurons cannot be located: {error}."
    random = None
    if len(probe.columns):
        random = random_neuron_auroc(
            contributions, labels, owners, len(probe.columns), config, exclude=probe.columns, draws=RANDOM_DRAWS
        )
    known, guessed = (len({owner for owner, own in zip(owners, labels, strict=True) if own == k}) for k in (0, 1))
    return Located(probe, random, known, guessed, config.labels)
