"""Whether a backward will run again what runs now: in a checkpoint (torch.utils.checkpoint)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.utils.checkpoint import CheckpointFunction, _checkpoint_hook

from .calls import callers


def saving() -> Any:
    """How tensors are saved for the backward, in two functions: a checkpoint's own way, inside of one; None: as they
    are."""
    return None if torch.compiler.is_compiling() else _top_saved_tensors_default_hooks(True)


def is_checkpoints(pack: Any) -> bool:
    """Whether this way of saving tensors is a checkpoint's. Others run nothing again, and may live for ever."""
    code = getattr(pack, "__code__", None)
    return code is not None and code in _checkpoint_hook.__init__.__code__.co_consts


def reentrant() -> Iterator[tuple[Any, bool]]:
    """The calls of reentrant checkpointing under way, the innermost first, each with whether it is its forward, which
    runs without gradients, or its backward, which runs that again. To look for them takes a while."""
    for frame in callers():
        if frame.f_code is CheckpointFunction.forward.__code__:
            yield frame.f_locals["ctx"], True
        elif frame.f_code is CheckpointFunction.backward.__code__:
            yield frame.f_locals["ctx"], False


def in_checkpoint() -> bool:
    """Whether the forward of one is under way."""
    if torch.is_grad_enabled():
        way = saving()
        return way is not None and is_checkpoints(way[0])
    return any(is_forward for _, is_forward in reentrant())
