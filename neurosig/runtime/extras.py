"""The packages that a bare install lacks, and the extra of ``pip install neurosig`` that brings each."""

from __future__ import annotations

from importlib.util import find_spec

from neurosig.runtime.errors import UserError

EXTRAS = {
    "signals": ("nnsight", "pandas", "sklearn"),
    "explore": ("IPython", "ipywidgets", "jupyterlab", "matplotlib", "seaborn", "transformer_lens"),
    "baselines": ("trl",),
    "server": ("openai",),
    "math": ("math_verify",),
    "trackers": ("tensorboard", "wandb"),
    "hub": ("datasets",),
    "neighbours": ("usearch",),
    "gguf": ("gguf",),
}
"""Extra -> its packages, by the names they are imported by."""


def check_installed(what: str, *packages: str) -> None:
    """Refuse what needs a package of an extra that is not installed, before anything expensive.

    Args:
        what: What needs it, for the message.
        packages: By the names they are imported by.

    Raises:
        UserError: Naming the first package that is missing, and its extra.
    """
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{what}: {absent(package)}")


def absent(package: str) -> str | None:
    """How to install a missing package, in words; ``None`` if it is in no extra."""
    found = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return found and f"{package} is not installed; run `pip install 'neurosig[{found}]'`"
