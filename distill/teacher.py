"""The teacher: the student's own model, seen from where no gradient flows.

``base`` is the model before training (the adapter switched off, or a frozen copy under full fine-tuning); ``live`` is
the student as it stands. Whatever it knows more than the student comes from its context alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TeacherName = Literal["base", "live"]


class Teacher:
    """Gives the model whose distribution is learned from.

    Args:
        name: ``base`` or ``live``.
        model: The student's causal language model, adapter layers included.
        adapter: The peft wrapper around it, ``None`` under full fine-tuning.
    """

    def __init__(self, name: TeacherName, model: PreTrainedModel, adapter: PeftModel | None):
        self.name = name
        self._model = model
        self._adapter = adapter
        frozen = name == "base" and adapter is None
        self._copy = copy.deepcopy(model).requires_grad_(False).eval() if frozen else None

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The teacher's model, without gradients; the student is as before when the block ends."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.name == "base" and self._adapter is not None:
                stack.enter_context(self._adapter.disable_adapter())
            yield self._model if self._copy is None else self._copy
