"""dx = Σ dx_bases + dh A and dA = dhᵀ x: the backward of h = x Aᵀ, and of the base layers that read the same x.

M tokens, K in_features, R rank. Token-sized: reads x and the dx_bases, writes dx, each once.

With dropout the mask is computed again from the forward's seed (dropout.py).
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .common import (
    LONG_SUM,
    block_of,
    full_waves,
    inside,
    lies_across,
    named,
    precision,
    product,
    rows_of,
    tile,
    upright,
)
from .dropout import kept, rescale
from .expand import launch_expand
from .launching import launch
from .layers import MOST_LAYERS, MOST_RANKS_APART, MOST_RANKS_MASKED, launches_of, ranks_of, rescales
from .segments import Runs, own, parts_of, run_of_rows
from .sums import most_parts, parts_like, sum_parts
from .tuning import Config, cdiv, of_parts, of_reads, programs, tuned


@triton.jit
def _wide(t, rows, cols, stride_row, stride_col, here):
    return tl.load(tile(t, rows, cols, stride_row, stride_col), mask=here, other=0.0).to(tl.float32)


@triton.jit
def _side_by_side(first, second, third, rows, ranks, end, R_1, R_2, R):
    """A tile of up to three tensors' ranks, which end at R_1, R_2 and R."""
    t = tl.load(tile(first, rows, ranks, R_1, 1), mask=inside(rows, ranks, end, R_1), other=0.0)
    if second is not None:
        here = inside(rows, ranks, end, R_2) & (ranks >= R_1)[None, :]
        t += tl.load(tile(second, rows, ranks - R_1, R_2 - R_1, 1), mask=here, other=0.0)
    if third is not None:
        here = inside(rows, ranks, end, R) & (ranks >= R_2)[None, :]
        t += tl.load(tile(third, rows, ranks - R_2, R - R_2, 1), mask=here, other=0.0)
    return t


