"""A layer's shape as a linear map, whatever it calls it: nn.Linear and all that has its attributes, transformers'
Conv1D (GPT-2's, whose weight is stored in × out), a mixture's stack."""

from typing import Any

from .stacks import Stack


def features(layer: Any) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that acts on the last dimension; None: it is no such layer."""
    names = ("nx", "nf") if is_conv1d(layer) else ("in_features", "out_features")
    found = tuple(getattr(layer, name, None) for name in names)
    return found if all(isinstance(size, int) for size in found) else None  # type: ignore[return-value]


def shape(layer: Any) -> tuple[int, int]:
    """`features` of a layer that has them."""
    found = features(layer)
    assert found is not None  # it is a target
    return found


def is_conv1d(layer: Any) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is stored in × out."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "nx")


def copies(layer: Any) -> int | None:
    """How many matrices of that shape a stack of experts has; None: it is no stack."""
    return layer.num_experts if isinstance(layer, Stack) else None


def described(layer: Any) -> str:
    """The shape for people; of a stack with the number of experts."""
    inner, outer = shape(layer)
    experts = copies(layer)
    return f"{inner} → {outer}" + ("" if experts is None else f", {experts} experts")
