"""One run on several processes, under ``accelerate launch`` or ``torchrun``; in a single process a no-op.

After sampling, every rank holds every rollout of the step, so the loss's normaliser, the share of each rank and the
number of its micro-batches follow without a message. Gradients are sums over ranks, never means of means: ranks may
hold different numbers of questions, rollouts and tokens, or none.

Data parallel: no DDP wrapper, whose hooks fire once per forward of the wrapped module, while we run the decoder twice
(prompt, completion) and the head separately, any number of times per step; local sums and one all-reduce before
clipping are right for every split. FSDP2: the decoder and its layers are sharded; the embeddings are never trained and
stay whole, so the loss can use the head. While sampling, all weights are whole on each rank, which decodes at its own
pace.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from neurosig.runtime import ranks
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

    from distill.config import TrainConfig


class Ranks(ranks.Ranks):
    """`neurosig.runtime.ranks.Ranks` with gradients and weights.

    Attributes:
        sharded: Whether FSDP2 shards the weights.
    """

    def __init__(self, state: PartialState | None = None):
        super().__init__(state)
        self.sharded = self.world > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")

    def check(self, config: TrainConfig) -> None:
        super().check(config)
        if not self.sharded:
            return
        from accelerate.utils import is_torch_version

        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("FSDP 1 is not supported; start with accelerate launch --use_fsdp --fsdp_version 2")
        if is_torch_version("<", "2.13"):
            raise UserError(f"FSDP2 needs torch 2.13 or newer, this is {torch.__version__}; leave out --use_fsdp")
        if config.sampler == "openai":
            raise UserError("--sampler openai sends whole adapters, which FSDP2 splits; leave out --use_fsdp")
        if config.teacher == "ema":
            raise UserError("--teacher ema averages whole weights, which FSDP2 does not keep; leave out --use_fsdp")

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of all ranks; FSDP2 has done so already."""
        if self.world == 1 or self.sharded:
            return
        from accelerate.utils import reduce

        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def shard(self, model: PreTrainedModel) -> None:
        """Under FSDP2, split the decoder's weights over the ranks in place; optimizers are made afterwards."""
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (self.world,))
        whole = {model.get_input_embeddings().weight, *model.get_output_embeddings().parameters()}
        for module in [*decoder_layers(model), model.base_model]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        for unit in _units(model):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        with torch.no_grad():  # the first forward tells FSDP2 which module is the root
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)

    @contextlib.contextmanager
    def whole(self, model: PreTrainedModel) -> Iterator[None]:
        """Gather all weights on each rank for the block, in which no rank waits for another."""
        if not self.sharded:
            yield
            return
        for unit in _units(model):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in _units(model):
                unit.set_reshard_after_forward(True, recurse=False)
            # ranks ran different numbers of forwards: FSDP2 must forget them, or it prefetches by their order
            _units(model)[0].reset_iter_state()

    def whole_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors, whole, on the main process and nothing elsewhere; every rank must call this.

        One is gathered at a time, and those that were sharded go to the CPU.
        """
        gathered: dict[str, Tensor] = {}
        for name, tensor in tensors:
            whole = whole_tensor(tensor.detach())
            if self.main:
                gathered[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
        return gathered


ALONE = Ranks()


def launched(config: TrainConfig) -> Ranks:
    """The ranks of this run; see `neurosig.runtime.ranks.Ranks.launched`."""
    return Ranks.launched(config.device)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have sharded; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of ``whole``, laid out as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return whole
    whole = whole.to(tensor.device)
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The transformer blocks of a causal language model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def _units(model: PreTrainedModel) -> list[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
