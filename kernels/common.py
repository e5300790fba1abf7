"""What the kernel families share: tile addresses, sums of partial results, shapes of launches.

Letters as in the rest of the kernels: M tokens, K in_features, N out_features, R rank; N also stands for the width of
any token-sized tensor where it does not matter which it is.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..operators import operator
from ..segments import Segments
from . import interpreter
from .launching import launch
from .tuning import Config, allows_tf32, cdiv, has_tf32, power_of_2, programs

interpreter.install()

MAX_RANK = 256  # ranks that one launch of a kernel keeps in registers; more take several launches


@triton.jit
def tile(pointer, rows, cols, stride_row, stride_col):
    """Addresses of a tile. In int64: a token-sized tensor may pass 2³¹ elements."""
    return pointer + rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col


@triton.jit
def inside(rows, cols, M, N):
    """Which elements of a tile exist."""
    return (rows < M)[:, None] & (cols < N)[None, :]


SHARE = 64  # rows of a share in a table; blocks of rows divide it
_SHARE = tl.constexpr(SHARE)


@triton.jit
def share_of_rows(i, M, table, BLOCK: tl.constexpr):
    """(first row of block i, end of the rows that it may touch, its matrix). Without a table the blocks follow each
    other; with one, which has a share's first row, its end and its matrix, they are cut from its shares."""
    first, last, matrix = i * BLOCK, M, 0
    if table is not None:
        per: tl.constexpr = _SHARE // BLOCK
        entry = table + i // per * 3
        first = tl.load(entry) + i % per * BLOCK
        last, matrix = tl.load(entry + 1), tl.load(entry + 2)
    return first, last, matrix


@triton.jit
def run_of_rows(i, each, M, table):
    """(first row, end, matrix) of part i of the rows, for programs that walk down it."""
    first, last, matrix = i * each, min(i * each + each, M), 0
    if table is not None:
        first, last, matrix = tl.load(table + i * 3), tl.load(table + i * 3 + 1), tl.load(table + i * 3 + 2)
    return first, last, matrix


@triton.jit
def own(pointer, table, matrix, R, width):
    """(a share's matrix in a stack of R × width ones, how many of its ranks count)."""
    if table is not None:
        pointer += tl.maximum(matrix, 0).to(tl.int64) * R * width
        R = tl.where(matrix < 0, 0, R)
    return pointer, R


@triton.jit
def own_vector(pointer, table, matrix, cols, N, none):
    """The columns of a share's vector in a stack of N-wide ones; `none` where it has none."""
    if table is not None:
        pointer += tl.maximum(matrix, 0).to(tl.int64) * N
        N = tl.where(matrix < 0, 0, N)
    return tl.load(pointer + cols, mask=cols < N, other=none).to(tl.float32)


