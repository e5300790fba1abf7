"""DeLoRA: decoupled angles and strength. Bini et al. 2025, arXiv 2503.18225, equation 6.

    y = W x + (λ/r) B Ξ A (w ∘ x),    Ξᵢ = 1 / (‖aᵢ‖ ‖bᵢ‖)

aᵢ are A's rows and bᵢ B's columns; w (K) are the norms of W's columns, taken once. ‖·‖ is held above 1e-4. B starts as
zero, so that step 0 is the base model for any λ; λ = 0 would leave every gradient at zero.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..config import OF_THE_SCALE, AdapterConfig
from ..params import Params, ParamSpec
from ..primitives import LowRankAdd
from ..quantized import dense_weight
from ..variant import Variant, register
from ._checks import check_rank, finite


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(AdapterConfig):
    """DeLoRA's config; see `AdapterConfig`. alpha is not used: λ sets the strength.

    Args:
        lambda0: where the trainable λ starts; above 0.
    """

    variant: ClassVar[str] = "delora"
    unused: ClassVar[tuple[str, ...]] = OF_THE_SCALE
    lambda0: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.lambda0 > 0, "lambda0", "greater than 0")


@register
class DeLoRA(Variant):
    name = "delora"
    config = DeLoRAConfig
    on_embeddings = False  # A's rows would be normalised over the vocabulary: each step would move every id

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, in_features), init="kaiming"),
            "lora_B": ParamSpec((out_features, cfg.r), init="zeros"),
            "lora_lambda": ParamSpec((1,), init=lambda t: t.fill_(cfg.lambda0)),
            "lora_wnorm": ParamSpec((in_features,), init="ones", as_buffer=True),
        }

    @staticmethod
    def check_worth(in_features: int, out_features: int, cfg: Any) -> None:
        check_rank(cfg.r, in_features, out_features)

    @staticmethod
    def init(p: Params, layer: nn.Module, cfg: Any) -> None:
        p.fill("lora_wnorm", finite(dense_weight(layer, p.lora_wnorm.dtype).norm(dim=0)))

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> LowRankAdd:
        A, B = p.lora_A, p.lora_B
        norms = A.norm(dim=-1).clamp_min(1e-4) * B.norm(dim=-2).clamp_min(1e-4)
        strength = p.lora_lambda / (cfg.r * norms)
        return LowRankAdd(A * strength[..., None] * p.lora_wnorm[..., None, :], B, dropout=cfg.dropout)
