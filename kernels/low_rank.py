"""The operators of a low-rank sum: what autograd and torch.compile see of the kernels of its two halves.

M tokens, K in_features, N out_features, R rank. Token-sized reads and writes, each tensor once a kernel:

    shrink                       reads x               writes –        h = x Aᵀ
    shrink backward              reads x, dx_bases     writes dx       dx = Σ dx_bases + dh A,  dA = dhᵀ x
    expand_add                   reads y               writes out      out = y + scale · h Bᵀ
    expand_add backward          reads dy              writes –        dh = scale · dy B,  dB = scale · dyᵀ h
    expand_add_rescale           reads y               writes out      out = g ∘ (y − bias + scale · h Bᵀ) + bias
    expand_add_rescale backward  reads dy, y           writes dy_base

`shrink` hands x on to the base layer, so the base layer's own input gradient dx_base comes back to it together with
dh: no M×K delta is ever stored and autograd has nothing to add. Layers that read the same x share the work:
`shrink_together` reads x once for the ranks of all, and its backward adds all their dx_bases and dh A in one kernel,
where autograd would add them one by one.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..operators import applied, operator, watched
from ..reference import sharing
from ..segments import Segments
from .common import compute_dtype, joined, or_empty
from .dropout import new_seed, threshold
from .expand import launch_expand
from .expand_backward import launch_expand_backward
from .launching import replayed
from .segments import Runs
from .shrink import launch_shrink
from .shrink_backward import launch_shrink_backward


@operator("lora_lite::shrink")
@replayed
def _shrink(x: Tensor, A: Tensor, dtype: torch.dtype, runs: list[Tensor], seed: Tensor | None) -> Tensor:
    return launch_shrink(x, A, dtype, Runs.read(runs), seed)


@_shrink.register_fake
def _(x: Tensor, A: Tensor, dtype: torch.dtype, runs: list[Tensor], seed: Tensor | None) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], A.shape[-2], dtype=dtype)


@operator("lora_lite::shrink_backward")
@replayed
def _shrink_backward(
    dx_bases: list[Tensor],
    dhs: list[Tensor],
    x: Tensor,
    A: Tensor,
    runs: list[Tensor],
    seeds: Tensor | None,
    dtype: torch.dtype,
    needs_dx: bool,
    needs_dA: bool,
) -> tuple[Tensor, Tensor]:
    dx, dA, _ = launch_shrink_backward(dx_bases, dhs, x, A, needs_dx, needs_dA, None, Runs.read(runs), seeds, dtype)
    return or_empty(dx, x), or_empty(dA, A)


@_shrink_backward.register_fake
def _(
    dx_bases: list[Tensor],
    dhs: list[Tensor],
    x: Tensor,
    A: Tensor,
    runs: list[Tensor],
    seeds: Tensor | None,
    dtype: torch.dtype,
    needs_dx: bool,
    needs_dA: bool,
) -> tuple[Tensor, Tensor]:
    dA = A.new_empty(A.shape, dtype=dtype) if needs_dA else A.new_empty(0)
    return x.new_empty(x.shape if needs_dx else 0), dA


ShrinkArguments = tuple[Tensor, Tensor, torch.dtype, list[Tensor], Tensor | None]


def _save_shrink(ctx: Any, inputs: ShrinkArguments, output: Tensor) -> None:
    x, A, _, runs, seed = inputs
    ctx.save_for_backward(x, A, seed, *runs)


def _backward_shrink(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    needs_dx, needs_dA = ctx.needs_input_grad[:2]
    x, A, seed, *runs = ctx.saved_tensors
    dx, dA = _shrink_backward([], [dh], x, A, runs, seed, A.dtype, needs_dx, needs_dA)
    return dx if needs_dx else None, dA if needs_dA else None, None, [None] * len(runs), None


_shrink.register_autograd(_backward_shrink, setup_context=_save_shrink)


class _Tap(torch.autograd.Function):
    """x and x Aᵀ; the gradients of both come back together. A Function, since an operator may not return its input."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        h = _shrink(*inputs)
        _save_shrink(ctx, inputs, h)  # type: ignore[arg-type]
        return inputs[0].view_as(inputs[0]), h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, seed, *runs = ctx.saved_tensors
        dx_base, dh = grads
        dx, dA = _shrink_backward([dx_base], [dh], x, A, runs, seed, A.dtype, True, ctx.needs_input_grad[1])
        return dx, dA if ctx.needs_input_grad[1] else None, None, None, None


_tap = applied(_Tap)


