"""Operators that cost a step little: PyTorch's custom operators where something looks at operators, plain calls else.

A custom operator's way through the dispatcher and its generated autograd cost more CPU time than a kernel's launch.
Nothing needs them in eager mode, so there a call is the function itself, in an `autograd.Function` where a gradient is
wanted. `torch.compile`, export, fake tensors, tensor subclasses, function transforms and dispatch modes (selective
checkpointing, FLOP counters) get the operator.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack  # type: ignore[attr-defined]
from torch._C._functorch import peek_interpreter_stack
from torch._library.custom_ops import CustomOpDef

# Views are not recorded either: an output that is known for one could not be written to later.
_BelowAutograd: Any = torch._C._AutoDispatchBelowADInplaceOrView  # type: ignore[attr-defined]
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_NO_TENSOR = frozenset({list, float, int, bool, torch.dtype, type(None)})
_dispatching = False


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
        or torch._C._get_tracing_state() is not None
    )


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` without the search for function transforms, which see operators and never come here."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class Operator(CustomOpDef):
    """A custom operator that in eager mode is called without the dispatcher. Its tensors must be on one device, or it
    raises a RuntimeError."""

    _function: Callable[..., Any] | None = None  # with the operator's gradient

    def __call__(self, *args: Any) -> Any:
        plain, device, needs_grad = not watched(), None, False
        for each in args:
            kind = type(each)
            if kind in _PLAIN or (kind not in _NO_TENSOR and isinstance(each, Tensor)):
                if device is None:
                    device = each.device
                elif each.device != device:
                    raise self._on_two_devices(args)
                plain = plain and kind in _PLAIN
                needs_grad = needs_grad or each.requires_grad
        if not plain:
            return super().__call__(*args)
        if needs_grad and torch.is_grad_enabled():
            # Without a gradient of its own (a backward that is to be differentiated again), the operator says so.
            return super().__call__(*args) if self._function is None else self._function(*args)
        with _BelowAutograd():
            return self._init_fn(*args)

    def _on_two_devices(self, args: tuple[Any, ...]) -> RuntimeError:
        """A kernel would read from its own device at another's address."""
        names = inspect.signature(self._init_fn).parameters
        found = [f"{name} on {t.device}" for name, t in zip(names, args, strict=False) if isinstance(t, Tensor)]
        return RuntimeError(
            f"{self._qualname} got {', '.join(found)}; move the adapter, its layer and the input to one device"
        )

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """As of a custom operator. One function a node: a `setup_context` beside `forward` would bind every call's
        arguments to its signature anew, which takes longer than the rest."""
        super().register_autograd(backward, setup_context=setup_context)
        call, keep = self._init_fn, setup_context or (lambda ctx, args, output: None)

        def forward(ctx: Any, *args: Any) -> Any:
            with _BelowAutograd():
                output = call(*args)
            keep(ctx, args, output)
            return output

        def of_arguments(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = backward(ctx, *grads)  # of a list of tensors, an operator's backward gives a list
            return tuple([None if isinstance(grad, list) else grad for grad in found])

        bases: tuple[type, ...] = (torch.autograd.Function,)
        members = {"forward": staticmethod(forward), "backward": staticmethod(of_arguments)}
        self._function = applied(type(self._name, bases, members))  # type: ignore[attr-defined]


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """`torch.library.custom_op` for a function that writes to none of its arguments and returns new tensors."""

    def of(call: Callable[..., Any]) -> Operator:
        op = torch.library.custom_op(name, call, mutates_args=())
        op.__class__ = Operator
        return cast(Operator, op)

    return of
