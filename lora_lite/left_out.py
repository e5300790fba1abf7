"""What an attachment does not adapt, by kind of weight: how many, how large a part of the model, and why."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .params import Params
from .renaming import dotted, named_modules
from .shapes import SHAPELESS, shape
from .stacks import Stack
from .targets import candidates, fold, is_linear, is_shapeless

EXPERTS = "stacked experts that"  # so the reason begins of those that no adapter reaches


@dataclass(frozen=True)
class LeftOut:
    """Weights of one kind that no adapter of an attachment acts on.

    Args:
        kind: the weights' name, with block numbers as *.
        count: how many there are.
        share: of the model's parameters, quantised weights counted as what they stand for.
        why: the reason.
    """

    kind: str
    count: int
    share: float
    why: str

    @property
    def matters(self) -> bool:
        """Whether a user may take it for a linear layer: no embedding, convolution or small table."""
        small = self.why.startswith("read by") and self.share < 0.05
        return not (small or self.why.startswith(("an embedding", "a convolution")))

    def __str__(self) -> str:
        return f"{self.kind} ×{self.count} ({100 * self.share:.1f} %): {self.why}"


def left_out(model: nn.Module, reasons: Mapping[str, str], adapted: Iterable[str]) -> tuple[LeftOut, ...]:
    """The model's weights but the adapted ones, largest share first. `reasons` has those of linear layers by name."""
    kinds: dict[tuple[str, str], list[int]] = {}
    adapted, total = set(adapted), 0
    for layer, name, size, why in _weights(model):
        total += size
        target = layer if _is_weight(name) else name  # a stack of experts is a target under its parameter's name
        reason = reasons.get(target) or why
        if reason and target not in adapted:
            kinds.setdefault((fold(name.removesuffix(".weight")), reason), []).append(size)
    found = [LeftOut(kind, len(sizes), sum(sizes) / max(total, 1), why) for (kind, why), sizes in kinds.items()]
    return tuple(sorted(found, key=lambda each: -each.share))


def unreachable(model: nn.Module) -> tuple[LeftOut, ...]:
    """The weights that belong to no linear layer."""
    linear = [target.name for target in candidates(model)]
    return tuple(each for each in left_out(model, {}, linear) if each.why)


def out_of_reach(model: nn.Module, pattern: str) -> str:
    """What a pattern finds that belongs to no linear layer, and why; empty: nothing."""
    linear = {target.name for target in candidates(model)}
    found = {path if _is_weight(name) else name: why for path, name, _, why in _weights(model) if why}
    named = [f"{name}: {why}" for name, why in found.items() if re.search(pattern, name) and name not in linear]
    return "; ".join(named[:3])


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "W_q", "qweight")


def _weights(model: nn.Module) -> Iterable[tuple[str, str, int, str]]:
    """(module's name, weight's name, number of parameters, why it is out of reach) of each parameter; of vectors and of
    linear layers' weights the reason is empty."""
    seen: set[int] = set()
    for path, module in named_modules(model):
        if isinstance(module, Params | Stack):
            continue
        linear: Any = module if is_linear(module) else None
        for key, t in _own(module):
            name, tied = dotted(path, key), id(t) in seen
            seen.add(id(t))
            if linear is not None and _is_weight(key):
                yield path, name, 0 if tied else math.prod(shape(linear)), ""
            elif tied:
                continue
            elif is_lazy(t):
                yield path, name, 0, SHAPELESS if key == "weight" and is_shapeless(module) else ""
            else:
                yield path, name, _size(module, key, t), _out_of_reach(path, module, key, t)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    packed = [(key, t) for key, t in module.named_buffers(recurse=False) if key in ("qweight", "weight", "W_q")]
    return [*module.named_parameters(recurse=False), *packed]


def _size(module: Any, key: str, t: Tensor) -> int:
    if key == "qweight" and isinstance(getattr(module, "in_features", None), int):
        return module.in_features * module.out_features
    return t.numel()


def _out_of_reach(path: str, module: nn.Module, key: str, t: Tensor) -> str:
    kind = type(module).__name__
    if key == "qweight" or (t.ndim >= 2 and not t.is_floating_point() and hasattr(module, "in_features")):
        return f"a quantisation that can't be read ({kind})"
    if t.ndim < 2:
        return ""
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if t.ndim == 3 and "expert" in f"{path}.{kind}".lower():
        return f"{EXPERTS} {kind} runs by itself"
    return f"read by {kind} itself, which calls no layer for it"
