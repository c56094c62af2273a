"""List the commands of this package: ``python -m distill``."""

from __future__ import annotations

import sys

from neurosig.runtime.cli import list_commands

COMMANDS = {
    "train": "distil a manifest's contexts into the model, or run a baseline",
    "evaluate": "accuracy and calibration on labelled questions",
    "merge": "merge an adapter into its model, and say what its dtype keeps",
    "rescore": "grade kept rollouts again, without a model",
    "compare": "compare evaluations of the same questions, with paired intervals",
}

if __name__ == "__main__":
    sys.exit(list_commands("distill", COMMANDS))
