"""x + (x Aᵀ) Bᵀ: both halves of a low-rank sum with no layer between them.

M tokens, K in_features, R rank. Token-sized reads and writes, each tensor once a kernel:

    shrink           reads x        writes –       h = x Aᵀ
    expand           reads x        writes out     out = x + h Bᵀ
    shrink           reads dy       writes –       dh = dy B
    shrink backward  reads x, dy    writes dx      dx = dy + dh A,  dA = dhᵀ x,  dB = dyᵀ h

With many ranks dB is of a launch of its own, which reads dy once more.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..operators import operator
from ..segments import Segments
from .common import compute_dtype, or_empty
from .expand import launch_expand
from .expand_backward import launch_expand_backward
from .launching import replayed
from .segments import Runs
from .shrink import launch_shrink
from .shrink_backward import launch_shrink_backward

# Up to these registers hold dA and dB of enough columns. With fewer columns h and dh, which are read again for each
# block of them, take longer than another read of dy.
MOST_RANKS_FUSED = 128


@operator("lora_lite::shrink_expand")
@replayed
def _shrink_expand(x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, runs: list[Tensor]) -> tuple[Tensor, Tensor]:
    h = launch_shrink(x, A, dtype, Runs.read(runs))
    return launch_expand(x, h, B, 1.0, runs=Runs.read(runs)), h


@_shrink_expand.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, runs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], A.shape[-2], dtype=dtype)


def launch_shrink_expand_backward(
    dy: Float[Tensor, "*M K"],
    x: Float[Tensor, "*M K"],
    h: Float[Tensor, "M R"],
    A: Float[Tensor, "*G R K"],
    B: Float[Tensor, "*G K R"],
    needs_dx: bool,
    runs: Runs | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB) of x + h Bᵀ, where h = x Aᵀ."""
    if A.shape[-2] > MOST_RANKS_FUSED:
        dh, dB, *_ = launch_expand_backward(dy, h, B, 1.0, True, True, runs=runs)
        dx, dA, _ = launch_shrink_backward([dy], [or_empty(dh, h)], x, A, needs_dx, True, runs=runs)
        return dx, dA, dB
    dh = launch_shrink(dy, B.mT, h.dtype, runs)
    return launch_shrink_backward([dy], [dh], x, A, needs_dx, True, h, runs)


@operator("lora_lite::shrink_expand_backward")
@replayed
def _shrink_expand_backward(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, runs: list[Tensor], needs_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dA, dB = launch_shrink_expand_backward(dy, x, h, A, B, needs_dx, Runs.read(runs))
    return or_empty(dx, x), or_empty(dA, A), or_empty(dB, B).to(B.dtype)


@_shrink_expand_backward.register_fake
def _(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, runs: list[Tensor], needs_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if needs_dx else 0), A.new_empty(A.shape), B.new_empty(B.shape)


def _save_shrink_expand(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, torch.dtype, list[Tensor]], output: Any
) -> None:
    x, A, B, _, runs = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], A, B, *runs)


def _backward_shrink_expand(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
    x, h, A, B, *runs = ctx.saved_tensors
    dx, dA, dB = _shrink_expand_backward(dy, x, h, A, B, runs, ctx.needs_input_grad[0])
    return dx if ctx.needs_input_grad[0] else None, dA, dB, None, [None] * len(runs)


_shrink_expand.register_autograd(_backward_shrink_expand, setup_context=_save_shrink_expand)


def shrink_expand(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    B: Float[Tensor, "*G K R"],
    segments: Segments | None = None,
) -> Float[Tensor, "*M K"]:
    """x + (x Aᵀ) Bᵀ."""
    return _shrink_expand(x, A, B, compute_dtype(x), Runs.of(segments, x, A.shape[0]))[0]
