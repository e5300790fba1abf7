"""EVA: explained-variance adaptation. Paischer et al. 2024, arXiv 2410.07170, section 3.2.

    y = W x + (α/r) B A x

LoRA whose A starts as the leading principal directions of the layer's inputs on calibration data. B starts as zero, so
that step 0 is the base model.
"""

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
    """

    variant: ClassVar[str] = "eva"
    center: bool = True


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
        return InputPCA(cfg.r, cfg.center)

    @staticmethod
    def calibrate(p: Params, statistic: Any, cfg: Any) -> None:
        p.fill("lora_A", statistic.components())
