"""Reasoning-pattern neurons: which questions rely on the same neurons."""

from typing import Literal

Signature = Literal["representative", "union", "intersection", "frequency", "hidden_state"]
"""Which neurons similarity compares; see `neurosig.patterns.signatures.signature`."""
