"""The rows of a token-sized tensor in segments, as kernels see them: tables of shares of rows, each of one run.

M tokens, K, N widths, R rank, G matrices of a stack. A program finds in a table which rows are its own and which matrix
they take. Tables are made on the device, without a host sync.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from ..operators import operator
from ..segments import Segments
from .common import split
from .tuning import Config, cdiv, programs

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


class Runs(NamedTuple):
    """The rows of a token-sized tensor in shares that are of one run each. Made on the device: its grids are as large
    as any runs could need, and the shares left over have no rows. Rows without a matrix have shares too.

    `blocks` has shares of up to `SHARE` rows, `parts` longer ones for sums over rows: first row, end, matrix of each
    (below 0: none). The parts of matrix g are order[starts[g]] to order[starts[g + 1] - 1].
    """

    blocks: Int[Tensor, "shares 3"]
    parts: Int[Tensor, "P 3"]
    order: Int[Tensor, " P"]
    starts: Int[Tensor, " G+1"]

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
    blocks, parts = (_most_shares(M, each, len(ends)) for each in (SHARE, _rows_of_a_part(M, ends)))
    new = ends.new_empty
    return [t.int() for t in (new(blocks, 3), new(parts, 3), new(parts), new(G + 1))]


def _most_shares(M: int, each: int, S: int) -> int:
    """Of S runs and what is behind them; no more of these have rows than there are rows. A grid is never empty."""
    return -(-M // each) + torch.sym_max(torch.sym_min(S + 1, M), 1)


def _shares(ends: Tensor, which: Tensor | None, M: int, each: int) -> Int[Tensor, "shares 3"]:
    """All rows in shares of `each` or fewer; those left over have no rows and no matrix."""
    S, device = len(ends), ends.device
    ends = torch.cat([ends, ends.new_full((1,), M)]).clamp_max(M)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    after = ((ends - starts + each - 1) // each).cumsum(0, dtype=torch.int32)
    share = torch.arange(_most_shares(M, each, S), device=device, dtype=torch.int32)
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
