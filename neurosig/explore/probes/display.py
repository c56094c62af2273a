"""How a probe is printed, shown in a notebook and drawn."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd

from neurosig.explore.tables import framed, neurons_html
from neurosig.runtime.extras import check_installed

if TYPE_CHECKING:
    from neurosig.explore.probes.probe import Probe


def probe_text(probe: Probe) -> str:
    """What the probe tells apart, how well, and by how many neurons, in one sentence each."""
    if not hasattr(probe, "classes_"):
        given = {name: value for name, value in probe.get_params().items() if value != _default(probe, name)}
        return f"Probe({', '.join(f'{name}={value!r}' for name, value in given.items())}), not fitted"
    negative, positive = (str(one) for one in probe.classes_)
    counts = [int((probe.labels_ == label).sum()) for label in (1, 0)]
    found = probe.auroc_interval_
    parts = [
        f"Probe, {probe.kind}: {positive} (positive, {counts[0]} texts) against {negative} ({counts[1]})",
        f"AUROC {probe.auroc_:.3f} [{found.low:.3f}, {found.high:.3f}], cross-fitted",
    ]
    if probe.p_ is not None:
        parts.append(f"p {probe.p_:.3g} (labels permuted {probe.permute_} groups)")
    kept, stable = len(probe.fitted_.columns), int(probe.neurons_["stable"].sum())
    parts.append(f"{kept} of {probe.fitted_.n_neurons} neurons have a weight")
    if probe.kind == "l1":
        parts.append(f"{stable} are stable (at most {probe.expected_false_:.2g} false ones expected)")
    if probe.model_:
        parts.append(f"model {probe.model_['id']}, {probe.layout_[0]} layers of {probe.layout_[1]}")
    return "; ".join([*parts, *probe.notes_])


def probe_html(probe: Probe) -> str:
    """`probe_text` and the first neurons, escaped, inline styles only and the page's own colours."""
    if hasattr(probe, "classes_"):
        return neurons_html(probe_text(probe), probe.neurons_)
    return framed(f"<div>{escape(probe_text(probe))}</div>")


def path_plot(path: pd.DataFrame, penalty: float, ax: Any = None) -> Any:
    """Held-out AUROC and its standard deviation over the folds at each penalty; a line where the probe is."""
    ax = axes(ax)
    ax.errorbar(path["inverse_penalty"], path["auroc_mean"], yerr=path["auroc_sd"], marker="o", capsize=3)
    for x, y, n in zip(path["inverse_penalty"], path["auroc_mean"], path["neurons"], strict=True):
        ax.annotate(f"{n:.0f}", (x, y), textcoords="offset points", xytext=(4, 6))
    ax.axvline(penalty, linestyle="--", color="grey")
    ax.set(xscale="log", xlabel="inverse penalty (numbers: neurons with a weight)", ylabel="held-out AUROC")
    return ax


def axes(ax: Any = None) -> Any:
    """The given axes, or new ones."""
    if ax is not None:
        return ax
    check_installed("plot", "matplotlib")
    from matplotlib import pyplot

    return pyplot.subplots()[1]


def _default(probe: Probe, name: str) -> Any:
    return getattr(type(probe)(), name)
