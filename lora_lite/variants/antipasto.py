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
from torch import Tensor, nn

from ..calibration import MeanAbsProjection
from ..config import AdapterConfig
from ..linalg import SVD, blockwise, rotations, top_svd
from ..params import Params, ParamSpec
from ..primitives import LowRankAdd
from ..quantized import dense_weight
from ..variant import Variant, register
from ._checks import check_rank

Basis = Literal["V", "U", "none"]


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(AdapterConfig):
    """AntiPaSTO's config; see `AdapterConfig`. r is large since a triplet costs few parameters; alpha is not used.

    Args:
        block_size: side of a rotation block; it divides r.
        max_rotation_angle: θ, in radians, below π; the bound of one plane alone.
        rotate_basis: "V" turns the input side, "U" the output side, "none" neither.
        svd: as in `PiSSAConfig`.
    """

    variant: ClassVar[str] = "antipasto"
    r: int = 256
    block_size: int = 4
    max_rotation_angle: float = 0.5
    rotate_basis: Basis = "V"
    svd: SVD = "randomized"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block_size >= 2, "block_size", "at least 2")
        self.require(self.r % self.block_size == 0, "r", f"divisible by block_size={self.block_size}")
        self.require(0 < self.max_rotation_angle < math.pi, "max_rotation_angle", "between 0 and π")
        self.require_one_of("rotate_basis", Basis)
        self.require_one_of("svd", SVD)


@register
class AntiPaSTO(Variant):
    name = "antipasto"
    config = AntiPaSTOConfig
    calibration = "optional"
    side_by_side = True

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        check_rank(cfg.r, in_features, out_features)
        blocks, upper = cfg.r // cfg.block_size, cfg.block_size * (cfg.block_size - 1) // 2
        specs = {
            "lora_U": ParamSpec((out_features, cfg.r), init="zeros", as_buffer=True),
            "lora_S": ParamSpec((cfg.r,), init="zeros", as_buffer=True),
            "lora_Vh": ParamSpec((cfg.r, in_features), init="zeros", as_buffer=True),
            "lora_delta_s": ParamSpec((cfg.r,), init="near_zero"),
        }
        if cfg.rotate_basis != "none":
            specs["lora_rot_T"] = ParamSpec((blocks, upper), init="near_zero", dtype=torch.float32)
        return specs

    @staticmethod
    def init(p: Params, layer: nn.Module, cfg: Any) -> None:
        _fill(p, *top_svd(dense_weight(layer, torch.float32), cfg.r, cfg.svd))

    @staticmethod
    def statistic(p: Params, layer: nn.Module, cfg: Any) -> MeanAbsProjection:
        pool = min(2 * cfg.r, p.lora_U.shape[0], p.lora_Vh.shape[1])
        return MeanAbsProjection(top_svd(dense_weight(layer, torch.float32), pool, cfg.svd), needs=cfg.r)

    @staticmethod
    def calibrate(p: Params, statistic: Any, cfg: Any) -> None:
        """Of the 2r strongest directions keep the r with the largest Sᵢ · mean |x · vᵢ|, in their order."""
        U, S, Vh = statistic.svd
        kept = (S * statistic.mean()).topk(cfg.r).indices.sort().values
        _fill(p, U[:, kept], S[kept], Vh[kept])

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> LowRankAdd:
        U, S, Vh, S_new = p.lora_U, p.lora_S, p.lora_Vh, p.lora_S + p.lora_delta_s
        if cfg.rotate_basis == "none":
            return LowRankAdd(p.lora_delta_s[..., None] * Vh, U, dropout=cfg.dropout)
        R = rotations(p.lora_rot_T, cfg.block_size, cfg.max_rotation_angle)
        rows = Vh if cfg.rotate_basis == "V" else U.mT
        change = S_new[..., None] * blockwise(R, rows) - S[..., None] * rows
        A, B = (change, U) if cfg.rotate_basis == "V" else (Vh, change.mT)
        return LowRankAdd(A, B, dropout=cfg.dropout)


def _fill(p: Params, U: Tensor, S: Tensor, Vh: Tensor) -> None:
    for name, value in (("lora_U", U), ("lora_S", S), ("lora_Vh", Vh)):
        p.fill(name, value)
