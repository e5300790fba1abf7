"""Where a layer's output is nobody else's, a low-rank sum is written into it: on a CPU fresh memory takes longer to get
than the sum to compute.

That holds of PyTorch's own layers, whose output is new and is not kept for the backward, where nothing else looks on:
no hook that sees the output before the adapter, nor a mode that sees operators.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils.hooks import RemovableHandle

from . import reference
from .primitives import LowRankAdd, Primitive
from .shapes import is_conv1d


def _expand_add(*args: Any) -> Tensor:
    return reference.expand_add(*args, own=True)


OPS = SimpleNamespace(expand_add=_expand_add)


def ops_for(primitive: Primitive, ops: Any, layer: nn.Module, hooks: Sequence[RemovableHandle]) -> Any:
    """The operations for `on_output` of the only primitive around a layer, in place of `ops`. `hooks`: the adapter's
    own."""
    alone = (
        not torch.compiler.is_compiling()
        and ops is reference
        and type(primitive) is LowRankAdd  # another may use the output twice
        and (type(layer) in (nn.Linear, nn.Embedding) or is_conv1d(layer))
        and "forward" not in vars(layer)
        and type(layer.weight) in (Tensor, nn.Parameter)
        and next(iter(layer._forward_hooks)) in [hook.id for hook in hooks]
        and not hooks_of_all._global_forward_hooks
        and torch._C._len_torch_function_stack() == 0
    )
    return OPS if alone else ops
