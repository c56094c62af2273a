"""From neuron values to contribution scores and active sets: pure tensor functions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def magnitude(
    value: Float[Tensor, "batch seq d_mlp"], w_out_norm: Float[Tensor, " d_mlp"]
) -> Float[Tensor, "batch seq d_mlp"]:
    """L2 norm of what each neuron adds to the FFN output: ``|a_j| * ||W_down[:, j]||``, in fp32.

    Source: algebra of the FFN, whose output is the sum of ``a_j * W_down[:, j]`` (plus a bias, if any).
    """
    return value.abs().float().mul_(w_out_norm)


def cett(
    value: Float[Tensor, "batch seq d_mlp"],
    w_out_norm: Float[Tensor, " d_mlp"],
    ffn_out: Float[Tensor, "batch seq d_model"],
) -> Float[Tensor, "batch seq d_mlp"]:
    """Magnitude relative to the FFN output: ``|a_j| * ||W_down[:, j]|| / ||FFN output||``, in fp32.

    ``ffn_out`` is the down projection's output, bias included, before any post-norm. Where it is exactly zero
    the score is infinite, or NaN for a silent neuron.

    Source: the contribution score of H-Neurons, after CETT; its use here is a reconstruction.
    """
    return magnitude(value, w_out_norm).div_(ffn_out.float().norm(dim=-1, keepdim=True))


def masked_mean(x: Float[Tensor, "batch seq d"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch d"]:
    """Mean over the positions where ``mask`` holds; NaN for a row without any.

    A NaN or infinity in ``x`` makes the mean of its row and column NaN, also where it is masked out.
    """
    return torch.einsum("bs,bsd->bd", mask.to(x.dtype), x) / mask.sum(dim=1, keepdim=True)


def active_set(mean: Float[Tensor, "batch d_mlp"], k: int) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """The ``k`` largest entries of each row and their indices, largest first, equal values by lower index.

    A stable sort: ``torch.topk`` leaves the order and choice among equal values open. NaN sorts first.
    """
    values, ids = mean.sort(dim=-1, descending=True, stable=True)
    return ids[:, :k].clone(), values[:, :k].clone()


def neurons_per_layer(n_layers: int, d_mlp: int, set_size: int = 1000) -> int:
    """Each layer's share of a set of about ``set_size`` neurons: rounded up, at most ``d_mlp``."""
    return min(-(-set_size // n_layers), d_mlp)