@operator("lora_lite::shrink_together")
@replayed
def _shrink_together(x: Tensor, As: list[Tensor], dtype: torch.dtype, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
    A = joined(As, dtype)
    return launch_shrink(x, A, dtype, None, seeds, tuple(itertools.accumulate(len(A) for A in As))), A


@_shrink_together.register_fake
def _(x: Tensor, As: list[Tensor], dtype: torch.dtype, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
    A = As[0].new_empty((sum(len(A) for A in As), x.shape[-1]), dtype=dtype)
    return x.new_empty(x.numel() // x.shape[-1], len(A), dtype=dtype), A


def shrink(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    dropout: float = 0.0,
    segments: Segments | None = None,
) -> tuple[Float[Tensor, "*M K"], Float[Tensor, "M R"]]:
    """(x, x Aᵀ), the second with its leading dimensions as one, and of x after dropout. Hand the returned x, not the
    argument, to the layer. With segments A is a stack, of which each row takes its own."""
    seed = new_seed(x, dropout) if dropout and threshold(dropout) else None
    arguments = (x, A, compute_dtype(x), Runs.of(segments, x, A.shape[0]), seed)
    if torch.is_grad_enabled() and x.requires_grad:
        return (_Tap.apply if watched() else _tap)(*arguments)  # type: ignore[return-value]
    return x, _shrink(*arguments)


def _seeds(x: Tensor, dropouts: Sequence[float]) -> list[Tensor]:
    if not any(map(threshold, dropouts)):
        return []
    return [torch.cat([new_seed(x, dropout) for dropout in dropouts])]


def _together(x: Tensor, As: Sequence[Tensor], masks: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _shrink_together(x, list(As), dtype, masks[0] if masks else None)


def _together_backward(
    dx_bases: list[Tensor],
    dhs: list[Tensor],
    x: Tensor,
    A: Tensor,
    masks: Sequence[Tensor],
    dtype: torch.dtype,
    needs_dx: bool,
    needs_dA: bool,
) -> tuple[Tensor, Tensor]:
    return _shrink_backward(dx_bases, dhs, x, A, [], masks[0] if masks else None, dtype, needs_dx, needs_dA)


def worth_sharing(x: Tensor) -> bool:
    """Always: a launch costs more than what the host does to share one."""
    return True


shrink_together = sharing(compute_dtype, _seeds, _together, _together_backward)


@operator("lora_lite::expand_add")
@replayed
def _expand_add(y: Tensor, h: Tensor, B: Tensor, scale: float, runs: list[Tensor]) -> Tensor:
    return launch_expand(y, h, B, scale, runs=Runs.read(runs))


@_expand_add.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, scale: float, runs: list[Tensor]) -> Tensor:
    return y.new_empty(y.shape)


@operator("lora_lite::expand_add_backward")
@replayed
def _expand_add_backward(
    dy: Tensor,
    h: Tensor,
    B: Tensor,
    scale: float,
    runs: list[Tensor],
    needs_dh: bool,
    needs_dB: bool,
) -> tuple[Tensor, Tensor]:
    dh, dB, _, _ = launch_expand_backward(dy, h, B, scale, needs_dh, needs_dB, runs=Runs.read(runs))
    return or_empty(dh, h), or_empty(dB, B)


@_expand_add_backward.register_fake
def _(
    dy: Tensor,
    h: Tensor,
    B: Tensor,
    scale: float,
    runs: list[Tensor],
    needs_dh: bool,
    needs_dB: bool,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape if needs_dh else 0), B.new_empty(B.shape if needs_dB else 0)


def _save_expand_add(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, list[Tensor]], output: Tensor) -> None:
    _, h, B, ctx.scale, runs = inputs
    ctx.save_for_backward(h, B, *runs)


def _backward_expand_add(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    _, needs_dh, needs_dB, *_ = ctx.needs_input_grad
    h, B, *runs = ctx.saved_tensors
    if not (needs_dh or needs_dB):
        return dy, None, None, None, [None] * len(runs)
    dh, dB = _expand_add_backward(dy, h, B, ctx.scale, runs, needs_dh, needs_dB)
    return dy, dh if needs_dh else None, dB if needs_dB else None, None, [None] * len(runs)


_expand_add.register_autograd(_backward_expand_add, setup_context=_save_expand_add)


def expand_add(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """y + scale · h Bᵀ. With segments B is a stack as A is in `shrink`."""
    return _expand_add(y, h, B, scale, Runs.of(segments, y, B.shape[0]))


@operator("lora_lite::expand_add_rescale")
@replayed
def _expand_add_rescale(
    y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]
) -> Tensor:
    return launch_expand(y, h, B, scale, g, bias, Runs.read(runs))


@_expand_add_rescale.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]) -> Tensor:
    return y.new_empty(y.shape)


@operator("lora_lite::expand_add_rescale_backward")
@replayed
def _expand_add_rescale_backward(
    dy: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dh, dB, dy_base, dg = launch_expand_backward(dy, h, B, scale, True, True, y, g, bias, Runs.read(runs))
    return or_empty(dy_base, y), or_empty(dh, h), or_empty(dB, B), or_empty(dg, g)


@_expand_add_rescale_backward.register_fake
def _(
    dy: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), h.new_empty(h.shape), B.new_empty(B.shape), g.new_empty(g.shape)


def _save_rescale(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor | None, list[Tensor]], output: Tensor
) -> None:
    y, h, B, ctx.scale, g, bias, runs = inputs
    ctx.save_for_backward(y, h, B, g, bias, *runs)


def _backward_rescale(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    y, h, B, g, bias, *runs = ctx.saved_tensors
    dy_base, dh, dB, dg = _expand_add_rescale_backward(dy, y, h, B, ctx.scale, g, bias, runs)
    return dy_base, dh, dB, None, dg, None, [None] * len(runs)


_expand_add_rescale.register_autograd(_backward_rescale, setup_context=_save_rescale)


def expand_add_rescale(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    g: Float[Tensor, "*G N"],
    bias: Float[Tensor, "*G N"] | None,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """g ∘ (y − bias + scale · h Bᵀ) + bias. The bias, the base layer's, gets no gradient. With segments B, g and bias
    are stacks, of which each row takes its own; y stays where it has none."""
    bias = None if bias is None else bias.detach().contiguous()
    return _expand_add_rescale(y, h, B, scale, g.contiguous(), bias, Runs.of(segments, y, B.shape[0]))
