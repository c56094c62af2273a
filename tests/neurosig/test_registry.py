"""Functions of a user's own as options: through export, report, verify, resume and reuse, beside ours."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neurosig
from neurosig.export import PRESETS, ExportConfig
from neurosig.export import main as export
from neurosig.hallucination.belief import AnswerState
from neurosig.hallucination.context_scores import TeacherSignals
from neurosig.hallucination.scores import QuestionSignals, ScoreInputs
from neurosig.manifest import read_manifest
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import CUT, SCORED
from neurosig.neurons.tracer import NeuronTracer
from neurosig.registry import _REGISTERED, KINDS, find, names
from neurosig.report.__main__ import ReportConfig
from neurosig.report.__main__ import main as report
from neurosig.runtime.arguments import parse_config
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.selection.choose import Candidate
from neurosig.selection.contexts import ContextInputs
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support import functions
from tests.support.flow import export_config, make_manifest, save_tiny, write_questions
from tests.support.functions import HERE
from tests.support.parsers import UNCUT
from tests.support.tiny import tiny_model

ALL = {
    "hallucination_score": f"{HERE}:spread",
    "question_filter": f"{HERE}:even",
    "context_policy": f"{HERE}:alike_in_length",
    "contribution": f"{HERE}:squared",
    "active_set": f"{HERE}:strongest",
}


@pytest.fixture
def registered() -> Any:
    before = dict(_REGISTERED)
    yield neurosig.register
    _REGISTERED.clear()
    _REGISTERED.update(before)


def test_every_name_of_ours_has_a_function() -> None:
    for kind, home in KINDS.items():
        for name in home.names:
            assert callable(find(kind, name).function) and find(kind, name).sha256 is None


def test_one_function_of_each_kind_decides_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(
        make_manifest(tmp_path, **ALL, answer_parser=UNCUT, more_scores=(f"{HERE}:spread", "random"))
    )
    digest = sha256_file(functions.__file__)
    assert manifest.header.functions == dict.fromkeys(ALL.values(), digest)
    assert [row.selected for row in manifest.rows] == [True, False] * 4
    assert {row.reason for row in manifest.rows} == {"selected", "rejected"}
    probe = torch.tensor([list(group) for group in _probe_scores(manifest.folder)])
    for row, scores in zip(manifest.rows, probe, strict=True):
        assert row.scores[f"{HERE}:spread"] == pytest.approx(float(scores.numpy().std()), abs=2e-6)
    costs = {row.question_id: row for row in manifest.rows}
    for row in manifest.selected:
        assert len(row.context) == 2 and all(item.similarity <= 0 for item in row.context)
        assert all(costs[item.question_id].selected for item in row.context)
    report(ReportConfig(manifest=manifest.folder, out=tmp_path / "report", quiet=True, resamples=100, permutations=0))
    assert f"{HERE}:spread" in (tmp_path / "report" / "signals.csv").read_text()
    verify(VerifyConfig(folder=manifest.folder))
    lines = capsys.readouterr().out
    assert all(f"the {kind} {name}" in lines for kind, name in _kinds().items())


def _kinds() -> dict[str, str]:
    kinds = ("score", "filter", "context", "contribution", "active_set")
    return dict(zip(kinds, ALL.values(), strict=True))


def _probe_scores(folder: Path) -> Any:
    from neurosig.neurons.signals_file import read_signals

    return read_signals(folder / "signals.safetensors").probe_scores.reshape(8, 3).tolist()


def test_a_contribution_and_an_active_set_of_ones_own_are_what_they_say() -> None:
    """Against every neuron's values at every token; the second cut leaves ten neurons."""
    model, prompts, completions = tiny_model("qwen3"), [[5, 6, 7]], [[8, 9, 10, 11]]
    squared, active = ALL["contribution"], ALL["active_set"]
    every = NeuronTracer(model, TraceConfig(score=squared, set_size=10**6)).trace(prompts, completions)
    plain = NeuronTracer(model, TraceConfig(score="magnitude", set_size=10**6)).trace(prompts, completions)
    assert not torch.allclose(every.contributions, plain.contributions)
    found = NeuronTracer(model, TraceConfig(score=squared, active=active, set_size=24)).trace(prompts, completions)
    assert found.neuron_ids.shape == (1, 10)
    mean = dict(zip(every.neuron_ids[0].tolist(), every.contributions[0].tolist(), strict=True))
    assert found.contributions[0].tolist() == pytest.approx([mean[one] for one in found.neuron_ids[0].tolist()])
    both = NeuronTracer(model, TraceConfig(score=squared, active=active, set_size=24)).trace(
        [*prompts, [5]], [*completions, [6, 7, 8, 9, 10, 11, 12]]
    )
    assert both.neuron_ids[0].equal(found.neuron_ids[0])


