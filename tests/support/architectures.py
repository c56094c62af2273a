"""One tiny random model of every architecture that is tested from a saved folder on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny import BOS_ID, CONTEXT, D_MLP, D_MODEL, EOS_ID, N_HEADS, N_KV_HEADS, PAD_ID, VOCAB_SIZE

SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
USUAL = SHARED | {"max_position_embeddings": CONTEXT, "intermediate_size": D_MLP}
GROUPED = USUAL | {"num_key_value_heads": N_KV_HEADS}
GPT = {"n_positions": CONTEXT, "n_inner": D_MLP}
HEADS = {"head_dim": D_MODEL // N_HEADS}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = GROUPED | HEADS | {"query_pre_attn_scalar": HEADS["head_dim"]} | SLIDING
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "apertus": GROUPED,
    "arcee": GROUPED,
    "bloom": SHARED,
    "cohere": GROUPED | {"logit_scale": 0.5},
    "cohere2": GROUPED | SLIDING | {"logit_scale": 0.5},
    "diffllama": GROUPED,
    "ernie4_5": GROUPED,
    "exaone4": GROUPED | SLIDING,
    "falcon": SHARED | {"max_position_embeddings": CONTEXT, "ffn_hidden_size": D_MLP},
    "gemma": GROUPED | HEADS,
    "gemma2": GEMMA,
    "gemma3": {
        "text_config": GEMMA,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": VOCAB_SIZE - 1,
        "boi_token_index": VOCAB_SIZE - 2,
        "eoi_token_index": VOCAB_SIZE - 3,
    },
    "gemma3_text": GEMMA,
    "glm": GROUPED | HEADS,
    "glm4": GROUPED | HEADS,
    "gpt2": SHARED | GPT,
    "gpt_bigcode": SHARED | GPT,
    "gpt_neox": USUAL,
    "granite": GROUPED | {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "helium": GROUPED | HEADS,
    "hunyuan_v1_dense": GROUPED | HEADS,
    "llama": GROUPED,
    "ministral": GROUPED | HEADS | SLIDING,
    "ministral3": GROUPED | HEADS,
    "mistral": GROUPED | {"sliding_window": 8},
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED | SLIDING,
    "opt": SHARED | {"max_position_embeddings": CONTEXT, "ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL},
    "phi": GROUPED,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | HEADS,
    "qwen3_5_text": GROUPED | HEADS | LINEAR,
    "seed_oss": GROUPED | HEADS,
    "smollm3": GROUPED | {"no_rope_layers": [1, 0]},
    "stablelm": GROUPED,
    "starcoder2": GROUPED | {"sliding_window": 8},
}
"""``model_type`` -> its configuration."""


def random_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of this type, fp32, eval; see `tests.support.tiny.tiny_model` on its weights."""
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | changes)
    model = AutoModelForCausalLM.from_config(config)
    return with_random_weights(model, seed)
