"""Tiny random models and a byte tokenizer, built in memory and shared by the tests."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

Arch = Literal["qwen3", "llama", "gemma3", "gpt2", "gpt_neox"]
ARCHS: tuple[Arch, ...] = get_args(Arch)
"""One of each kind: what every part of the project is tested on."""

OtherArch = Literal["gemma2", "mistral", "olmo2", "opt", "phi3", "qwen2", "smollm3", "starcoder2"]
ALL_ARCHS: tuple[Arch | OtherArch, ...] = (*ARCHS, *get_args(OtherArch))
"""Every architecture whose neurons are located."""

MixtureArch = Literal["mixtral", "qwen3_moe"]
MIXTURES: tuple[MixtureArch, ...] = get_args(MixtureArch)
"""Mixtures of experts, whose neurons are not located."""

VOCAB_SIZE = 300
D_MODEL = 32
D_MLP = 64
N_HEADS = 4
N_KV_HEADS = 2
N_LAYERS = 2
CONTEXT = 512
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def tiny_model(arch: Arch | OtherArch | MixtureArch, seed: int = 0) -> PreTrainedModel:
    """A random two-layer model, fp32, eval; gemma3 has three layers. Sliding windows are of 8 tokens."""
    return with_random_weights(_model(arch), seed)


def with_random_weights(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with other weights, in eval mode.

    Weights are larger than the usual 0.02, norm gains and biases are jittered, and the embedding is small
    enough that a tied head does not just repeat its input: predictions vary and are neither flat nor certain.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_gain = name.endswith("norm.weight") or (".ln_" in name and name.endswith("weight"))
                parameter.add_(noise * (0.1 if is_gain else 0.2))
            elif ".embed" in name or ".wte." in name or ".wpe." in name:
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(noise * 1.5 * D_MODEL**-0.5)
    return model.eval()


def _model(arch: Arch | OtherArch | MixtureArch) -> PreTrainedModel:
    shared = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    gated = shared | {"intermediate_size": D_MLP, "num_key_value_heads": N_KV_HEADS}
    head_dim = D_MODEL // N_HEADS
    match arch:
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**gated, head_dim=head_dim, tie_word_embeddings=False))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**gated, tie_word_embeddings=True))
        case "gemma3":
            config = gated | {"num_hidden_layers": 3, "head_dim": head_dim, "query_pre_attn_scalar": head_dim}
            layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
            return Gemma3ForCausalLM(Gemma3TextConfig(**config, sliding_window=8, layer_types=layer_types))
        case "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=VOCAB_SIZE,
                    n_embd=D_MODEL,
                    n_layer=N_LAYERS,
                    n_head=N_HEADS,
                    n_inner=D_MLP,
                    n_positions=CONTEXT,
                    bos_token_id=BOS_ID,
                    eos_token_id=EOS_ID,
                    pad_token_id=PAD_ID,
                )
            )
        case "gpt_neox":
            return GPTNeoXForCausalLM(GPTNeoXConfig(**shared, intermediate_size=D_MLP))
        case "gemma2":
            return Gemma2ForCausalLM(
                Gemma2Config(**gated, head_dim=head_dim, query_pre_attn_scalar=head_dim, sliding_window=8)
            )
        case "mistral":
            return MistralForCausalLM(MistralConfig(**gated, sliding_window=8))
        case "olmo2":
            return Olmo2ForCausalLM(Olmo2Config(**gated))
        case "opt":
            return OPTForCausalLM(OPTConfig(**shared, ffn_dim=D_MLP, word_embed_proj_dim=D_MODEL))
        case "phi3":
            return Phi3ForCausalLM(Phi3Config(**gated))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**gated))
        case "smollm3":
            return SmolLM3ForCausalLM(SmolLM3Config(**gated, no_rope_layers=[1, 0]))
        case "starcoder2":
            return Starcoder2ForCausalLM(Starcoder2Config(**gated, sliding_window=8))
        case "mixtral":
            return MixtralForCausalLM(MixtralConfig(**gated, num_local_experts=4))
        case "qwen3_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": D_MLP}
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**gated, **experts, head_dim=head_dim))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of exactly 300 ids: 3 special tokens, 256 bytes, 41 unused fillers.

    Its chat template is ChatML; ``enable_thinking=False`` opens the answer with Qwen3's empty think block.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, *alphabet])}
    vocab |= {f"<|unused_{i}|>": i for i in range(len(vocab), VOCAB_SIZE)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


LENGTHS = [(6, 4), (11, 1), (3, 9), (1, 2), (7, 7), (12, 3)]  # prompt and completion tokens


def rollouts(lengths: list[tuple[int, int]] = LENGTHS) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt and completion ids of these lengths, drawn at random; each completion ends in the end token."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()

    prompts, completions = zip(*((draw(p), [*draw(c - 1), EOS_ID]) for p, c in lengths), strict=True)
    return list(prompts), list(completions)
