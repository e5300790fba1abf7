"""RoAd: 2D rotary adaptation. Liao and Monz 2024, arXiv 2409.00119, section 3.1, equation 4 and table 1.

    y' = R (W x + b),    of each pair of outputs    y'ᵢ = α₁ᵢ cos θ₁ᵢ yᵢ − α₂ᵢ sin θ₂ᵢ yⱼ
                                                    y'ⱼ = α₂ⱼ sin θ₂ⱼ yᵢ + α₁ⱼ cos θ₁ⱼ yⱼ

Within each group of outputs i counts the first half, and j = i + group_size/2, as in PEFT. RoAd₁ has one θ and α a pair
(N/2 each), RoAd₂ one an output (N), RoAd₄ one for each of the two products too (2N). R is block-diagonal and is never
built. θ starts near zero and α near one, so that step 0 is the base model to 1e-3 (see `ParamSpec`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import OF_THE_RANK, OF_THE_SCALE, AdapterConfig
from ..errors import UnfitError
from ..params import Params, ParamSpec
from ..primitives import RotatePairs
from ..variant import Variant, register

Kind = Literal[1, 2, 4]


@dataclass(frozen=True, kw_only=True)
class RoadConfig(AdapterConfig):
    """RoAd's config; see `AdapterConfig`. r and alpha are not used.

    Args:
        kind: which of RoAd₁, RoAd₂ and RoAd₄: how many numbers a pair of outputs has, half of them angles.
        group_size: outputs of a group, within which those of the first half pair with those of the second; even, and a
            divisor of the layer's out_features. It says who is paired, and nothing about the number of parameters.
    """

    variant: ClassVar[str] = "road"
    unused: ClassVar[tuple[str, ...]] = (*OF_THE_RANK, *OF_THE_SCALE)
    takes_dropout: ClassVar[bool] = False
    kind: Kind = 1
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        even = self.group_size >= 2 and self.group_size % 2 == 0
        self.require(even, "group_size", "even and at least 2: it is halved to make pairs")


@register
class RoAd(Variant):
    name = "road"
    config = RoadConfig

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        if out_features % cfg.group_size:
            raise UnfitError(
                f"group_size={cfg.group_size} does not divide its out_features={out_features}; use a group_size that "
                "does, or leave this layer out",
                f"group_size={cfg.group_size} does not divide its width",
            )
        shape = (out_features * cfg.kind // 2,)
        return {"lora_theta": ParamSpec(shape, init="near_zero"), "lora_alpha": ParamSpec(shape, init="near_one")}

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> RotatePairs:
        # groups × (cos, sin) × halves × pairs, where one stands for both that are alike
        of_products, of_halves = 1 + (cfg.kind == 4), 1 + (cfg.kind > 1)
        shape = (-1, of_products, of_halves, cfg.group_size // 2)
        # By unbind: its gradient is one launch, that of an index is a whole tensor of zeros each.
        theta, alpha = (t.unflatten(-1, shape).unbind(-3) for t in (p.lora_theta, p.lora_alpha))
        c, s = (alpha[0] * theta[0].cos()).unbind(-2), (alpha[-1] * theta[-1].sin()).unbind(-2)
        return RotatePairs(_group(c[0], c[-1]), _group(-s[0], s[-1]), cfg.group_size)


def _group(first: Float[Tensor, "*E G P"], second: Float[Tensor, "*E G P"]) -> Float[Tensor, "*E N"]:
    """Of each group's halves the whole."""
    return torch.stack([first, second], -2).flatten(-3)
