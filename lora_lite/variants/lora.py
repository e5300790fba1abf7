"""LoRA: low-rank adaptation. Hu et al. 2021, arXiv 2106.09685, section 4.1.

    y = W x + (α/r) B A x

A (r×K) starts Kaiming-uniform and B (N×r) zero, so that step 0 is the base model: A's gradient is zero there, B's not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import AdapterConfig
from ..params import Params, ParamSpec
from ..primitives import LowRankAdd
from ..shapes import is_embedding
from ..variant import Variant, register
from ._checks import check_rank


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """LoRA's config; see `AdapterConfig`."""

    variant: ClassVar[str] = "lora"


@register
class LoRA(Variant):
    name = "lora"
    config = LoRAConfig

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, in_features), init="kaiming"),
            "lora_B": ParamSpec((out_features, cfg.r), init="zeros"),
        }

    @staticmethod
    def check_worth(in_features: int, out_features: int, cfg: Any) -> None:
        check_rank(cfg.r, in_features, out_features)

    @staticmethod
    def init(p: Params, layer: nn.Module, cfg: Any) -> None:
        if is_embedding(layer):
            # An id meets one column of A: a fan-in of 1, of which ±1/√in_features knows nothing. And A is the factor
            # that starts as zero, so that ids which training never shows keep their rows.
            p.fill("lora_A", torch.zeros_like(p.lora_A))
            p.fill("lora_B", torch.randn_like(p.lora_B))

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> LowRankAdd:
        return LowRankAdd(p.lora_A, p.lora_B, cfg.scale, cfg.dropout)
