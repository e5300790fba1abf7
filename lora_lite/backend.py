"""Which implementation of the token-space operations a layer runs. The only place that chooses."""

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from . import reference
from .operators import transformed

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_IN_TRANSFORMS = "the kernels neither differentiate forward nor run within torch.func or a trace"

# By whose attributes a graph finds the kernels; a module that a constant holds it can't take apart.
_package: Any = sys.modules[__name__.rpartition(".")[0]]

_in_force: dict[tuple[str, torch.device, torch.dtype], tuple[ModuleType, str, str]] = {}
_warned: set[str] = set()


def triton_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels can't run on this device and dtype; None where they can."""
    if dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cpu", "cuda"):
        return f"the kernels don't run on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        if not import_module("lora_lite.kernels.interpreter").ACTIVE:
            return "the layer is on a CPU; TRITON_INTERPRET=1, set before Python starts, runs kernels there, slowly"
    elif torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return "the kernels need compute capability 8.0 or later; this GPU has {}.{}".format(*capability)
    return None


def check_backend(requested: str) -> None:
    """Raise a ValueError unless `requested` is a backend."""
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {requested!r}")


def select(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    """(operations, name of the backend, reason for it).

    "triton" that has to fall back warns once for each reason; "auto" falls back silently. Forward-mode derivatives and
    function transforms (torch.func) run on the reference.

    Raises:
        ValueError: `requested` is no backend.
    """
    key = (requested, device, dtype)
    chosen = _chosen_for_graph(*key) if torch.compiler.is_compiling() else _in_force.get(key) or _chosen(*key)
    if chosen[0] is not reference and transformed():
        chosen = reference, "reference", _IN_TRANSFORMS
    if requested == "triton" and chosen[0] is reference and chosen[2] not in _warned:
        _warned.add(chosen[2])
        warnings.warn(f'backend="triton" runs the PyTorch reference instead: {chosen[2]}', stacklevel=3)
    return chosen


def _chosen(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    """The choice for tokens outside of transforms, made once."""
    check_backend(requested)
    key = (requested, device, dtype)
    if key not in _in_force:
        _in_force[key] = _choose(*key)
    return _in_force[key]


@torch.compiler.assume_constant_result  # no graph has the imports behind a choice
def _named(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    return _chosen(requested, device, dtype)[1:]


def _chosen_for_graph(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    """The same for a graph that is compiled, which takes the operations from where their module stands."""
    name, reason = _named(requested, device, dtype)
    return (reference if name == "reference" else _package.kernels.ops), name, reason


def _choose(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    if requested == "reference":
        return reference, "reference", "requested"
    reason = triton_unavailable(device, dtype)
    if reason is not None:
        return reference, "reference", reason
    ops = import_module("lora_lite.kernels.ops")  # here, so that lora_lite imports without Triton
    return ops, "triton", "requested" if requested == "triton" else f"the kernels run on {device.type}"
