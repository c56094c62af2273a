"""Tiny random models of every architecture that the README lists; run as a module, it prints the README's table."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from neurosig.neurons.sites import ffn_sites
from tests.support.tiny import (
    BOS_ID,
    CONTEXT,
    D_MLP,
    D_MODEL,
    EOS_ID,
    N_HEADS,
    N_KV_HEADS,
    PAD_ID,
    VOCAB_SIZE,
    tiny_tokenizer,
    with_random_weights,
)

SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
POSITIONS = {"max_position_embeddings": CONTEXT}
USUAL = SHARED | POSITIONS | {"intermediate_size": D_MLP}
GROUPED = USUAL | {"num_key_value_heads": N_KV_HEADS}
GPT = SHARED | {"n_positions": CONTEXT, "n_inner": D_MLP}
FALCON = SHARED | POSITIONS | {"ffn_hidden_size": D_MLP}
HEADS = GROUPED | {"head_dim": D_MODEL // N_HEADS}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = HEADS | SLIDING | {"query_pre_attn_scalar": D_MODEL // N_HEADS}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": CONTEXT // 4}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGES = {
    "text_config": GEMMA,
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "image_token_index": VOCAB_SIZE - 1,
    "boi_token_index": VOCAB_SIZE - 2,
    "eoi_token_index": VOCAB_SIZE - 3,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model type, as the README names it, and the configuration of a tiny one.

    ``lens``: whether TransformerLens reads it; ``lens_errs``: its own forward pass is another function.
    """

    family: str
    model_type: str
    config: dict[str, Any] = field(default_factory=lambda: GROUPED)
    lens: bool = True
    lens_errs: bool = False


_LISTED = (
    Architecture("Llama, SmolLM2", "llama"),
    Architecture("Mistral", "mistral", GROUPED | {"sliding_window": 8}),
    Architecture("Ministral", "ministral", HEADS | SLIDING, lens=False),
    Architecture("Ministral 3", "ministral3", HEADS | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}),
    Architecture("Qwen2, Qwen2.5", "qwen2"),
    Architecture("Qwen3", "qwen3", HEADS),
    Architecture("Qwen3.5 (text)", "qwen3_5_text", HEADS | LINEAR),
    Architecture("Gemma", "gemma", HEADS),
    Architecture("Gemma 2", "gemma2", GEMMA | {"final_logit_softcapping": 5.0}),
    Architecture("Gemma 3 (text)", "gemma3_text", GEMMA),
    Architecture("Gemma 3 (its text part)", "gemma3", IMAGES),
    Architecture("OLMo", "olmo"),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OLMo 3", "olmo3", GROUPED | SLIDING),
    Architecture("SmolLM3", "smollm3", GROUPED | {"no_rope_layers": [1, 0]}),
    Architecture("Granite", "granite", GROUPED | {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    Architecture("Command R", "cohere", GROUPED | {"logit_scale": 0.5}),
    Architecture("Command R7B, Command A", "cohere2", GROUPED | SLIDING | {"logit_scale": 0.5}),
    Architecture("EXAONE 4", "exaone4", GROUPED | SLIDING),
    Architecture("Seed-OSS", "seed_oss", HEADS),
    Architecture("StableLM", "stablelm"),
    Architecture("Hunyuan", "hunyuan_v1_dense", HEADS),
    Architecture("ERNIE 4.5", "ernie4_5"),
    Architecture("Helium", "helium", HEADS, lens=False),
    Architecture("DiffLlama", "diffllama", lens=False),
    Architecture("Phi-3, Phi-4", "phi3"),
    Architecture("GLM", "glm", HEADS),
    Architecture("GLM-4", "glm4", HEADS),
    Architecture("Apertus", "apertus"),
    Architecture("Arcee", "arcee"),
    Architecture("Nemotron", "nemotron"),
    Architecture("GPT-2", "gpt2", GPT),
    Architecture("StarCoder", "gpt_bigcode", GPT),
    Architecture("StarCoder2", "starcoder2", GROUPED | {"sliding_window": 8}),
    Architecture("GPT-NeoX, Pythia", "gpt_neox", USUAL),
    Architecture("Falcon", "falcon", FALCON),
    Architecture("BLOOM", "bloom", SHARED),
    Architecture("Phi-1, Phi-2", "phi"),
    Architecture("OPT", "opt", SHARED | POSITIONS | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL}),
)
_VARIANTS = {
    "falcon, ALiBi": Architecture("Falcon", "falcon", FALCON | {"alibi": True, "parallel_attn": False}, lens_errs=True),
    "falcon, grouped": Architecture(
        "Falcon", "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, lens=False
    ),
    "gpt_bigcode, all heads": Architecture("StarCoder", "gpt_bigcode", GPT | {"multi_query": False}, lens=False),
    "stablelm, parallel": Architecture("StableLM", "stablelm", GROUPED | {"use_parallel_residual": True}),
}
ARCHITECTURES: dict[str, Architecture] = {one.model_type: one for one in _LISTED} | _VARIANTS
"""Every listed ``model_type``, and variants whose blocks or attention differ."""


def model_of(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random two-layer model of this architecture, fp32, eval, with the weights of `tests.support.tiny`."""
    one = ARCHITECTURES[name]
    config = AutoConfig.for_model(one.model_type, **one.config | changes)
    return with_random_weights(AutoModelForCausalLM.from_config(config), seed)


def save(name: str, folder: Path, ends: list[int] | None = None) -> Path:
    """A folder with such a model, and a tokenizer, that every command can load; ``ends``: its end tokens."""
    model = model_of(name)
    if ends is not None:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def models_table() -> str:
    """The README's table: families with the same neurons, read at the same place and checked in the same ways."""
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for one in _LISTED:
        sites = ffn_sites(model_of(one.model_type))
        value = "act(gate) · up" if sites.gated else "act(x)"
        place = sites.layers[0].removeprefix(f"{sites.blocks[0]}.")
        checked = f"reading{', TransformerLens' if one.lens else ''}, sampling, learning"
        rows[value, f"`{place}`", checked].append(f"{one.family} `{one.model_type}`")
    lines = [
        "| models and their `model_type` | a neuron's value | read at the input of | checked |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {'; '.join(names)} | {' | '.join(row)} |" for row, names in rows.items())])


if __name__ == "__main__":
    print(models_table())
