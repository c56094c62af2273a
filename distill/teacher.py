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
from distill.student import effective_weights
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
        average: Name -> float32 average of an effective weight; empty but for ``ema``. Under LoRA these are the merged
            weights ``W + scale * B A``: averaging A and B apart would average another function. Their layers compute
            in float32: rounded to bfloat16 the average would stand still for many steps.
    """

    def __init__(self, name: TeacherName, model: PreTrainedModel, adapter: PeftModel | None, ema_decay: float = 0.99):
        check_choice("teacher", name, TeacherName)
        self.name = name
        self._model = model
        self._adapter = adapter
        self._decay = ema_decay
        frozen = name == "base" and adapter is None
        self._copy = copy.deepcopy(model).requires_grad_(False).eval() if frozen else None
        averaged = effective_weights(model, adapter) if name == "ema" else ()
        self.average: Mapping[str, Tensor] = {weight: tensor.detach().clone() for weight, tensor in averaged}

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
                stack.enter_context(_in_place(self._model, self.average))
            yield self._model if self._copy is None else self._copy

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the student; call it after each optimizer step."""
        for name, tensor in effective_weights(self._model, self._adapter) if self.average else ():
            self.average[name].lerp_(tensor, 1 - self._decay)


@contextlib.contextmanager
def _in_place(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the model's weights in the block; afterwards its own are put back, not recomputed.

    A layer whose weight gets another dtype computes in that dtype and returns its own.
    """
    replaced = [(model.get_parameter(name), tensor) for name, tensor in weights.items()]
    hooks = []
    for name, tensor in weights.items():
        module, own = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).dtype
        if own != tensor.dtype:
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, to=tensor.dtype: (inputs[0].to(to),)))
            hooks.append(module.register_forward_hook(lambda _, __, output, to=own: output.to(to)))
            biases = [parameter for place, parameter in module.named_parameters(recurse=False) if place == "bias"]
            replaced += [(bias, bias.data.to(tensor.dtype)) for bias in biases]
    own_data = [parameter.data for parameter, _ in replaced]
    try:
        for parameter, tensor in replaced:
            parameter.data = tensor
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (parameter, _), data in zip(replaced, own_data, strict=True):
            parameter.data = data
