"""The pattern signature of a question: the neurons that stand for how its majority answer was reached."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int32
from torch import Tensor

from neurosig.neurons.contributions import PAD
from neurosig.patterns import Signature


def signature(
    ids: Int32[Tensor, "k size"], majority: Sequence[int], representative: int | None, kind: Signature
) -> Int32[Tensor, " neurons"]:
    """Neurons of a question's signature, ascending.

    ``representative`` is the active set of the rollout that stands for the question; ``union``, ``intersection`` and
    ``frequency`` keep the neurons in any, in all, and in at least half of the majority's rollouts (NeuFS and the
    author's later code; reconstruction). ``hidden_state`` compares mean hidden states instead, the embedding baseline,
    and names the representative's neurons.

    Args:
        ids: Active sets of the K rollouts.
        majority: Rollouts that gave the majority answer.
        representative: The rollout that stands for the question; ``None`` without a majority gives an empty signature.
        kind: The option.
    """
    if representative is None:
        return ids.new_empty(0)
    if kind in ("representative", "hidden_state"):
        chosen = ids[representative]
        return chosen[chosen != PAD]
    least = {"union": 1, "intersection": len(majority), "frequency": -(-len(majority) // 2)}[kind]
    neurons, counts = ids[list(majority)].unique(return_counts=True)
    return neurons[(counts >= least) & (neurons != PAD)]