def test_a_registered_name_works_like_one_of_ours(tmp_path: Path, registered: Any) -> None:
    assert registered("score", "spread", functions.spread) is functions.spread
    assert names("score")[-1] == "spread"
    by_name = read_manifest(make_manifest(tmp_path, hallucination_score="spread", question_filter="neuron_only"))
    by_place = read_manifest(
        make_manifest(tmp_path, "other", hallucination_score=f"{HERE}:spread", question_filter="neuron_only")
    )
    assert [row.reason for row in by_name.rows] == [row.reason for row in by_place.rows]
    assert set(by_name.header.functions) == {"spread"}
    registered("score", "spread", functions.too_few)  # a notebook's cell that is run again
    with pytest.raises(UserError, match="spread: 1 scores for 8 questions; return one for each"):
        make_manifest(tmp_path, "third", hallucination_score="spread")


@pytest.mark.parametrize(
    ("kind", "name", "function", "message"),
    [
        ("scores", "mine", len, "kind is 'scores'; choose one of score, filter, context"),
        ("score", "Mine!", len, "name is 'Mine!'; use lower-case letters, digits and underscores"),
        ("score", "entropy", len, "entropy is a score of neurosig's own; choose another name"),
        ("score", "mine", 7, "mine is no function, but a int"),
        ("score", "mine", len, "mine has no source whose hash could be recorded"),
    ],
)
def test_what_cannot_be_registered_is_refused(
    kind: Any, name: str, function: Any, message: str, registered: Any
) -> None:
    with pytest.raises(UserError, match=message):
        registered(kind, name, function)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hallucination_score": "surprise"}, r"hallucination_score is 'surprise'; choose one of \w+, .* MODULE"),
        ({"context_policy": "far"}, "context_policy is 'far'; choose one of nearest, .*, none, or MODULE:FUNCTION"),
        ({"hallucination_score": "nowhere_at_all:f"}, "--hallucination-score nowhere_at_all:f: no module"),
        ({"question_filter": f"{HERE}:nothing"}, f"--question-filter {HERE}:nothing: .*functions.py has no function"),
        ({"hallucination_score": f"{HERE}:failing"}, f"{HERE}:failing: KeyError: 'nothing there'"),
        ({"hallucination_score": f"{HERE}:too_few"}, f"{HERE}:too_few: 1 scores for 8 questions; return one for each"),
        ({"contribution": f"{HERE}:other_parameter"}, "parameter gradient; it may name value, w_out, w_out_norm"),
        ({"context_policy": f"{HERE}:strangers"}, 'a demonstration of "nobody", which is not in the pool'),
        ({"hallucination_score": "belief_shift"}, "belief_shift reads what the teacher answers; give --teacher"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_used_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_manifest(tmp_path, **options)
    assert not (tmp_path / "manifest" / "manifest.json").exists()


def test_a_changed_source_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By resume, reuse and verify: the name alone says nothing."""
    source = Path(functions.__file__).read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    options: dict[str, Any] = {"contribution": "mine:squared", "hallucination_score": "mine:spread"}
    folder = make_manifest(tmp_path, **options)
    model, questions = tmp_path / "model", tmp_path / "questions.jsonl"
    export(export_config(tmp_path, model, questions, resume=True, **options))
    export(export_config(tmp_path, model, questions, "again", reuse=folder, **options))
    assert (tmp_path / "again" / "signals.safetensors").read_bytes() == (folder / "signals.safetensors").read_bytes()
    (tmp_path / "mine.py").write_text(source + "\n# another version\n")
    with pytest.raises(UserError, match="cannot resume, these differ"):
        export(export_config(tmp_path, model, questions, resume=True, **options))
    with pytest.raises(UserError, match="contribution_sha256"):
        export(export_config(tmp_path, model, questions, "third", reuse=folder, **options))
    capsys.readouterr()
    with pytest.raises(UserError, match="failed"):
        verify(VerifyConfig(folder=folder))
    assert "its source is not the one on record" in capsys.readouterr().out
    (tmp_path / "mine.py").unlink()
    verify(VerifyConfig(folder=folder))
    assert "no module mine" in capsys.readouterr().out


def test_an_unfinished_export_does_not_mix_two_versions_of_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traces of the first version are made again."""
    source = Path(functions.__file__).read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("neurosig.manifest.write_manifest", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(export_config(tmp_path, model, questions, contribution="mine:squared"))
    (tmp_path / "mine.py").write_text(source.replace("w_out_norm) ** 2", "w_out_norm) ** 4"))
    export(export_config(tmp_path, model, questions, contribution="mine:squared", resume=True))
    export(export_config(tmp_path, model, questions, "straight", contribution="mine:squared"))
    files = [(tmp_path / out / "signals.safetensors").read_bytes() for out in ("manifest", "straight")]
    assert files[0] == files[1]


def _interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_score_of_ones_own_may_know_nothing_of_a_question(tmp_path: Path, registered: Any) -> None:
    """Its questions then tell the cut nothing, which is said."""

    def partial(inputs: Any) -> list[float | None]:
        return [None if place % 2 else float(place) for place in range(len(inputs.questions))]

    registered("score", "partial", partial)
    manifest = read_manifest(make_manifest(tmp_path, more_scores=("partial",), answer_parser=UNCUT))
    assert [row.scores.get("partial", math.nan) for row in manifest.rows[::2]] == [0, 2, 4, 6]
    assert all("partial" not in row.scores for row in manifest.rows[1::2])
    shutil.copytree(manifest.folder, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "manifest.json").read_text())["functions"].keys() == {"partial"}


PAGE = (Path(neurosig.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_score_of_the_readme_works_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ten lines rank an export, and its commands parse."""
    (block,) = re.findall(r"```python\n# my_scores\.py\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scores.py").write_text(block)
    options: dict[str, Any] = {"hallucination_score": "my_scores:wavering", "answer_parser": UNCUT}
    manifest = read_manifest(make_manifest(tmp_path, **options, question_filter="neuron_only"))
    for row in manifest.rows:
        own = [manifest.rollouts[row.question_id, k] for k, one in enumerate(row.answers) if one == row.pseudo_label]
        spread = np.std([rollout.mean_logprob or 0.0 for rollout in own])
        assert row.scores["my_scores:wavering"] == pytest.approx(spread, abs=1e-6)
    (commands,) = re.findall(r"```sh\n([^`]*my_scores:wavering.*?)```", PAGE, flags=re.DOTALL)
    export_line, report_line = (shlex.split(line)[3:] for line in commands.replace("\\\n", " ").strip().splitlines())
    parse_config(ExportConfig, presets=PRESETS, prog="export", argv=export_line)
    parse_config(ReportConfig, presets={}, prog="report", argv=report_line)


def test_the_readme_names_what_a_function_gets() -> None:
    for kind in KINDS:
        assert kind == "answer_parser" or f"| `{kind}` |" in PAGE
    for owner in (ScoreInputs, QuestionSignals, TeacherSignals, Candidate, ContextInputs, AnswerState):
        assert owner.__name__ in PAGE or owner in (TeacherSignals, AnswerState)
    for name in (*SCORED, *CUT):
        assert f"`{name}`" in PAGE
