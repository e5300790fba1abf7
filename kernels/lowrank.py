"""y + scale · (x Aᵀ) Bᵀ in two halves around the base layer: `shrink` before it, `expand_add` after it.

M tokens, K in_features, N out_features, R rank. Token-sized reads and writes, each tensor once a kernel:

    shrink              reads x                 writes –         h = x Aᵀ
    expand_add          reads y                 writes out       out = y + scale · h Bᵀ
    expand_add backward reads dy                writes –         dh = scale · dy B,  dB = scale · dyᵀ h
    shrink backward     reads x, dx_base        writes dx        dx = dx_base + dh A,  dA = dhᵀ x

Layers that read the same x share the work: `shrink_together` reads x once for the ranks of all, and its backward adds
all their dx_bases and dh A in one kernel, where autograd would add them one by one.

`shrink_expand` is both with no layer between them, x + (x Aᵀ) Bᵀ: the same forward, and in the backward `shrink` of dy
for dh, then `shrink backward` with dy as dx_base, which it has at hand for dB = dyᵀ h too.

`shrink` hands x on to the base layer, so the base layer's own input gradient dx_base comes back to it together with
dh: no M×K delta is ever stored and autograd has nothing to add. With g and bias the same kernels do DoRA's
composition (see dora.py). Sums over a dimension that several programs share are float32 parts, added in fixed order.

With dropout, x Aᵀ is of x's surviving elements; the backward computes the mask again from the same seed (dropout.py).
Each of several layers has a mask of its own.
With segments, A is G×R×K and B is G×N×R, and each row takes the A and the B of its run; where it has none, as if they
were zero. A program's rows are of one run: it finds them in a table of shares (`common.Runs`).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..operators import applied, operator, watched
from ..reference import sharing
from ..segments import Segments
from .common import (
    MAX_RANK,
    Runs,
    block_of,
    blocks_of,
    compute_dtype,
    full_waves,
    inside,
    joined,
    or_empty,
    own,
    own_vector,
    parts_like,
    parts_of,
    precision,
    rows_of,
    run_of_rows,
    share_of_rows,
    small,
    split,
    sum_parts,
    tile,
)
from .dropout import kept, new_seed, rescale, threshold
from .launching import launch, replayed
from .tuning import Config, cdiv, programs, tuned

# Float32 parts of dh, a part a block of columns, are written and read: 4·R/columns passes over dy, where reading dy
# once more in `shrink` is one. Beyond these ranks the blocks of columns are too narrow for parts.
MOST_RANKS_IN_PARTS = {"expand_backward": 64, "expand_backward_rescale": 32}

# Up to these ranks B is read as the parameter is, in float32, and converted in registers, which saves a launch. Beyond
# them `expand`, which reads B for every block of rows, would read more of it than of y; the backward lacks registers.
MOST_RANKS_UNCAST = {"expand": 32, "expand_backward": 16}

MOST_LAYERS = 3  # whose results, of one x, a launch takes

# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _of_layer(ranks, i: tl.constexpr, LAYERS: tl.constexpr, R_1, R_2):
    """Which ranks are layer i's."""
    mine = ranks >= 0
    if i == 0:
        if LAYERS > 1:
            mine = ranks < R_1
    elif i == 1:
        mine = ranks >= R_1
        if LAYERS > 2:
            mine &= ranks < R_2
    else:
        mine = ranks >= R_2
    return mine


@triton.jit
def _rescales(seeds, ranks, LAYERS: tl.constexpr, R_1, R_2):
    """Of each rank, 1 / the probability of its layer's inputs to stay."""
    found = ranks * 0.0
    for i in tl.static_range(LAYERS):
        found = tl.where(_of_layer(ranks, i, LAYERS, R_1, R_2), rescale(seeds + i), found)
    return found


