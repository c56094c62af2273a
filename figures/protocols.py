"""The questions of the two published protocols, as files that `figures.grid`'s presets of the same names read.

    python -m figures.protocols --questions EDU=my_education_set.jsonl
    python -m figures.grid --preset paper --out runs/paper
    python -m figures.grid --preset inflow --model Qwen/Qwen3-4B --out runs/inflow/qwen3-4b

``paper`` is that of Tables 3 and 4 of arXiv 2607.02460: SciKnowEval's four sciences, MMLU-Pro, and an education set
that it does not name. ``inflow`` is that of INFLOW's Table 1: one model trained on all, judged on mathematics, natural
science, and humanities and social science of MMLU-Pro and SciKnowEval. Which categories make a domain, how many
questions the paper's protocol has, and the division are this project's reading; neither is published.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from figures.sources import question_lines
from neurosig.runtime.cli import CommonConfig, run_command
from neurosig.runtime.errors import UserError

logger = logging.getLogger(__name__)

FOLDER = Path("runs/questions")
OVERALL, DEV = "overall", 100
_MMLU_PRO = "hf:TIGER-Lab/MMLU-Pro:test"
_SCIENCES = {name: f"hf:hicai-zju/SciKnowEval/{name}:test" for name in ("Biology", "Material", "Physics", "Chemistry")}
INFLOW_MODELS = (
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3.5-9B",
    "mistralai/Ministral-3-8B-Instruct-2512",
    "meta-llama/Llama-3.1-8B-Instruct",
)
"""The models of INFLOW's Table 1, as we take their hub ids to be."""


@dataclass(frozen=True)
class Pool:
    """A domain: where its questions are, and how many of them test.

    Attributes:
        n_test: Test questions.
        kinds: Source -> the kinds (MMLU-Pro's categories) that belong to it; none for all.
    """

    n_test: int
    kinds: Mapping[str, Sequence[str]]


PROTOCOLS: Mapping[str, Mapping[str, Pool]] = {
    "paper": {
        **{
            name: Pool(500, {_SCIENCES[science]: ()})
            for name, science in (("BIO", "Biology"), ("MAT", "Material"), ("PHYS", "Physics"), ("CHEM", "Chemistry"))
        },
        "EDU": Pool(500, {}),
        "MMLU_PRO": Pool(500, {_MMLU_PRO: ()}),
    },
    "inflow": {
        "math": Pool(100, {_MMLU_PRO: ("math",)}),
        "natural_science": Pool(
            200, {_MMLU_PRO: ("biology", "chemistry", "physics"), **dict.fromkeys(_SCIENCES.values(), ())}
        ),
        "humanities_social": Pool(
            200, {_MMLU_PRO: ("business", "economics", "history", "law", "philosophy", "psychology")}
        ),
    },
}


def file_options(protocol: str, domains: Sequence[str], part: str) -> tuple[str, ...]:
    """``NAME=FILE`` of each domain, for an option of `figures.grid`; ``part`` is train, dev or test."""
    return tuple(f"{name}={FOLDER / protocol / f'{name}-{part}.jsonl'}" for name in domains)


@dataclass(kw_only=True)
class ProtocolsConfig(CommonConfig):
    """Write the training, development and test questions of both published protocols."""

    questions: tuple[str, ...] = ()
    """NAME=QUESTIONS, a file, folder or hf:ORG/NAME[/SET] in place of a domain's own. EDU, which the paper does not
    name, is left out without one."""
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    """Which."""
    out: Path = FOLDER
    """Folder of the files; the grid's presets read runs/questions."""


def main(config: ProtocolsConfig) -> None:
    """Write the files.

    Raises:
        UserError: A name is unknown, or a domain has too few labelled questions.
    """
    from neurosig.questions.load import Question, load_questions
    from neurosig.runtime.files import write_atomic

    given = dict(value.partition("=")[::2] for value in config.questions)
    known = {name for protocol in PROTOCOLS.values() for name in protocol}
    for name in (*(set(given) - known), *(set(config.protocols) - set(PROTOCOLS))):
        raise UserError(f"{name}: no such domain or protocol; have {', '.join((*PROTOCOLS, *sorted(known)))}")
    for protocol in config.protocols:
        parts: dict[str, list[Question]] = {"train": [], "dev": [], "test": []}
        for name, pool in PROTOCOLS[protocol].items():
            sources = {given[name]: ()} if name in given else pool.kinds
            if not sources:
                logger.warning("%s: %s left out; give its questions: --questions %s=FILE", protocol, name, name)
                continue
            read = [(one, kinds) for source, kinds in sources.items() for one in load_questions(source)]
            pooled = [one for one, kinds in read if one.answer is not None and (not kinds or one.kind in kinds)]
            pooled.sort(key=lambda one: hashlib.sha256(one.id.encode()).digest())
            if len(pooled) <= pool.n_test + DEV:
                raise UserError(f"{name}: {len(pooled)} labelled questions; more than {pool.n_test + DEV} are needed")
            ends = {"test": slice(pool.n_test), "dev": slice(pool.n_test, pool.n_test + DEV)}
            for part in parts:
                chosen = [replace(one, domain=name) for one in pooled[ends.get(part, slice(pool.n_test + DEV, None))]]
                parts[part] += chosen
                write_atomic(_place(config.out / protocol, name, part), question_lines(chosen))
        for part, questions in parts.items() if protocol == "inflow" else ():
            one = [replace(question, domain=OVERALL) for question in questions]
            write_atomic(_place(config.out / protocol, OVERALL, part), question_lines(one))
        logger.info("%s", config.out / protocol)


def _place(folder: Path, name: str, part: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{part}.jsonl"


if __name__ == "__main__":
    sys.exit(run_command(ProtocolsConfig, main, presets={}, prog="python -m figures.protocols"))
