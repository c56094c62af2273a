"""The trainable model, its effective weights, and the rollouts sampled from it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.distributed import Ranks, decoder_layers
from distill.served_student import ServedStudent
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from distill.tasks import Task
    from neurosig.models.load import LoadedModel


def make_student(config: TrainConfig, loaded: LoadedModel) -> tuple[PreTrainedModel, PeftModel | None]:
    """Make the loaded model trainable in place: LoRA on all linear projections, or every weight but the embeddings.

    Returns:
        The model with its adapter layers, and the peft wrapper around it, ``None`` under full fine-tuning.
    """
    model = loaded.model
    if config.full:
        model.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
        return model, None
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapter = get_peft_model(model, lora)
    adapter.eval()
    return model, adapter


@torch.no_grad()
def effective_weights(model: PreTrainedModel, adapter: PeftModel | None) -> dict[str, Tensor]:
    """Effective weights by parameter name: ``W + scale * B A``, or the trained parameters themselves."""
    if adapter is None:
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    from peft.tuners.lora import Linear

    return {
        f"{name}.base_layer.weight": module.base_layer.get_parameter("weight") + module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }


@contextlib.contextmanager
def in_place(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the model's weights in the block; afterwards its own are put back, not recomputed."""
    replaced = [(model.get_parameter(name), tensor) for name, tensor in weights.items()]
    own = [parameter.data for parameter, _ in replaced]
    try:
        for parameter, tensor in replaced:
            parameter.data = tensor.to(parameter.dtype)
        yield
    finally:
        for (parameter, _), data in zip(replaced, own, strict=True):
            parameter.data = data


@contextlib.contextmanager
def merged(model: PreTrainedModel, adapter: PeftModel | None) -> Iterator[None]:
    """Sample with the adapter merged: the same function, rounded to the weights' dtype, but faster."""
    if adapter is None:
        yield
        return
    with adapter.disable_adapter(), in_place(model, effective_weights(model, adapter)):
        yield


@contextlib.contextmanager
def sampling_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use SDPA while sampling: flash-attention kernels do not support our preallocated KV cache."""
    own = str(model.config._attn_implementation)
    if not own.startswith("flash"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class TrainingForward:
    """How the decoder's layers run in the student's forward pass, and only there; made after sharding.

    Args:
        model: The student.
        gradient_checkpointing: Store a layer's input only and recompute the rest in the backward pass. (The model's own
            switch needs train mode, which turns dropout on.)
        compile: Compile each layer.

    Attributes:
        share_prompts: Whether `completion_hidden` may use a cache: a layer that is recomputed would fill it twice, and
            a compiled one would be compiled for each layer's place in it.
    """

    def __init__(self, model: PreTrainedModel, *, gradient_checkpointing: bool = False, compile: bool = False):
        self.share_prompts = not (gradient_checkpointing or compile)
        self._layers = [] if self.share_prompts else decoder_layers(model)
        self._forwards = []
        for layer in self._layers:
            forward = layer.forward
            if compile:
                forward = torch.compile(forward, dynamic=True)
            if gradient_checkpointing:
                forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            self._forwards.append(forward)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Apply it in the block, and in the backward pass of what was computed there."""
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward


class StudentSampler:
    """Samples rollouts from the student as it is now, here on all ranks or on a server from the main one.

    ``done`` optimizer steps are behind the student.
    """

    def __init__(
        self,
        config: TrainConfig,
        loaded: LoadedModel,
        model: PreTrainedModel,
        adapter: PeftModel | None,
        ranks: Ranks,
        done: int,
    ):
        self._loaded, self._model, self._adapter, self._ranks = loaded, model, adapter, ranks
        self._decoding: dict[str, Any] = {"batch_rows": config.batch_rows, "compile_decoding": config.compile_decoding}
        server = config.server(loaded)
        self._served = None if server is None or adapter is None else ServedStudent(config, server, adapter, done)

    def rollouts(self, tasks: Iterable[Task], sampling: SamplingConfig, step: int) -> list[Rollout]:
        """The rollouts of a training step, in the order of `draw`."""
        prompts = [Prompt(task.id, task.student_prompt) for task in tasks]
        return [rollout for group in self.draw(prompts, sampling, f"step{step}") for rollout in group]

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingConfig, salt: str) -> list[list[Rollout]]:
        """The rollouts of each prompt, short prompts first, the same on every rank."""
        if self._served is not None:
            served = self._served
            groups = self._ranks.on_main(lambda: served.sample(prompts, sampling, salt, fresh=salt == "development"))
        else:
            ranks, model = self._ranks, self._model
            own = prompts[ranks.rank :: ranks.world]
            with ranks.whole(model), ranks.together(), merged(model, self._adapter), sampling_attention(model):
                drawn = list(sample(self._loaded, own, sampling, salt=salt, **self._decoding))
            groups = [group for part in ranks.gather(drawn) for group in part]
        by_id = {group[0].question_id: group for group in groups}
        return [by_id[prompt.question_id] for prompt in sorted(prompts, key=lambda prompt: len(prompt.token_ids))]

    def updated(self, step: int) -> dict[str, int]:
        """Tell the server's sampler that the student made another update; the age of the weights last sampled from."""
        return {} if self._served is None else self._served.updated(step)

    def close(self) -> None:
        """Unload the adapter from the server."""
        if self._served is not None and self._ranks.main:
            self._served.close()
