"""List the commands: ``python -m neurosig``."""

from __future__ import annotations

import sys

from neurosig.runtime.cli import list_commands

COMMANDS = {
    "show": "trace one text and print its largest neurons and what each adds to the next token",
    "export": "sample, trace and score unlabelled questions, and write the selection manifest",
    "screen": "rank a pool of questions by how far answers will agree, from one forward pass per prompt",
    "check": "compare nnsight, plain hooks and TransformerLens on a model's neurons",
    "report": "measure what each signal of a manifest knows about right answers",
    "locate": "name the neurons that go with guessing in every kind of question, over several exports",
    "intervene": "scale a manifest's neurons during generation and measure the answers",
    "verify": "recompute a results folder and compare it with its records",
}

if __name__ == "__main__":
    sys.exit(list_commands("neurosig", COMMANDS))
