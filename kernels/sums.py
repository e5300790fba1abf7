"""Sums over a dimension that several programs share: float32 parts, added in a fixed order.

sum_parts    reads parts    writes out    out = Σ parts, of runs those of each matrix
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .common import inside, tile
from .launching import launch
from .segments import Runs
from .tuning import cdiv

_SUMMED = 512  # elements of a program
_AT_ONCE = 8  # parts in flight, added pairwise: a chain one by one waits for each, and rounds as often

MOST_BYTES = 96 << 20  # of the parts of a sum, for as long as a step of a layer takes


def most_parts(size: int) -> int:
    """How many parts of a sum of so many numbers there may be."""
    return max(MOST_BYTES // max(4 * size, 1), 1)


@triton.jit
def _sum_block(parts, out, order, starts, P, size, block, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Block `block` of `out`, of all P parts; with an order, of those of the matrix that the block is of."""
    blocks = tl.cdiv(size, BLOCK)
    matrix = block // blocks
    at = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, last = 0, P
    if order is not None:
        first, last = tl.load(starts + matrix), tl.load(starts + matrix + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, AT_ONCE):
        which = start + tl.arange(0, AT_ONCE)
        here = inside(which, at, last, size)
        if order is not None:
            which = tl.load(order + which, mask=which < last, other=0)
        total += tl.sum(tl.load(tile(parts, which, at, size, 1), mask=here, other=0.0), 0)
    tl.store(out + matrix.to(tl.int64) * size + at, total, mask=at < size)


@triton.jit
def _sum_parts_kernel(
    parts, out, order, starts, parts_2, out_2, order_2, starts_2, parts_3, out_3, order_3, starts_3,
    P, size, blocks, P_2, size_2, blocks_2, P_3, size_3, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Up to three sums: the first `blocks` programs do the first, the next `blocks_2` the second."""
    block = tl.program_id(0)
    if block < blocks:
        _sum_block(parts, out, order, starts, P, size, block, BLOCK, AT_ONCE)
    elif parts_2 is not None:
        if block < blocks + blocks_2:
            _sum_block(parts_2, out_2, order_2, starts_2, P_2, size_2, block - blocks, BLOCK, AT_ONCE)
        elif parts_3 is not None:
            before = blocks + blocks_2
            _sum_block(parts_3, out_3, order_3, starts_3, P_3, size_3, block - before, BLOCK, AT_ONCE)


def parts_like(out: Tensor | None, count: int, runs: Runs | None = None) -> Float[Tensor, "P ..."] | None:
    """Room for `count` partial results of `out`, which `sum_parts` adds in a fixed order; one part is `out` itself. Of
    runs `out` holds a result for each matrix."""
    if out is None or (count == 1 and runs is None):
        return out
    return out.new_empty((count, *(out.shape if runs is None else out.shape[1:])), dtype=torch.float32)


def sum_parts(*sums: tuple[Tensor | None, Tensor | None, Runs | None]) -> None:
    """Of each (parts, out, runs) Σ parts, added in float32 and rounded once into `out`; of runs, for each matrix those
    of its own. One launch for up to three."""
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    total = 0
    for parts, out, runs in sums:
        if parts is None or out is None or parts is out or out.numel() == 0:
            continue
        groups = 1 if runs is None else out.shape[0]
        size = out.numel() // groups
        blocks = cdiv(size, _SUMMED) * groups
        tensors += (parts, out, *((None, None) if runs is None else (runs.order, runs.starts)))
        numbers += (parts.shape[0], size, blocks)
        total += blocks
    if tensors:
        tensors += [None] * (12 - len(tensors))
        numbers += [0] * (9 - len(numbers))
        launch(_sum_parts_kernel, (total,), tensors, numbers[:8], (_SUMMED, _AT_ONCE))
