"""Whether the sources of a manifest's functions that are not ours are still those on record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from neurosig.manifest import Header
from neurosig.registry import Kind, MissingFunction, find
from neurosig.verify import SKIPPED

OPTIONS: Mapping[str, Kind] = {
    "hallucination_score": "score",
    "more_scores": "score",
    "question_filter": "filter",
    "context_policy": "context",
    "contribution": "contribution",
    "active_set": "active_set",
}
"""Option -> the kind of its functions."""


def function_checks(header: Header) -> Iterator[tuple[str, str]]:
    """The name of each check and its problem, empty if there is none."""
    for option, kind in OPTIONS.items():
        value = header.options.get(option, ())
        for name in value if isinstance(value, list) else [value]:
            if name not in header.functions:
                continue
            try:
                here = find(kind, name).sha256
                problem = "" if here == header.functions[name] else "its source is not the one on record"
            except MissingFunction as error:
                problem = f"{SKIPPED}{error}"
            yield f"the {kind} {name}", problem
