"""A launch: the device's, and without Triton's binder where an equal one has been made before.

What a kernel is compiled for follows from its arguments: numbers that are 1 or divisible by 16, dtypes, alignment. The
binder finds that out anew at every launch and takes most of its CPU time. Here the arguments themselves are the key of
a look-up, and what Triton has compiled for equal ones is launched directly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tuning import Config

# Triton's backend for AMD also looks at how much memory a tensor's storage has.
_REMEMBER = torch.version.hip is None
_MOST = 4096

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    constants: Sequence[Any],
    config: Config | None = None,
) -> None:
    """Start a kernel, whose parameters are these in their order, with a row's warps and stages, on the device that
    holds the first tensor. Each parameter gets numbers of one type: 1 and 1.0 are equal as keys."""
    assert tensors[0] is not None
    index = tensors[0].get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(kernel, grid, tensors, numbers, constants, config)
    options = (None, None) if config is None else (config.num_warps, config.num_stages)
    kinds = [None if t is None else (t.dtype, t.data_ptr() & 15) for t in tensors]
    key = (id(kernel), index, *kinds, *numbers, *constants, *options)
    if (known := _compiled.get(key)) is not None:
        known[(*grid, 1, 1)[:3]](*tensors, *numbers, *constants)
        return None
    known = kernel[grid](*tensors, *numbers, *constants, **({} if config is None else config.launch))
    if known is not None and _REMEMBER:  # the interpreter compiles nothing
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = known
    return None


def forget() -> None:
    """What was compiled; for benchmarks, which put another driver under Triton."""
    _compiled.clear()
