"""AntiPaSTO: singular-value steering with a block rotation. Clark 2026, arXiv 2601.07473.

    y = W x + U [diag(S + δ) R Vᵀ − diag(S) Vᵀ] x    (r of W's singular triplets; R rotates V, U, or neither)

R is block-diagonal: each block is the Cayley map (I − X)⁻¹(I + X) of a skew X bounded elementwise by
tan(θ/2)·tanh(·), so that a block of 2 turns by at most θ, and a block of n by at most 2 atan(cot(π/2n)·tan(θ/2)). δ and
R's parameters start near zero: step 0 is the base model to 1e-3; every gradient is live, since S is not zero. W is left
alone.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..config import OF_THE_SCALE
from ..linalg import blockwise, rotations
from ..params import Params, ParamSpec
from ..primitives import LowRankAdd
from ..variant import register
from ._triplets import KeepsTriplets, SVDConfig

Basis = Literal["V", "U", "none"]


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(SVDConfig):
    """AntiPaSTO's config; see `SVDConfig`. r is large since a triplet costs few parameters; alpha is not used.

    Args:
        block_size: side of a rotation block; it divides r.
        max_rotation_angle: θ, in radians, below π; the bound of one plane alone.
        rotate_basis: "V" turns the input side, "U" the output side, "none" neither.
    """

    variant: ClassVar[str] = "antipasto"
    unused: ClassVar[tuple[str, ...]] = OF_THE_SCALE
    r: int = 256
    block_size: int = 4
    max_rotation_angle: float = 0.5
    rotate_basis: Basis = "V"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block_size >= 2, "block_size", "at least 2")
        self.require(self.r % self.block_size == 0, "r", f"divisible by block_size={self.block_size}")
        self.require(0 < self.max_rotation_angle < math.pi, "max_rotation_angle", "between 0 and π")


@register
class AntiPaSTO(KeepsTriplets):
    name = "antipasto"
    config = AntiPaSTOConfig

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        specs = KeepsTriplets.param_specs(in_features, out_features, cfg)
        specs["lora_delta_s"] = ParamSpec((cfg.r,), init="near_zero")
        if cfg.rotate_basis != "none":
            angles = (cfg.r // cfg.block_size, cfg.block_size * (cfg.block_size - 1) // 2)
            specs["lora_rot_T"] = ParamSpec(angles, init="near_zero", dtype=torch.float32)
        return specs

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> LowRankAdd:
        rows = turned = p.lora_U.mT if cfg.rotate_basis == "U" else p.lora_Vh
        if cfg.rotate_basis != "none":
            turned = blockwise(rotations(p.lora_rot_T, cfg.block_size, cfg.max_rotation_angle), rows)
        # (S + δ) R V − S V, put so that nothing cancels where R is the identity.
        change = p.lora_delta_s[..., None] * turned + p.lora_S[..., None] * (turned - rows)
        A, B = (p.lora_Vh, change.mT) if cfg.rotate_basis == "U" else (change, p.lora_U)
        return LowRankAdd(A, B, dropout=cfg.dropout)
