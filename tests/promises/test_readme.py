"""Commands, make targets, tests, files and numbers on the project's pages are real."""

from __future__ import annotations

import ast
import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from figures.experiments.signal_search import adds
from neurosig.export_config import ExportConfig
from neurosig.runtime.arguments import parse_config
from neurosig.statistics.vote_table import GRADINGS
from tests.benchmarks import memory
from tests.support.commands import command_module
from tests.support.pages import PAGES, README, section, words
from tests.support.paths import FIGURE_DATA, ROOT

EVERYTHING = "\n".join(PAGES.values())
CONFIGS = {
    "neurosig.export": "ExportConfig",
    "neurosig.check": "CheckConfig",
    "neurosig.report": "ReportConfig",
    "neurosig.screen": "ScreenConfig",
    "neurosig.show": "ShowConfig",
    "neurosig.locate": "LocateConfig",
    "neurosig.intervene": "InterveneConfig",
    "neurosig.verify": "VerifyConfig",
    "distill.train": "TrainConfig",
    "distill.evaluate": "EvaluateConfig",
    "distill.compare": "CompareConfig",
    "figures.grid": "GridConfig",
}


def commands() -> list[str]:
    """The lines of the pages' sh blocks, each once, continued lines joined, without comments."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", EVERYTHING, flags=re.DOTALL)).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in blocks.splitlines())
    return list(dict.fromkeys(words(line.removeprefix("$ ")) for line in lines if line))


@pytest.mark.parametrize(
    "command", [line for line in commands() if re.search(r"-m (neurosig\.|distill\.|figures\.grid )", line)]
)
def test_every_command_parses(command: str) -> None:
    """The command's own parser takes its options, and accelerate's parser those of `accelerate launch`."""
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(words[2:])
        assert launched.module
        module, argv = launched.training_script, launched.training_script_args
    else:
        place = words.index("-m")
        assert words[place - 1] == "python"
        module, argv = words[place + 1], words[place + 2 :]
    loaded = command_module(module)
    parse_config(getattr(loaded, CONFIGS[module]), presets=getattr(loaded, "PRESETS", {}), prog=module, argv=argv)


def test_every_link_leads_somewhere() -> None:
    """Files exist, and headings are those of the page."""
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", PAGES[target], flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.relative_to(ROOT)}: {link}"


def test_the_front_page_is_read_in_four_minutes() -> None:
    assert len(README.splitlines()) <= 230


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(
        re.findall(r"\bmake ([a-z][a-z-]+)", "\n".join(commands()) + " ".join(re.findall(r"`([^`\n]*)`", EVERYTHING)))
    )
    assert {"demo", "test"} <= named <= targets


def test_every_test_named_as_evidence_exists() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", EVERYTHING)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def layout() -> Iterator[tuple[Path, str]]:
    """The names under "Where things go" that end in ``/`` or ``.py``, each with the folder of its line or block."""
    block = section("Where things go").split("```")[1].partition("\n")[2]
    parents: list[tuple[int, Path]] = [(-1, ROOT)]
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        while parents[-1][0] >= indent:
            parents.pop()
        for name in re.findall(r"(?<!\S)[\w./*-]+(?:/|\.py)(?=[\s,;]|$)", line):
            yield parents[-1][1], name
            if name.endswith("/") and line.lstrip().startswith(name):
                parents.append((indent, parents[-1][1] / name))


def test_the_layout_names_every_folder_and_what_it_names_exists() -> None:
    named = set()
    for folder, name in layout():
        places = {path for parent in (folder, folder.parent, ROOT) for path in parent.glob(name)}
        assert places, f"{folder.relative_to(ROOT)}/{name}"
        named |= {path.relative_to(ROOT) for path in places}
    packages = ("neurosig", "distill", "figures")
    present = {path.parent.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py")}
    assert present <= named, sorted(map(str, present - named))


def test_the_memory_table_is_the_arithmetic() -> None:
    terms = memory.gigabytes(memory.Arithmetic())
    table = {
        line.split("|")[1].strip(): line.split("|")[2:5]
        for line in section("Memory").splitlines()
        if line.startswith("| ")
    }

    def cells(name: str) -> list[float]:
        return [float(cell) for cell in next(row for head, row in table.items() if head.startswith(name))]

    embeddings = 2 * 151_936 * 2560 / 1e9
    decoder = terms["weights"] - embeddings
    for name, expected in {
        "weights": [terms["weights"]] * 2 + [embeddings + decoder / 8],
        "adapter, gradient": [terms["adapter, gradient, Adam"]] * 2 + [terms["adapter, gradient, Adam"] / 8],
        "sampling: the weights": [0, 0, 7 / 8 * decoder],
        "sampling: keys": [terms["sampling: keys and values"] / ranks for ranks in (1, 8, 8)],
        "`--dev-questions`": [terms["measuring: keys and values"] * rows / 256 for rows in (256, 64, 64)],
        "learning: student's": [terms["learning: student's activations"]] * 3,
        "learning: the same": [terms["learning: with --gradient-checkpointing"]] * 3,
        "learning: teacher's": [terms["learning: teacher's keys and values"]] * 3,
        "loss: two": [terms["loss: two chunks of logits"]] * 3,
    }.items():
        assert cells(name) == pytest.approx(expected, abs=0.06), name


def test_what_screening_buys_is_the_committed_table() -> None:
    """Every number with an interval in that section is one of the table's."""
    text = section("Sample where it is worth it")
    with (FIGURE_DATA / "screening.csv").open(newline="") as handle:
        rows = [[row[name] for name in ("value", "low", "high")] for row in csv.DictReader(handle) if row["low"]]
    numbers = [[float(number) for number in row] for row in rows]
    named = re.findall(r"(\d*\.\d+) \[(\d*\.\d+), (\d*\.\d+)\]", text)
    assert len(named) >= 8
    for found in named:
        digits = len(found[0].partition(".")[2])
        wanted = [f"{float(number):.{digits}f}" for number in found]
        assert any([f"{number:.{digits}f}" for number in row] == wanted for row in numbers), found


