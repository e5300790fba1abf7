"""A variant: the tensors of an adapter, their start, and the primitive that they make. And the registry of all."""

from dataclasses import MISSING, fields
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from .calibration import Statistic
from .config import AdapterConfig
from .errors import AttachError
from .params import Params, ParamSpec
from .primitives import Primitive


class Variant:
    """One adapter method, in parameter space. Subclass it, decorate with `register`, and attach its config.

    Methods are static: all state is in `p`, the layer's own tensors. `cfg` is the variant's config.
    """

    name: ClassVar[str]
    config: ClassVar[type[AdapterConfig]]
    calibration: ClassVar[Literal["none", "optional", "required"]] = "none"
    on_embeddings: ClassVar[bool] = True  # whether its low-rank sum may stand where each row of x is a single id
    side_by_side: ClassVar[bool] = False  # whether `init` draws no random numbers, so that its order does not matter

    @staticmethod
    def param_specs(in_features: int, out_features: int, cfg: Any) -> dict[str, ParamSpec]:
        """The tensors of one layer, by name. Names start with `lora_`."""
        raise NotImplementedError

    @staticmethod
    def check_worth(in_features: int, out_features: int, cfg: Any) -> None:
        """Raise an UnfitError where the formula holds, and a layer of this shape is still none to train it on. Not
        asked on load: a file may have what another library trained."""

    @staticmethod
    def init(p: Params, layer: nn.Module, cfg: Any) -> None:
        """Fill what the specs could not: tensors that start from the layer's weight. Not called on load, nor where
        `calibrate` does this instead."""

    @staticmethod
    def derive(p: Params, layer: nn.Module, cfg: Any) -> None:
        """Compute the `derived` tensors from the base layer, on attach and on load."""

    @staticmethod
    def statistic(p: Params, layer: nn.Module, cfg: Any) -> Statistic:
        """What to gather from the layer's inputs on the calibration data."""
        raise NotImplementedError

    @staticmethod
    def plan(statistics: dict[str, Any], cfg: Any) -> Any:
        """The config, once every layer's statistic is there: `cfg`, or another that differs from layer to layer."""
        return cfg

    @staticmethod
    def calibrate(p: Params, statistic: Any, cfg: Any) -> None:
        """Fill tensors from the statistic, once all calibration batches have passed."""
        raise NotImplementedError

    @staticmethod
    def primitive(p: Params, layer: nn.Module, cfg: Any) -> Primitive:
        """The differentiable computation on the adapter's own tensors: O((K + N)·r²), and no token."""
        raise NotImplementedError


REGISTRY: dict[str, type[Variant]] = {}
V = TypeVar("V", bound=type[Variant])


def register(variant: V) -> V:
    """Class decorator: make `variant` known to `attach` and `load` under its `name`.

    Raises:
        ValueError: name, config or primitive is missing, name and config disagree, the config's defaults are not those
            that its class shows, or another variant has the name.
    """
    name, config = getattr(variant, "name", None), getattr(variant, "config", None)
    if not name or config is None or getattr(config, "variant", None) != name:
        raise ValueError(f"{variant.__name__} needs `name` and `config`, with config.variant == name; got {name!r}")
    if name in REGISTRY and _whereabouts(REGISTRY[name]) != _whereabouts(variant):
        raise ValueError(
            f"a variant named {name!r} is registered already, {_whereabouts(REGISTRY[name])}; give yours another name"
        )
    if variant.primitive is Variant.primitive:
        raise ValueError(f"{variant.__name__} needs a `primitive`: what it computes around a layer")
    defaults = {each.name: each.default for each in fields(config) if each.default is not MISSING}
    if lost := [field for field, default in defaults.items() if getattr(config, field, default) != default]:
        raise ValueError(
            f"{config.__name__} gives {', '.join(lost)} another default, which counts only with its type and in a "
            "dataclass: write `r: int = 8`, and @dataclass(frozen=True, kw_only=True) above each class"
        )
    REGISTRY[name] = variant
    return variant


def _whereabouts(variant: type) -> str:
    return f"{variant.__module__}.{variant.__qualname__}"


def variant_of(cfg: AdapterConfig) -> type[Variant]:
    """The registered variant of a config.

    Raises:
        AttachError: it is no config of one.
    """
    name = getattr(cfg, "variant", None)
    if name not in REGISTRY or not isinstance(cfg, AdapterConfig):
        raise AttachError(
            f"cfg must be the config of a registered variant ({', '.join(REGISTRY)}); got {type(cfg).__name__}"
        )
    return REGISTRY[name]


def require_loadable(cfg: AdapterConfig) -> None:
    """Raise an AttachError where a file of it could not be read: its class has fields that its variant's has not."""
    known = variant_of(cfg).config
    if more := sorted({each.name for each in fields(cfg)} - {each.name for each in fields(known)}):
        raise AttachError(
            f"{type(cfg).__name__} has fields ({', '.join(more)}) of which {known.__name__}, the config of variant "
            f"{cfg.variant!r}, knows nothing, so that its files could not be loaded; register a variant "
            "of your own with it"
        )
