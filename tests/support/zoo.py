"""Tiny random models of the kinds that people adapt, each with a batch that runs all of it."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from models import SIZES, VOCAB, build, token_ids
from torch import Tensor, nn

T = transformers
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
CLIP_TEXT: dict[str, Any] = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    **TEXT,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}
SHARED: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 24}


def text(labels: bool = True) -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "labels": ids} if labels else {"input_ids": ids}


def image(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def both(**more: Any) -> dict[str, Any]:
    return {**text(labels=False), "pixel_values": image(), **more}


def of(make: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: build(getattr(T, make), getattr(T, config)(**fields))


def llava() -> nn.Module:
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT), vision_config=T.CLIPVisionConfig(**VISION), image_token_index=5,
        vision_feature_layer=-1,  # the last, where the default leaves the last block out
    )  # fmt: skip
    return build(T.LlavaForConditionalGeneration, config)


def llava_batch() -> dict[str, Tensor]:
    ids = token_ids()
    ids[ids == 5] = 6
    ids[:, :4] = 5  # (32 / 16)² patches
    return {"input_ids": ids, "pixel_values": image(), "labels": ids}


def unet() -> nn.Module:
    import diffusers

    def make(config: Any) -> nn.Module:
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, norm_num_groups=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip

    return build(make, None)


def sentence_transformer() -> nn.Module:
    """The names that sentence-transformers gives: its first module is number 0 of a Sequential."""

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = T.BertModel(T.BertConfig(**SIZES), add_pooling_layer=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.auto_model(input_ids).last_hidden_state.mean(1)

    return build(lambda _: nn.Sequential(Transformer(), nn.Identity()), None)


def gptq() -> nn.Module:
    """Layers that keep packed integers as `qweight`, as GPTQ's and AWQ's do."""

    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 32, 32
            self.register_buffer("qweight", torch.randint(0, 2**31 - 1, (4, 32), dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return x

    return nn.Sequential(nn.Linear(32, 32), QuantLinear(), nn.Linear(32, 32)).eval()


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "clip": (
        of("CLIPModel", "CLIPConfig", text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16),
        lambda: both(return_loss=True),
    ),
    "siglip": (
        of("SiglipModel", "SiglipConfig", text_config={**CLIP_TEXT, "projection_size": 48}, vision_config=VISION),
        lambda: both(return_loss=True),
    ),
    "deepseek_v3": (
        of(
            "DeepseekV3ForCausalLM", "DeepseekV3Config", **{**TEXT, "num_key_value_heads": 4}, q_lora_rank=12,
            kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=2,
            topk_group=1, num_experts_per_tok=2, moe_intermediate_size=20, first_k_dense_replace=1,
        ),
        text,
    ),
    "qwen3_moe": (of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **EXPERTS), text),
    "mixtral": (of("MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=4), text),
    "qwen2_moe": (of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **SHARED), text),
    "qwen3_next": (
        of(
            "Qwen3NextForCausalLM", "Qwen3NextConfig", **SHARED, linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        ),
        text,
    ),
    "phimoe": (of("PhimoeForCausalLM", "PhimoeConfig", **TEXT, num_local_experts=4), text),
    "llama4": (
        of("Llama4ForCausalLM", "Llama4TextConfig", **TEXT, head_dim=8, num_local_experts=4, intermediate_size_mlp=48),
        text,
    ),
    "whisper": (
        of(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCAB, d_model=32, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=56,
            decoder_ffn_dim=56, num_mel_bins=8, max_source_positions=20, max_target_positions=20, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        lambda: {"input_features": image(40)[:, 0, :8], "labels": token_ids(2, 9)},
    ),
    "modernbert": (
        of(
            "ModernBertForMaskedLM", "ModernBertConfig", **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2,
        ),
        text,
    ),
    "distilbert": (
        of("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=VOCAB, dim=32, hidden_dim=56, n_layers=2, n_heads=4),
        text,
    ),
    "rwkv": (of("RwkvForCausalLM", "RwkvConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), text),
    "t5": (
        of(
            "T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=32, d_kv=6, d_ff=56, num_layers=2,
            num_heads=4, pad_token_id=0, decoder_start_token_id=0,
        ),
        text,
    ),
    "swin": (
        of(
            "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2],
            num_heads=[2, 4], window_size=4, num_labels=3,
        ),
        lambda: {"pixel_values": image(), "labels": torch.tensor([0, 2])},
    ),
    "unet": (
        unet,
        lambda: {
            "sample": image(8, 4), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 24), "return_dict": False
        },
    ),
    "sentence_transformer": (sentence_transformer, lambda: {"input": token_ids()}),
    "llava": (llava, llava_batch),
    "transformer_encoder": (
        lambda: build(
            lambda _: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2), None
        ),
        lambda: {"src": torch.randn(2, 5, 32)},
    ),
    "mamba": (
        of("MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2),
        text,
    ),
    "gptq": (gptq, lambda: {"input": torch.randn(3, 32)}),
}  # fmt: skip