def test_what_the_published_selectors_select_is_the_committed_table() -> None:
    text = words(section("What published selectors select"))
    table = pd.read_csv(FIGURE_DATA / "selectors.csv")
    table = table[table["model"] == "smollm2-135m"].drop(columns=["model", "questions"])
    strict, lenient = (table[table["grading"] == grading].drop(columns="grading") for grading in GRADINGS)
    assert strict.to_numpy().tolist() == lenient.to_numpy().tolist() and set(strict["asked"]) == {60}
    rows = strict.set_index("selector")
    named = re.findall(r"(-?\.\d+) \[(-?\.\d+), (-?\d?\.\d+)\]", text)
    wanted = [rows.loc[name, ["student", "student_low", "student_high"]] for name in ("probe", "votes", "published")]
    wanted += [rows.loc["inflow", ["student", "student_low", "student_high"]]]
    wanted += [rows.loc[name, ["balance", "balance_low", "balance_high"]] for name in ("canon", "u-opsd")]
    assert [[float(one) for one in found] for found in named] == [[round(v, 2) for v in row] for row in wanted]
    assert rows.loc["consistency", "student_low"] == 1
    assert (rows["balance_low"] <= 0).all() and set(rows.index[rows["balance_high"] < 0]) == {"canon", "u-opsd"}


def test_what_scaling_neurons_does_is_in_the_committed_tables() -> None:
    """Every number with an interval in that section is a change, a difference or a value of one of the two runs."""
    text = section("Do the located neurons cause anything?")
    rows: list[dict[str, str]] = []
    for name in ("dose_response.csv", "dose_response_pilot.csv"):
        with (FIGURE_DATA / name).open(newline="") as handle:
            rows += csv.DictReader(handle)
    cells = [
        [row[f"{name}{end}"] for end in ("", "_low", "_high")] for row in rows for name in ("change", "difference")
    ]
    known = {tuple(round(float(number), 3) for number in cell) for cell in cells if cell[0]}
    named = re.findall(r"([+-]\.\d+) \[(-?\.\d+), (-?\.\d+)\]", text)
    assert len(named) >= 8
    assert {tuple(float(number) for number in found) for found in named} <= known


def test_what_we_found_is_in_the_tables_of_the_grid() -> None:
    """Every number with an interval on the front page and in its long form is a finding or a change of a method."""
    findings, methods = (pd.read_csv(FIGURE_DATA / f"{name}.csv") for name in ("findings", "methods"))
    tested = findings[["estimate", "low", "high"]].to_numpy().tolist()
    rows = [*tested, *methods[["delta", "low", "high"]].to_numpy().tolist()]
    known = [row for low in rows for row in (low, [-low[0], -low[2], -low[1]])]
    number = r"([+-]?\d*\.\d+)"
    for text in (section("What we found"), section("What the evidence says").partition("| question |")[2]):
        named = re.findall(rf"{number} (?:points )?(?:of Avg@8 )?\[{number}, {number}\]", words(text))
        assert len(named) >= 5
        for found in named:
            digits = len(found[0].partition(".")[2])
            stated = [float(one) for one in found]
            assert any(np.allclose(stated, row, rtol=0, atol=0.51 * 10**-digits) for row in known), found


def test_what_the_neurons_say_is_the_committed_report() -> None:
    text = words(section("What the neurons say").partition("- **Forty neurons**")[0])
    table = pd.read_csv(FIGURE_DATA / "signal_report.csv")
    columns = ("auroc", "over_vote", "over_outputs")
    rows = {
        tuple(f"{row[f'{name}{end}']:.3f}" for end in ("", "_low", "_high"))
        for name in columns
        for row in table.to_dict("records")
    }
    named = re.findall(r"([+-]?\.\d+) \[(-?\.\d+), (-?\.\d+)\]", text)
    assert len(named) == 6 and {tuple(f"{float(one):.3f}" for one in found) for found in named} <= rows
    scores = table[(table["kind"] == "neuron") & (table["level"] == "question")]
    assert len(scores) == 5 and (scores["over_vote_low"] <= 0).all()


