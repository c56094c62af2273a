from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout, RolloutLog, read_external_rollouts

KEY = {"seed": 0, "model": "m"}


def group(name: str, k: int = 2) -> list[Rollout]:
    return [Rollout(name, index, f"text ü {index}", (5, 6, 2), "stop", -0.25, 1.5) for index in range(k)]


def test_a_log_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "log", KEY)
    log.append(group("a"))
    log.append(group("b"))
    assert RolloutLog(tmp_path / "log", KEY).groups == {"a": group("a"), "b": group("b")}


def test_a_torn_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "log", KEY)
    log.append(group("a"))
    log.append(group("b"))
    path = tmp_path / "log"
    for cut in (1, 30):
        path.write_bytes(path.read_bytes()[:-cut])
        again = RolloutLog(path, KEY)
        assert again.groups == {"a": group("a")}
        again.append(group("b"))
        assert RolloutLog(path, KEY).groups == {"a": group("a"), "b": group("b")}


def test_the_bar_shows_questions_and_tokens_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    RolloutLog(tmp_path / "log", KEY).append(group("a"))
    log = RolloutLog(tmp_path / "log", KEY)
    start = time.perf_counter()

    def draw() -> Iterator[list[Rollout]]:
        for name in ("b", "c"):
            time.sleep(0.15)
            yield group(name, k=10)

    assert list(log.extend(draw(), total=3, desc="sample")) == ["a", "b", "c"]
    least = 60 / (time.perf_counter() - start)
    shown = re.findall(r"sample:.* (\d)/3 .* (\d+) tokens/s", terminal.getvalue())
    assert shown[-1][0] == "3" and least - 1 <= int(shown[-1][1]) <= 60 / 0.3  # the earlier question is not counted


def test_a_log_of_another_run_is_never_continued(tmp_path: Path) -> None:
    RolloutLog(tmp_path / "log", KEY)
    expected = r"differ from the interrupted run: extra \(none before, 2 now\), seed \(0 before, 1 now\); use the same"
    with pytest.raises(UserError, match=f"cannot resume, these {expected}"):
        RolloutLog(tmp_path / "log", {**KEY, "seed": 1, "extra": 2})


@pytest.mark.parametrize("line", ["", "{}", '{"key": {"seed": 0, "model": "m"}}\n[{"text": 1}]', "\x00\x01"])
def test_a_damaged_log_is_never_continued(tmp_path: Path, line: str) -> None:
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(UserError, match="log: damaged, so it cannot be resumed"):
        RolloutLog(tmp_path / "log", KEY)
    assert (tmp_path / "log").read_text() == line + "\n"


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Ids below 10 are special."""
    return "".join(chr(i) if i >= 10 else "" if skip_special_tokens else f"<{i}>" for i in ids)


def read(path: Path, ids: set[str], eos: tuple[int, ...] = (2,)) -> dict[str, list[Rollout]]:
    return read_external_rollouts(path, encode, decode, eos, 0xFFFE, ids)


def test_external_rollouts_are_encoded_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = [
        {"question_id": "a", "text": "hi"},
        {"question_id": "a", "text": "ho", "finish_reason": "length"},
        {"question_id": "a", "text": ""},
        {"question_id": "b", "text": "AB", "completion_ids": [65, 66]},
        {"question_id": "b", "text": "A<3>", "token_ids": [65, 3], "logprobs": None},
        {"question_id": "b", "text": " A B", "completion_ids": [65, 66], "finish_reason": "length"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = read(path, {"a", "b"}, (2, 3))
    assert [r.completion_ids for r in groups["a"]] == [(104, 105, 2), (104, 111), (2,)]
    assert [r.completion_ids for r in groups["b"]] == [(65, 66, 2), (65, 3), (65, 66)]
    assert [r.completion_ids_without_eos for r in groups["b"]] == [(65, 66), (65,), (65, 66)]
    assert [r.rollout_id for r in groups["b"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"r\.jsonl:2: invalid JSON"),
        ("[1]", r"r\.jsonl:2: expected an object, got list"),
        ('{"question_id": "a"}', r"r\.jsonl:2: text: expected a string, got null"),
        ('{"question_id": 3, "text": "x"}', r"r\.jsonl:2: question_id: expected a string, got 3"),
        ('{"question_id": "a", "text": "x", "finish_reason": "eos"}', r"r\.jsonl:2: finish_reason: expected"),
        ('{"question_id": "a", "text": "x", "completion_ids": [-1]}', r"r\.jsonl:2: completion_ids: expected"),
        (
            '{"question_id": "a", "text": "x", "completion_ids": "ab"}',
            r"r\.jsonl:2: completion_ids: expected .*, got \"ab\"",
        ),
        ('{"question_id": "a", "text": "x", "completion_ids": 7}', r"r\.jsonl:2: completion_ids: expected .*, got 7"),
        ('{"question_id": "a", "text": "x", "completion_ids": [true]}', r"r\.jsonl:2: completion_ids: expected"),
        ('{"question_id": "a", "text": "x\\ud800"}', r"r\.jsonl:2: text: a lone surrogate at character 1"),
        ('{"question_id": "a", "text": "", "finish_reason": "length"}', r"r\.jsonl:2: an empty completion"),
        (
            '{"question_id": "a", "text": "x"}',
            r'r\.jsonl:3: question "b" has 1 rollouts, "a" on line 1 has 2; every question needs the same number',
        ),
        (
            '{"question_id": "a", "text": "x", "completion_ids": [121]}',
            r'r\.jsonl:2: completion_ids: they decode to "y", the text is "x"; give the ids of this text',
        ),
        ('{"question_id": "a", "text": "", "token_ids": [65, 2]}', r'r\.jsonl:2: token_ids: they decode to "A", the'),
        (
            '{"question_id": "a", "text": "x", "completion_ids": [65535]}',
            "completion_ids: token id 65535, but the model has",
        ),
    ],
)
def test_a_malformed_external_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"question_id": "a", "text": "x"}\n' + line + '\n{"question_id": "b", "text": "x"}\n')
    with pytest.raises(UserError, match=message):
        read(path, {"a", "b"})


def test_a_question_without_rollouts_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"question_id": "a", "text": "x"}\n')
    with pytest.raises(UserError, match='no rollouts for 1 of 2 questions, the first is "b"'):
        read(tmp_path / "r.jsonl", {"a", "b"})
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent.jsonl", {"a"})


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hi there", [*encode("Hi there"), 2]),
        ("Hi  there\n", [*encode(" Hi there"), 2]),
        ("Hi", [*encode("Hi"), 5, 2]),
        ("Hi<5><2>", [*encode("Hi"), 5, 2]),
        ("Hi<5>", [*encode("Hi"), 5, 2]),
        ("Hi", encode("Hi\ufffd")),
        ("e\u0301", encode("\u00e9")),
    ],
    ids=["end token", "spaces", "special tokens", "with them", "without the end token", "half a character", "NFD"],
)
def test_texts_that_decoders_write_differently_are_the_same(tmp_path: Path, text: str, ids: list[int]) -> None:
    line = {"question_id": "a", "text": text, "completion_ids": ids, "finish_reason": "stop" if 2 in ids else "length"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    assert read(tmp_path / "r.jsonl", {"a"})["a"][0].completion_ids == tuple(ids)
