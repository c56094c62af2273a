"""The published protocols: their questions as files, the grid's presets, and INFLOW's table next to our own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from figures import protocols
from figures.draw.inflow_table import PUBLISHED, page, published
from figures.grid.__main__ import main as run_grid
from figures.grid.cells import Try, trained_cells, untrained_cells
from figures.grid.config import PRESETS, GridConfig
from figures.grid.processes import CONFIGS
from figures.grid.table_text import markdown
from figures.grid.tables import METRICS, Layout, matrix_table, plain
from figures.protocols import OVERALL, PROTOCOLS, Pool, ProtocolsConfig, main
from neurosig.questions.load import load_questions
from neurosig.runtime.arguments import parse_config
from neurosig.runtime.cli import command_words
from neurosig.runtime.errors import UserError
from tests.support.exports import write_lines
from tests.support.flow import WORDS, save_tiny
from tests.support.parsers import UNCUT

SHARES = {"math": 0.2, "natural_science": 0.4, "humanities_social": 0.4}


def write_pool(path: Path, n: int, kind: str = "math") -> Path:
    records = [
        {"id": f"{path.stem}-{kind}-{i}", "domain": "other", "kind": kind, "question": f"{path.stem} {kind} {i}?"}
        | {"answer": str(i)}
        for i in range(n)
    ]
    return write_lines(path, records)


def test_inflows_overall_is_the_weighted_mean_of_its_domains() -> None:
    frame = pd.read_csv(PUBLISHED).set_index(["model", "method", "domain"])["value"].unstack()
    assert frame.shape == (4 * 7, 4)
    np.testing.assert_allclose(sum(frame[name] * share for name, share in SHARES.items()), frame[OVERALL], atol=0.061)


def test_golden_rows_of_inflows_table() -> None:
    tables = published()
    assert list(tables) == ["Qwen3-4B", "Qwen3.5-9B", "Ministral-3-8B", "Llama-3.1-8B"]
    lines = markdown(tables["Qwen3-4B"]).splitlines()
    assert lines[2] == "| base |  | 45.3 | 78.5 | 45.0 | 58.5 |"
    assert lines[-1] == "| INFLOW | overall | **51.3** (+6.0) | 79.2 (+0.7) | **46.2** (+1.2) | **60.4** (+1.9) |"
    neuron = "| N-OPSD (published reading) | overall | 23.7 (-3.0) | **79.0** (+0.8) | 38.8 (-0.4) | 51.9 (-0.4) |"
    assert neuron in markdown(tables["Llama-3.1-8B"])


def test_our_rows_are_followed_by_those_of_all_four_models() -> None:
    domains = (OVERALL, *SHARES)
    base = dict.fromkeys(domains, 40.0)
    layout, trained = Layout(domains), {"inflow": {OVERALL: dict.fromkeys(domains, 42.0)}}
    text = page(matrix_table(plain(METRICS["avg_at_k"], layout, base, trained)))[-1]
    names = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert [name for name in names if "(INFLOW," not in name] == ["base", "INFLOW"]
    assert names[1:5] == [f"base (INFLOW, {model})" for model in published()]
    assert "| INFLOW (INFLOW, Qwen3-4B) | overall | **51.30** (+6.00) |" in text
    other = matrix_table(plain(METRICS["avg_at_k"], Layout(("a",)), {"a": 1.0}, {}))
    assert not any("next to it" in part for part in page(other))


def test_the_questions_of_a_protocol_are_divided_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pools = {name: Pool(pool.n_test // 10, pool.kinds) for name, pool in PROTOCOLS["inflow"].items()}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(write_pool(mixed, 150).read_text() + write_pool(mixed, 50, "law").read_text())
    pools["math"] = Pool(10, {str(mixed): ("math",)})
    monkeypatch.setattr(protocols, "PROTOCOLS", {"paper": {"EDU": Pool(1, {})}, "inflow": pools})
    given = tuple(f"{name}={write_pool(tmp_path / f'{name}.jsonl', 160)}" for name in list(pools)[1:])
    main(ProtocolsConfig(questions=given, out=tmp_path / "out", quiet=True))
    sizes = {name: {"test": pool.n_test, "dev": 100} for name, pool in pools.items()}
    total = {"train": 0, "dev": 0, "test": 0}
    for name, size in sizes.items():
        read = {part: load_questions(tmp_path / f"out/inflow/{name}-{part}.jsonl") for part in total}
        assert {part: len(read[part]) for part in size} == size and {one.domain for one in read["train"]} == {name}
        ids = [one.id for part in read.values() for one in part]
        assert len(ids) == len(set(ids)) == (150 if name == "math" else 160)
        assert {one.kind for part in read.values() for one in part} == {"math"}
        total = {part: total[part] + len(read[part]) for part in total}
    for part, n in total.items():
        overall = load_questions(tmp_path / f"out/inflow/{OVERALL}-{part}.jsonl")
        assert len(overall) == n and {one.domain for one in overall} == {OVERALL}
    assert "EDU left out; give its questions: --questions EDU=FILE" in caplog.text
    with pytest.raises(UserError, match="EDX: no such domain or protocol; have paper, inflow"):
        main(ProtocolsConfig(questions=("EDX=x",), out=tmp_path / "out"))
    with pytest.raises(UserError, match="EDU: 100 labelled questions; more than 101 are needed"):
        few = write_pool(tmp_path / "few.jsonl", 100)
        main(ProtocolsConfig(protocols=("paper",), questions=(f"EDU={few}",), out=tmp_path / "out"))


@pytest.mark.parametrize("name", ["paper", "inflow"])
def test_a_published_preset_names_all_its_cells(name: str) -> None:
    config = parse_config(GridConfig, presets=PRESETS, prog="grid", argv=["--preset", name, "--out", "x"])
    sources, targets, dev = (
        dict(one.split("=") for one in values) for values in (config.sources, config.targets, config.dev)
    )
    assert set(sources.values()) | set(targets.values()) | set(dev.values()) == {
        f"runs/questions/{name}/{domain}-{part}.jsonl"
        for part, domains in (("train", sources), ("dev", dev), ("test", targets))
        for domain in domains
    }
    assert set(targets) - {OVERALL} == set(PROTOCOLS[name])
    cells = trained_cells(config, sources, targets, {method: Try(1e-5, 2, 2) for method in config.methods})
    assert {cell.name for cell in cells} == {f"{m}--{s}--seed0" for m in config.methods for s in sources}
    evaluations = [cell.commands[-1].options for cell in (*cells, *untrained_cells(config, targets, dev))]
    assert {one.get("num_generations", 8) for one in evaluations} == {{"paper": 8, "inflow": 3}[name]}
    if name == "inflow":
        assert all(cell.commands[1].options["preset"] in ("published", *config.methods) for cell in cells)
        assert {cell.name for cell in untrained_cells(config, targets, dev)} == {
            "base", *(f"control-T{one}" for one in config.control_temperatures)
        }  # fmt: skip


@pytest.mark.parametrize("name", ["paper", "inflow"])
def test_commands_take_the_options_of_a_published_preset(name: str) -> None:
    config = parse_config(GridConfig, presets=PRESETS, prog="grid", argv=["--preset", name, "--out", "x"])
    source = {"a": "a.jsonl"}
    cells = trained_cells(config, source, source, {method: Try(1e-5, 2, 2) for method in config.methods})
    commands = {repr((one.module, {**one.options, "adapter": 0})): one for cell in cells for one in cell.commands}
    prompts = set()
    for command in commands.values():
        module, words = importlib.import_module(command.module), {"out": command.out, **command.options}
        kind = getattr(module, CONFIGS[command.module])
        argv = command_words(words, kind)
        parsed = parse_config(kind, presets=module.PRESETS, prog="x", argv=argv)
        thinking = "eval_thinking" if command.module == "distill.evaluate" else "student_thinking"
        prompts.add(getattr(parsed, "choice_instruction", None))
        assert getattr(parsed, thinking, False) is False, argv
    assert len(prompts - {None}) == 1  # all methods are asked alike, in export and evaluation


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("paper", "nopsd"), ("inflow", "inflow")])
def test_a_published_preset_runs_at_small_size(name: str, method: str, tmp_path: Path) -> None:
    """One method on a random model and twelve questions, with every other option of the preset."""
    save_tiny(tmp_path / "model")
    records = [
        {"id": f"q{i}", "domain": OVERALL, "question": f"Is {word} nice?", "answer": f"GOLD{i}"}
        for i, word in enumerate(WORDS[:12])
    ]
    questions = write_lines(tmp_path / "questions.jsonl", records)
    named, small = f"{OVERALL}={questions}", {"max_new_tokens": 4}
    tables: dict[str, Any] = {table: {**PRESETS[name].get(table, {}), **small} for table in ("export", "evaluate")}  # type: ignore[dict-item]
    for table in tables.values():
        table["answer_parser"] = UNCUT
    tables["export"] |= {"question_filter": "all", "keep_truncated": True, "set_size": 16, "max_context_tokens": 200}
    train = {**PRESETS[name].get("train", {}), **small, "steps": 1, "questions_per_step": 2}  # type: ignore[dict-item]
    options = {**PRESETS[name], **tables, "train": {**train, "keep_truncated": True}, "model": str(tmp_path / "model")}
    options |= {"methods": (method,), "control_temperatures": (0.5,), "quiet": True}
    options |= {"sources": (named,), "targets": (named,), "dev": (named,)}
    config = GridConfig(**options, out=tmp_path / "grid")  # type: ignore[arg-type]
    run_grid(config)
    rows = pyarrow.parquet.read_table(tmp_path / "grid" / "grid.parquet").to_pandas()
    assert set(rows["method"]) == {"base", "control", method} and set(rows["k"]) == {{"paper": 8, "inflow": 3}[name]}
