"""t ∘ g: IA3's gain on a layer's output, IA3-FF's on its input.

M tokens, N features of t, whichever side. Token-sized reads and writes, each tensor once a kernel:

    scale           reads t        writes out
    scale backward  reads dy, t    writes dt      dt = dy ∘ g,  dg = Σ dy ∘ t over the tokens
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .common import device, inside, parts_like, rows_of, split, sum_parts, tile
from .operators import operator
from .tuning import Config, cdiv, programs, tuned

# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scale_kernel(t, g, out, M, N, stride_m, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile a program; neighbouring programs take neighbouring columns of the same rows."""
    blocks = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    here = inside(rows, cols, M, N)
    gain = tl.load(g + cols, mask=cols < N, other=0.0).to(tl.float32)
    t_tile = tl.load(tile(t, rows, cols, stride_m, stride_n), mask=here, other=0.0).to(tl.float32)
    tl.store(tile(out, rows, cols, N, 1), t_tile * gain[None, :], mask=here)


@triton.jit
def _scale_backward_kernel(
    dy, t, g, dt, dg,
    M, N, stride_dm, stride_dn, stride_tm, stride_tn, m_per_program,
    NEEDS_DT: tl.constexpr, NEEDS_DG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the columns of block j, down the rows of part i. dg holds a result a part."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * m_per_program
    end = min(first + m_per_program, M)
    gain = tl.load(g + cols, mask=cols < N, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        here = inside(rows, cols, end, N)
        dy_tile = tl.load(tile(dy, rows, cols, stride_dm, stride_dn), mask=here, other=0.0).to(tl.float32)
        if NEEDS_DG:
            acc += dy_tile * tl.load(tile(t, rows, cols, stride_tm, stride_tn), mask=here, other=0.0).to(tl.float32)
        if NEEDS_DT:
            tl.store(tile(dt, rows, cols, N, 1), dy_tile * gain[None, :], mask=here)
    if NEEDS_DG:
        tl.store(dg + tl.program_id(1) * N + cols, tl.sum(acc, 0), mask=cols < N)


# ---- launchers -------------------------------------------------------------------------------------------------------


def launch_scale(t: Float[Tensor, "M N"], g: Float[Tensor, "N"]) -> Float[Tensor, "M N"]:
    """t ∘ g, rounded once."""
    M, N = t.shape
    g = g.contiguous()
    out = t.new_empty(M, N)
    if M == 0:
        return out

    def run(config: Config) -> Tensor:
        grid = (cdiv(M, config.rows) * cdiv(N, config.cols),)
        with device(t):
            _scale_kernel[grid](t, g, out, M, N, *t.stride(), BLOCK_M=config.rows, BLOCK_N=config.cols, **config.launch)
        return out

    return tuned("scale", run, t, M, N, 1)


def launch_scale_backward(
    dy: Float[Tensor, "M N"], t: Float[Tensor, "M N"], g: Float[Tensor, "N"], needs_dt: bool, needs_dg: bool
) -> tuple[Tensor, Tensor]:
    """(dt, dg): dy ∘ g, and Σ dy ∘ t over the tokens in float32. What is not needed is left empty."""
    M, N = t.shape
    g = g.contiguous()
    dt = t.new_empty(M, N) if needs_dt else t.new_empty(0)
    dg = t.new_empty(N, dtype=torch.float32) if needs_dg else t.new_empty(0)
    if M == 0:
        return dt, dg.zero_()

    def run(config: Config) -> tuple[Tensor, Tensor]:
        blocks = cdiv(N, config.cols)
        count, each = split(M, config.rows, cdiv(programs(t), blocks))
        dgs = parts_like(dg, count)
        with device(t):
            _scale_backward_kernel[(blocks, count)](
                dy, t, g, dt, dgs, M, N, *dy.stride(), *t.stride(), each, NEEDS_DT=needs_dt, NEEDS_DG=needs_dg,
                BLOCK_M=config.rows, BLOCK_N=config.cols, **config.launch,
            )  # fmt: skip
        return dt, sum_parts(dgs, dg)

    return tuned("scale_backward", run, t, M, N, 1)


# ---- operators -------------------------------------------------------------------------------------------------------


@operator("lora_lite::scale")
def _scale(t: Tensor, g: Tensor) -> Tensor:
    return launch_scale(rows_of(t), g).view(t.shape)


@_scale.register_fake
def _(t: Tensor, g: Tensor) -> Tensor:
    return t.new_empty(t.shape)


@operator("lora_lite::scale_backward")
def _scale_backward(dy: Tensor, t: Tensor, g: Tensor, needs_dt: bool, needs_dg: bool) -> tuple[Tensor, Tensor]:
    dt, dg = launch_scale_backward(rows_of(dy), rows_of(t), g, needs_dt, needs_dg)
    return dt.view(t.shape) if needs_dt else dt, dg.to(g.dtype)


@_scale_backward.register_fake
def _(dy: Tensor, t: Tensor, g: Tensor, needs_dt: bool, needs_dg: bool) -> tuple[Tensor, Tensor]:
    return t.new_empty(t.shape if needs_dt else 0), g.new_empty(g.shape if needs_dg else 0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    needs_dt, needs_dg = ctx.needs_input_grad
    dt, dg = _scale_backward(dy, *ctx.saved_tensors, needs_dt, needs_dg)
    return dt if needs_dt else None, dg if needs_dg else None


_scale.register_autograd(_backward, setup_context=_save)


def scale(t: Float[Tensor, "*M D"], g: Float[Tensor, "D"]) -> Float[Tensor, "*M D"]:
    """t ∘ g."""
    return _scale(t, g)
