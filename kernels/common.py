"""What the kernel families share: tile addresses, sums of partial results, shapes of launches.

Letters as in the rest of the kernels: M tokens, K in_features, N out_features, R rank; N also stands for the width of
any token-sized tensor where it does not matter which it is.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from . import interpreter
from .tuning import cdiv, power_of_2

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


@triton.jit
def share_of_rows(i, tokens, each, group):
    """(first row of share i, end of its entry's rows, its entry). Each entry's `tokens` rows are shared out by
    themselves, `each` at a time; without groups there is one entry."""
    first, last, entry = i * each, tokens, 0
    if group is not None:
        shares = tl.cdiv(tokens, each)
        entry = i // shares
        first, last = entry * tokens + i % shares * each, (entry + 1) * tokens
    return first, last, entry


@triton.jit
def own(pointer, group, entry, R, width):
    """(the matrix of an entry's group in a stack of R × width ones, how many of its ranks count)."""
    if group is not None:
        which = tl.load(group + entry)
        pointer += which.to(tl.int64) * R * width
        R = tl.where(which < 0, 0, R)
    return pointer, R


@triton.jit
def _sum_parts_kernel(parts, out, group, P, parts_an_entry, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    part = parts + at
    for i in range(P):
        mine = size
        if group is not None:
            mine = tl.where(tl.load(group + i // parts_an_entry) == tl.program_id(1), size, 0)
        total += tl.load(part, mask=at < mine, other=0.0)
        part += size
    tl.store(out + tl.program_id(1).to(tl.int64) * size + at, total, mask=at < size)


@dataclass(frozen=True)
class Entries:
    """The rows of a token-sized tensor: one entry, or as many as `group` has, each with as many tokens."""

    count: int
    tokens: int
    group: Int[Tensor, "entries"] | None

    @classmethod
    def of(cls, t: Float[Tensor, "M N"], group: Int[Tensor, "entries"] | None) -> "Entries":
        count = 1 if group is None else max(len(group), 1)
        return cls(count, len(t) // count, group)

    def split(self, block: int, wanted: int) -> tuple[int, int]:
        """(parts of all entries, rows of a part): `wanted` parts as long as each has a block's worth."""
        parts, each = split(self.tokens, block, cdiv(wanted, self.count))
        return parts * self.count, each


def parts_like(out: Tensor, count: int, entries: Entries | None = None) -> Float[Tensor, "P ..."]:
    """Room for `count` partial results of `out`, which `sum_parts` adds in a fixed order; one part is `out` itself. Of
    grouped entries `out` holds a result for each group."""
    grouped = entries is not None and entries.group is not None
    shape = out.shape[1:] if grouped else out.shape
    return out[None] if count == 1 and not grouped else out.new_empty(count, *shape, dtype=torch.float32)


def sum_parts(parts: Float[Tensor, "P ..."], out: Tensor, entries: Entries | None = None) -> Tensor:
    """Σ parts, added in float32 and rounded once into `out`; of grouped entries, for each group those of its own."""
    group, count = (None, 1) if entries is None else (entries.group, entries.count)
    if (len(parts) > 1 or group is not None) and out.numel() > 0:
        groups = 1 if group is None else len(out)
        size = out.numel() // groups
        with device(out):
            _sum_parts_kernel[cdiv(size, 1024), groups](
                parts, out, group, len(parts), len(parts) // count, size, BLOCK=1024
            )
    return out


def rows_of(t: Float[Tensor, "*M N"]) -> Float[Tensor, "M N"]:
    """All leading dimensions as one; a copy only where strides don't allow a view."""
    return t.reshape(-1, t.shape[-1])


def small(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as the kernels read it: in the dtype of the product, row by row."""
    return t.to(dtype).contiguous()


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


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as PyTorch's own products do."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def device(t: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device that holds t; where that is the current one, and on a CPU, nothing changes."""
    here = not t.is_cuda or t.device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(t.device)


_HERE: AbstractContextManager[None] = nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products with x: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
