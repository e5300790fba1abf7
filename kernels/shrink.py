"""h = x Aᵀ, the half of a low-rank sum before the base layer.

M tokens, K in_features, R rank. Token-sized reads and writes, each tensor once a kernel:

    shrink             reads x               writes –       h = x Aᵀ
    shrink backward    reads x, dx_bases     writes dx      dx = Σ dx_bases + dh A,  dA = dhᵀ x

`shrink` hands x on to the base layer, so the base layer's own input gradient dx_base comes back to it together with
dh: no M×K delta is ever stored and autograd has nothing to add. Layers that read the same x share the work:
`shrink_together` reads x once for the ranks of all, and its backward adds all their dx_bases and dh A in one kernel,
where autograd would add them one by one.

With dropout, x Aᵀ is of x's surviving elements; the backward computes the mask again from the same seed (dropout.py).
Each of several layers has a mask of its own. With segments, A is G×R×K, and each row takes the A of its run; where it
has none, as if that were zero. A program's rows are of one run (segments.py).
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
from . import expand
from .common import (
    DTYPES,
    MAX_RANK,
    block_of,
    compute_dtype,
    full_waves,
    inside,
    joined,
    named,
    or_empty,
    precision,
    rows_of,
    small,
    split,
    tile,
)
from .dropout import kept, new_seed, rescale, threshold
from .launching import launch, replayed
from .segments import Runs, blocks_of, own, parts_of, run_of_rows, share_of_rows
from .sums import most_parts, parts_like, sum_parts
from .tuning import Config, cdiv, of_idle, of_parts, of_reads, programs, tuned

MOST_LAYERS = 3  # whose results, of one x, a launch takes

# Ranks of several layers that a launch takes with a mask or a dh each, by their bytes an element: where there are more,
# registers don't hold them. Then dh is copied together, and layers with dropout take a launch each.
MOST_RANKS_APART = {2: 64, 4: 32}
MOST_RANKS_MASKED = {2: 64, 4: 0}

# Up to these A is read as the parameter is, in float32, and converted in registers, which saves a launch. Beyond them
# blocks of 32 rows would read more of A than of x.
MOST_RANKS_UNCAST = 16


@triton.jit
def _of_layer(ranks, i: tl.constexpr, LAYERS: tl.constexpr, R_1, R_2):
    """Which ranks are layer i's, of several."""
    if i == 0:
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
    found = ranks * 0.0 + rescale(seeds)
    for i in tl.static_range(1, LAYERS):
        found = tl.where(_of_layer(ranks, i, LAYERS, R_1, R_2), rescale(seeds + i), found)
    return found


