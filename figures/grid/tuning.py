"""What was tried on the development questions for each method, and which learning rate and steps it gets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from figures.grid.cells import Try, tried_name, tries
from figures.grid.config import GridConfig
from neurosig.runtime.files import write_atomic

TUNING = "tuning.csv"


def choose(config: GridConfig, sources: Iterable[str]) -> dict[str, Try]:
    """Method -> its best try, and write all of them with their results as ``tuning.csv``.

    The best has the highest strict Avg@K on the development questions, mean over the sources; of equals, the smallest
    learning rate and the fewest steps. A try that failed in a source does not count; a method without any is left out.
    """
    rows, chosen = [], {}
    for method in config.methods:
        scores: dict[Try, float] = {}
        for one in tries(config, method):
            found = [_judged(config, method, source, one) for source in sources] if config.learning_rates else []
            rows += [row for row in found if row]
            if all(found):
                scores[one] = sum(row["avg_at_k"] for row in found if row) / max(1, len(found))
        if scores:
            chosen[method] = max(scores, key=lambda one: scores[one])
    if rows:
        for row in rows:
            best = chosen.get(row["method"])
            row["chosen"] = int(best is not None and (best.learning_rate, best.at) == (row["learning_rate"], row["at"]))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(config.out / TUNING, text.getvalue())
    return chosen


def _judged(config: GridConfig, method: str, source: str, one: Try) -> dict[str, Any] | None:
    folder = config.out / "tries" / tried_name(method, source, one.learning_rate) / "eval" / f"step-{one.at:06d}"
    path = folder / "summary.json"
    if not path.is_file():
        return None
    domains: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["domains"]
    judged = max(domains.values(), key=lambda domain: int(domain["n"]))
    return {
        "method": method,
        "source": source,
        "learning_rate": one.learning_rate,
        "steps": one.steps,
        "at": one.at,
        "n": judged["n"],
        "avg_at_k": judged["avg_at_k"]["estimate"],
        "avg_at_k_lenient": judged["avg_at_k_lenient"]["estimate"],
    }