def test_what_contexts_do_is_the_committed_table() -> None:
    text = words(section("What the neurons say").partition("- **A context helps by")[2].partition("- **")[0])
    table = pd.read_csv(FIGURE_DATA / "context_policies.csv").set_index("policy")
    for policy in ("none", "random", "random_within_kind", "nearest"):
        assert f"{table.loc[policy, 'teacher']:.3f}".lstrip("0") in text, policy
    estimate, low, high = (table.loc["nearest", f"over_kind{end}"] for end in ("", "_low", "_high"))
    assert f"{estimate:.3f} [{low:.3f}, {high:.3f}]".replace("0.", ".") in text
    assert f"For the {table['n'].max()} questions" in text


def test_what_the_organism_shows_is_the_committed_study() -> None:
    text = words(section("A model whose truth is known")).partition("`--preset organism`")[0]
    table = pd.read_csv(FIGURE_DATA / "organism.csv")
    rows = {tuple(f"{number:.3f}" for number in row) for row in table[["estimate", "low", "high"]].dropna().to_numpy()}
    named = re.findall(r"([+-]?\d?\.\d+) \[(-?\d?\.\d+), (-?\d?\.\d+)\]", text)
    assert len(named) == 6 and {tuple(f"{float(one):.3f}" for one in found) for found in named} <= rows


def test_what_is_located_over_kinds_is_the_committed_record() -> None:
    record = json.loads((FIGURE_DATA / "located_over_kinds.json").read_text())
    text = section("What the neurons say").partition("- **Over twelve kinds")[2].partition("\n- **")[0]
    question, _, kind, domain = record["auroc"]
    stated = [question["auroc"], question["null"], kind["auroc"], domain["auroc"]]
    stated += [row["within"] for row in (question, kind, domain)]
    assert re.findall(r"\.\d{3}", text) == [f"{value:.3f}".lstrip("0") for value in stated]
    assert {row["p_within"] for row in (question, kind, domain)} == {0.05}
    assert record["power"]["recall"]["0.5"] == 1 and record["power"]["recall"]["0.25"] == pytest.approx(0.6)
    with (FIGURE_DATA / "located_over_kinds.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    firm = sum(float(row["stability_left_out"]) >= 0.75 for row in rows)
    assert (len(rows), sum(row["survives"] == "True" for row in rows), firm) == (5, 2, 1)
    assert "108 agree, 461 split" in text and record["findings"][0].startswith("108 questions agree and 461 split")


def test_where_locating_fails_is_the_committed_table() -> None:
    with (FIGURE_DATA / "planted_neurons.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))

    def total(data: str, column: str) -> int:
        return sum(int(row[column]) for row in rows if row["data"] == data)

    text = words(section("What the neurons say").partition("**where it fails**")[2])
    nearly = "half, nearly decisive"
    for sentence in (
        f"{total('no decoys', 'stable_planted')} of 40 planted neurons are stable",
        f"are located too ({total('correlated', 'stable_decoys')});",
        f"({total('no decoys', 'left_out_planted')} remain without decoys)",
        f"are located every time ({total('length', 'stable_decoys')} of 8)",
        f"leave {total(nearly, 'stable_planted')} planted among {total(nearly, 'stable')} stable neurons",
    ):
        assert sentence in text
    assert total("correlated", "left_out_decoys") == total(nearly, "both") == 0
    assert 2 * total("length", "both_decoys") == total("length", "stable_decoys")


def test_numbers_of_the_signal_search_are_those_of_its_table() -> None:
    """Each interval is one of the table's; as many tests add as it says, and the rule keeps the default."""
    text = words(section("Looking for more, honestly"))
    table = pd.read_csv(FIGURE_DATA / "signal_search.csv")
    known = [table[[name, f"{name}_low", f"{name}_high"]].dropna() for name in ("auroc", "over_vote", "over_default")]
    rows = {tuple(f"{number:.3f}" for number in row) for part in known for row in part.to_numpy()}
    named = re.findall(r"([+-]?\.\d+)\s\[(-?\.\d+), (-?\.\d+)\]", text)
    assert len(named) == 6
    for found in named:
        assert tuple(f"{float(number):.3f}" for number in found) in rows, found
    tried = table[(table["role"] == "tried") & table["over_vote_p"].notna()]
    counts = {}
    for stage, tests in tried.groupby("stage"):
        own = [adds(tests, base) for base in ("over_vote", "over_outputs")]
        counts[stage] = len(tests), *(int(one.sum()) for one in own)
    assert counts == {"search": (640, 2, 0), "confirmation": (60, 0, 0)}
    assert "of 640 tests 2 add" in text and "none of 60 tests adds" in text
    assert f"{table.loc[table['stage'] == 'search', 'variant'][table['role'] == 'tried'].nunique()} annotation" in text
    mean = table[(table["task"] == "mean over the tasks") & (table["stage"] == "confirmation")]
    mean = mean[(mean["role"] == "tried") & (mean["event"] == "majority is right")]
    assert (mean["over_default_low"] < 0).all() and "**The defaults stay.**" in text
    assert [ExportConfig.positions, ExportConfig.probe_labels, ExportConfig.probe_values] == [
        "answer",
        "agreement",
        "contribution",
    ]