@triton.jit
def _shrink_backward_kernel(
    x, dx_base, dx_base_2, dx_base_3, dh, dh_2, dh_3, h, A, dx, dA, dB, table, seeds,
    M, K, R, R_1, R_2, stride_dm, stride_dk, stride_xm, stride_xk, m_per_program,
    PRECISION: tl.constexpr, OVER_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, LAYERS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Program (j, i): block j of columns, part i of rows; dA, and with h dB = dx_baseᵀ h, hold a result a part. Layers
    that read the same x have a dx_base, a dh (of ranks up to R_1, R_2, R), a seed each.
    OVER_TOKENS: how products are added to dA and dB."""
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
        here = inside(rows, cols, end, K)
        dh_tile = _side_by_side(dh, dh_2, dh_3, rows, ranks, end, R_1, R_2, R)
        if dA is not None:
            x_tile = tl.load(tile(x, rows, cols, stride_xm, stride_xk), mask=here, other=0.0).to(dtype)
            if seeds is None:
                dA_acc = tl.dot(tl.trans(x_tile), dh_tile, dA_acc, input_precision=OVER_TOKENS)
        if dx_base is not None:
            base_tile = tl.load(tile(dx_base, rows, cols, stride_dm, stride_dk), mask=here, other=0.0)
            if h is not None:
                h_tile = tl.load(tile(h, rows, ranks, R, 1), mask=inside(rows, ranks, end, R), other=0.0)
                dB_acc = tl.dot(tl.trans(base_tile.to(dtype)), h_tile, dB_acc, input_precision=OVER_TOKENS)
        if seeds is None:
            if dx is not None:
                dx_tile = upright(product(dh_tile, A_tile, None, PRECISION, ACROSS), ACROSS)
        else:
            dx_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for i in tl.static_range(LAYERS):
                keep = kept(seeds + i, rows, tl.program_id(0) * BLOCK_K, BLOCK_M, BLOCK_K)
                own_dh = dh_tile
                if LAYERS > 1:
                    own_dh = tl.where(ranks_of(ranks, i, LAYERS, R_1, R_2)[None, :], dh_tile, 0.0)
                if dA is not None:
                    of_layer = tl.where(keep, x_tile, 0.0)
                    dA_acc = tl.dot(tl.trans(of_layer), own_dh, dA_acc, input_precision=OVER_TOKENS)
                if dx is not None:
                    own_dx = upright(product(own_dh, A_tile, None, PRECISION, ACROSS), ACROSS)
                    dx_tile += tl.where(keep, rescale(seeds + i) * own_dx, 0.0)
        if dx is not None:
            if dx_base is not None:
                dx_tile += base_tile.to(tl.float32)
            if dx_base_2 is not None:
                dx_tile += _wide(dx_base_2, rows, cols, stride_dm, stride_dk, here)
            if dx_base_3 is not None:
                dx_tile += _wide(dx_base_3, rows, cols, stride_dm, stride_dk, here)
            tl.store(tile(dx, rows, cols, K, 1), dx_tile, mask=here)
    if dA is not None:
        if seeds is not None:
            dA_acc *= rescales(seeds, ranks, LAYERS, R_1, R_2)[None, :]
        dA += tl.program_id(1).to(tl.int64) * R * K
        tl.store(tile(dA, cols, ranks, 1, K), dA_acc, mask=inside(cols, ranks, K, R))
    if h is not None:
        dB += tl.program_id(1).to(tl.int64) * K * R
        tl.store(tile(dB, cols, ranks, R, 1), dB_acc, mask=inside(cols, ranks, K, R))


def launch_shrink_backward(
    dx_bases: Sequence[Float[Tensor, "*M K"]],
    dhs: Sequence[Float[Tensor, "M _"]],
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    needs_dx: bool,
    needs_dA: bool,
    h: Float[Tensor, "M R"] | None = None,
    runs: Runs | None = None,
    seeds: Int[Tensor, " L"] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB): Σ dx_bases + dh A, dhᵀ x, and with h, of ranks that one launch takes, also dx_baseᵀ h, where dh are
    the dhs of all layers side by side. What is not needed is None. `dtype`: of dA; without it, A's."""
    M, R, size = x.numel() // x.shape[-1], A.shape[-2], dhs[0].element_size()
    if seeds is None and len(dhs) > 1 and (len(dhs) > MOST_LAYERS or MOST_RANKS_APART[size] < R):
        dhs = [torch.cat(list(dhs), 1)]
    layers = MOST_LAYERS if seeds is None or MOST_RANKS_MASKED[size] >= R else 1
    launches = launches_of(R, tuple(itertools.accumulate(dh.shape[1] for dh in dhs)), layers)
    if len(launches) > 1:
        return *_shrink_backward_by_ranks(dx_bases, dhs, x, A, needs_dx, needs_dA, runs, seeds, dtype), None
    (of,), K = launches, x.shape[-1]
    R, R_1, R_2 = of.numbers
    dx = x.new_empty(x.shape) if needs_dx else None
    # With many ranks in float32 registers hold one base.
    x, bases = rows_of(x), _as_few(dx_bases, 1 if size == 4 and R > 128 else 3)
    A, h, dhs = A.contiguous(), None if h is None else h.contiguous(), [dh.contiguous() for dh in dhs]
    dA = A.new_empty(A.shape, dtype=dtype or A.dtype) if needs_dA else None
    dB = None if h is None else A.new_empty(A.mT.shape)
    if M == 0:
        zeros = [None if t is None else t.zero_() for t in (dA, dB)]
        return dx, zeros[0], zeros[1]

    def shares(config: Config) -> tuple[int, tuple[int, int, Tensor | None]]:
        blocks = cdiv(K, config.cols)
        wanted = full_waves(programs(x), blocks, M, config.rows, most_parts(K * R))
        return blocks, parts_of(M, config.rows, wanted, runs)

    def moves(config: Config) -> float:
        blocks, (count, *_) = shares(config)
        of_h = 0 if h is None else of_parts(count, K * R) + of_reads(blocks, h)
        return of_parts(count, K * R) + sum(of_reads(blocks, dh) for dh in dhs) + of_h

    def run(config: Config) -> None:
        blocks, (count, each, table) = shares(config)
        dAs, dBs = parts_like(dA, count, runs), parts_like(dB, count, runs)
        numbers = (M, K, R, R_1, R_2, *(bases[0].stride() if bases else (0, 0)), *x.stride(), each)
        hows = (precision(x, dhs[0].dtype, many) for many in (False, M >= LONG_SUM))  # dx is a sum over ranks, in one
        constants = (*hows, config.rows, config.cols, block_of(R), len(dhs), lies_across(x, dhs[0].dtype))
        of_layers = [*bases, *[None] * (3 - len(bases)), *dhs, *[None] * (3 - len(dhs))]
        tensors = (x, *of_layers, h, A, dx, dAs, dBs, table, seeds)
        launch(_shrink_backward_kernel, (blocks, count), tensors, numbers, constants, config)
        sum_parts((dAs, dA, runs), (dBs, dB, runs))

    kernel = named("shrink_backward", runs, seeds, together=max(len(dhs), len(bases)) > 1)
    tuned(kernel if h is None else "shrink_expand_backward", run, x, dhs[0].dtype, M, K, R, moves=moves)
    return dx, dA, dB


def _shrink_backward_by_ranks(
    dx_bases: Sequence[Tensor],
    dhs: Sequence[Tensor],
    x: Tensor,
    A: Tensor,
    needs_dx: bool,
    needs_dA: bool,
    runs: Runs | None,
    seeds: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """As above, of more ranks or layers than a launch takes: dx of each layer's dh A by itself."""
    dh, ends = torch.cat(list(dhs), 1) if len(dhs) > 1 else dhs[0], itertools.accumulate(each.shape[1] for each in dhs)
    seeds_of = [None] * len(dhs) if seeds is None else seeds.split(1)
    dx = None
    if needs_dx:
        dx = sum(dx_bases[1:], dx_bases[0]) if dx_bases else torch.zeros_like(x)
        for each, rows, seed in zip(dhs, A.split([each.shape[1] for each in dhs], -2), seeds_of, strict=True):
            dx = launch_expand(dx, each, rows.mT, 1.0, None, None, runs, seed)
    if not needs_dA:
        return dx, None
    dAs = []
    for of in launches_of(A.shape[-2], tuple(ends), 1):
        rows, seed = A[..., of.ranks, :], seeds_of[of.layers.start]
        _, dA, _ = launch_shrink_backward([], [dh[:, of.ranks]], x, rows, False, True, None, runs, seed, dtype)
        dAs.append(dA)
    return dx, torch.cat(dAs, -2)


def _as_few(bases: Sequence[Float[Tensor, "*M K"]], most: int) -> list[Float[Tensor, "M K"]]:
    """As many as the kernel adds, of the same strides; the rest is added to the last of them."""
    if len(bases) < 2:
        return [rows_of(base) for base in bases]
    rows = [rows_of(base).contiguous() for base in bases]
    return rows if len(rows) <= most else [*rows[: most - 1], sum(rows[most:], rows[most - 1])]
