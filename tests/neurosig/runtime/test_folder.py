from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from neurosig.export import main as export
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import output_folder
from neurosig.runtime.recorded import BEGUN, RUN
from tests.support.flow import export_config, save_tiny, write_questions


def hold(out: Path, *, resume: bool = False, overwrite: bool = False):  # type: ignore[no-untyped-def]
    return output_folder(out, finished="done", owned=("done", "part*"), resume=resume, overwrite=overwrite)


def test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from neurosig.runtime.folder import output_folder
with output_folder(Path({str(tmp_path / "out")!r}), finished="done", owned=(), resume=False, overwrite=False):
    print("locked", flush=True)
    sys.stdin.read()
"""
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert first.stdout is not None and first.stdin is not None
    assert first.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=rf"in use by pid {first.pid} on {re.escape(socket.gethostname())}; wait"),
        hold(tmp_path / "out", resume=True),
    ):
        pass
    first.kill()  # the lock is freed even so
    first.wait()
    with hold(tmp_path / "out", resume=True) as complete:
        assert not complete
    first.stdin.close()
    first.stdout.close()


def test_earlier_runs_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold(out) as complete:
        assert not complete
        (out / "part1").write_text("1")
    with pytest.raises(UserError, match="holds an earlier run; give --resume"), hold(out):
        pass
    with hold(out, resume=True) as complete:
        assert not complete
        (out / "done").write_text("")
    with hold(out, resume=True) as complete:
        assert complete
    (out / "mine").write_text("keep")
    with hold(out, overwrite=True) as complete:
        assert not complete
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="exclude each other"), hold(out, resume=True, overwrite=True):
        pass


def test_nothing_is_left_behind_by_a_run_that_failed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a" / "out"):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "out").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out: is a file; give a folder"), hold(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match="cannot write there"), hold(tmp_path / "out" / "below"):
        pass


def test_a_run_killed_after_its_last_write_gets_its_record_when_it_is_resumed(tmp_path: Path) -> None:
    config = export_config(tmp_path, save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl"))
    export(config)
    out = config.out
    record = json.loads((out / RUN).read_bytes())["options"]
    (out / BEGUN).write_text(json.dumps({"options": record}))
    (out / RUN).unlink()
    export(replace(config, resume=True))
    assert json.loads((out / RUN).read_bytes())["options"] == record
    assert not (out / BEGUN).exists()
