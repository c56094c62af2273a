"""``python -m neurosig.show``: the table, the JSON that other programs read, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import neurosig
from neurosig.models.load import load_model
from neurosig.runtime.cli import run_command
from neurosig.show import ShowConfig, main
from tests.support.flow import save_tiny
from tests.support.tiny import tiny_model

HOSTILE = "<script>a</script>\u202e\x1b[2J"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("show") / "model", "llama")


def show(*argv: object) -> int:
    return run_command(ShowConfig, main, presets={}, prog="python -m neurosig.show", argv=[*map(str, argv)])


def test_the_table_is_that_of_a_trace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(folder, "Is it red?", " It is.", "--top", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Traces(1 text through ")
    assert lines[1] == "Is it red?| It is."
    assert lines[2].split() == ["layer", "neuron", "contribution", "position", "token", "next_token", "effect"]
    frame = neurosig.trace(load_model(folder), ("Is it red?", " It is."), progress=False).to_frame(3)
    found = [line.split()[:3] for line in lines[3:]]
    assert found == [[str(r.layer), str(r.neuron), f"{r.contribution:.4f}"] for r in frame.itertuples()]


def test_the_json_has_the_fields_that_are_described(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(folder, "Hi?", " Yo.", "--json", "--top", 2, "--positions", "0:2") == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(record) == [
        *("format", "version", "model", "adapter", "sites", "positions", "notes", "prompt", "completion"),
        *("tokens", "rows"),
    ]
    assert (record["format"], record["version"], record["model"]) == ("neurosig.show", 1, str(folder))
    assert (record["adapter"], record["sites"], record["positions"], record["notes"]) == (None, "ffn", "0:2", [])
    assert "".join(token["text"] for token in record["tokens"]) == record["prompt"] + record["completion"] == "Hi? Yo."
    assert [token["index"] for token in record["tokens"] if token["read"]] == [3, 4]
    assert len(record["rows"]) == 2
    for row in record["rows"]:
        assert list(row) == ["layer", "neuron", "contribution", "position", "token", "next_token", "effect"]
        assert row["position"] in (3, 4)
        assert all(isinstance(row[name], int) for name in ("layer", "neuron", "position"))
        assert all(isinstance(row[name], float) for name in ("contribution", "effect"))
    assert show(folder, "Hi?", "--json", "--sites", "model.layers.0.mlp", "--chat") == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["rows"][0]) == ["module", "dimension", "value"]
    assert record["tokens"][0]["text"] == "<|im_start|>"
    assert record["notes"] == ["1 of 1 texts have no completion and are read at their prompts"]


def test_the_page_stands_alone_and_text_stays_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "a" / "page.html"
    assert show(folder, HOSTILE, HOSTILE, "--html", page, "--top", 1) == 2  # no such folder; nothing is printed
    assert capsys.readouterr().out == ""
    page.parent.mkdir()
    assert show(folder, HOSTILE, HOSTILE, "--html", page, "--top", 1) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert "<script" not in text and "\u202e" not in text and "\x1b" not in text
    assert "http" not in text and "src=" not in text
    assert text.count("<tr>") == 2
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_an_adapter_is_applied(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    records = []
    for options in ((), ("--adapter", tmp_path / "adapter")):
        assert show(folder, "Hi?", " Yo.", "--json", *options) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["adapter"] is None and len(records[1]["adapter"]) == 64
    assert records[0]["rows"] != records[1]["rows"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "error: MODEL is required: Hub id"),
        (("{folder}",), "error: PROMPT is required: What the model reads first"),
        (("{folder}", "Hi", "--positions", "end"), "error: positions: expected prompt, answer"),
        (("{folder}", "Hi", "--sites", "resid"), "error: sites='resid': no such module"),
        (("{folder}", "Hi", "--top", "0"), "error: --top: expected at least 1, got 0"),
        (("{folder}", "Hi", ""), "error: text 0: an empty completion"),
        (("{folder}", "Hi", "a", "b"), "error: b: one word too many"),
        (("no/such/model", "Hi"), "error: model no/such/model"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(*(word.replace("{folder}", str(folder)) for word in argv)) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (out, len(errors)) == ("", 1)
    assert errors[0].startswith(message)
