"""The representative rollout of a question and its pattern signature: the neurons behind its majority answer."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int32
from torch import Tensor

from neurosig.neurons.contributions import PAD
from neurosig.patterns import Signature
from neurosig.runtime.shapes import check_choice


def representative(
    answers: Sequence[str | None],
    winner: str | None,
    probe_scores: Sequence[float],
    usable: Sequence[bool] | None = None,
) -> int | None:
    """Index of a question's representative: of the rollouts with the majority answer the one with the lowest score.

    Args:
        answers: The K parsed answers.
        winner: The majority answer.
        probe_scores: Probe score of each rollout, higher is less trustworthy; on ties the first rollout is chosen.
        usable: Which rollouts may be one; those that were cut off may not. All by default.

    Returns:
        The index; ``None`` without such a rollout.
    """
    allowed = [True] * len(answers) if usable is None else usable
    majority = [k for k, answer in enumerate(answers) if answer is not None and answer == winner and allowed[k]]
    return min(majority, key=lambda index: probe_scores[index], default=None)


def signature(
    ids: Int32[Tensor, "k size"], majority: Sequence[int], representative: int | None, kind: Signature
) -> Int32[Tensor, " neurons"]:
    """Neurons of a question's signature, ascending.

    ``representative`` is the active set of the `representative` rollout; ``union``, ``intersection`` and
    ``frequency`` keep the neurons in any, in all, and in at least half of the majority's rollouts (NeuFS and the
    author's later code; reconstruction). ``hidden_state`` compares mean hidden states instead, the embedding baseline,
    and names the representative's neurons.

    Args:
        ids: Active sets of the K rollouts.
        majority: Rollouts that gave the majority answer.
        representative: Index of the representative rollout; ``None`` gives an empty signature.
        kind: The option.

    Raises:
        UserError: There is no such kind.
    """
    check_choice("signature", kind, Signature)
    if representative is None:
        return ids.new_empty(0)
    if kind in ("representative", "hidden_state"):
        chosen = ids[representative]
        return chosen[chosen != PAD]
    least = {"union": 1, "intersection": len(majority), "frequency": -(-len(majority) // 2)}[kind]
    neurons, counts = ids[list(majority)].unique(return_counts=True)
    return neurons[(counts >= least) & (neurons != PAD)]