@triton.jit
def _sum_block(parts, out, order, starts, P, size, block, BLOCK: tl.constexpr):
    """Block `block` of `out`, of all P parts; with an order, of those of the matrix that the block is of."""
    blocks = tl.cdiv(size, BLOCK)
    matrix = block // blocks
    at = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, last = 0, P
    if order is not None:
        first, last = tl.load(starts + matrix), tl.load(starts + matrix + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    part = parts + at
    for i in range(first, last):
        if order is not None:
            part = parts + tl.load(order + i).to(tl.int64) * size + at
        total += tl.load(part, mask=at < size, other=0.0)
        if order is None:
            part += size
    tl.store(out + matrix.to(tl.int64) * size + at, total, mask=at < size)


@triton.jit
def _sum_parts_kernel(
    parts, out, order, starts, parts_2, out_2, order_2, starts_2, parts_3, out_3, order_3, starts_3,
    P, size, blocks, P_2, size_2, blocks_2, P_3, size_3, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to three sums: the first `blocks` programs do the first, the next `blocks_2` the second."""
    block = tl.program_id(0)
    if block < blocks:
        _sum_block(parts, out, order, starts, P, size, block, BLOCK)
    elif parts_2 is not None:
        if block < blocks + blocks_2:
            _sum_block(parts_2, out_2, order_2, starts_2, P_2, size_2, block - blocks, BLOCK)
        elif parts_3 is not None:
            _sum_block(parts_3, out_3, order_3, starts_3, P_3, size_3, block - blocks - blocks_2, BLOCK)


@triton.jit
def _join_kernel(first, second, third, out, size, size_2, size_3, BLOCK: tl.constexpr):
    """One after the other, in out's dtype."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(first + at, mask=at < size, other=0.0).to(tl.float32)
    end = size + size_2
    values += tl.load(second + (at - size), mask=(at >= size) & (at < end), other=0.0).to(tl.float32)
    if third is not None:
        values += tl.load(third + (at - end), mask=(at >= end) & (at < end + size_3), other=0.0).to(tl.float32)
    tl.store(out + at, values, mask=at < end + size_3)


class Runs(NamedTuple):
    """The rows of a token-sized tensor in shares that are of one run each. Made on the device: its grids are as large
    as any runs could need, and the shares left over have no rows. Rows without a matrix have shares too.

    `blocks` has shares of up to `SHARE` rows, `parts` longer ones for sums over rows: first row, end, matrix of each
    (below 0: none). The parts of matrix g are order[starts[g]] to order[starts[g + 1] - 1].
    """

    blocks: Int[Tensor, "shares 3"]
    parts: Int[Tensor, "P 3"]
    order: Int[Tensor, "P"]
    starts: Int[Tensor, "G+1"]

    @classmethod
    def of(cls, segments: Segments | None, x: Tensor, G: int) -> list[Tensor]:
        """The tensors of those of x's rows in segments, of G matrices, made once for each number of rows; operators
        take them as a list. Empty: there are no segments."""
        if segments is None:
            return []
        M = x.numel() // x.shape[-1]
        return segments.once(("runs", M, G), lambda: make_runs(segments.ends, segments.which, M, G))

    @classmethod
    def read(cls, tensors: list[Tensor]) -> "Runs | None":
        """What `of` has listed."""
        return cls(*tensors) if tensors else None


def _rows_of_a_part(M: int, t: Tensor) -> int:
    """A part for every fourth multiprocessor of t's device: kernels have several blocks of columns for each."""
    wanted = max(programs(t) // 4, 1)
    return SHARE * max(-(-M // (wanted * SHARE)), 1)


@operator("lora_lite::runs")
def make_runs(ends: Tensor, which: Tensor | None, M: int, G: int) -> list[Tensor]:
    """The tensors of `Runs`."""
    parts = _shares(ends, which, M, _rows_of_a_part(M, ends))
    by_matrix, order = torch.sort(parts[:, 2].contiguous(), stable=True)
    matrices = torch.arange(G + 1, device=ends.device, dtype=torch.int32)
    starts = torch.searchsorted(by_matrix, matrices, out_int32=True)
    return [_shares(ends, which, M, SHARE), parts, order.int(), starts]


@make_runs.register_fake
def _(ends: Tensor, which: Tensor | None, M: int, G: int) -> list[Tensor]:
    blocks, parts = (-(-M // each) + len(ends) + 1 for each in (SHARE, _rows_of_a_part(M, ends)))
    new = ends.new_empty
    return [t.int() for t in (new(blocks, 3), new(parts, 3), new(parts), new(G + 1))]


def _shares(ends: Tensor, which: Tensor | None, M: int, each: int) -> Int[Tensor, "shares 3"]:
    """All rows in shares of `each` or fewer; those left over have no rows and no matrix."""
    S, device = len(ends), ends.device
    ends = torch.cat([ends, ends.new_full((1,), M)]).clamp_max(M)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    after = ((ends - starts + each - 1) // each).cumsum(0, dtype=torch.int32)
    share = torch.arange(-(-M // each) + S + 1, device=device, dtype=torch.int32)
    run = torch.searchsorted(after, share, right=True)
    over, run = run > S, run.clamp_max(S)
    before = torch.cat([after.new_zeros(1), after[:-1]])
    which = torch.arange(S, device=device) if which is None else which
    matrix = torch.cat([which, which.new_full((1,), -1)])[run].clamp_min(-1).masked_fill(over, -1)
    first = (starts[run] + (share - before[run]) * each).masked_fill(over, 0)
    last = torch.minimum(first + each, ends[run]).masked_fill(over, 0)
    return torch.stack([first, last, matrix.int()], 1).int()


def blocks_of(M: int, config: Config, runs: Runs | None) -> tuple[int, Tensor | None, int]:
    """(blocks of rows, table of the shares that they are cut from, rows of a block)."""
    if runs is None:
        return cdiv(M, config.rows), None, config.rows
    rows = min(config.rows, SHARE)
    return len(runs.blocks) * (SHARE // rows), runs.blocks, rows


def parts_of(M: int, block: int, wanted: int, runs: Runs | None) -> tuple[int, int, Tensor | None]:
    """(parts of the rows, rows of a part, table of the parts): `wanted` as long as each has a block's worth."""
    return (*split(M, block, wanted), None) if runs is None else (len(runs.parts), 0, runs.parts)


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
        launch(_sum_parts_kernel, (total,), tensors, numbers[:8], (_SUMMED,))


_SUMMED = 1024  # elements of a program


def joined(As: Sequence[Float[Tensor, "R K"]], dtype: torch.dtype) -> Float[Tensor, "R K"]:
    """The ranks of several layers as one matrix in the dtype of the product: one launch for two and three."""
    if len(As) == 1 or len(As) > 3:
        return small(As[0] if len(As) == 1 else torch.cat(list(As)), dtype)
    As = [A.contiguous() for A in As]
    out = As[0].new_empty((sum(len(A) for A in As), As[0].shape[1]), dtype=dtype)
    numbers = [*(A.numel() for A in As), 0][:3]
    tensors = [*As, *[None] * (3 - len(As)), out]
    launch(_join_kernel, (cdiv(out.numel(), _SUMMED),), tensors, numbers, (_SUMMED,))
    return out


def rows_of(t: Float[Tensor, "*M N"]) -> Float[Tensor, "M N"]:
    """All leading dimensions as one; a copy only where strides don't allow a view."""
    return t if t.ndim == 2 else t.reshape(-1, t.shape[-1])


def small(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as the kernels read it: in the dtype of the product, row by row."""
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns, which may return no None."""
    return like.new_empty(0) if t is None else t


def block_of(size: int, most: int = MAX_RANK) -> int:
    """The block that holds `size`: a power of two, at least the 16 that `tl.dot` takes."""
    return min(most, max(16, power_of_2(size)))


def split(size: int, block: int, wanted: int) -> tuple[int, int]:
    """(programs, elements each) that share `size`: at least `wanted` programs, as long as each has a block's worth.

    Shares are multiples of 16, which keeps accesses aligned; a program's last block may reach past its share.
    """
    share = size / max(wanted, 1) / 16
    for each in (max(math.ceil(share) * 16, block), max(int(share) * 16, block)):
        if cdiv(size, each) >= wanted:
            break
    return cdiv(size, each), each


@cache
def full_waves(processors: int, blocks: int, size: int, block: int) -> int:
    """Into how many parts to share `size` for `blocks` × parts programs, so that none of the `processors` has much more
    to do than the others: the fewest that leave the busiest at most 10 % above its share, or else the best there are.
    """
    best, wanted = math.inf, 1
    for parts in range(1, min(4 * -(-processors // blocks), -(-size // block)) + 1):
        count, each = split(size, block, parts)
        busiest = -(-blocks * count // processors) * each * processors / (blocks * size)
        if busiest < best:
            best, wanted = busiest, count
        if busiest <= 1.1:
            break
    return wanted


def precision(t: Tensor, dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies on t's device: float32 as PyTorch's own products do, where the device has TF32."""
    return "tf32" if dtype == torch.float32 and allows_tf32() and has_tf32(t) else "ieee"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products with x: autocast's where that is on."""
    kind = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
