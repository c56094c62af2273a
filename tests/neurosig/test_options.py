from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from distill.evaluate import EvaluateConfig
from neurosig.export import ExportConfig
from neurosig.hallucination.config import ProbeConfig
from neurosig.intervene.__main__ import InterveneConfig
from neurosig.neurons.config import TraceConfig
from neurosig.questions.prompts import PromptConfig
from neurosig.sampling.config import SamplingConfig
from neurosig.selection.config import SelectionConfig

THINKING = {"student_thinking", "teacher_thinking", "eval_thinking"}


@pytest.mark.parametrize("command", [ExportConfig, EvaluateConfig, InterveneConfig])
@pytest.mark.parametrize("part", [SamplingConfig, PromptConfig, SelectionConfig, ProbeConfig, TraceConfig])
def test_an_option_and_the_configuration_it_builds_have_one_default(command: type, part: type) -> None:
    options = {field.name: field.default for field in fields(command) if field.default is not MISSING}
    names = {"value": "neuron_value", "score": "contribution", "active": "active_set"} if part is TraceConfig else {}
    for field in fields(part):
        name = f"probe_{field.name}" if part is ProbeConfig else names.get(field.name, field.name)
        if name in options:
            assert options[name] == field.default, name


def test_every_field_of_these_configurations_is_an_option() -> None:
    options = {field.name for field in fields(ExportConfig)}
    for part in (SamplingConfig, PromptConfig, SelectionConfig):
        assert {field.name for field in fields(part)} <= {*options, "enable_thinking"}
    modes = [
        {f.name for f in fields(command)} & THINKING for command in (ExportConfig, EvaluateConfig, InterveneConfig)
    ]
    assert modes == [{"student_thinking", "teacher_thinking"}, {"eval_thinking"}, {"eval_thinking"}]
