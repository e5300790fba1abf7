"""y ∘ c + partner(y) ∘ s: RoAd's rotations and scales of pairs of outputs.

M tokens, N features in groups of 2·HALF. Token-sized reads and writes, each tensor once a kernel:

    rotate           reads y        writes out
    rotate backward  reads dy, y    writes dy_base    dy_base = dy ∘ c + partner(dy ∘ s),
                                                      dc = Σ dy ∘ y, ds = Σ dy ∘ partner(y) over the tokens
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
def _partners(block, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """(columns, their partners') of a block of pairs. Past the last pair both are past the last column."""
    pairs = block * PAIRS + tl.arange(0, PAIRS)
    cols = pairs // HALF * (2 * HALF) + pairs % HALF
    return cols, cols + HALF


@triton.jit
def _rotate_kernel(
    y, c, s, out, table,
    M, N, stride_m, stride_n,
    BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One tile of columns and one of their partners a program; neighbouring programs take the same rows."""
    blocks = tl.cdiv(N // 2, PAIRS)
    top, last, matrix = share_of_rows(tl.program_id(0) // blocks, M, table, BLOCK_M)
    rows = top + tl.arange(0, BLOCK_M)
    i, j = _partners(tl.program_id(0) % blocks, HALF, PAIRS)
    here = inside(rows, i, last, N)
    c_i, c_j = own_vector(c, table, matrix, i, N, 1.0), own_vector(c, table, matrix, j, N, 1.0)
    s_i, s_j = own_vector(s, table, matrix, i, N, 0.0), own_vector(s, table, matrix, j, N, 0.0)
    y_i = tl.load(tile(y, rows, i, stride_m, stride_n), mask=here, other=0.0).to(tl.float32)
    y_j = tl.load(tile(y, rows, j, stride_m, stride_n), mask=here, other=0.0).to(tl.float32)
    tl.store(tile(out, rows, i, N, 1), y_i * c_i[None, :] + y_j * s_i[None, :], mask=here)
    tl.store(tile(out, rows, j, N, 1), y_j * c_j[None, :] + y_i * s_j[None, :], mask=here)


@triton.jit
def _rotate_backward_kernel(
    dy, y, c, s, dy_base, dc, ds, table,
    M, N, stride_dm, stride_dn, stride_ym, stride_yn, m_per_program,
    BLOCK_M: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (b, p): the pairs of block b, down the rows of part p. dc and ds hold a result a part."""
    i, j = _partners(tl.program_id(0), HALF, PAIRS)
    first, end, matrix = run_of_rows(tl.program_id(1), m_per_program, M, table)
    c_i, c_j = own_vector(c, table, matrix, i, N, 1.0), own_vector(c, table, matrix, j, N, 1.0)
    s_i, s_j = own_vector(s, table, matrix, i, N, 0.0), own_vector(s, table, matrix, j, N, 0.0)
    dc_i, dc_j = tl.zeros((BLOCK_M, PAIRS), tl.float32), tl.zeros((BLOCK_M, PAIRS), tl.float32)
    ds_i, ds_j = tl.zeros((BLOCK_M, PAIRS), tl.float32), tl.zeros((BLOCK_M, PAIRS), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        here = inside(rows, i, end, N)
        dy_i = tl.load(tile(dy, rows, i, stride_dm, stride_dn), mask=here, other=0.0).to(tl.float32)
        dy_j = tl.load(tile(dy, rows, j, stride_dm, stride_dn), mask=here, other=0.0).to(tl.float32)
        if dc is not None:
            y_i = tl.load(tile(y, rows, i, stride_ym, stride_yn), mask=here, other=0.0).to(tl.float32)
            y_j = tl.load(tile(y, rows, j, stride_ym, stride_yn), mask=here, other=0.0).to(tl.float32)
            dc_i += dy_i * y_i
            dc_j += dy_j * y_j
            ds_i += dy_i * y_j
            ds_j += dy_j * y_i
        if dy_base is not None:
            tl.store(tile(dy_base, rows, i, N, 1), dy_i * c_i[None, :] + dy_j * s_j[None, :], mask=here)
            tl.store(tile(dy_base, rows, j, N, 1), dy_j * c_j[None, :] + dy_i * s_i[None, :], mask=here)
    if dc is not None:
        part = tl.program_id(1) * N
        tl.store(dc + part + i, tl.sum(dc_i, 0), mask=i < N)
        tl.store(dc + part + j, tl.sum(dc_j, 0), mask=j < N)
        tl.store(ds + part + i, tl.sum(ds_i, 0), mask=i < N)
        tl.store(ds + part + j, tl.sum(ds_j, 0), mask=j < N)


def launch_rotate(
    y: Float[Tensor, "*M N"],
    c: Float[Tensor, "*G N"],
    s: Float[Tensor, "*G N"],
    group_size: int,
    runs: Runs | None = None,
) -> Float[Tensor, "*M N"]:
    """y ∘ c + partner(y) ∘ s, rounded once."""
    out, y, c, s = y.new_empty(y.shape), rows_of(y), c.contiguous(), s.contiguous()
    M, N = y.shape
    if M == 0:
        return out

    def run(config: Config) -> Tensor:
        pairs = config.cols // 2
        blocks, table, rows = blocks_of(M, config, runs)
        grid = (blocks * cdiv(N // 2, pairs),)
        constants = (rows, pairs, group_size // 2)
        launch(_rotate_kernel, grid, (y, c, s, out, table), (M, N, *y.stride()), constants, config)
        return out

    return tuned("rotate", run, y, y.dtype, M, N, group_size, 1)


def launch_rotate_backward(
    dy: Float[Tensor, "*M N"],
    y: Float[Tensor, "*M N"],
    c: Float[Tensor, "*G N"],
    s: Float[Tensor, "*G N"],
    group_size: int,
    needs_dy_base: bool,
    needs_vectors: bool,
    runs: Runs | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dy_base, dc, ds): dy ∘ c + partner(dy ∘ s), and Σ dy ∘ y and Σ dy ∘ partner(y) over the tokens. What is not
    needed is None."""
    dy_base, c, s = y.new_empty(y.shape) if needs_dy_base else None, c.contiguous(), s.contiguous()
    dc, ds = (torch.empty_like(c), torch.empty_like(s)) if needs_vectors else (None, None)
    dy, y = rows_of(dy), rows_of(y)
    M, N = y.shape
    if M == 0:
        return dy_base, None if dc is None else dc.zero_(), None if ds is None else ds.zero_()

    def run(config: Config) -> None:
        pairs = config.cols // 2
        blocks = cdiv(N // 2, pairs)
        count, each, table = parts_of(M, config.rows, full_waves(programs(y), blocks, M, config.rows), runs)
        dcs, dss = parts_like(dc, count, runs), parts_like(ds, count, runs)
        numbers = (M, N, *dy.stride(), *y.stride(), each)
        tensors = (dy, y, c, s, dy_base, dcs, dss, table)
        constants = (config.rows, pairs, group_size // 2)
        launch(_rotate_backward_kernel, (blocks, count), tensors, numbers, constants, config)
        sum_parts((dcs, dc, runs), (dss, ds, runs))

    tuned("rotate_backward", run, y, y.dtype, M, N, group_size, 1)
    return dy_base, dc, ds


@operator("lora_lite::rotate_pairs")
@replayed
def _rotate_pairs(y: Tensor, c: Tensor, s: Tensor, group_size: int, runs: list[Tensor]) -> Tensor:
    return launch_rotate(y, c, s, group_size, Runs.read(runs))


@_rotate_pairs.register_fake
def _(y: Tensor, c: Tensor, s: Tensor, group_size: int, runs: list[Tensor]) -> Tensor:
    return y.new_empty(y.shape)


@operator("lora_lite::rotate_pairs_backward")
@replayed
def _rotate_pairs_backward(
    dy: Tensor,
    y: Tensor,
    c: Tensor,
    s: Tensor,
    group_size: int,
    runs: list[Tensor],
    needs_dy_base: bool,
    needs_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy_base, dc, ds = launch_rotate_backward(dy, y, c, s, group_size, needs_dy_base, needs_vectors, Runs.read(runs))
    return or_empty(dy_base, y), or_empty(dc, c), or_empty(ds, s)


@_rotate_pairs_backward.register_fake
def _(
    dy: Tensor,
    y: Tensor,
    c: Tensor,
    s: Tensor,
    group_size: int,
    runs: list[Tensor],
    needs_dy_base: bool,
    needs_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = (c.new_empty(c.shape), s.new_empty(s.shape)) if needs_vectors else (c.new_empty(0), s.new_empty(0))
    return y.new_empty(y.shape if needs_dy_base else 0), *vectors


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, list[Tensor]], output: Tensor) -> None:
    y, c, s, ctx.group_size, runs = inputs
    ctx.save_for_backward(y, c, s, *runs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_dy_base, needs_dc, needs_ds, *_ = ctx.needs_input_grad
    y, c, s, *runs = ctx.saved_tensors
    dy_base, dc, ds = _rotate_pairs_backward(dy, y, c, s, ctx.group_size, runs, needs_dy_base, needs_dc or needs_ds)
    found = dy_base if needs_dy_base else None, dc if needs_dc else None, ds if needs_ds else None
    return *found, None, [None] * len(runs)


_rotate_pairs.register_autograd(_backward, setup_context=_save)


def rotate_pairs(
    y: Float[Tensor, "*M N"],
    c: Float[Tensor, "*G N"],
    s: Float[Tensor, "*G N"],
    group_size: int,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """y ∘ c + partner(y) ∘ s, the partner being the element group_size/2 away in its group. With segments c and s are
    stacks, of which each row takes its own; a row that has none stays."""
    return _rotate_pairs(y, c, s, group_size, Runs.of(segments, y, c.shape[0]))
