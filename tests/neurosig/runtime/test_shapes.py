from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import jaxtyping
import pytest
import torch

import distill
import figures
import neurosig
from distill.config import TrainConfig
from distill.evaluate import EvaluateConfig
from distill.losses import Divergence
from distill.teacher import Teacher
from figures.notebook.runs import run_folder
from neurosig.export import ExportConfig
from neurosig.intervene.interventions import choose_neurons
from neurosig.neurons.backends import tracer_class
from neurosig.neurons.config import TraceConfig
from neurosig.patterns.signatures import signature
from neurosig.patterns.similarity import nearest_sets
from neurosig.questions.load import Question
from neurosig.runtime.shapes import Above0, AtLeast, Shapes, check_config, option_names
from neurosig.sampling.choice_scoring import completions
from neurosig.screen import ScreenConfig
from neurosig.selection.rows import manifest_rows
from neurosig.show import ShowConfig
from neurosig.views import explorer
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("config_class", [ExportConfig, TrainConfig, EvaluateConfig, ScreenConfig, ShowConfig])
def test_every_option_has_one_mark(config_class: type) -> None:
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in fields(config_class):
        marks = [mark for mark in getattr(hints[field.name], "__metadata__", ()) if isinstance(mark, Shapes)]
        assert len(marks) == 1, field.name


def test_marks_decide_reuse_resume_and_records() -> None:
    server = {"base_url", "request_timeout", "max_retries", "concurrency"}
    unrecorded = option_names(ExportConfig, Shapes.PLACE, Shapes.RESOURCES)
    assert {*unrecorded} == {
        *("preset", "config", "out", "reuse", "resume", "overwrite", "batch_rows", "batch_tokens", "device"),
        "compile_decoding",
        *server,
    }
    shaping = {*option_names(ExportConfig, Shapes.ROLLOUTS, Shapes.TRACES)}
    assert {"questions", "template", "temperature", "seed", "served_model", "set_size"} <= shaping
    assert shaping.isdisjoint({"model", "dtype", "answer_format", "keep_fraction", "context_policy", *unrecorded})
    assert {*option_names(TrainConfig, Shapes.PLACE)} == {
        *("preset", "config", "out", "resume", "overwrite", "save_steps", "keep_checkpoints", "keep_rollouts"),
        *("license", "push_to_hub", "report_to", "adapter_dir"),
        *server,
    }
    assert {*option_names(TrainConfig, Shapes.RESOURCES)} == {
        *("micro_batch_size", "micro_batch_tokens", "batch_rows", "device", "attn_implementation"),
        *("gradient_checkpointing", "compile"),
        "compile_decoding",
    }
    assert {"dev_questions", "compile", "sampler", "base_url"} < {*option_names(TrainConfig, Shapes.DISTILLATION)}
    assert {"teacher", "divergence", "clip", "replay"} < {*option_names(TrainConfig, Shapes.TEACHER)}


@pytest.fixture
def as_users_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type checks of the test run, which would refuse a wrong name first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def literal_fields() -> list[tuple[type, str]]:
    """Every field of a dataclass of the three packages whose annotation holds a ``Literal``."""
    found = []
    for package in (neurosig, distill, figures):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == info.name]
            found += [(k, f.name) for k in kinds if dataclasses.is_dataclass(k) for f in fields(k) if named(module, f)]
    return found


