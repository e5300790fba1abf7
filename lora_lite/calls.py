"""Calls of modules under way, by thread: what a pre-hook leaves for the hook that follows it.

Nothing of a call survives it, however it ends. A graph that is compiled, and checkpoints a block, may not write to what
was there before the block: there what is left goes with the tensor that the module gets.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Call(NamedTuple):
    """A call of a module under way."""

    module: nn.Module
    frame: FrameType | None  # of nn.Module's call, by which one that was interrupted is known; None: it is unknown
    kept: Any  # what its pre-hook leaves


def always_after(
    module: nn.Module, hook: Callable[..., Any], key: int, *, with_kwargs: bool = False
) -> RemovableHandle:
    """Register a forward hook that is also called where the forward raised. `key`: its id, below 0, which PyTorch gives
    to none. On all modules the same: a graph that is compiled holds for modules with that id alone."""
    handle = module.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=True)
    for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
        if handle.id in hooks:
            hooks[key] = hooks.pop(handle.id)  # type: ignore[index, call-overload]
    handle.id = key
    return handle


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []


_thread = _Thread()


def under_way() -> list[Call]:
    """This thread's calls, the innermost last, without those that were interrupted."""
    if _thread.calls:
        _drop_interrupted(_thread.calls)
    return _thread.calls


def begin(module: nn.Module, kept: Any) -> None:
    """A hook of nn.Module's call begins a call of the module."""
    _thread.calls.append(Call(module, _frame_of_call(), kept))


def end(module: nn.Module) -> Call | None:
    """Take this thread's last call of the module off, and what an exception left above it; None: there is none."""
    calls = _thread.calls
    for i in range(len(calls) - 1, -1, -1):
        if calls[i].module is module:
            call = calls[i]
            del calls[i:]
            return call
    return None


def forget(module: nn.Module) -> None:
    """Drop all calls of the module."""
    _thread.calls[:] = [call for call in _thread.calls if call.module is not module]


def with_call(x: Tensor, module: nn.Module, kept: Any) -> Tensor:
    """In a graph that is compiled, an alias of x for the module to get, with which the call goes."""
    x = x.view_as(x)
    x._lora_lite_call = Call(module, None, kept)  # type: ignore[attr-defined]
    return x


def call_with(x: Any) -> Call | None:
    """The call that goes with x; None: there is none."""
    return getattr(x, "_lora_lite_call", None)


def callers() -> Iterator[FrameType]:
    """This thread's frames under way, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def called_by(function: str, module: str) -> bool:
    """Whether a function of that name, of the module of that name, is among them."""
    return any(each.f_code.co_name == function and each.f_globals.get("__name__") == module for each in callers())


def _frame_of_call() -> FrameType | None:
    """The frame of nn.Module's call that runs the hook."""
    frame = sys._getframe(3)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    return frame


def _drop_interrupted(calls: list[Call]) -> None:
    """A KeyboardInterrupt runs no hook. Calls whose frame is not running any more are dropped, and their graphs with
    them. What stands below one that is running was running when that began."""
    here = sys._getframe(2)
    while calls and (wanted := calls[-1].frame) is not None:
        frame: FrameType | None = here
        while frame is not None and frame is not wanted:
            frame = frame.f_back
        if frame is not None:
            return
        calls.pop()
