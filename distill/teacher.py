"""The teacher: the student's own model, without gradients, or another one.

``base`` is the model before training (the adapter switched off, or as it was if training continues one; a frozen copy
under full fine-tuning); ``live`` is the student as it is now; ``ema`` an average over its past. Unless it is another
model, the teacher's only advantage is its context.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from distill.distributed import Ranks
from distill.student import effective_weights
from distill.tasks import Task, check_prompts
from neurosig.models.completion_hidden import logit_softcap
from neurosig.models.load import LoadedModel, load_model
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from distill.config import TrainConfig

logger = logging.getLogger(__name__)

TeacherName = Literal["base", "live", "ema"]


def load_teacher(
    config: TrainConfig, student: LoadedModel, tasks: Sequence[Task], max_new_tokens: int
) -> LoadedModel | None:
    """The frozen model of ``--teacher-model``, on the student's device; ``None`` without.

    Raises:
        UserError: Its tokenizer or its head is not the student's, or a prompt does not fit; or see
            `neurosig.models.load.load_model`.
    """
    if config.teacher_model is None:
        return None
    options: Any = {"dtype": config.dtype, "attn_implementation": config.attn_implementation}
    other = load_model(config.teacher_model, device=str(student.model.device), **options)
    heads = [len(one.model.get_output_embeddings().weight) for one in (student, other)]
    problem = (
        "its tokenizer has other tokens" if other.info.tokenizer_sha256 != student.info.tokenizer_sha256
        else f"its head has {heads[1]} rows" if min(heads) < len(student.tokenizer)
        else "it caps its logits otherwise" if logit_softcap(other.model) != logit_softcap(student.model)
        else ""
    )  # fmt: skip
    if problem:
        raise UserError(
            f"--teacher-model {config.teacher_model}: cannot teach {student.info.id}, {problem}; give a model of the "
            "same family"
        )
    if other.info.chat_template_sha256 != student.info.chat_template_sha256:
        logger.warning("--teacher-model %s: has a chat template of its own; it reads the student's", other.info.id)
    check_prompts(tasks, other, max_new_tokens)
    other.model.requires_grad_(False)
    return other


class Teacher:
    """Gives the model whose distribution is the target.

    Args:
        name: ``base``, ``live`` or ``ema``.
        model: The student's causal language model, adapter layers included.
        adapter: The peft wrapper around it, ``None`` under full fine-tuning.
        ema_decay: Share of itself that the average keeps at each step.
        continued: Whether the adapter is one of an earlier training, with which the model before this one begins.
        other: Another model to be the teacher; ``name`` is then ``base``.

    Attributes:
        average: Name -> float32 average of an effective weight; empty but for ``ema``. Under LoRA these are the merged
            weights ``W + scale * B A``: averaging A and B apart would average another function. Their layers compute
            in float32: rounded to bfloat16 the average would stand still for many steps.
    """

    def __init__(
        self,
        name: TeacherName,
        model: PreTrainedModel,
        adapter: PeftModel | None,
        ema_decay: float = 0.99,
        *,
        continued: bool = False,
        other: PreTrainedModel | None = None,
    ):
        check_choice("teacher", name, TeacherName)
        self.name = name
        self._model = model
        self._adapter = adapter
        self._decay = ema_decay
        frozen = name == "base" and adapter is None and other is None
        self._copy = copy.deepcopy(model).requires_grad_(False).eval() if frozen else other
        self._continued = continued and name == "base" and other is None and adapter is not None
        self._start = self._adapter_now()
        averaged = effective_weights(model, adapter) if name == "ema" else ()
        self.average: Mapping[str, Tensor] = {weight: tensor.detach().clone() for weight, tensor in averaged}

    @classmethod
    def of(
        cls, config: TrainConfig, student: LoadedModel, adapter: PeftModel | None, other: LoadedModel | None
    ) -> Teacher:
        """The teacher of a run; OPSA's, which is never run, keeps no copy."""
        options: Any = {"continued": student.info.adapter is not None, "other": other and other.model}
        name: TeacherName = "live" if config.method == "opsa" else config.teacher
        return cls(name, student.model, adapter, config.ema_decay, **options)

    def shard(self, ranks: Ranks) -> None:
        """Under FSDP2, shard the frozen copy, or that of the adapter, like the student."""
        self._start = self._adapter_now()
        if self._copy is not None:
            ranks.shard(self._copy)

    def _adapter_now(self) -> list[tuple[Tensor, Tensor]]:
        """Each weight of the adapter and a copy, if the model before training has an adapter."""
        trained = self._model.parameters() if self._continued else ()
        return [(parameter, parameter.detach().clone()) for parameter in trained if parameter.requires_grad]

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The teacher's model, without gradients, for the block; the student is left unchanged."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._start:
                stack.enter_context(_exchanged(self._start))
            elif self.name != "live" and self._adapter is not None and self._copy is None:
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
def _exchanged(values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give parameters other values in the block, in place, so that FSDP2 sees them too; afterwards their own again."""
    own = [(parameter, parameter.detach().clone()) for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.copy_(value)
        yield
    finally:
        for parameter, value in own:
            parameter.copy_(value)


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
