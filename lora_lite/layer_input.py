"""Which of the arguments of a layer's call is its input."""

from typing import Any

from torch import Tensor

from .errors import AttachError


def input_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input with which a layer is called."""
    return args[0] if args else kwargs[input_key(name, kwargs)]


def input_key(name: str, kwargs: dict[str, Any] | None) -> str:
    """Under which keyword the layer gets its input."""
    tensors = [key for key, value in (kwargs or {}).items() if isinstance(value, Tensor)]
    if "input" in tensors:
        return "input"
    if len(tensors) != 1:
        raise AttachError(
            f"{name}: called without a positional argument and with the tensors {tensors}: which is its input? pass "
            "that first, or as input="
        )
    return tensors[0]
