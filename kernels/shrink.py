"""h = x Aᵀ, the half of a low-rank sum before the base layer.

M tokens, K in_features, R rank. Token-sized: reads x, once.

With dropout, x Aᵀ is of x's surviving elements. Each of several layers that read the same x has a mask of its own. With
segments, A is G×R×K, and each row takes the A of its run; where it has none, as if that were zero. A program's rows are
of one run (segments.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .common import DTYPES, LONG_SUM, block_of, inside, named, precision, rows_of, small, split, tile
from .dropout import kept
from .launching import launch
from .layers import MOST_LAYERS, MOST_RANKS_MASKED, launches_of, ranks_of, rescales
from .segments import Runs, blocks_of, own, share_of_rows
from .sums import parts_like, sum_parts
from .tuning import Config, of_idle, of_parts, of_reads, programs, tuned

# Up to these A is read as the parameter is, in float32, and converted in registers, which saves a launch. Beyond them
# blocks of 32 rows would read more of A than of x.
MOST_RANKS_UNCAST = 16


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
                    own_A = tl.where(ranks_of(ranks, i, LAYERS, R_1, R_2)[None, :], A_tile, 0.0)
                acc = tl.dot(of_layer, own_A, acc, input_precision=PRECISION)
    if seeds is not None:
        acc *= rescales(seeds, ranks, LAYERS, R_1, R_2)[None, :]
    h += tl.program_id(1).to(tl.int64) * M * R
    tl.store(tile(h, rows, ranks, R, 1), scale * acc, mask=inside(rows, ranks, last, R))


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
    launches = launches_of(A.shape[-2], ends if seeds is not None else (), layers)
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
        least = config.cols * (4 if dtype.itemsize == 2 else 1)  # the longer a chain of float32's, the less exact
        return blocks, table, rows, *split(K, config.cols, min(programs(x) // blocks, K // least))

    def moves(config: Config) -> float:
        blocks, _, _, count, _ = shares(config)
        return of_parts(count, M * R) + of_reads(blocks, A) + of_idle(blocks * count, programs(x), x)

    def run(config: Config) -> Tensor:
        blocks, table, rows, count, each = shares(config)
        parts = parts_like(h, count)
        numbers = (float(scale), M, K, R, R_1, R_2, *x.stride(), each)
        how = precision(x, dtype, many_tiles=min(M, K) >= LONG_SUM)  # few tokens take no time either way
        constants = (how, rows, config.cols, block_of(R), len(of.ends), DTYPES[dtype], across)
        launch(_shrink_kernel, (blocks, count), (x, A, parts, table, seeds), numbers, constants, config)
        sum_parts((parts, h, None))
        return h

    kernel = named("shrink", runs, seeds, together=len(of.ends) > 1, across=across)
    return tuned(kernel, run, x, dtype, M, K, R, moves=moves)
