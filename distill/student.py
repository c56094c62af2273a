"""The trainable model, its effective weights, and the rollouts sampled from it."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.distributed import Ranks, decoder_layers
from distill.served_student import ServedStudent
from neurosig.models.adapter import LearningDropout, lora_targets, read_adapter
from neurosig.models.prefix import on_a_copy
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.packed_weights import WeightOf, own_weight, packs
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from distill.config import TrainConfig
    from distill.tasks import Task
    from neurosig.models.load import LoadedModel

logger = logging.getLogger(__name__)


def make_student(
    config: TrainConfig, loaded: LoadedModel, start: Path | None = None
) -> tuple[PreTrainedModel, PeftModel | None]:
    """Make the loaded model trainable in place: LoRA as the options say, or every weight but the embeddings.

    ``start`` is an adapter that training continues, with its own rank and targets; under ``--full`` it is in the
    weights already. In bfloat16 a merged start would lose most of the adapter's change.

    Returns:
        The model with its adapter layers, and the peft wrapper around it, ``None`` under full fine-tuning.

    Raises:
        UserError: See `neurosig.models.adapter.lora_targets`; or an option contradicts ``start``.
    """
    model = loaded.model
    if model.device.type == "cuda" and _product_dtype(config, model).itemsize < 4:
        torch.set_float32_matmul_precision("high")  # TF32 where LoRA's factors or master weights are float32
    if config.full:
        model.requires_grad_(False)
        model.get_decoder().requires_grad_(True)
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
        return model, None
    from peft import LoraConfig, get_peft_model

    if start is not None:
        adapter, _ = read_adapter(loaded, start, trainable=True)
        _check_continued(config, adapter.peft_config["default"], start)
        return model, _with_dropout(config, adapter)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.lora_rslora,
        target_modules=lora_targets(config.lora_targets, model),
        task_type="CAUSAL_LM",
    )
    adapter = get_peft_model(model, lora)
    adapter.eval()
    return model, _with_dropout(config, adapter)


def _check_continued(config: TrainConfig, lora: Any, start: Path) -> None:
    """Refuse explicit options of another adapter than the one that training continues."""
    own = {"lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_rslora": lora.use_rslora}
    for name, value in own.items():
        if config.is_explicit(name) and getattr(config, name) != value:
            raise UserError(f"--{name.replace('_', '-')}: training continues {start}, which has {value}; leave it out")
    if config.is_explicit("lora_targets"):
        raise UserError(f"--lora-targets: training continues {start}, which has its own; leave it out")
    lora.lora_dropout = config.lora_dropout
    logger.info("continuing the adapter %s (r=%d, alpha=%g)", start, lora.r, lora.lora_alpha)


def _with_dropout(config: TrainConfig, adapter: PeftModel) -> PeftModel:
    from peft.tuners.lora import LoraLayer

    for module in adapter.modules() if config.lora_dropout else ():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = LearningDropout(config.lora_dropout)
    return adapter


@torch.no_grad()
def effective_weights(model: PreTrainedModel, adapter: PeftModel | None) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 value of each effective weight: ``W + scale * B A``, or the trained parameter itself."""
    if adapter is None:
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        yield from ((name, parameter.float()) for name, parameter in trained)
        return
    merge = mergers(model)
    for name, module in model.named_modules():
        if module in merge:
            yield f"{name}.weight", merge[module](module)


def mergers(model: PreTrainedModel) -> dict[nn.Module, Callable[[nn.Module], Tensor]]:
    """For each linear layer under an adapter, what computes its effective weight, in float32, from it."""
    from peft.tuners.lora import Linear

    def merge(layer: Linear, base: nn.Module) -> Tensor:
        return base.get_parameter("weight").float() + layer.get_delta_weight("default").float()

    adapted = [module for module in model.modules() if isinstance(module, Linear)]
    return {layer.base_layer: functools.partial(merge, layer) for layer in adapted}


@contextlib.contextmanager
def sampling_weights(model: PreTrainedModel, adapter: PeftModel | None) -> Iterator[WeightOf]:
    """Sample from the student's effective weights: gives the weight to pack for a linear layer.

    Where weights are packed (float32 on a CPU) the adapter is merged one layer at a time while packing, which is the
    same function to rounding and as fast as the base model. Elsewhere it stays active beside the weights: rounded to
    bfloat16, a merged weight would lose every change below half a unit in its last place.
    """
    merge = {} if adapter is None else mergers(model)
    if adapter is None or not all(map(packs, merge)):
        yield own_weight
        return
    factors = {module for name, module in model.named_modules() if ".lora_" in name}

    def effective(linear: nn.Linear) -> Tensor | None:
        return None if linear in factors else merge.get(linear, own_weight)(linear)

    with adapter.disable_adapter(), torch.no_grad():
        yield effective


@contextlib.contextmanager
def sampling_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use SDPA, or eager without it, while sampling: flash-attention kernels do not support our KV cache."""
    own = str(model.config._attn_implementation)
    if not own.startswith("flash"):
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def autocast(config: TrainConfig, model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """Under ``--full`` the weights are float32 masters, whose products are computed in ``--dtype``."""
    dtype = _product_dtype(config, model)
    return torch.autocast(model.device.type, dtype=dtype, enabled=config.full and dtype.itemsize < 4)


def _product_dtype(config: TrainConfig, model: PreTrainedModel) -> torch.dtype:
    auto = torch.float32 if model.device.type == "cpu" else torch.bfloat16
    return auto if config.dtype == "auto" else getattr(torch, config.dtype)


class TrainingForward:
    """How the decoder's layers run in the student's forward pass, and only there; made after sharding.

    Args:
        model: The student.
        gradient_checkpointing: Store a layer's input only and recompute the rest in the backward pass. (The model's own
            switch needs train mode, which turns dropout on.)
        compile: Compile each layer.
        dropout: Recompute with the same dropout masks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        dropout: bool = False,
    ):
        self._layers = decoder_layers(model) if gradient_checkpointing or compile else []
        forwards = [torch.compile(layer.forward, dynamic=True) if compile else layer.forward for layer in self._layers]
        run = operator.call
        if gradient_checkpointing:
            run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)
        self._forwards = [on_a_copy(forward, index, run) for index, forward in enumerate(forwards)]

    @classmethod
    def of(cls, config: TrainConfig, model: PreTrainedModel) -> TrainingForward:
        options = {"gradient_checkpointing": config.gradient_checkpointing, "compile": config.compile}
        return cls(model, dropout=config.lora_dropout > 0, **options)

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
        self._autocast = autocast(config, model)
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
            with contextlib.ExitStack() as stack:
                stack.enter_context(ranks.whole(model))
                stack.enter_context(ranks.together())
                stack.enter_context(self._autocast)
                stack.enter_context(sampling_attention(model))
                weight_of = stack.enter_context(sampling_weights(model, self._adapter))
                drawn = list(sample(self._loaded, own, sampling, salt=salt, weight_of=weight_of, **self._decoding))
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
