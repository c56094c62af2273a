"""Tiny random models and a byte tokenizer, built in memory and shared by the tests."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Arch = Literal["qwen3", "llama", "gemma3", "gpt2", "gpt_neox"]
ARCHS: tuple[Arch, ...] = get_args(Arch)

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


def tiny_model(arch: Arch, seed: int = 0) -> PreTrainedModel:
    """A random two-layer model (gemma3: three, so that sliding and full attention both occur), fp32, eval.

    Weights are larger than the usual 0.02, norm gains and biases are jittered, and the embedding is small
    enough that a tied head does not just repeat its input: predictions vary and are neither flat nor certain.
    """
    model = _model(arch)
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


def _model(arch: Arch) -> PreTrainedModel:
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