def named(module: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether the field's annotation is a ``Literal`` or the module's name of one."""
    annotation = str(field.type)
    alias = getattr(module, annotation.split(" | ")[0].split(",")[0].removeprefix("Annotated["), None)
    return "Literal[" in annotation or typing.get_origin(alias) is Literal


def built(kind: type, /, **changes: Any) -> Any:
    """An instance with these fields; other required ones get a name of their own, or a value that no check reads."""
    hints = typing.get_type_hints(kind)
    required = {
        f.name: typing.get_args(hints[f.name])[0] if typing.get_origin(hints[f.name]) is Literal else "x"
        for f in fields(kind)
        if f.default is f.default_factory is dataclasses.MISSING
    }
    return kind(**{**required, **changes})


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(("kind", "name"), literal_fields(), ids=lambda value: getattr(value, "__name__", value))
def test_a_misspelt_option_lists_the_names(kind: type, name: str) -> None:
    hint = str(typing.get_type_hints(kind)[name])
    for wrong in ("typo", lambda value: value, 3):
        given = (wrong,) if hint.startswith("tuple") else wrong
        with pytest.raises(ValueError, match=f"{name} is .*; choose one of [a-z]"):
            built(kind, **{name: given})


def test_every_class_of_options_is_checked() -> None:
    """The list that the test above goes through holds these, and so does not shrink unnoticed."""
    kinds = {kind.__name__ for kind, _ in literal_fields()}
    assert kinds >= {"TraceConfig", "SelectionConfig", "ProbeConfig", "ServerConfig", "Divergence", "Rollout"}
    assert kinds >= {"ExportConfig", "TrainConfig", "EvaluateConfig", "InterveneConfig"}
    assert len(literal_fields()) > 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set_size": 0}, "set_size is 0; it must be at least 1"),
        ({"probe_folds": 1}, "probe-folds: expected at least 2"),
        ({"keep_fraction": 0.0}, "keep-fraction: expected above 0"),
        ({"num_generations": 0}, "num-generations: expected at least 1"),
    ],
    ids=str,
)
def test_bounds_are_checked_where_options_are_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig(model="m", questions=("q",), out=Path("o"), **change)
    with pytest.raises(ValueError, match="--ema-decay: expected 0 to below 1"):
        TrainConfig(manifest=Path("m"), out=Path("o"), ema_decay=1.0)


TYPO: Any = "typo"


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    "call",
    [
        lambda: signature(torch.zeros(1, 1, dtype=torch.int32), [0], 0, TYPO),
        lambda: nearest_sets(torch.zeros(2, 1, dtype=torch.int32), 1, backend=TYPO),
        lambda: tracer_class(TYPO),
        lambda: choose_neurons("neurons.csv", TYPO, TYPO),
        lambda: completions(Question("q", "d", "Which?", ("a", "b")), TYPO, ""),
        lambda: Teacher(TYPO, tiny_model("qwen3"), None),
        lambda: explorer.Explorer.heat_map(TYPO, "q", quantity=TYPO),
        lambda: run_folder(TYPO),
        lambda: manifest_rows([], {}, TYPO, [], ranked_by=TYPO, selection=TYPO),
    ],
)  # fmt: skip
def test_a_misspelt_argument_lists_the_names(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"is 'typo'; choose one of \w+"):
        call()


@dataclasses.dataclass
class Example:
    names: typing.Annotated[tuple[Literal["a", "b"], ...], "mark"] = ()
    maybe: Literal["a"] | None = None
    free: str | None = None
    count: typing.Annotated[int, AtLeast(1)] = 1
    rate: typing.Annotated[float, Above0] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a", "b"), "maybe": "a", "free": "c"}, None),
        ({"names": ("a", "c")}, "names is 'c'; choose one of a, b"),
        ({"maybe": "b"}, "maybe is 'b'; choose one of a"),
        ({"count": 0}, "--count: expected at least 1, got 0"),
        ({"count": float("nan")}, "--count: expected at least 1, got nan"),
        ({"rate": float("inf")}, "--rate: expected a number above 0, got inf"),
    ],
)
def test_annotations_are_what_is_checked(change: dict[str, Any], message: str | None) -> None:
    if message is None:
        check_config(Example(**change))
        return
    with pytest.raises(ValueError, match=message):
        check_config(Example(**change))


@pytest.mark.usefixtures("as_users_run")
def test_a_name_is_asked_for_by_its_names() -> None:
    with pytest.raises(ValueError, match="score is 'typo'; choose one of cett, magnitude, unembed"):
        TraceConfig(score=TYPO)
    with pytest.raises(ValueError, match=r"name is .*; choose one of forward_kl, reverse_kl, jsd, sampled_token"):
        Divergence(name=torch.nn.functional.kl_div)  # type: ignore[arg-type]
