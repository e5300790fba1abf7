"""The backward of y + scale · h Bᵀ and of g ∘ (y − bias + scale · h Bᵀ) + bias (expand.py).

    dh = scale · dy B,  dB = scale · dyᵀ h
    dy_base = g ∘ dy,  dh = scale · dy (g ∘ B),  dB = scale · g ∘ dyᵀh,  dg = Σ dy ∘ (y − bias) + Σ B ∘ scale · dyᵀh

M tokens, N out_features, R rank. Token-sized: reads dy; for g also y, and writes dy_base; each once. With many ranks dh
takes another look at dy.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .common import (
    LONG_SUM,
    MAX_RANK,
    block_of,
    full_waves,
    inside,
    named,
    precision,
    rows_of,
    side_by_side,
    small,
    tile,
)
from .expand import rows_apart
from .launching import launch
from .segments import Runs, own, own_vector, parts_of, run_of_rows
from .shrink import launch_shrink
from .sums import most_parts, parts_like, sum_parts
from .tuning import LAUNCH, Config, cdiv, of_parts, of_reads, programs, tuned

# Float32 parts of dh, a part a block of columns, are written and read: 4·R/columns passes over dy, where reading dy
# once more in `shrink` is one. Beyond these ranks the blocks of columns are too narrow for parts. Where parts would
# move more than that, or take too much memory, as of very long batches, it is `shrink` too.
MOST_RANKS_IN_PARTS = {"expand_backward": 64, "expand_backward_rescale": 32}

# Up to these ranks B is read as the parameter is, in float32; beyond them registers lack.
MOST_RANKS_UNCAST = 16


@triton.jit
def _expand_backward_kernel(
    dy, h, B, dh, dB, y, g, bias, dy_base, dg, wide_B, table, scale,
    M, N, R, stride_dm, stride_dn, stride_ym, stride_yn, stride_hm, m_per_program,
    PRECISION: tl.constexpr, OVER_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the columns of block j, down the rows of part i. dh holds a result a block, dB and dg a part.
    wide_B is B as the parameter is. OVER_TOKENS: how products are added to dB."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    first, end, matrix = run_of_rows(tl.program_id(1), m_per_program, M, table)
    B, of_B = own(B, table, matrix, R, N)
    dtype = h.dtype.element_ty
    if dh is not None:
        dh += tl.program_id(0).to(tl.int64) * M * R
        B_tile = tl.load(tile(B, cols, ranks, R, 1), mask=inside(cols, ranks, N, of_B), other=0.0)
        if g is not None:
            B_tile = B_tile.to(tl.float32) * own_vector(g, table, matrix, cols, N, 1.0)[:, None]
        B_tile = B_tile.to(dtype)
    dB_acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    if g is not None:
        dg_acc = tl.zeros((BLOCK_N,), tl.float32)
        gain = own_vector(g, table, matrix, cols, N, 1.0)[None, :]
        b = tl.zeros((1, BLOCK_N), tl.float32)
        if bias is not None:
            b = own_vector(bias, table, matrix, cols, N, 0.0)[None, :]
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        here = inside(rows, cols, end, N)
        dy_tile = tl.load(tile(dy, rows, cols, stride_dm, stride_dn), mask=here, other=0.0)
        if g is not None:
            dy_wide = dy_tile.to(tl.float32)
            y_tile = tl.load(tile(y, rows, cols, stride_ym, stride_yn), mask=here, other=0.0).to(tl.float32)
            dg_acc += tl.sum(dy_wide * (y_tile - b), 0)
            tl.store(tile(dy_base, rows, cols, N, 1), dy_wide * gain, mask=here)
        if dB is not None:
            h_tile = tl.load(tile(h, rows, ranks, stride_hm, 1), mask=inside(rows, ranks, end, R), other=0.0)
            dB_acc = tl.dot(tl.trans(dy_tile.to(dtype)), h_tile, dB_acc, input_precision=OVER_TOKENS)
        if dh is not None:
            dh_tile = scale * tl.dot(dy_tile.to(dtype), B_tile, input_precision=PRECISION)
            tl.store(tile(dh, rows, ranks, R, 1), dh_tile, mask=inside(rows, ranks, end, R))
    if dB is not None:
        dB_acc *= scale
        if g is not None:
            wide_B, of_B = own(wide_B, table, matrix, R, N)
            # Across, so that addresses are not kept in registers all along.
            wide = tl.load(tile(wide_B, ranks, cols, 1, R), mask=inside(ranks, cols, of_B, N), other=0.0)
            dg_acc += tl.sum(tl.trans(wide.to(tl.float32)) * dB_acc, 1)
            dB_acc *= own_vector(g, table, matrix, cols, N, 1.0)[:, None]
        dB += tl.program_id(1).to(tl.int64) * N * R
        tl.store(tile(dB, cols, ranks, R, 1), dB_acc, mask=inside(cols, ranks, N, R))
    if g is not None:
        tl.store(dg + tl.program_id(1) * N + cols, dg_acc, mask=cols < N)


def launch_expand_backward(
    dy: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    needs_dh: bool,
    needs_dB: bool,
    y: Float[Tensor, "*M N"] | None = None,
    g: Float[Tensor, "*G N"] | None = None,
    bias: Float[Tensor, "*G N"] | None = None,
    runs: Runs | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dB, dy_base, dg) of `launch_expand`; dy_base and dg with y and g. What is not needed is None."""
    if B.shape[-1] > MAX_RANK:
        return _expand_backward_by_ranks(dy, h, B, scale, needs_dh, needs_dB, y, g, bias, runs)
    dy_base = None if y is None else dy.new_empty(dy.shape)
    dy, y = rows_of(dy), None if y is None else rows_of(y)
    (M, N), R = dy.shape, B.shape[-1]
    B, h = B.contiguous(), rows_apart(h)
    kernel = "expand_backward" if y is None else "expand_backward_rescale"
    dB = torch.empty_like(B) if needs_dB or g is not None else None
    dg = None if g is None else torch.empty_like(g)
    if M == 0:
        zeros = [None if t is None else t.zero_() for t in (dB, dg)]
        return h.new_empty((M, R)) if needs_dh else None, zeros[0], dy_base, zeros[1]

    def by_shrink() -> Tensor | None:
        """dh by another look at dy."""
        if not needs_dh:
            return None
        return launch_shrink(dy if dy_base is None else dy_base, B.mT, h.dtype, runs, scale=scale)

    if dB is None and MOST_RANKS_IN_PARTS[kernel] < R:
        return by_shrink(), None, dy_base, dg
    of_shrink = dy.nbytes + 4 * LAUNCH  # a product and a sum; the quickest memories move twice as much in a launch

    def shares(config: Config) -> tuple[int, bool, tuple[int, int, Tensor | None]]:
        """(blocks of columns, whether each is to have a part of dh, shares of the rows)."""
        blocks = cdiv(N, config.cols)
        few = MOST_RANKS_IN_PARTS[kernel] >= R and blocks <= most_parts(M * R)
        in_parts = needs_dh and few and of_parts(blocks, M * R) <= of_shrink
        wanted = full_waves(programs(dy), blocks, M, config.rows, most_parts(N * R))
        return blocks, in_parts, parts_of(M, config.rows, wanted, runs)

    def moves(config: Config) -> float:
        blocks, in_parts, (count, *_) = shares(config)
        of_dh = of_parts(blocks, M * R) if in_parts else of_shrink
        return of_dh + of_parts(count, N * R) + of_reads(blocks, h)

    def run(config: Config) -> Tensor | None:
        blocks, in_parts, (count, each, table) = shares(config)
        dh = h.new_empty((M, R)) if in_parts else None
        dhs, dBs, dgs = parts_like(dh, blocks), parts_like(dB, count, runs), parts_like(dg, count, runs)
        numbers = (float(scale), M, N, R, *dy.stride(), *((0, 0) if y is None else y.stride()), h.stride(0), each)
        hows = (precision(dy, h.dtype, many_tiles=size >= LONG_SUM) for size in (min(M, N), M))
        constants = (*hows, config.rows, config.cols, block_of(R))
        wide_B = None if y is None else B
        narrow = small(B, h.dtype) if in_parts and MOST_RANKS_UNCAST < R else B
        tensors = (dy, h, narrow, dhs, dBs, y, g, bias, dy_base, dgs, wide_B, table)
        if in_parts or dB is not None:
            launch(_expand_backward_kernel, (blocks, count), tensors, numbers, constants, config)
            sum_parts((dhs, dh, None), (dBs, dB, runs), (dgs, dg, runs))
        return dh if in_parts else by_shrink()

    dh = tuned(named(kernel, runs if y is None else None), run, dy, h.dtype, M, N, R, moves=moves)
    return dh, dB, dy_base, dg


def _expand_backward_by_ranks(
    dy: Tensor,
    h: Tensor,
    B: Tensor,
    scale: float,
    needs_dh: bool,
    needs_dB: bool,
    y: Tensor | None,
    g: Tensor | None,
    bias: Tensor | None,
    runs: Runs | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As above, of more ranks than a launch takes: y goes to the first alone."""
    (first, B_first), *rest = zip(h.split(MAX_RANK, -1), B.split(MAX_RANK, -1), strict=True)
    dh, dB, dy_base, dg = launch_expand_backward(dy, first, B_first, scale, needs_dh, needs_dB, y, g, bias, runs)
    dhs, dBs = [dh], [dB]
    for hs, Bs in rest:
        wide = Bs if g is None else g[..., None] * Bs
        dh, dB, _, _ = launch_expand_backward(dy, hs, wide, scale, needs_dh, needs_dB or g is not None, runs=runs)
        if g is not None and dg is not None and dB is not None:
            dg += (Bs * dB).sum(-1)
            dB = (g[..., None] * dB).to(B.dtype)
        dhs.append(dh)
        dBs.append(dB)
    return side_by_side(dhs), side_by_side(dBs), dy_base, dg
