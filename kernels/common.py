"""What the kernel families share: tile addresses, sums of partial results, shapes of launches.

Letters as in the rest of the kernels: M tokens, K in_features, N out_features, R rank; N also stands for the width of
any token-sized tensor where it does not matter which it is.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from . import interpreter

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
def _sum_parts_kernel(parts, out, P, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    part = parts + at
    for _ in range(P):
        total += tl.load(part, mask=at < size, other=0.0)
        part += size
    tl.store(out + at, total, mask=at < size)


def parts_like(out: Tensor, count: int) -> Float[Tensor, "P ..."]:
    """Room for `count` partial results of `out`, which `sum_parts` adds in a fixed order; one part is `out` itself."""
    return out[None] if count == 1 else torch.empty(count, *out.shape, dtype=torch.float32, device=out.device)


def sum_parts(parts: Float[Tensor, "P ..."], out: Tensor) -> Tensor:
    """Σ parts, added in float32 and rounded once into `out`."""
    if len(parts) > 1 and out.numel() > 0:
        grid = (triton.cdiv(out.numel(), 1024),)
        with device(out):
            _sum_parts_kernel[grid](parts, out, len(parts), out.numel(), BLOCK=1024)
    return out


def rows_of(t: Float[Tensor, "*M N"]) -> Float[Tensor, "M N"]:
    """All leading dimensions as one; a copy only where strides don't allow a view."""
    return t.reshape(-1, t.shape[-1])


def small(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as the kernels read it: in the dtype of the product, row by row."""
    return t.to(dtype).contiguous()


def block_of(size: int, most: int = MAX_RANK) -> int:
    """The block that holds `size`: a power of two, at least the 16 that `tl.dot` takes."""
    return min(most, max(16, triton.next_power_of_2(size)))


def split(size: int, block: int, wanted: int) -> tuple[int, int]:
    """(programs, elements each) that share `size`: at least `wanted` programs, as long as each has a block's worth.

    Shares are multiples of 16, which keeps accesses aligned; a program's last block may reach past its share.
    """
    share = size / max(wanted, 1) / 16
    for each in (max(math.ceil(share) * 16, block), max(int(share) * 16, block)):
        if triton.cdiv(size, each) >= wanted:
            break
    return triton.cdiv(size, each), each


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as PyTorch's own products do."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def device(t: Tensor) -> torch.cuda.device:
    """Launch on the device that holds t; on a CPU nothing changes."""
    return torch.cuda.device(t.device if t.is_cuda else -1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products with x: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
