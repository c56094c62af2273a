"""The oracle of every trace: neuron scores by plain PyTorch forward hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neurosig.neurons.sites import ffn_sites


def hooked_scores(model: PreTrainedModel, ids: list[int], value: str = "gated", score: str = "cett") -> Tensor:
    """The oracle: plain forward hooks on one unpadded sequence, fp64 from there: [seq, n_layers, d_mlp].

    ``unembed`` is about the token that follows: its last position has none and is zero.
    """
    head = model.get_output_embeddings().weight.double()
    sites = ffn_sites(model)
    values: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for layer in range(sites.n_layers):
        down = model.get_submodule(sites.layers[layer])
        act = model.get_submodule(sites.acts[layer])

        def on_down(module: nn.Module, args: tuple[Tensor], out: Tensor, layer: int = layer) -> None:
            outputs[layer] = out[0].double()
            if value == "gated":
                values[layer] = args[0][0].double()

        def on_act(module: nn.Module, args: tuple[Tensor], out: Tensor, layer: int = layer) -> None:
            if value == "act":
                values[layer] = out[0].double()

        handles += [down.register_forward_hook(on_down), act.register_forward_hook(on_act)]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()

    scores = torch.empty(len(ids), sites.n_layers, values[0].shape[-1], dtype=torch.float64)
    for layer in range(sites.n_layers):
        down = model.get_submodule(sites.layers[layer])
        w_out = down.weight.double() if isinstance(down, Conv1D) else down.weight.double().T  # [d_mlp, d_model]
        for t in range(len(ids)):
            if score == "unembed":
                following = head[ids[t + 1]] if t + 1 < len(ids) else torch.zeros(head.shape[1], dtype=torch.float64)
                scores[t, layer] = values[layer][t] * (w_out @ following)
                continue
            scores[t, layer] = values[layer][t].abs() * w_out.square().sum(dim=1).sqrt()
            if score == "cett":
                scores[t, layer] /= outputs[layer][t].square().sum().sqrt()
    return scores.detach()
