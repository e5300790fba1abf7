"""What methods that start from a weight's singular triplets share: W = U S Vᵀ, of which r are kept."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..calibration import MeanAbsProjection
from ..config import AdapterConfig
from ..linalg import SVD, top_svd
from ..params import Params, ParamSpec
from ..quantized import dense_weight
from ..variant import Variant
from ._checks import check_rank, finite

Triplets = tuple[Float[Tensor, "N R"], Float[Tensor, " R"], Float[Tensor, "R K"]]


@dataclass(frozen=True, kw_only=True)
class SVDConfig(AdapterConfig):
    """Of methods that need an SVD; see `AdapterConfig`.

    Args:
        svd: "randomized" finds the top r singular values to 1e-3 without a full SVD; "exact" runs the full one.
    """

    svd: SVD = "randomized"


def strongest(layer: nn.Module, r: int, cfg: Any) -> Triplets:
    """U, S and Vᵀ of the r largest singular values of the layer's weight, in float32."""
    return top_svd(finite(dense_weight(layer, torch.float32)), r, cfg.svd)


class KeepsTriplets(Variant):
    """Keeps r triplets as buffers: the strongest or, with calibration data, those of the 2r strongest that the layer's
    inputs use most, by Sᵢ · mean |x · vᵢ|."""

    calibration = "optional"
    side_by_side = True

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        check_rank(cfg.r, in_features, out_features)
        shapes = {"lora_U": (out_features, cfg.r), "lora_S": (cfg.r,), "lora_Vh": (cfg.r, in_features)}
        return {name: ParamSpec(shape, init="zeros", as_buffer=True) for name, shape in shapes.items()}

    @staticmethod
    def init(p: Params, layer: nn.Module, cfg: Any) -> None:
        _keep(p, *strongest(layer, cfg.r, cfg))

    @staticmethod
    def statistic(p: Params, layer: nn.Module, cfg: Any) -> MeanAbsProjection:
        pool = min(2 * cfg.r, p.lora_U.shape[0], p.lora_Vh.shape[1])
        return MeanAbsProjection(strongest(layer, pool, cfg), needs=cfg.r)

    @staticmethod
    def calibrate(p: Params, statistic: Any, cfg: Any) -> None:
        U, S, Vh = statistic.svd
        kept = (S * statistic.mean()).topk(cfg.r).indices.sort().values  # in their order
        _keep(p, U[:, kept], S[kept], Vh[kept])


def _keep(p: Params, U: Tensor, S: Tensor, Vh: Tensor) -> None:
    for name, value in (("lora_U", U), ("lora_S", S), ("lora_Vh", Vh)):
        p.fill(name, value)
