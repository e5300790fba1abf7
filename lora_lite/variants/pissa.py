"""PiSSA: principal singular values and vectors adaptation. Meng et al. 2024, arXiv 2404.02948, section 3.

    y = W x + (α/r) (B A − B₀ A₀) x,    B₀ = U √(S r/α),  A₀ = √(S r/α) Vᵀ   (top r of W = U S Vᵀ)

The paper trains B A beside the residual W − B₀A₀; this is the same function with W left alone. A and B start as A₀ and
B₀, so that step 0 is the base model. A₀ and B₀ are saved, so that loading needs no SVD.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..params import Params, ParamSpec
from ..primitives import LowRankAdd
from ..variant import Variant, register
from ._checks import check_rank
from ._triplets import SVDConfig, strongest


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(SVDConfig):
    """PiSSA's config; see `SVDConfig`."""

    variant: ClassVar[str] = "pissa"


@register
class PiSSA(Variant):
    name = "pissa"
    config = PiSSAConfig
    side_by_side = True

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        A, B = (cfg.r, in_features), (out_features, cfg.r)
        return {
            "lora_A": ParamSpec(A, init="zeros"),
            "lora_B": ParamSpec(B, init="zeros"),
            "lora_A0": ParamSpec(A, init="zeros", as_buffer=True),
            "lora_B0": ParamSpec(B, init="zeros", as_buffer=True),
        }

    @staticmethod
    def check_worth(in_features: int, out_features: int, cfg: Any) -> None:
        check_rank(cfg.r, in_features, out_features)

    @staticmethod
    def init(p: Params, layer: nn.Module, cfg: Any) -> None:
        U, S, Vh = strongest(layer, cfg.r, cfg)
        root = (S / cfg.scale).sqrt()
        for name in ("lora_A", "lora_A0"):
            p.fill(name, root[:, None] * Vh)
        for name in ("lora_B", "lora_B0"):
            p.fill(name, U * root)

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> LowRankAdd:
        A = torch.cat([p.lora_A, p.lora_A0], dim=-2)
        B = torch.cat([p.lora_B, -p.lora_B0], dim=-1)
        return LowRankAdd(A, B, cfg.scale, cfg.dropout)
