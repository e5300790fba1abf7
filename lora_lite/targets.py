"""Find the layers to adapt, by structure: anything with in_features, out_features and a weight."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import AdapterConfig, Role
from .errors import AttachError
from .quantized import weight_of
from .sharding import mesh_of

# Names of square layers that write into the residual stream; any other square layer reads from it.
_WRITERS = re.compile(r"(o_proj|out_proj|down_proj|c_proj|out_lin|lin2|fc2|wo|w2|dense|dense_4h_to_h)$")


@dataclass(frozen=True)
class Target:
    """A layer to adapt: its name in the model, the module, its place beside the residual stream, and the device mesh
    that FSDP2 has sharded it over, if any."""

    name: str
    layer: nn.Module
    role: Role
    mesh: Any = None


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for whatever has its shape: quantised layers are no subclasses that we import."""
    return (
        isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and weight_of(module) is not None
    )


def candidates(model: nn.Module) -> list[Target]:
    """Every linear layer of the model, in its order."""
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    width = _residual_width(model, linears)
    return [
        Target(name, layer, _role(name, layer, width), mesh_of(model, name, weight_of(layer)))
        for name, layer in linears.items()
    ]


def find_targets(model: nn.Module, cfg: AdapterConfig) -> list[Target]:
    """The layers that `cfg` selects, in the model's order.

    Raises:
        AttachError: there is none; the message lists the model's candidates.
    """
    found = candidates(model)
    targets = [target for target in found if _selected(target, cfg)]
    if not targets:
        raise AttachError(_no_match(found, cfg))
    return targets


def _selected(target: Target, cfg: AdapterConfig) -> bool:
    if any(re.search(pattern, target.name) for pattern in cfg.exclude_names):
        return False
    if cfg.target_names and not any(re.search(pattern, target.name) for pattern in cfg.target_names):
        return False
    if cfg.target_roles and target.role not in cfg.target_roles:
        return False
    return cfg.layers is None or _block_index(target.name) in cfg.layers


def _block_index(name: str) -> int | None:
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None


def _residual_width(model: nn.Module, linears: dict[str, nn.Module]) -> int:
    """hidden_size of the model's config; without one, the width that most layers read or write."""
    config = getattr(model, "config", None)
    for holder in (getattr(config, "text_config", None), config):
        width = getattr(holder, "hidden_size", None)
        if isinstance(width, int):
            return width
    widths = Counter(width for m in linears.values() for width in (m.in_features, m.out_features))
    return widths.most_common(1)[0][0] if widths else 0  # type: ignore[return-value]


def _role(name: str, layer: nn.Module, width: int) -> Role:
    reads, writes = layer.in_features == width, layer.out_features == width
    if reads and writes:
        return "writer" if _WRITERS.search(name) else "reader"
    return "reader" if reads else "writer" if writes else "inner"


def _no_match(found: list[Target], cfg: AdapterConfig) -> str:
    """One line a kind of layer: block indices are folded, so a deep model's list stays short."""
    kinds: dict[str, int] = Counter(f"{re.sub(r'(?<![^.])[0-9]+(?![^.])', '*', t.name)} ({t.role})" for t in found)
    listing = "\n".join(f"  {kind} ×{count}" for kind, count in kinds.items()) or "  (the model has no linear layer)"
    return (
        f"no layer matches target_names={cfg.target_names}, target_roles={cfg.target_roles}, "
        f"exclude_names={cfg.exclude_names}, layers={cfg.layers}. The model's candidates are:\n{listing}"
    )
