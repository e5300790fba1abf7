"""What the kernel families share: tile addresses, shapes of launches, parameters as kernels read them.

Letters as in the rest of the kernels: M tokens, K in_features, N out_features, R rank; N also stands for the width of
any token-sized tensor where it does not matter which it is.
"""

import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..operators import autocast_dtype
from . import interpreter
from .launching import launch
from .tuning import allows_tf32, architecture, cdiv, has_tf32, power_of_2

interpreter.install()

MAX_RANK = 256  # ranks that one launch of a kernel keeps in registers; more take several launches
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_JOINED = 1024  # elements of a program


@triton.jit
def tile(pointer, rows, cols, stride_row, stride_col):
    """Addresses of a tile. In int64: a token-sized tensor may pass 2³¹ elements."""
    return pointer + rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col


@triton.jit
def inside(rows, cols, M, N):
    """Which elements of a tile exist."""
    return (rows < M)[:, None] & (cols < N)[None, :]


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """acc + a b, which is to be added to a tile that is read and written row by row; ACROSS, as (bᵀ aᵀ)ᵀ, which
    `upright` turns. AMD's compiler then stores 128 bits a thread and not 64, and NVIDIA's takes fewer registers, but of
    16 bits on Hopper eight steps instead of two to rearrange the tile."""
    if ACROSS:
        acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def upright(t, ACROSS: tl.constexpr):
    """What `product` gives, row by row."""
    return tl.trans(t) if ACROSS else t


def lies_across(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether `product` in that dtype is to be ACROSS on t's device."""
    return architecture(t) != "sm_90" or dtype == torch.float32


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


def joined(As: Sequence[Float[Tensor, "R K"]], dtype: torch.dtype) -> Float[Tensor, "R K"]:
    """The ranks of several layers as one matrix in the dtype of the product: one launch for two and three."""
    if len(As) == 1 or len(As) > 3:
        return small(As[0] if len(As) == 1 else torch.cat(list(As)), dtype)
    As = [A.contiguous() for A in As]
    out = As[0].new_empty((sum(len(A) for A in As), As[0].shape[1]), dtype=dtype)
    numbers = [*(A.numel() for A in As), 0][:3]
    tensors = [*As, *[None] * (3 - len(As)), out]
    launch(_join_kernel, (cdiv(out.numel(), _JOINED),), tensors, numbers, (_JOINED,))
    return out


def named(kernel: str, runs: Any, seeds: Tensor | None = None, together: bool = False, across: bool = False) -> str:
    """The kernel's name in the block tables: of layers that read the same x, or with a matrix that lies across; with
    dropout, or in runs."""
    kind = "_dropout" if seeds is not None else "_grouped" if runs is not None else ""
    return f"{kernel}{'_together' * together}{'_across' * across}{kind}"


def side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Along the last dimension; None where there are none."""
    return None if parts[0] is None else torch.cat(list(parts), -1)  # type: ignore[arg-type]


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
    """(programs, elements each) that share `size`: at least `wanted` programs, as long as each has a block's worth, and
    one where there is nothing to share.

    Shares are multiples of 16, which keeps accesses aligned; a program's last block may reach past its share.
    """
    share = size / max(wanted, 1) / 16
    for each in (max(math.ceil(share) * 16, block), max(int(share) * 16, block)):
        if cdiv(size, each) >= wanted:
            break
    return max(cdiv(size, each), 1), each


@lru_cache(maxsize=4096)  # the lengths of batches may vary without end
def full_waves(processors: int, blocks: int, size: int, block: int, most: int = sys.maxsize) -> int:
    """Into how many parts, `most` at the most, to share `size` for `blocks` × parts programs, so that none of the
    `processors` has much more to do than the others: the fewest that leave the busiest at most 10 % above its share, or
    else the best there are.
    """
    best, wanted = math.inf, 1
    for parts in range(1, min(4 * -(-processors // blocks), -(-size // block), most) + 1):
        count, each = split(size, block, parts)
        busiest = -(-blocks * count // processors) * each * processors / (blocks * size)
        if busiest < best:
            best, wanted = busiest, count
        if busiest <= 1.1:
            break
    return wanted


# Three products in TF32 are wrong by 2·10⁻⁷, as measured on an H200, however many are added; a chain of float32's own
# instructions is nearer until it has about so many.
LONG_SUM = 128


def full_precision(t: Tensor) -> str:
    """How `tl.dot` multiplies float32 exactly on t's device. AMD's matrix cores take float32 itself; on NVIDIA's it is
    three TF32 products. These cores truncate what they add, but Triton adds each tile's sum outside of them, so that a
    sum of many tiles is nearer than one in float32's own instructions (tests/kernels/test_tensor_cores.py)."""
    return "ieee" if architecture(t).startswith("gfx") else "tf32x3"


def precision(t: Tensor, dtype: torch.dtype, many_tiles: bool) -> str:
    """How `tl.dot` multiplies on t's device: in TF32 only where PyTorch's own float32 products may, and the device can.
    Where its sums are not of many tiles, float32 takes its own instructions."""
    if dtype != torch.float32:
        return "ieee"
    if allows_tf32() and has_tf32(t):
        return "tf32"
    return full_precision(t) if many_tiles else "ieee"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products with x: autocast's where that is on."""
    return autocast_dtype(x.device) or x.dtype
