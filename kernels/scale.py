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

from ..operators import operator
from ..segments import Segments
from .common import full_waves, inside, or_empty, rows_of, tile
from .launching import launch, replayed
from .segments import Runs, blocks_of, own_vector, parts_of, run_of_rows, share_of_rows
from .sums import parts_like, sum_parts
from .tuning import Config, cdiv, programs, tuned


@triton.jit
def _scale_kernel(t, g, out, table, M, N, stride_m, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile a program; neighbouring programs take neighbouring columns of the same rows."""
    blocks = tl.cdiv(N, BLOCK_N)
    top, last, matrix = share_of_rows(tl.program_id(0) // blocks, M, table, BLOCK_M)
    rows = top + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    here = inside(rows, cols, last, N)
    gain = own_vector(g, table, matrix, cols, N, 1.0)
    t_tile = tl.load(tile(t, rows, cols, stride_m, stride_n), mask=here, other=0.0).to(tl.float32)
    tl.store(tile(out, rows, cols, N, 1), t_tile * gain[None, :], mask=here)


@triton.jit
def _scale_backward_kernel(
    dy, t, g, dt, dg, table,
    M, N, stride_dm, stride_dn, stride_tm, stride_tn, m_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the columns of block j, down the rows of part i. dg holds a result a part."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end, matrix = run_of_rows(tl.program_id(1), m_per_program, M, table)
    gain = own_vector(g, table, matrix, cols, N, 1.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        here = inside(rows, cols, end, N)
        dy_tile = tl.load(tile(dy, rows, cols, stride_dm, stride_dn), mask=here, other=0.0).to(tl.float32)
        if dg is not None:
            acc += dy_tile * tl.load(tile(t, rows, cols, stride_tm, stride_tn), mask=here, other=0.0).to(tl.float32)
        if dt is not None:
            tl.store(tile(dt, rows, cols, N, 1), dy_tile * gain[None, :], mask=here)
    if dg is not None:
        tl.store(dg + tl.program_id(1) * N + cols, tl.sum(acc, 0), mask=cols < N)


def launch_scale(t: Float[Tensor, "*M N"], g: Float[Tensor, "*G N"], runs: Runs | None = None) -> Float[Tensor, "*M N"]:
    """t ∘ g, rounded once."""
    out, t, g = t.new_empty(t.shape), rows_of(t), g.contiguous()
    M, N = t.shape
    if M == 0:
        return out

    def run(config: Config) -> Tensor:
        blocks, table, rows = blocks_of(M, config, runs)
        grid = (blocks * cdiv(N, config.cols),)
        launch(_scale_kernel, grid, (t, g, out, table), (M, N, *t.stride()), (rows, config.cols), config)
        return out

    return tuned("scale", run, t, t.dtype, M, N, 1)


def launch_scale_backward(
    dy: Float[Tensor, "*M N"],
    t: Float[Tensor, "*M N"],
    g: Float[Tensor, "*G N"],
    needs_dt: bool,
    needs_dg: bool,
    runs: Runs | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dt, dg): dy ∘ g, and Σ dy ∘ t over the tokens. What is not needed is None."""
    dt, g = t.new_empty(t.shape) if needs_dt else None, g.contiguous()
    dg = torch.empty_like(g) if needs_dg else None
    dy, t = rows_of(dy), rows_of(t)
    M, N = t.shape
    if M == 0:
        return dt, None if dg is None else dg.zero_()

    def run(config: Config) -> None:
        blocks = cdiv(N, config.cols)
        count, each, table = parts_of(M, config.rows, full_waves(programs(t), blocks, M, config.rows), runs)
        dgs = parts_like(dg, count, runs)
        numbers = (M, N, *dy.stride(), *t.stride(), each)
        tensors = (dy, t, g, dt, dgs, table)
        launch(_scale_backward_kernel, (blocks, count), tensors, numbers, (config.rows, config.cols), config)
        sum_parts((dgs, dg, runs))

    tuned("scale_backward", run, t, t.dtype, M, N, 1)
    return dt, dg


@operator("lora_lite::scale")
@replayed
def _scale(t: Tensor, g: Tensor, runs: list[Tensor]) -> Tensor:
    return launch_scale(t, g, Runs.read(runs))


@_scale.register_fake
def _(t: Tensor, g: Tensor, runs: list[Tensor]) -> Tensor:
    return t.new_empty(t.shape)


@operator("lora_lite::scale_backward")
@replayed
def _scale_backward(
    dy: Tensor, t: Tensor, g: Tensor, runs: list[Tensor], needs_dt: bool, needs_dg: bool
) -> tuple[Tensor, Tensor]:
    dt, dg = launch_scale_backward(dy, t, g, needs_dt, needs_dg, Runs.read(runs))
    return or_empty(dt, t), or_empty(dg, g)


@_scale_backward.register_fake
def _(dy: Tensor, t: Tensor, g: Tensor, runs: list[Tensor], needs_dt: bool, needs_dg: bool) -> tuple[Tensor, Tensor]:
    return t.new_empty(t.shape if needs_dt else 0), g.new_empty(g.shape if needs_dg else 0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, list[Tensor]], output: Tensor) -> None:
    t, g, runs = inputs
    ctx.save_for_backward(t, g, *runs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_dt, needs_dg, *_ = ctx.needs_input_grad
    t, g, *runs = ctx.saved_tensors
    dt, dg = _scale_backward(dy, t, g, runs, needs_dt, needs_dg)
    return dt if needs_dt else None, dg if needs_dg else None, [None] * len(runs)


_scale.register_autograd(_backward, setup_context=_save)


def scale(
    t: Float[Tensor, "*M D"], g: Float[Tensor, "*G D"], segments: Segments | None = None
) -> Float[Tensor, "*M D"]:
    """t ∘ g. With segments g is a stack, of which each row takes its own; a row that has none stays."""
    return _scale(t, g, Runs.of(segments, t, g.shape[0]))
