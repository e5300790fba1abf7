"""Language models with random weights, and our configs on the linear layers of their blocks."""

import torch
from torch import nn

import lora_lite as ll

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of a block of these models."""
VARIANTS = ("lora", "pissa", "dora", "delora", "eva", "ia3", "ia3_ff", "hra", "antipasto", "road")
METHODS = ("lora", "pissa", "dora", "hra", "ia3", "road", "antipasto")
"""Of those the ones whose layers are timed: EVA's are LoRA's, IA³-FF's nearly IA³'s, DeLoRA's nearly LoRA's."""


def our_config(variant: str, r: int, dtype: torch.dtype = torch.float32) -> ll.AdapterConfig:
    """On all of them, with alpha = 2r; `dtype` is the adapter's."""
    return ll.REGISTRY[variant].config.from_common(
        r=r, alpha=2 * r, dtype=dtype, target_roles=(), target_names=tuple(f"{t}$" for t in TARGETS)
    )


def llama(width: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """A Llama of 1,024 tokens with a frozen base, the same on each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,  # whole groups of RoAd's
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def qwen(layers: int = 2, **sizes: int) -> nn.Module:
    """Qwen3-0.6B's widths, two layers of its 28 and 4,096 tokens of its 151,936, unless said otherwise."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    widths = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 4096,
    }
    config = Qwen3Config(**{**widths, **sizes}, num_hidden_layers=layers, tie_word_embeddings=True, rope_theta=1e6)
    return Qwen3ForCausalLM(config).eval()


def qwen_moe(experts: int, dtype: torch.dtype, width: int = 256, layers: int = 2, visited: int = 4) -> nn.Module:
    """A mixture of experts with a frozen base, the same on each call."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=width, intermediate_size=width, moe_intermediate_size=width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4,
        num_experts=experts, num_experts_per_tok=visited,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(dtype).requires_grad_(False).train()
