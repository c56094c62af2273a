"""The selection manifest: the only thing that export passes to distillation.

A folder of ``questions.jsonl`` (one row per input question, in input order), ``rollouts.jsonl``,
``signals.safetensors``, ``neurons.csv``, with a second stage ``teacher_rollouts.jsonl``, and, written last,
``manifest.json``: its presence means that the export is complete. It has no gold answer. Same inputs and seed give the
same bytes.
"""

from neurosig.manifest.files import (
    FILES,
    HEADER,
    NEURONS,
    QUESTIONS,
    ROLLOUTS,
    SIGNALS,
    TEACHER_ROLLOUTS,
    Manifest,
    read_manifest,
    write_manifest,
)
from neurosig.manifest.rows import DemonstrationRecord, FileEntry, Header, QuestionRow, Reason, RolloutRow, VoteRecord

__all__ = [
    "FILES",
    "HEADER",
    "NEURONS",
    "QUESTIONS",
    "ROLLOUTS",
    "SIGNALS",
    "TEACHER_ROLLOUTS",
    "DemonstrationRecord",
    "FileEntry",
    "Header",
    "Manifest",
    "QuestionRow",
    "Reason",
    "RolloutRow",
    "VoteRecord",
    "read_manifest",
    "write_manifest",
]
