"""What the README promises of a bare install and of each extra alone: commands on tiny models, as steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from neurosig.runtime.cli import command_words
from tests.support.exports import write_lines
from tests.support.flow import make_manifest, write_questions
from tests.support.paths import ROOT

COMMANDS = (
    *("neurosig.export", "neurosig.check", "neurosig.report", "neurosig.intervene", "neurosig.verify"),
    *("neurosig.screen", "neurosig.show", "neurosig.locate"),
    *("neurosig.organism.train", "neurosig.organism.study"),
    *("distill.train", "distill.evaluate", "distill.rescore", "distill.compare"),
    *("figures", "figures.grid", "figures.grid.evidence", "figures.grid.rescore", "figures.experiments.signal_search"),
)
NEEDED = "is not installed; run `pip install 'neurosig[{}]'`"


@dataclass(frozen=True)
class Step:
    """A command, ``python`` left out, and what becomes of it.

    Attributes:
        words: ``-m MODULE ...``, or ``-c CODE``.
        refused: Text of the one-line error, with exit code 2; None: exit code 0.
        shown: Text that it prints.
    """

    words: tuple[str, ...]
    refused: str | None = None
    shown: str = ""

    def problem(self, code: int, out: str, err: str) -> str:
        """What is wrong with its exit code and output, or an empty string."""
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        if self.refused is None:
            right = code == 0 and self.shown in out
        else:
            right = code == 2 and len(errors) == 1 and self.refused in errors[0]
        return "" if right else f"{' '.join(self.words)}: exit code {code}\n{out[-2000:]}\n{err[-2000:]}"


def command(module: str, *names: str, refused: str | None = None, shown: str = "", **options: object) -> Step:
    """``python -m MODULE NAMES --option value ...``."""
    return Step(("-m", module, *names, *command_words(options)), refused, shown)


def prepare(folder: Path) -> None:
    """A tiny model, questions in several forms and a manifest, made by the whole environment."""
    from datasets import Dataset

    manifest = make_manifest(folder)
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    Dataset.from_list(questions).save_to_disk(folder / "dataset")
    write_questions(folder / "choices.jsonl", choices=["one", "two"], answer="B")
    answers = [{"question_id": question["id"], "text": "Answer: yes"} for question in questions for _ in range(2)]
    make_manifest(folder, "answered", rollouts=write_lines(folder / "rollouts.jsonl", answers))
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    assert (manifest / "manifest.json").is_file()


def steps(install: str, folder: Path, base_url: str = "") -> list[Step]:
    """What an install promises, on the files of `prepare`.

    Args:
        install: ``base`` or an extra.
        folder: That of `prepare`; results go to a folder of the install's name.
        base_url: Address of a server with the tiny model, for the extra ``server``.
    """
    made = {
        "base": _base,
        "signals": _signals,
        "explore": _explore,
        "baselines": _baselines,
        "trackers": _trackers,
        "hub": _hub,
        "gguf": _gguf,
    }
    if install == "math":
        code = "from neurosig.questions.answers import extract_answer\n"
        code += "from neurosig.questions.load import Question\n"
        code += "question = Question('q', 'd', 'What is the sine of 45 degrees?')\n"
        code += r"print(extract_answer(r'It is \boxed{\frac{1}{\sqrt{2}}}.', question, 'number'))"
        return [Step(("-c", code), shown="sqrt(2)/2\n")]
    if install == "neighbours":
        code = "import torch; from neurosig.patterns.similarity import nearest_sets\n"
        code += "sets = torch.arange(40).reshape(10, 4).int()\n"
        code += "print(nearest_sets(sets, 2, backend='usearch'))"
        return [Step(("-c", code))]
    if install == "server":
        options = {**_evaluated(folder), "sampler": "openai", "base_url": base_url, "out": folder / install / "eval"}
        return [command("distill.evaluate", **options)]
    return made[install](folder, folder / install)


def _evaluated(folder: Path) -> dict[str, object]:
    quick = {"max_new_tokens": 4, "num_generations": 2, "temperature": 1.0}
    return {"model": folder / "model", "questions": folder / "questions.jsonl", **quick}


def _trained(folder: Path, out: Path) -> dict[str, object]:
    quick = {"steps": 2, "questions_per_step": 2, "num_generations": 2, "lora_r": 2, "keep_truncated": True}
    return {"manifest": folder / "manifest", "out": out, **quick}


def _base(folder: Path, out: Path) -> list[Step]:
    evaluated, train, evals = _evaluated(folder), _trained(folder, out / "nopsd"), out / "eval"
    scored = {"model": folder / "model", "questions": folder / "choices.jsonl", "scoring": "loglikelihood"}
    lmsi, other = {**train, "method": "lmsi", "out": out / "lmsi"}, {**evaluated, "out": out / "other"}
    runs, gold = {"manifest": folder / "manifest", "out": out / "other"}, {"questions": folder / "questions.jsonl"}
    return [
        Step(("-m", "neurosig"), shown="python -m neurosig.export"),
        Step(("-m", "distill"), shown="python -m distill.train"),
        *(Step(("-m", module, "--help"), shown="--debug") for module in COMMANDS),
        command("distill.train", **train),
        command("distill.train", **{**train, "out": out / "whole", "full": True}),
        command("distill.evaluate", **evaluated, out=evals / "base"),
        command("distill.evaluate", **evaluated, adapter=out / "nopsd" / "adapter", out=evals / "nopsd"),
        command("distill.evaluate", **scored, out=evals / "scored", mutual_info=True),
        command(
            "distill.compare", base=evals / "base", trained=evals / "nopsd", train=out / "nopsd", out=out / "report",
            shown="maj@2",
        ),
        command("distill.rescore", str(evals / "base"), vote_merge="exact", out=out / "rescored"),
        command("neurosig.verify", str(out), shown="ok"),
        command("neurosig.verify", str(folder / "manifest"), shown="ok"),
        command("neurosig.export", **other, refused=NEEDED.format("signals")),
        command("neurosig.report", **runs, refused=NEEDED.format("signals")),
        command("neurosig.locate", **runs, refused=NEEDED.format("signals")),
        command("neurosig.intervene", **runs, **gold, refused=NEEDED.format("signals")),
        command("neurosig.screen", run=folder / "manifest", questions=folder / "questions.jsonl", out=out / "screened",
                refused=NEEDED.format("signals")),
        command("neurosig.check", model=folder / "model", refused=NEEDED.format("signals")),
        command("figures.grid", model=folder / "model", sources=f"a={folder}", out=out / "other",
                refused=NEEDED.format("signals")),
        command("figures", "methods", results=out, refused=NEEDED.format("explore")),
        command("distill.train", **lmsi, refused="run `pip install 'neurosig[baselines]'`"),
        command("distill.train", **{**train, "out": out / "x", "report_to": "wandb"},
                refused="run `pip install 'neurosig[trackers]'`"),
        command("distill.evaluate", **other, sampler="openai", base_url="http://127.0.0.1:1/v1",
                refused="run `pip install 'neurosig[server]'`"),
        command("distill.evaluate", **{**other, "questions": folder / "dataset"}, refused=NEEDED.format("hub")),
        command("distill.evaluate", **{**other, "model": folder / "model.gguf"}, refused=NEEDED.format("gguf")),
    ]  # fmt: skip


def _signals(folder: Path, out: Path) -> list[Step]:
    evaluated = _evaluated(folder)
    found = {"manifest": out / "manifest", "questions": folder / "questions.jsonl"}
    neurons = {"neurons": "all", "controls": 1, "num_generations": 2, "max_new_tokens": 4}
    return [
        command("neurosig.export", **evaluated, out=out / "manifest", set_size=16, question_filter="all",
                keep_truncated=True),
        command("neurosig.verify", str(out / "manifest"), shown="ok"),
        command("neurosig.check", model=folder / "model", shown="nnsight = plain hooks"),
        command("neurosig.screen", run=out / "manifest", questions=folder / "questions.jsonl", out=out / "screened",
                refused="8 questions with rollouts are too few for a probe"),
        command("neurosig.intervene", **found, **neurons, out=out / "intervene",
                table=_some_neurons(folder), factors=(0.0, 1.0)),
        command("distill.train", **{**_trained(folder, out / "nopsd"), "manifest": out / "manifest"}),
    ]  # fmt: skip


def _some_neurons(folder: Path) -> Path:
    table = folder / "neurons.csv"
    table.write_text("layer,index,weight\n0,3,0.5\n1,5,0.25\n")
    return table


def _explore(folder: Path, out: Path) -> list[Step]:
    cells = [
        "".join(cell["source"])
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    imports = [line for cell in cells for line in cell.splitlines() if line.startswith(("import ", "from "))]
    return [
        Step(("-c", "\n".join(imports))),
        Step(("-m", "jupyterlab", "--version")),
        command("figures", "methods", "findings", "paper_tables", results=out),
        command("neurosig.check", model=folder / "model", shown="TransformerLens = plain hooks    "),
    ]


def _baselines(folder: Path, out: Path) -> list[Step]:
    return [
        command(
            "distill.train", **{**_trained(folder, out / method), "method": method, "manifest": folder / "answered"}
        )
        for method in ("lmsi", "ttrl", "intuitor")
    ]


def _trackers(folder: Path, out: Path) -> list[Step]:
    return [command("distill.train", **_trained(folder, out / "nopsd"), report_to=("tensorboard", "wandb"))]


def _hub(folder: Path, out: Path) -> list[Step]:
    return [command("distill.evaluate", **{**_evaluated(folder), "questions": folder / "dataset"}, out=out / "eval")]


def _gguf(folder: Path, out: Path) -> list[Step]:
    evaluated = {**_evaluated(folder), "model": "smollm2-135m", "limit": 1}
    return [command("distill.evaluate", **evaluated, out=out / "eval")]