@triton.jit
def _shrink_kernel(
    x, A, h, table, seeds, scale,
    M, K, R, R_1, R_2, stride_xm, stride_xk, k_per_program,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    LAYERS: tl.constexpr, DTYPE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Program (i, s): rows of block i, and columns of part s, multiplied in DTYPE. h holds a result a part. A is R × K,
    or lies across, K × R. With seeds, one for each layer whose ranks A has: the ranks of the first end at R_1, of the
    second at R_2."""
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
        if ACROSS:
            A_tile = tl.load(tile(A, cols, ranks, R, 1), mask=inside(cols, ranks, end, of_A), other=0.0)
        else:
            A_tile = tl.trans(tl.load(tile(A, ranks, cols, K, 1), mask=inside(ranks, cols, of_A, end), other=0.0))
        A_tile = A_tile.to(DTYPE)
        if seeds is None:
            acc = tl.dot(x_tile.to(DTYPE), A_tile, acc, input_precision=PRECISION)
        else:
            for i in tl.static_range(LAYERS):
                of_layer = tl.where(kept(seeds + i, rows, start, BLOCK_M, BLOCK_K), x_tile, 0.0).to(DTYPE)
                own_A = A_tile
                if LAYERS > 1:
                    own_A = tl.where(_of_layer(ranks, i, LAYERS, R_1, R_2)[None, :], A_tile, 0.0)
                acc = tl.dot(of_layer, own_A, acc, input_precision=PRECISION)
    if seeds is not None:
        acc *= _rescales(seeds, ranks, LAYERS, R_1, R_2)[None, :]
    h += tl.program_id(1).to(tl.int64) * M * R
    tl.store(tile(h, rows, ranks, R, 1), scale * acc, mask=inside(rows, ranks, last, R))


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
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """Program (j, i): block j of columns, part i of rows; dA, and with h dB = dx_baseᵀ h, hold a result a part. Layers
    that read the same x have a dx_base, a dh (of ranks up to R_1, R_2, R), a seed each. dx as (Aᵀ dhᵀ)ᵀ: see expand."""
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
                dA_acc = tl.dot(tl.trans(x_tile), dh_tile, dA_acc, input_precision=PRECISION)
        if dx_base is not None:
            base_tile = tl.load(tile(dx_base, rows, cols, stride_dm, stride_dk), mask=here, other=0.0)
            if h is not None:
                h_tile = tl.load(tile(h, rows, ranks, R, 1), mask=inside(rows, ranks, end, R), other=0.0)
                dB_acc = tl.dot(tl.trans(base_tile.to(dtype)), h_tile, dB_acc, input_precision=PRECISION)
        if seeds is None:
            if dx is not None:
                dx_tile = tl.trans(tl.dot(tl.trans(A_tile), tl.trans(dh_tile), input_precision=PRECISION))
        else:
            dx_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for i in tl.static_range(LAYERS):
                keep = kept(seeds + i, rows, tl.program_id(0) * BLOCK_K, BLOCK_M, BLOCK_K)
                own_dh = dh_tile
                if LAYERS > 1:
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
                dx_tile += _wide(dx_base_2, rows, cols, stride_dm, stride_dk, here)
            if dx_base_3 is not None:
                dx_tile += _wide(dx_base_3, rows, cols, stride_dm, stride_dk, here)
            tl.store(tile(dx, rows, cols, K, 1), dx_tile, mask=here)
    if dA is not None:
        if seeds is not None:
            dA_acc *= _rescales(seeds, ranks, LAYERS, R_1, R_2)[None, :]
        dA += tl.program_id(1).to(tl.int64) * R * K
        tl.store(tile(dA, cols, ranks, 1, K), dA_acc, mask=inside(cols, ranks, K, R))
    if h is not None:
        dB += tl.program_id(1).to(tl.int64) * K * R
        tl.store(tile(dB, cols, ranks, R, 1), dB_acc, mask=inside(cols, ranks, K, R))


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
    seeds: Int[Tensor, " L"] | None = None,
    ends: Sequence[int] = (),
    scale: float = 1.0,
) -> Float[Tensor, "M R"]:
    """scale · x Aᵀ, multiplied and returned in `dtype`; with seeds, of x after dropout. A may have the ranks of L
    layers, which end at these: each has a seed. It may lie across, as B does in dh = dy B: A = Bᵀ."""
    layers = MOST_LAYERS if MOST_RANKS_MASKED[dtype.itemsize] >= A.shape[-2] else 1
    launches = _launches_of(A.shape[-2], ends if seeds is not None else (), layers)
    if len(launches) > 1:
        parts = [
            launch_shrink(
                x, A[..., of.ranks, :], dtype, runs, None if seeds is None else seeds[of.layers], of.ends, scale
            )
            for of in launches
        ]
        return torch.cat(parts, 1)
    (of,) = launches
    x = rows_of(x)
    M, K = x.shape
    R, R_1, R_2 = of.numbers
    across = not A.is_contiguous() and A.mT.is_contiguous()
    as_read = A.dtype if MOST_RANKS_UNCAST >= R else dtype
    A = small(A.mT if across else A, as_read)
    h = x.new_empty((M, R), dtype=dtype)
    if M == 0:
        return h

    def shares(config: Config) -> tuple[int, Tensor | None, int, int, int]:
        """(blocks of rows, table of their shares, rows of a block, parts of the columns, columns of a part)."""
        blocks, table, rows = blocks_of(M, config, runs)
        return blocks, table, rows, *split(K, config.cols, min(programs(x) // blocks, K // (4 * config.cols)))

    def moves(config: Config) -> float:
        blocks, _, _, count, _ = shares(config)
        return of_parts(count, M * R) + of_reads(blocks, A) + of_idle(blocks * count, programs(x), x)

    def run(config: Config) -> Tensor:
        blocks, table, rows, count, each = shares(config)
        parts = parts_like(h, count)
        numbers = (float(scale), M, K, R, R_1, R_2, *x.stride(), each)
        constants = (precision(x, dtype), rows, config.cols, block_of(R), len(of.ends), DTYPES[dtype], across)
        launch(_shrink_kernel, (blocks, count), (x, A, parts, table, seeds), numbers, constants, config)
        sum_parts((parts, h, None))
        return h

    kernel = named("shrink", runs, seeds, together=len(of.ends) > 1, across=across)
    return tuned(kernel, run, x, dtype, M, K, R, moves=moves)


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
    launches = _launches_of(R, tuple(itertools.accumulate(dh.shape[1] for dh in dhs)), layers)
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
        how = precision(x, dhs[0].dtype, many_tiles=False)  # dx is a sum over the ranks, in one
        constants = (how, config.rows, config.cols, block_of(R), len(dhs))
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
            dx = expand.launch_expand(dx, each, rows.mT, 1.0, None, None, runs, seed)
    if not needs_dA:
        return dx, None
    dAs = []
    for of in _launches_of(A.shape[-2], tuple(ends), 1):
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
