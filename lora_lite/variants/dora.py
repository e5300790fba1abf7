"""DoRA: weight-decomposed low-rank adaptation. Liu et al. 2024, arXiv 2402.09353, equation 5 and section 4.3.

    y = m ∘ V x / ‖V‖ + b,    V = W + (α/r) B A,    ‖·‖ of each row

m (N) starts as ‖W‖ and B as zero, so that step 0 is the base model. The norm is held constant in the backward (§4.3)
and comes from W Aᵀ and A Aᵀ: neither V nor B A is ever built.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..config import AdapterConfig
from ..params import Params, ParamSpec
from ..primitives import LowRankAddRescale
from ..quantized import bias_of, dense_weight, stored_weight
from ..variant import Variant, register
from ._checks import check_rank, finite


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(AdapterConfig):
    """DoRA's config; see `AdapterConfig`."""

    variant: ClassVar[str] = "dora"


@register
class DoRA(Variant):
    name = "dora"
    config = DoRAConfig

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, in_features), init="kaiming"),
            "lora_B": ParamSpec((out_features, cfg.r), init="zeros"),
            "lora_m": ParamSpec((out_features,), init="ones"),
            "lora_w_sq": ParamSpec((out_features,), init="zeros", derived=True),  # ‖W‖², constant
        }

    @staticmethod
    def check_worth(in_features: int, out_features: int, cfg: Any) -> None:
        check_rank(cfg.r, in_features, out_features)

    @staticmethod
    def init(p: Params, layer: nn.Module, cfg: Any) -> None:
        p.fill("lora_m", finite(dense_weight(layer, p.lora_m.dtype).norm(dim=1)))

    @staticmethod
    def derive(p: Params, layer: nn.Module, cfg: Any) -> None:
        p.fill("lora_w_sq", dense_weight(layer, p.lora_w_sq.dtype).square().sum(1))

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> LowRankAddRescale:
        W, bias = stored_weight(layer), bias_of(layer)
        return LowRankAddRescale(p.lora_A, p.lora_B, cfg.scale, p.lora_m, W, p.lora_w_sq, bias, cfg.dropout)