@triton.jit
def _shrink_kernel(
    x, A, h, table, seeds,
    M, K, R, R_1, R_2, stride_xm, stride_xk, k_per_program,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """Program (i, s): rows of block i, and columns of part s. h holds a result a part. With seeds, one for each layer
    whose ranks A has: the ranks of the first end at R_1, of the second at R_2."""
    top, last, matrix = share_of_rows(tl.program_id(0), M, table, BLOCK_M)
    rows = top + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * k_per_program
    end = min(first + k_per_program, K)
    A, of_A = own(A, table, matrix, R, K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, end, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(tile(x, rows, cols, stride_xm, stride_xk), mask=inside(rows, cols, last, end), other=0.0)
        A_tile = tl.load(tile(A, ranks, cols, K, 1), mask=inside(ranks, cols, of_A, end), other=0.0)
        if seeds is None:
            acc = tl.dot(x_tile.to(A_tile.dtype), tl.trans(A_tile), acc, input_precision=PRECISION)
        else:
            for i in tl.static_range(LAYERS):
                of_layer = tl.where(kept(seeds + i, rows, start, BLOCK_M, BLOCK_K), x_tile, 0.0).to(A_tile.dtype)
                own_A = tl.where(_of_layer(ranks, i, LAYERS, R_1, R_2)[:, None], A_tile, 0.0)
                acc = tl.dot(of_layer, tl.trans(own_A), acc, input_precision=PRECISION)
    if seeds is not None:
        acc *= _rescales(seeds, ranks, LAYERS, R_1, R_2)[None, :]
    h += tl.program_id(1).to(tl.int64) * M * R
    tl.store(tile(h, rows, ranks, R, 1), acc, mask=inside(rows, ranks, last, R))


@triton.jit
def _expand_kernel(
    y, h, B, out, g, bias, table, seed, scale,
    M, N, R, stride_ym, stride_yn, stride_hm, stride_bn, stride_br,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of out a program; neighbouring programs take neighbouring columns of the same rows."""
    blocks = tl.cdiv(N, BLOCK_N)
    top, last, matrix = share_of_rows(tl.program_id(0) // blocks, M, table, BLOCK_M)
    rows = top + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    here = inside(rows, cols, last, N)
    B, of_B = own(B, table, matrix, R, N)
    dtype = h.dtype.element_ty
    y_tile = tl.load(tile(y, rows, cols, stride_ym, stride_yn), mask=here, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # transposed: AMD's compiler then stores 128 bits a thread, not 64
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        h_tile = tl.load(tile(h, rows, ranks, stride_hm, 1), mask=inside(rows, ranks, last, R), other=0.0)
        B_tile = tl.load(tile(B, cols, ranks, stride_bn, stride_br), mask=inside(cols, ranks, N, of_B), other=0.0)
        acc = tl.dot(B_tile.to(dtype), tl.trans(h_tile), acc, input_precision=PRECISION)
    change = scale * tl.trans(acc)
    if g is not None:
        gain = own_vector(g, table, matrix, cols, N, 1.0)[None, :]
        if bias is not None:
            b = own_vector(bias, table, matrix, cols, N, 0.0)[None, :]
            y_tile = (y_tile - b) * gain + b
        else:
            y_tile *= gain
        change *= gain
    if seed is not None:
        first = tl.program_id(0) % blocks * BLOCK_N
        change = tl.where(kept(seed, rows, first, BLOCK_M, BLOCK_N), rescale(seed) * change, 0.0)
    tl.store(tile(out, rows, cols, N, 1), y_tile + change, mask=here)


@triton.jit
def _expand_backward_kernel(
    dy, h, B, dh, dB, y, g, bias, dy_base, dg, wide_B, table, scale,
    M, N, R, stride_dm, stride_dn, stride_ym, stride_yn, stride_hm, m_per_program,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the columns of block j, down the rows of part i. dh holds a result a block, dB and dg a part.
    wide_B is B as the parameter is."""
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
            dB_acc = tl.dot(tl.trans(dy_tile.to(dtype)), h_tile, dB_acc, input_precision=PRECISION)
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


@triton.jit
def _shrink_backward_kernel(
    x, dx_base, dx_base_2, dx_base_3, dh, dh_2, dh_3, h, A, dx, dA, dB, table, seeds,
    M, K, R, R_1, R_2, stride_dm, stride_dk, stride_xm, stride_xk, m_per_program,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    LAYERS: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the columns of block j, down the rows of part i. dA holds a result a part, and with h so does
    dB = dx_baseᵀ h. Layers that read the same x have a dx_base each, and a dh each for ranks that end at R_1, R_2, R;
    with seeds, one for each."""
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    first, end, matrix = run_of_rows(tl.program_id(1), m_per_program, M, table)
    A, of_A = own(A, table, matrix, R, K)
    dtype = dh.dtype.element_ty
    A_tile = tl.load(tile(A, ranks, cols, K, 1), mask=inside(ranks, cols, of_A, K), other=0.0).to(dtype)
    dA_acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    dB_acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        here, of_rank = inside(rows, cols, end, K), inside(rows, ranks, end, R)
        dh_tile = tl.load(tile(dh, rows, ranks, R_1, 1), mask=inside(rows, ranks, end, R_1), other=0.0)
        if dh_2 is not None:
            of_2 = inside(rows, ranks, end, R_2) & (ranks >= R_1)[None, :]
            dh_tile += tl.load(tile(dh_2, rows, ranks - R_1, R_2 - R_1, 1), mask=of_2, other=0.0)
        if dh_3 is not None:
            of_3 = of_rank & (ranks >= R_2)[None, :]
            dh_tile += tl.load(tile(dh_3, rows, ranks - R_2, R - R_2, 1), mask=of_3, other=0.0)
        if dA is not None:
            x_tile = tl.load(tile(x, rows, cols, stride_xm, stride_xk), mask=here, other=0.0).to(dtype)
            if seeds is None:
                dA_acc = tl.dot(tl.trans(x_tile), dh_tile, dA_acc, input_precision=PRECISION)
        if dx_base is not None:
            base_tile = tl.load(tile(dx_base, rows, cols, stride_dm, stride_dk), mask=here, other=0.0)
            if h is not None:
                h_tile = tl.load(tile(h, rows, ranks, R, 1), mask=of_rank, other=0.0)
                dB_acc = tl.dot(tl.trans(base_tile.to(dtype)), h_tile, dB_acc, input_precision=PRECISION)
        # dx as (Aᵀ dhᵀ)ᵀ, for the same reason as in the expand kernel.
        if seeds is None:
            if dx is not None:
                dx_tile = tl.trans(tl.dot(tl.trans(A_tile), tl.trans(dh_tile), input_precision=PRECISION))
        else:
            dx_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for i in tl.static_range(LAYERS):
                keep = kept(seeds + i, rows, tl.program_id(0) * BLOCK_K, BLOCK_M, BLOCK_K)
                own_dh = tl.where(_of_layer(ranks, i, LAYERS, R_1, R_2)[None, :], dh_tile, 0.0)
                if dA is not None:
                    of_layer = tl.where(keep, x_tile, 0.0)
                    dA_acc = tl.dot(tl.trans(of_layer), own_dh, dA_acc, input_precision=PRECISION)
                if dx is not None:
                    own_dx = tl.trans(tl.dot(tl.trans(A_tile), tl.trans(own_dh), input_precision=PRECISION))
                    dx_tile += tl.where(keep, rescale(seeds + i) * own_dx, 0.0)
        if dx is not None:
            if dx_base is not None:
                dx_tile += base_tile.to(tl.float32)
            if dx_base_2 is not None:
                more = tl.load(tile(dx_base_2, rows, cols, stride_dm, stride_dk), mask=here, other=0.0)
                dx_tile += more.to(tl.float32)
            if dx_base_3 is not None:
                more = tl.load(tile(dx_base_3, rows, cols, stride_dm, stride_dk), mask=here, other=0.0)
                dx_tile += more.to(tl.float32)
            tl.store(tile(dx, rows, cols, K, 1), dx_tile, mask=here)
    if dA is not None:
        if seeds is not None:
            dA_acc *= _rescales(seeds, ranks, LAYERS, R_1, R_2)[None, :]
        dA += tl.program_id(1).to(tl.int64) * R * K
        tl.store(tile(dA, cols, ranks, 1, K), dA_acc, mask=inside(cols, ranks, K, R))
    if h is not None:
        dB += tl.program_id(1).to(tl.int64) * K * R
        tl.store(tile(dB, cols, ranks, R, 1), dB_acc, mask=inside(cols, ranks, K, R))


# ---- launchers -------------------------------------------------------------------------------------------------------


def named(kernel: str, runs: Runs | None, seeds: Tensor | None = None) -> str:
    """The kernel's name in the block tables."""
    return kernel + ("_dropout" if seeds is not None else "_grouped" if runs is not None else "")


def _rows_apart(h: Float[Tensor, "M R"]) -> Float[Tensor, "M R"]:
    """h with its ranks side by side; rows may be further apart, as those of one layer among several are."""
    return h if h.stride(1) == 1 else h.contiguous()


class _Ranks(NamedTuple):
    """The ranks and the layers of one launch: `ends` of each layer's ranks, of those that are here."""

    ranks: slice
    layers: slice
    ends: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, int, int]:
        """R, R_1, R_2 of a kernel."""
        R_1, R_2, *_ = (*self.ends, self.ends[-1], self.ends[-1])
        return self.ends[-1], R_1, R_2


def _launches_of(R: int, ends: Sequence[int], layers: int = MOST_LAYERS) -> list[_Ranks]:
    """R ranks, of layers that end at these (none: of one), in launches of at most MAX_RANK and so many layers."""
    ends, found = tuple(ends) or (R,), []
    for at in range(0, len(ends), layers):
        of = slice(at, at + layers)
        begin, end = ends[at - 1] if at else 0, ends[of][-1]
        for first in range(begin, max(end, begin + 1), MAX_RANK):
            last = min(first + MAX_RANK, end)
            found.append(_Ranks(slice(first, last), of, tuple(min(max(e, first), last) - first for e in ends[of])))
    return found


def launch_shrink(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    dtype: torch.dtype,
    runs: Runs | None = None,
    seeds: Int[Tensor, "L"] | None = None,
    ends: Sequence[int] = (),
) -> Float[Tensor, "M R"]:
    """x Aᵀ, multiplied and returned in `dtype`; with seeds, of x after dropout. A may have the ranks of L layers, which
    end at these: each has a seed."""
    launches = _launches_of(A.shape[-2], ends if seeds is not None else ())
    if len(launches) > 1:
        parts = [
            launch_shrink(x, A[..., of.ranks, :], dtype, runs, None if seeds is None else seeds[of.layers], of.ends)
            for of in launches
        ]
        return torch.cat(parts, 1)
    (of,) = launches
    x = rows_of(x)
    M, K = x.shape
    R, R_1, R_2 = of.numbers
    A = small(A, dtype)
    h = x.new_empty((M, R), dtype=dtype)
    if M == 0:
        return h

    def run(config: Config) -> Tensor:
        blocks, table, rows = blocks_of(M, config, runs)
        count, each = split(K, config.cols, min(programs(x) // blocks, K // (4 * config.cols)))
        parts = parts_like(h, count)
        numbers = (M, K, R, R_1, R_2, *x.stride(), each)
        constants = (precision(x, dtype), rows, config.cols, block_of(R), len(of.ends))
        launch(_shrink_kernel, (blocks, count), (x, A, parts, table, seeds), numbers, constants, config)
        sum_parts((parts, h, None))
        return h

    name = "shrink_together_dropout" if seeds is not None and len(of.ends) > 1 else named("shrink", runs, seeds)
    return tuned(name, run, x, dtype, M, K, R)


def launch_expand(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    g: Float[Tensor, "*G N"] | None = None,
    bias: Float[Tensor, "*G N"] | None = None,
    runs: Runs | None = None,
    seed: Int[Tensor, "1"] | None = None,
) -> Float[Tensor, "*M N"]:
    """y + scale · h Bᵀ; with g and bias, g ∘ (y − bias + scale · h Bᵀ) + bias. With a seed, what is added to y goes
    through dropout."""
    out, y = y.new_empty(y.shape), rows_of(y)
    (M, N), R = y.shape, B.shape[-1]
    B = B if MOST_RANKS_UNCAST["expand"] >= R else small(B, h.dtype)
    h = _rows_apart(h)
    inner = 64 if h.element_size() == 2 else 16  # ranks in one product; few where FMA units keep them in registers
    if M == 0:
        return out

    def run(config: Config) -> Tensor:
        blocks, table, rows = blocks_of(M, config, runs)
        numbers = (float(scale), M, N, R, *y.stride(), h.stride(0), *B.stride()[-2:])
        constants = (precision(y, h.dtype), rows, config.cols, block_of(R, inner))
        grid = (blocks * cdiv(N, config.cols),)
        launch(_expand_kernel, grid, (y, h, B, out, g, bias, table, seed), numbers, constants, config)
        return out

    return tuned(named("expand", runs, seed), run, y, h.dtype, M, N, R)


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
    B, h = B.contiguous(), _rows_apart(h)
    narrow = B if MOST_RANKS_UNCAST["expand_backward"] >= R else small(B, h.dtype)
    kernel = "expand_backward" if y is None else "expand_backward_rescale"
    in_parts = needs_dh and MOST_RANKS_IN_PARTS[kernel] >= R
    dh = h.new_empty((M, R)) if in_parts else None
    dB = torch.empty_like(B) if needs_dB or g is not None else None
    dg = None if g is None else torch.empty_like(g)
    if M == 0:
        zeros = [None if t is None else t.zero_() for t in (dB, dg)]
        return h.new_empty((M, R)) if needs_dh else None, zeros[0], dy_base, zeros[1]

    def run(config: Config) -> None:
        blocks = cdiv(N, config.cols)
        count, each, table = parts_of(M, config.rows, full_waves(programs(dy), blocks, M, config.rows), runs)
        dhs, dBs, dgs = parts_like(dh, blocks), parts_like(dB, count, runs), parts_like(dg, count, runs)
        numbers = (float(scale), M, N, R, *dy.stride(), *((0, 0) if y is None else y.stride()), h.stride(0), each)
        constants = (precision(dy, h.dtype), config.rows, config.cols, block_of(R))
        wide_B = None if y is None else B
        tensors = (dy, h, narrow, dhs, dBs, y, g, bias, dy_base, dgs, wide_B, table)
        launch(_expand_backward_kernel, (blocks, count), tensors, numbers, constants, config)
        sum_parts((dhs, dh, None), (dBs, dB, runs), (dgs, dg, runs))

    if in_parts or dB is not None:
        tuned(named(kernel, runs if y is None else None), run, dy, h.dtype, M, N, R)
    if needs_dh and not in_parts:
        dh = launch_shrink(dy, (scale * (B if g is None else g[..., None] * B)).mT, h.dtype, runs)
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
    return _side_by_side(dhs), _side_by_side(dBs), dy_base, dg


def _side_by_side(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts, -1)  # type: ignore[arg-type]


def launch_shrink_backward(
    dx_bases: Sequence[Float[Tensor, "*M K"]],
    dhs: Sequence[Float[Tensor, "M _"]],
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    needs_dx: bool,
    needs_dA: bool,
    h: Float[Tensor, "M R"] | None = None,
    runs: Runs | None = None,
    seeds: Int[Tensor, "L"] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB): Σ dx_bases + dh A, dhᵀ x, and with h also dx_baseᵀ h, where dh are the dhs of all layers side by
    side. What is not needed is None. `dtype`: of dA; without it, A's."""
    M = x.numel() // x.shape[-1]
    if seeds is None and (len(dhs) > MOST_LAYERS or A.shape[-2] > MAX_RANK):
        dhs = [torch.cat(list(dhs), 1)] if len(dhs) > 1 else dhs
    launches = _launches_of(A.shape[-2], tuple(itertools.accumulate(dh.shape[1] for dh in dhs)))
    if len(launches) > 1:
        return _shrink_backward_by_ranks(dx_bases, dhs, x, A, needs_dx, needs_dA, h, runs, seeds, dtype)
    (of,), K = launches, x.shape[-1]
    R, R_1, R_2 = of.numbers
    dx = x.new_empty(x.shape) if needs_dx else None
    # With many ranks in float32 registers hold one base.
    x, bases = rows_of(x), _as_few(dx_bases, 1 if dhs[0].element_size() == 4 and R > 128 else 3)
    A, h, dhs = A.contiguous(), None if h is None else h.contiguous(), [dh.contiguous() for dh in dhs]
    dA = A.new_empty(A.shape, dtype=dtype or A.dtype) if needs_dA else None
    dB = None if h is None else A.new_empty(A.mT.shape)
    if M == 0:
        zeros = [None if t is None else t.zero_() for t in (dA, dB)]
        return dx, zeros[0], zeros[1]

    def run(config: Config) -> None:
        blocks = cdiv(K, config.cols)
        count, each, table = parts_of(M, config.rows, full_waves(programs(x), blocks, M, config.rows), runs)
        dAs, dBs = parts_like(dA, count, runs), parts_like(dB, count, runs)
        numbers = (M, K, R, R_1, R_2, *(bases[0].stride() if bases else (0, 0)), *x.stride(), each)
        constants = (precision(x, dhs[0].dtype), config.rows, config.cols, block_of(R), len(dhs))
        of_layers = [*bases, *[None] * (3 - len(bases)), *dhs, *[None] * (3 - len(dhs))]
        tensors = (x, *of_layers, h, A, dx, dAs, dBs, table, seeds)
        launch(_shrink_backward_kernel, (blocks, count), tensors, numbers, constants, config)
        sum_parts((dAs, dA, runs), (dBs, dB, runs))

    name = named("shrink_backward", runs, seeds) if h is None else "shrink_expand_backward"
    if len(dhs) > 1 or len(bases) > 1:
        name = named("shrink_backward_together", None, seeds)
    tuned(name, run, x, dhs[0].dtype, M, K, R)
    return dx, dA, dB


def _shrink_backward_by_ranks(
    dx_bases: Sequence[Tensor],
    dhs: Sequence[Tensor],
    x: Tensor,
    A: Tensor,
    needs_dx: bool,
    needs_dA: bool,
    h: Tensor | None,
    runs: Runs | None,
    seeds: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As above, of more ranks or layers than a launch takes: dx of each layer's dh A by itself."""
    dh, ends = torch.cat(list(dhs), 1) if len(dhs) > 1 else dhs[0], itertools.accumulate(each.shape[1] for each in dhs)
    seeds_of = [None] * len(dhs) if seeds is None else seeds.split(1)
    dx = None
    if needs_dx:
        dx = sum(dx_bases[1:], dx_bases[0]) if dx_bases else torch.zeros_like(x)
        for each, rows, seed in zip(dhs, A.split([each.shape[1] for each in dhs], -2), seeds_of, strict=True):
            dx = launch_expand(dx, each, rows.mT, 1.0, None, None, runs, seed)
    dAs, dBs = [], []
    for of in _launches_of(A.shape[-2], tuple(ends), 1):
        part = None if h is None else h[:, of.ranks]
        seed, read = seeds_of[of.layers.start], [] if h is None else dx_bases
        _, dA, dB = launch_shrink_backward(
            read, [dh[:, of.ranks]], x, A[..., of.ranks, :], False, needs_dA, part, runs, seed, dtype
        )
        dAs.append(dA)
        dBs.append(dB)
    return dx, torch.cat(dAs, -2) if needs_dA else None, _side_by_side(dBs)


def _as_few(bases: Sequence[Float[Tensor, "*M K"]], most: int) -> list[Float[Tensor, "M K"]]:
    """As many as the kernel adds, of the same strides; the rest is added to the last of them."""
    if len(bases) < 2:
        return [rows_of(base) for base in bases]
    rows = [rows_of(base).contiguous() for base in bases]
    return rows if len(rows) <= most else [*rows[: most - 1], sum(rows[most:], rows[most - 1])]


# ---- operators -------------------------------------------------------------------------------------------------------


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


@operator("lora_lite::shrink_expand")
@replayed
def _shrink_expand(x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, runs: list[Tensor]) -> tuple[Tensor, Tensor]:
    h = launch_shrink(x, A, dtype, Runs.read(runs))
    return launch_expand(x, h, B, 1.0, runs=Runs.read(runs)), h


@_shrink_expand.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, runs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], A.shape[-2], dtype=dtype)


@operator("lora_lite::shrink_expand_backward")
@replayed
def _shrink_expand_backward(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, runs: list[Tensor], needs_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dh = launch_shrink(dy, B.mT, h.dtype, Runs.read(runs))
    dx, dA, dB = launch_shrink_backward([dy], [dh], x, A, needs_dx, True, h, Runs.read(runs))
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


def shrink(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    dropout: float = 0.0,
    segments: Segments | None = None,
) -> tuple[Float[Tensor, "*M K"], Float[Tensor, "M R"]]:
    """(x, x Aᵀ), the second with its leading dimensions as one, and of x after dropout. Hand the returned x, not the
    argument, to the layer. With segments A is a stack, of which each row takes its own."""
    seed = new_seed(x, dropout) if threshold(dropout) else None
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


shrink_together = sharing(compute_dtype, _seeds, _together, _together_backward)


def expand_add(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """y + scale · h Bᵀ. With segments B is a stack as A is in `shrink`."""
    return _expand_add(y, h, B, scale, Runs.of(segments, y, B.shape[0]))


def shrink_expand(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    B: Float[Tensor, "*G K R"],
    segments: Segments | None = None,
) -> Float[Tensor, "*M K"]:
    """x + (x Aᵀ) Bᵀ."""
    return _shrink_expand(x, A, B, compute_dtype(x), Runs.of(segments, x, A.shape[0]))[0]
