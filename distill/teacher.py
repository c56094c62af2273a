"""The teacher: the student's own model, without gradients.

``base`` is the model before training (the adapter switched off, or a frozen copy under full fine-tuning); ``live`` is
the student as it is now; ``ema`` an average over its past. The teacher's only advantage is its context.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from distill.distributed import Ranks
from distill.student import effective_weights, in_place
from neurosig.runtime.shapes import check_choice

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TeacherName = Literal["base", "live", "ema"]


class Teacher:
    """Gives the model whose distribution is the target.

    Args:
        name: ``base``, ``live`` or ``ema``.
        model: The student's causal language model, adapter layers included.
        adapter: The peft wrapper around it, ``None`` under full fine-tuning.
        ema_decay: Share of itself that the average keeps at each step.

    Attributes:
        average: Name -> fp32 average of an effective weight; empty but for ``ema``. Under LoRA these are the merged
            weights ``W + scale * B A``: averaging A and B apart would average another function.
    """

    def __init__(self, name: TeacherName, model: PreTrainedModel, adapter: PeftModel | None, ema_decay: float = 0.99):
        check_choice("teacher", name, TeacherName)
        self.name = name
        self._model = model
        self._adapter = adapter
        self._decay = ema_decay
        frozen = name == "base" and adapter is None
        self._copy = copy.deepcopy(model).requires_grad_(False).eval() if frozen else None
        averaged = effective_weights(model, adapter) if name == "ema" else {}
        self.average: Mapping[str, Tensor] = {weight: tensor.float().clone() for weight, tensor in averaged.items()}

    def shard(self, ranks: Ranks) -> None:
        """Under FSDP2, shard the frozen copy like the student."""
        if self._copy is not None:
            ranks.shard(self._copy)

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The teacher's model, without gradients, for the block; the student is left unchanged."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.name != "live" and self._adapter is not None:
                stack.enter_context(self._adapter.disable_adapter())
            if self.average:
                stack.enter_context(in_place(self._model, self.average))
            yield self._model if self._copy is None else self._copy

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the student; call it after each optimizer step."""
        for name, tensor in effective_weights(self._model, self._adapter).items() if self.average else ():
            self.average[name].lerp_(tensor.float(), 1 - self._decay)
