"""The report's part on single neurons: how the probe does along its path, which neurons are stable, and a control."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.controls import RandomNeurons, random_neuron_auroc
from neurosig.hallucination.locate import FittedProbe, HallucinationProbe
from neurosig.hallucination.probe import agreement_labels, contribution_matrix, too_few
from neurosig.manifest import Manifest
from neurosig.report.data import Traced

RANDOM_DRAWS = 10


@dataclass(frozen=True, slots=True)
class Located:
    """What `neurosig.hallucination.locate.HallucinationProbe` found in a manifest, and random neurons beside it.

    Attributes:
        probe: The fitted probe; its penalty is chosen by cross-validation.
        random: Probes on as many random neurons; ``None`` where the probe kept none.
        known: Questions that taught it as known.
        guessed: Questions that taught it as guessed.
    """

    probe: FittedProbe
    random: RandomNeurons | None
    known: int
    guessed: int

    @property
    def path(self) -> list[dict[Hashable, Any]]:
        return self.probe.path.to_dict("records")

    @property
    def table(self) -> list[dict[Hashable, Any]]:
        return self.probe.neurons.to_dict("records")

    @property
    def sentence(self) -> str:
        """The finding in words, made from the numbers."""
        probe, stable = self.probe, int(self.probe.stability.stable.sum())
        text = (
            f"Labels without gold: {self.known} questions whose rollouts agree, {self.guessed} whose rollouts split. "
            f"Cross-validation by question keeps {len(probe.columns)} neurons; they tell a question's side with "
            f"AUROC {probe.auroc:.3f} where they did not see it"
        )
        if self.random is not None:
            low, high = self.random.low, self.random.high
            verdict = "more" if probe.auroc > high else "less" if probe.auroc < low else "no more that can be told"
            text += (
                f"; as many random neurons with {self.random.auroc:.3f} [{low:.3f}, {high:.3f}] "
                f"({len(self.random.draws)} draws), so the located ones tell {verdict}"
            )
        return (
            f"{text}. {stable or 'No'} neuron{'s are' if stable > 1 else ' is'} stable: selected in at least "
            f"{probe.stability.threshold:.0%} of {2 * probe.stability.pairs} halves of the questions, a rule under "
            f"which at most {probe.stability.expected_false:.2f} false ones are expected."
        )


def locate(manifest: Manifest, traced: Traced, *, seed: int, quiet: bool) -> Located | str:
    """Fit the probe with the labels and shares that the export used; or say why that cannot be done."""
    options: Mapping[str, Any] = manifest.header.options
    config = ProbeConfig(
        agree_share=options["probe_agree_share"],
        split_share=options["probe_split_share"],
        inverse_penalty=None,
        folds=options["probe_folds"],
        seed=seed,
    )
    share = {row.id: row.vote.count / row.vote.n for row in manifest.rows if row.vote is not None}
    owners = [question_id for question_id, _ in manifest.rollouts]
    labels = agreement_labels(np.array([share[owner] for owner in owners]), config)
    shortage = too_few(labels, np.unique(owners, return_inverse=True)[1], config)
    if shortage:
        return f"Single neurons cannot be located: {shortage}."
    contributions = contribution_matrix(traced.ids, traced.values, traced.n_layers * traced.d_mlp)
    probe = HallucinationProbe(config).fit(contributions, labels, owners, d_mlp=traced.d_mlp, quiet=quiet)
    random = None
    if len(probe.columns):
        random = random_neuron_auroc(
            contributions, labels, owners, len(probe.columns), config, exclude=probe.columns, draws=RANDOM_DRAWS
        )
    by_question = agreement_labels(np.array(list(share.values())), config)
    return Located(probe, random, int((by_question == 0).sum()), int((by_question == 1).sum()))
