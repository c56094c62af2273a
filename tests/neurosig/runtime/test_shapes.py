from __future__ import annotations

import typing
from dataclasses import fields

import pytest

from distill.config import TrainConfig
from distill.evaluate import EvaluateConfig
from neurosig.export import ExportConfig
from neurosig.runtime.shapes import Shapes, option_names


@pytest.mark.parametrize("config_class", [ExportConfig, TrainConfig, EvaluateConfig])
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
        *server,
    }
    shaping = {*option_names(ExportConfig, Shapes.ROLLOUTS, Shapes.TRACES)}
    assert {"questions", "template", "temperature", "seed", "served_model", "set_size"} <= shaping
    assert shaping.isdisjoint({"model", "dtype", "answer_format", "keep_fraction", "context_policy", *unrecorded})
    assert {*option_names(TrainConfig, Shapes.PLACE)} == {
        *("preset", "config", "out", "resume", "overwrite", "save_steps", "keep_checkpoints"),
        *("license", "push_to_hub", "report_to", "adapter_dir"),
        *server,
    }
    assert {*option_names(TrainConfig, Shapes.RESOURCES)} == {
        *("micro_batch_size", "batch_rows", "device", "attn_implementation", "gradient_checkpointing", "compile"),
    }
    assert {"teacher", "divergence", "replay", "sampler", "base_url"} < {
        *option_names(TrainConfig, Shapes.DISTILLATION)
    }
