"""EVA: explained-variance adaptation. Paischer et al. 2024, arXiv 2410.07170, section 3.2.

    y = W x + (α/r) B A x

LoRA whose A starts as the leading principal directions of the layer's inputs on calibration data. B starts as zero, so
that step 0 is the base model. With ρ > 1 the layers' ranks are shared out anew: of all layers' directions, at most ρ·r
of each, those stay that explain the largest shares of their layer's variance, as many as there were ranks.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..calibration import InputPCA
from ..params import Params, ParamSpec
from ..variant import register
from .lora import LoRA, LoRAConfig


@dataclass(frozen=True, kw_only=True)
class EVAConfig(LoRAConfig):
    """EVA's config; see `AdapterConfig`.

    Args:
        center: subtract the inputs' mean, as the authors' code does, so that directions explain variance.
        rho: a layer's rank can grow to ρ·r, and falls to make room elsewhere, to none at all if need be; 1 keeps r. The
            ranks become the attachment's `rank_pattern`. Its `alpha_pattern` keeps every layer's scale.
    """

    variant: ClassVar[str] = "eva"
    center: bool = True
    rho: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.rho < 1e6, "rho", "at least 1, and less than a million")


@register
class EVA(LoRA):
    name = "eva"
    config = EVAConfig
    calibration = "required"

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        return {**LoRA.param_specs(in_features, out_features, cfg), "lora_A": ParamSpec((cfg.r, in_features), "zeros")}

    @staticmethod
    def statistic(p: Params, layer: nn.Module, cfg: Any) -> InputPCA:
        return InputPCA(min(round(cfg.r * cfg.rho), p.lora_A.shape[1], p.lora_B.shape[0]), cfg.center)

    @staticmethod
    def plan(statistics: dict[str, Any], cfg: Any) -> Any:
        if cfg.rho == 1:
            return cfg
        before = {layer: cfg.for_layer(layer) for layer in statistics}
        shares = [(share, layer) for layer, pca in statistics.items() for share in pca.explained().tolist()]
        shares.sort(key=lambda each: -each[0])
        kept = [layer for _, layer in shares[: sum(each.r for each in before.values())]]
        ranks = {rf"^{re.escape(layer)}$": kept.count(layer) for layer in statistics}
        alphas = {}
        for layer, (pattern, rank) in zip(statistics, ranks.items(), strict=True):
            ratio = rank / before[layer].r
            alphas[pattern] = before[layer].alpha * (ratio**0.5 if cfg.rslora else ratio)
        return dataclasses.replace(
            cfg,
            rank_pattern={pattern: rank for pattern, rank in ranks.items() if rank},
            alpha_pattern={pattern: alpha for pattern, alpha in alphas.items() if alpha},
            exclude_names=(*cfg.exclude_names, *(pattern for pattern, rank in ranks.items() if not rank)),
        )

    @staticmethod
    def calibrate(p: Params, statistic: Any, cfg: Any) -> None:
        p.fill("lora_A", statistic.components(cfg.r))
