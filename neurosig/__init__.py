"""Neuron signals of a model's own rollouts: how far to trust an answer, and which questions reason alike.

The public names load on first use, so ``import neurosig`` imports neither torch nor nnsight.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurosig.explore.comparison import compare
    from neurosig.explore.hooks import hooks
    from neurosig.explore.probes.probe import Probe, load_probe
    from neurosig.explore.traces import Traces, trace
    from neurosig.manifest import read_manifest
    from neurosig.models.load import load_model
    from neurosig.neurons.layouts import register_layout
    from neurosig.questions.load import load_questions
    from neurosig.registry import register
    from neurosig.sampling.sampler import sample
    from neurosig.views.explorer import read_export

__version__ = "0.2.0"
__all__ = [
    "Probe",
    "Traces",
    "__version__",
    "compare",
    "hooks",
    "load_model",
    "load_probe",
    "load_questions",
    "read_export",
    "read_manifest",
    "register",
    "register_layout",
    "sample",
    "trace",
]

_HOME = {
    "load_model": "neurosig.models.load",
    "load_questions": "neurosig.questions.load",
    "sample": "neurosig.sampling.sampler",
    "read_export": "neurosig.views.explorer",
    "read_manifest": "neurosig.manifest",
    "register": "neurosig.registry",
    "register_layout": "neurosig.neurons.layouts",
    "trace": "neurosig.explore.traces",
    "Traces": "neurosig.explore.traces",
    "hooks": "neurosig.explore.hooks",
    "Probe": "neurosig.explore.probes.probe",
    "load_probe": "neurosig.explore.probes.probe",
    "compare": "neurosig.explore.comparison",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'neurosig' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
