"""Public model shapes with random weights, to measure speed and memory without a download."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
}  # fmt: skip
"""From the config.json of Qwen/Qwen3-0.6B and Qwen/Qwen3-4B, whose heads are tied to their embeddings."""


def config(shape: str, **changes: int) -> Qwen3Config:
    return Qwen3Config(
        **{**SHAPES[shape], **changes},
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def random_model(shape: str, device: str, dtype: torch.dtype, **changes: int) -> PreTrainedModel:
    """A model of that shape with random weights, in eval mode."""
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Qwen3ForCausalLM(config(shape, **changes))
        finally:
            torch.set_default_dtype(before)
    return model.eval()
