"""HRA: Householder reflection adaptation. Yuan et al. 2024, arXiv 2405.17484, equation 2.

    y = W H₁ H₂ … H_r x,    Hᵢ = I − 2 uᵢuᵢᵀ / ‖uᵢ‖²

In compact WY form the row x becomes x + (x Uᵀ) Z (`linalg.reflections`): two thin products, no K×K matrix and no r
passes over x. The rows of U start in equal pairs, whose reflections cancel, so that step 0 is the base model.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import OF_THE_SCALE, AdapterConfig
from ..errors import UnfitError
from ..linalg import reflections
from ..params import Params, ParamSpec
from ..primitives import InputLowRankAdd
from ..variant import Variant, register
from ._checks import check_rank


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """HRA's config; see `AdapterConfig`. r is the number of reflections, even where they start here; alpha is not
    used."""

    variant: ClassVar[str] = "hra"
    unused: ClassVar[tuple[str, ...]] = OF_THE_SCALE
    takes_dropout: ClassVar[bool] = False


def _paired_rows(U: Tensor) -> None:
    half = nn.init.kaiming_uniform_(U[::2].clone(), a=5**0.5)
    U.copy_(half.repeat_interleave(2, dim=0))


@register
class HRA(Variant):
    name = "hra"
    config = HRAConfig

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        return {"lora_U": ParamSpec((cfg.r, in_features), init=_paired_rows)}

    @staticmethod
    def check_worth(in_features: int, out_features: int, cfg: Any) -> None:
        if cfg.r % 2:
            raise UnfitError(f"HRAConfig.r must be even: reflections start in pairs that cancel; got {cfg.r}", "odd r")
        check_rank(cfg.r, in_features)

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> InputLowRankAdd:
        U = p.lora_U.to(torch.promote_types(p.lora_U.dtype, torch.float32))
        return InputLowRankAdd(U, reflections(U).mT)
