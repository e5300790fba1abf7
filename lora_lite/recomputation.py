"""Whether a backward will run again what runs now: in a checkpoint (torch.utils.checkpoint)."""

import sys
from types import FrameType
from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.utils.checkpoint import CheckpointFunction, _checkpoint_hook


def packing() -> Any:
    """How tensors are saved for the backward, in two functions; None: as they are."""
    return None if torch.compiler.is_compiling() else _top_saved_tensors_default_hooks(True)


def is_checkpoints(pack: Any) -> bool:
    """Whether this way of saving tensors is a checkpoint's. Others run nothing again, and may live for ever."""
    code = getattr(pack, "__code__", None)
    return code is not None and code in _checkpoint_hook.__init__.__code__.co_consts


def in_checkpoint() -> bool:
    """Whether the forward of one is under way. A reentrant one's runs without gradients, and shows in the frames."""
    if torch.is_grad_enabled():
        saving = packing()
        return saving is not None and is_checkpoints(saving[0])
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False
