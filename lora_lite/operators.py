"""Operators that cost a step little: PyTorch's custom operators where something looks at operators, plain calls else.

A custom operator's way through the dispatcher and its generated autograd cost more CPU time than a kernel's launch.
Nothing needs them in eager mode, so there a call is the function itself, in an `autograd.Function` where a gradient is
wanted. `torch.compile`, export, fake tensors, tensor subclasses, function transforms and dispatch modes (selective
checkpointing, FLOP counters) get the operator.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack  # type: ignore[attr-defined]
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

# Views are not recorded either: an output that is known for one could not be written to later.
_BelowAutograd: Any = torch._C._AutoDispatchBelowADInplaceOrView  # type: ignore[attr-defined]
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
NO_TENSOR = frozenset({list, float, int, bool, torch.dtype, type(None)})
_tracing_state = torch._C._get_tracing_state
_dispatching = False


def is_plain(t: object) -> bool:
    """Whether it is a tensor of no class of its own: what PyTorch's operators do with it is known."""
    return type(t) in _PLAIN


@contextmanager
def dispatched() -> Iterator[None]:
    """Every call is the operator's: for tests, which run both ways."""
    global _dispatching
    before, _dispatching = _dispatching, True
    try:
        yield
    finally:
        _dispatching = before


def watched() -> bool:
    """Whether something in force wants to see operators."""
    return (
        _dispatching
        or torch.compiler.is_compiling()
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _tracing_state() is not None
    )


def writable(t: Tensor) -> bool:
    """Of a tensor that is ours, whether nothing in force would see or copy it at a write."""
    seen = watched() or torch._C._len_torch_function_stack() > 0
    return not seen and type(t) is Tensor and t.is_contiguous() and not of_a_batch(t)


def version(t: Tensor) -> int | None:
    """How often PyTorch has seen a write to it; None where nothing tells."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


def memory(t: Tensor) -> tuple[Any, ...]:
    """By which two tensors of the same memory are known to be, while that lives. A weak reference to a tensor itself
    would keep PyTorch from moving it, where `.to` swaps tensors."""
    return StorageWeakRef(t.untyped_storage()), t.storage_offset(), tuple(t.shape), t.stride()


def of_a_batch(grad: Tensor) -> bool:
    """Whether it stands for many gradients that are wanted at once (`is_grads_batched`), for which PyTorch maps some of
    its operators, and none of ours."""
    return is_legacy_batchedtensor(grad)


def traced() -> bool:
    """Whether `torch.jit.trace` looks on: it takes operators of any kind, and for constants what the host asks for."""
    return _tracing_state() is not None


def transformed() -> bool:
    """Whether something differentiates forward, maps or traces: what a formula of PyTorch's own operators allows, and
    neither a kernel nor a gradient by hand. In a graph that is compiled, whether that is done within or around it."""
    return _transformed_graph() if torch.compiler.is_compiling() else _transformed()


def _transformed() -> bool:
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None or _tracing_state() is not None


_transformed_graph = torch.compiler.assume_constant_result(_transformed)  # asked when it is compiled


def without_values() -> bool:
    """Whether tensors are made that hold none (FakeTensorMode)."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


autocast_anywhere = torch._C._is_any_autocast_enabled  # for any kind of device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In which autocast has products there; None: it is off, as it always is for tensors without values."""
    if not autocast_anywhere() or (kind := device.type) == "meta":
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` without the search for function transforms, which see operators and never come here."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class Operator(CustomOpDef):
    """A custom operator that in eager mode is called without the dispatcher. Its tensors must be on one device, or it
    raises a RuntimeError."""

    _function: Callable[..., Any] | None = None  # with the operator's gradient
    _again: Callable[..., Any]  # the quick way of a call that is like an earlier one; None: there was none

    def __call__(self, *args: Any) -> Any:
        if watched():
            return self._dispatched(args)
        grad = torch.is_grad_enabled()
        if not grad and (found := self._again(*args)) is not None:
            return found
        needs_grad = False
        for each in args:
            kind = type(each)
            if kind in _PLAIN:
                needs_grad = needs_grad or each.requires_grad
            elif kind not in NO_TENSOR and isinstance(each, Tensor):
                return self._dispatched(args)
        if needs_grad and grad:
            # Without a gradient of its own (a backward that is to be differentiated again), the operator says so.
            return self._dispatched(args) if self._function is None else self._function(*args)
        return self.unwatched(*args) if grad else self._init_fn(*args)

    def unwatched(self, *args: Any) -> Any:
        """A call without a gradient of its own, where nothing is `watched`."""
        found = self._again(*args)
        return self._init_fn(*args) if found is None else found

    def _dispatched(self, args: Sequence[Any]) -> Any:
        _require_one_device(self._qualname, self._init_fn, args)  # here too: on "meta" nothing calls the function
        return super().__call__(*args)

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """As of a custom operator. One function a node: a `setup_context` beside `forward` would bind every call's
        arguments to its signature anew, which takes longer than the rest."""
        super().register_autograd(backward, setup_context=setup_context)
        keep = setup_context or (lambda ctx, args, output: None)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.unwatched(*args)
            keep(ctx, args, output)
            return output

        def of_arguments(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = backward(ctx, *grads)  # of a list of tensors, an operator's backward gives a list
            return tuple([None if type(grad) is list else grad for grad in found])

        bases: tuple[type, ...] = (torch.autograd.Function,)
        members = {"forward": staticmethod(forward), "backward": staticmethod(of_arguments)}
        self._function = applied(type(self._name, bases, members))  # type: ignore[attr-defined]


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """`torch.library.custom_op` for a function that writes to none of its arguments and returns new tensors. It may
    have an `again`, which does the same where it has done so before, and else returns None."""

    def of(call: Callable[..., Any]) -> Operator:
        again = getattr(call, "again", lambda *args: None)

        @functools.wraps(call)
        def checked(*args: Any) -> Any:
            _require_one_device(name, call, args)
            with _BelowAutograd():
                return call(*args)

        op = torch.library.custom_op(name, checked, mutates_args=())
        op.__class__ = Operator
        op._again = again  # type: ignore[attr-defined]
        return cast(Operator, op)

    return of


def _require_one_device(name: str, call: Callable[..., Any], args: Sequence[Any]) -> None:
    """A kernel would read from its own device at another's address."""
    tensors = [each for arg in args for each in (arg if isinstance(arg, list) else (arg,)) if isinstance(each, Tensor)]
    if len({t.device for t in tensors}) > 1:
        names = inspect.signature(call).parameters
        found = [f"{name} on {t.device}" for name, t in zip(names, args, strict=False) if isinstance(t, Tensor)]
        raise RuntimeError(f"{name} got {', '.join(found)}; move the adapter, its layer and the input to one device")
