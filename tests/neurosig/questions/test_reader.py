"""The reader of completions: parsers of the user's own, their records, and agreement with an earlier vote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.sampling.rollouts import Rollout

QUESTION = Question("q7", "d", "How is it?", answer="gold", aliases=("au",))
FIRST_WORD = """\
def parse(text, question, answer_format, *, finish_reason, prompt_opens_thought):
    assert (question.answer, question.aliases, answer_format) == (None, (), "auto")
    return None if finish_reason == "length" else "The  " + text.split()[0] + "!"
"""


def rollout(text: str, reason: str = "stop", number: int = 0) -> Rollout:
    return Rollout("q7", number, text, (5, 2), reason)  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_parser_in_the_current_folder_replaces_ours(here: Path) -> None:
    (here / "my_parser.py").write_text(FIRST_WORD)
    reader = AnswerReader(answer_parser="my_parser:parse")
    reading = reader.read([rollout("GOLD of course"), rollout("lead", "length"), rollout("gold")], QUESTION)
    assert reading.raw_answers == reading.answers == ("gold", None, "gold")
    assert (reading.vote.winner, reading.vote.count, reading.vote.n) == ("gold", 2, 3)
    assert reader.record()["answer_parser_sha256"] == sha256_file(here / "my_parser.py")
    assert AnswerReader.from_record(reader.record()) == reader


def test_a_parser_in_a_package_may_use_its_neighbours(here: Path) -> None:
    (here / "tools").mkdir()
    (here / "tools" / "__init__.py").write_text("")
    (here / "tools" / "words.py").write_text("def first(text):\n    return text.split()[0]\n")
    code = (
        "from dataclasses import dataclass\nfrom .words import first\n\n@dataclass\nclass Parser:\n    n: 'int' = 1\n"
    )
    code += "    def __call__(self, text, *rest, **options):\n        return first(text)\n\nparse = Parser()\n"
    (here / "tools" / "parsers.py").write_text(code)
    assert AnswerReader(answer_parser="tools.parsers:parse").extract("red blue", "stop", QUESTION) == "red"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("my_parser", "", r"expected MODULE:FUNCTION, such as my_functions:name for a file my_functions\.py here"),
        ("my_parser.py:", "", r"expected MODULE:FUNCTION"),
        ("no_such_parser:parse", "", r"no module no_such_parser in .* or among the installed packages"),
        ("no_such.parser:parse", "", r"no module no_such\.parser in"),
        ("math:sqrt", "", r"module math (has no source file|in .* or among)"),
        ("my_parser:parse", "", r"my_parser\.py has no function parse"),
        ("my_parser:parse", "parse = 'auto'", r"parse in .*my_parser\.py is no function, but a str"),
        ("my_parser:parse", "1 / 0", r"my_parser\.py fails: ZeroDivisionError: division by zero"),
        ("my_parser:parse", "def parse(", r"my_parser\.py fails: SyntaxError"),
    ],
)
def test_what_is_no_parser_is_named(here: Path, name: str, code: str, message: str) -> None:
    (here / "my_parser.py").write_text(code)
    with pytest.raises(UserError, match=message) as error:
        AnswerReader(answer_parser=name)
    assert "\n" not in str(error.value) and "--answer-parser" in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError(text)", r"KeyError: 'b'"),
        ("return None if text == 'a' else 4.0", r"expected a text or None, got 4\.0 \(float\)"),
        ("return None if text == 'a' else ['b']", r"expected a text or None, got \['b'\] \(list\)"),
    ],
)
def test_a_parser_that_fails_names_question_and_rollout(here: Path, body: str, message: str) -> None:
    (here / "my_parser.py").write_text(
        f"def parse(text, *args, **options):\n    if text == 'a': return 'a'\n    {body}\n"
    )
    with pytest.raises(UserError, match=r'^--answer-parser my_parser:parse: question "q7", rollout 1: ' + message):
        AnswerReader(answer_parser="my_parser:parse").read([rollout("a"), rollout("b")], QUESTION)


def test_a_parser_that_changed_is_refused_with_both_hashes(here: Path) -> None:
    path = here / "my_parser.py"
    hashes, answers, records = [], [], []
    for answer in ("red", "tan"):  # same size, same second: bytecode of the first would still count as current
        path.write_text(f"def parse(*args, **options):\n    return '{answer}'\n")
        reader = AnswerReader(answer_parser="my_parser:parse")
        hashes.append(sha256_file(path))
        answers.append(reader.extract("", "stop", QUESTION))
        records.append(reader.record())
    assert answers == ["red", "tan"]
    with pytest.raises(UserError, match=rf"my_parser:parse: .*{hashes[1]}, on record is {hashes[0]}"):
        AnswerReader.from_record(records[0])
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"no module my_parser in {here}")):
        AnswerReader.from_record(records[0])


@pytest.mark.parametrize("packages", [(), ("deep",), ("deep", "deep/er")])
def test_a_parser_in_folders_with_and_without_init(here: Path, packages: tuple[str, ...]) -> None:
    folder = here / "deep" / "er"
    folder.mkdir(parents=True)
    (folder / "own.py").write_text("def parse(*args, **options):\n    return 'red'\n")
    for package in packages:
        (here / package / "__init__.py").touch()
    assert AnswerReader(answer_parser="deep.er.own:parse").extract("", "stop", QUESTION) == "red"


def test_a_further_completion_agrees_with_an_earlier_vote() -> None:
    reader = AnswerReader(vote_merge="exact")
    answers = ("asia", "asia", None, "europe")
    assert reader.agrees(rollout("Answer: Asia"), QUESTION, answers, "asia")
    assert not reader.agrees(rollout("Answer: Europe"), QUESTION, answers, "asia")
    assert not reader.agrees(rollout(""), QUESTION, answers, "asia")
    assert not reader.agrees(rollout("Answer: Asia"), QUESTION, (None, None), None)


def test_answers_of_another_version_of_the_parser_are_known() -> None:
    """A comparison refuses them, verify skips them."""
    from distill.evaluate import EvaluateConfig
    from neurosig.runtime.recorded import unlike

    reader = AnswerReader()
    record = reader.record()
    older = {**record, "parser_sha256": "0" * 64}
    assert reader.is_of(record) and not reader.is_of(older) and AnswerReader.from_record(older) == reader
    model = {"id": "m", "weights": {}, "dtype": "float32", "tokenizer_sha256": "t", "chat_template_sha256": None}
    same = {"config": {"scoring": "sampling"}, "model": model, "adapter_sha256": None, "questions_sha256": "q"}
    pairs = unlike(EvaluateConfig, {**same, "answers": record}, {**same, "answers": older})
    assert pairs == {"parser": (record["parser_sha256"], "0" * 64)}
