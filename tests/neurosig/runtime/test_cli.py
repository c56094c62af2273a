from __future__ import annotations

import errno
import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from neurosig.__main__ import COMMANDS
from neurosig.runtime.arguments import parse_config
from neurosig.runtime.cli import CommonConfig, PhaseTimer, printable, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import AtLeast


@dataclass(kw_only=True)
class Config(CommonConfig):
    """A command."""

    model: str
    """The model."""
    steps: Annotated[int, AtLeast(1)] = 10
    """Steps."""
    names: tuple[str, ...] = ()
    """Names."""
    colour: Literal["red", "blue"] = "red"
    """Colour."""
    resume: bool = False
    """Resume."""


PRESETS = {"small": {"model": "tiny", "steps": 3}}


def parse(*argv: str) -> Config:
    return parse_config(Config, presets=PRESETS, prog="command", argv=list(argv))


def run(main: Callable[[Config], None], *argv: str) -> int:
    return run_command(Config, main, presets=PRESETS, prog="command", argv=["--model", "m", *argv])


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('steps = 5\nnames = ["a", "b"]\n')
    assert parse("--model", "m").steps == 10
    assert (parse("--preset", "small").steps, parse("--preset", "small").model) == (3, "tiny")
    config = parse("--preset", "small", "--config", str(file))
    assert (config.steps, config.names, config.model) == (5, ("a", "b"), "tiny")
    assert parse("--preset", "small", "--config", str(file), "--steps", "7").steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 1", r'c\.toml: step: unknown option \(did you mean "steps"\?\)'),
        ('steps = "8"', r"c\.toml: steps: expected int, got '8'"),
        ("steps = true", r"c\.toml: steps: expected int, got True"),
        ("steps =", r"c\.toml: invalid TOML"),
    ],
)
def test_a_bad_config_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse("--config", str(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--preset", "smal"), r'--preset smal: no such preset \(did you mean "small"\?\); have small'),
        ((), r"--model is required: The model\."),
        (("--model", "m", "--stepz", "3"), r"--stepz: no such option \(did you mean --steps\?\)"),
        (("--model", "m", "--steps", "many"), r"--steps many: expected int"),
        (("--model", "m", "--steps=many"), r"--steps many: expected int"),
        (("--model", "m", "--steps"), r"--steps: expected int"),
        (("--model", "m", "--steps", "0"), r"--steps: expected at least 1, got 0"),
        (("--model", "m", "--colour", "rot"), r"--colour rot: expected one of red, blue"),
        (("--model", "m", "--steps", "3", "4"), r"4: one word too many; see --help"),
        (("word", "--model", "m"), r"word: one word too many; see --help"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        parse(*argv)
    assert run_command(Config, lambda config: None, presets=PRESETS, prog="command", argv=argv) == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_a_value_out_of_bounds_in_a_config_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("steps = 0")
    with pytest.raises(UserError, match=r"^--steps: expected at least 1, got 0$"):
        parse("--model", "m", "--config", str(tmp_path / "c.toml"))


def test_of_several_processes_the_first_says_what_is_wrong_with_their_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: Config) -> None:
        raise UserError("its own fault")

    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    for rank, count in ("0", 1), ("1", 0):
        monkeypatch.setenv("RANK", rank)
        assert run(lambda config: None, "--stepz") == 2
        assert capsys.readouterr().err.count("error: --stepz: no such option") == count
        assert run(fails) == 2
        assert capsys.readouterr().err == "error: its own fault\n"
        assert run(interrupted) == 130
        assert capsys.readouterr().err.count("interrupted") == count


def test_the_help_page_lists_required_options_first_and_presets_last(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    page = capsys.readouterr().out
    assert not stop.value.code
    places = [page.index(text) for text in ("A command.", "Required:", "--model", "Options:", "--steps", "Common:")]
    assert places == sorted(places)
    assert "Steps. (default: 10)" in page and "--resume, --no-resume" in page and "{red, blue}" in page
    assert page.endswith('small       model = "tiny", steps = 3\n')
    assert max(map(len, page.splitlines())) <= 100
    with pytest.raises(SystemExit):
        parse("--preset", "small", "--help")
    assert "Required:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (UserError("the file is gone"), 2, "error: the file is gone\n"),
        (KeyboardInterrupt(), 130, "interrupted; rerun with --resume\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "error: out/x: No space left on device\n"),
        (
            MemoryError("no"),
            2,
            "error: out of memory: no; lower the batch size (--batch-rows, in training --micro-batch-size), "
            "then continue with --resume\n",
        ),
        (ZeroDivisionError("oh"), 1, "error: internal: ZeroDivisionError: oh (rerun with --debug for the traceback)\n"),
        (UserError("two\nlines \x1b[31m"), 2, "error: two lines \\x1b[31m\n"),
    ],
)
def test_faults_are_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], fault: BaseException, code: int, line: str
) -> None:
    def main(config: Config) -> None:
        raise fault

    assert run(main) == code
    assert capsys.readouterr().err == line
    assert run(main, "--debug") == code
    assert "Traceback" in capsys.readouterr().err


def test_a_command_that_works_returns_0(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    assert run(seen.append, "--steps", "4") == 0
    assert seen[0].steps == 4
    assert capsys.readouterr().err == ""


def test_model_text_is_shown_harmlessly() -> None:
    assert printable("a\x1b[2Jb\nc\u202ed") == "a\\x1b[2Jb\\nc\\u202ed"
    assert printable("naïve 你好 🙂") == "naïve 你好 🙂"


@pytest.mark.parametrize(
    "module",
    [
        *("neurosig.export", "neurosig.check", "neurosig.report", "neurosig.intervene", "neurosig.verify"),
        *("neurosig.screen", "neurosig.show", "neurosig.locate", "figures.experiments.screening"),
        *("distill.train", "distill.evaluate", "distill.compare", "figures", "figures.grid"),
    ],
)
def test_help_teaches(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m {module} ")
    assert f"Example:\n  python -m {module} " in done.stdout
    assert "--preset" in done.stdout and "--debug" in done.stdout
    assert "torch" not in done.stderr and "\x1b" not in done.stdout
    assert all(line.startswith(" ") for line in done.stdout.split("\n\n")[-1].splitlines()[1:])


def test_the_package_lists_its_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "neurosig"], capture_output=True, text=True, check=True)
    rows = [line.split("  ")[0].split() for line in done.stdout.splitlines()]
    assert [row[-1] for row in rows] == [f"neurosig.{name}" for name in COMMANDS]
    assert all(importlib.util.find_spec(row[-1]) for row in rows)


def test_the_phase_table_shows_shares_and_rates_of_what_ended_well(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="neurosig")
    with PhaseTimer() as timer:
        for _ in range(2):
            with timer.phase("sample"):
                time.sleep(0.05)
            timer.add_tokens("sample", 30)
        with timer.phase("write"):
            pass
    table = caplog.messages[-1].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["sample", "write", "total"]
    rate = int(re.search(r"(\d+) tokens/s", table[1])[1])  # type: ignore[index]
    assert rate == pytest.approx(60 / timer.seconds["sample"], abs=1) and 300 < rate <= 600
    assert int(re.search(r"(\d+)%", table[1])[1]) > 80  # type: ignore[index]
    assert "tokens/s" not in table[2] + table[3]
    caplog.clear()
    with pytest.raises(UserError), PhaseTimer():
        raise UserError("no")
    assert not caplog.messages
