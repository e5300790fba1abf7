"""Which implementation of the token-space operations a layer runs. The only place that chooses."""

import warnings
from types import ModuleType
from typing import Literal, get_args

import torch

from . import reference

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def triton_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels can't run on this device and dtype; None where they can."""
    return "this version of lora-lite has no Triton kernels yet"


def check_backend(requested: str) -> None:
    """Raise a ValueError unless `requested` is a backend."""
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {requested!r}")


def select(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    """(operations, name of the backend, reason for it).

    "triton" that has to fall back warns once for each reason; "auto" falls back silently.

    Raises:
        ValueError: `requested` is no backend.
    """
    check_backend(requested)
    if requested == "reference":
        return reference, "reference", "requested"
    reason = triton_unavailable(device, dtype)
    assert reason is not None
    if requested == "triton" and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f'backend="triton" runs the PyTorch reference instead: {reason}', stacklevel=3)
    return reference, "reference", reason


_warned: set[str] = set()
