"""IA³: infused adapter by inhibiting and amplifying inner activations. Liu et al. 2022, arXiv 2205.05638, section 3.3.

    ia3:    y = g ∘ (W x + b)    on keys and values
    ia3_ff: y = W (g ∘ x) + b    on the second layer of the feed-forward block

g starts near one (the paper: at one), so that step 0 is the base model to 1e-3; `ParamSpec` says why. The paper trains
both kinds at once.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..config import OF_THE_RANK, OF_THE_SCALE, AdapterConfig
from ..params import Params, ParamSpec
from ..primitives import ScaleInput, ScaleOutput
from ..variant import Variant, register


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """IA³ on outputs; see `AdapterConfig`. r and alpha are not used. Targets keys and values by default.

    The paper scales keys and values, not queries. A layer that computes all three (query_key_value, Wqkv, qkv_proj,
    c_attn) is therefore no default: a model with no other is refused, until `target_names` names that layer.
    """

    variant: ClassVar[str] = "ia3"
    unused: ClassVar[tuple[str, ...]] = (*OF_THE_RANK, *OF_THE_SCALE)
    takes_dropout: ClassVar[bool] = False
    target_roles: tuple = ()
    target_names: tuple[str, ...] = (
        r"(^|\.)(k_proj|v_proj|key|value|key_proj|value_proj|k_lin|v_lin|kv_b_proj)(\.linear)?$",  # Moshi's
        r"Attention\.(k|v)$",  # T5
    )


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """IA³ on inputs; see `AdapterConfig`. r and alpha are not used. Targets the feed-forward output by default."""

    variant: ClassVar[str] = "ia3_ff"
    unused: ClassVar[tuple[str, ...]] = (*OF_THE_RANK, *OF_THE_SCALE)
    takes_dropout: ClassVar[bool] = False
    target_roles: tuple = ()
    target_names: tuple[str, ...] = (
        r"(^|\.)(down_proj|fc2|lin2|dense_4h_to_h)$",
        r"(^|\.)(mlp\.(Wo|c_proj)|DenseReluDense\.wo)$",  # ModernBERT, BigCode, T5
        r"layer\.\d+\.output\.dense$",
    )


@register
class IA3(Variant):
    name = "ia3"
    config = IA3Config

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        return {"lora_g": ParamSpec((out_features,), init="near_one")}

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> ScaleOutput:
        return ScaleOutput(p.lora_g)


@register
class IA3FF(Variant):
    name = "ia3_ff"
    config = IA3FFConfig

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        return {"lora_g": ParamSpec((in_features,), init="near_one")}

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> ScaleInput:
        return ScaleInput(p.lora_g)
