"""‖W + scale · B A‖ of each row, from which DoRA's g comes, for W as it is stored: dense, int8 or 4 bit.

N out_features, K in_features, R rank. W is read once, above r = 128 once for every 128 ranks, and nothing of its size
is written: a row's squared norm is ‖w‖² + 2·scale · b·(A w) + scale² · b·(A Aᵀ)·b with ‖w‖² known. float32 throughout,
quantised weights included: they turn into numbers in registers, as bitsandbytes defines them.

    row_norm        reads W  (N×K; int8 with a factor a row)
    row_norm_4bit   reads W  (N×K/2 bytes), with an absmax a block of weights, itself quantised or not
    root            reads and writes as many numbers as there are rows, of each part of the columns

The more rows a program has, the fewer read A again; columns are shared out among programs until they fill the device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ..operators import operator
from ..reference import without_autocast
from .common import DTYPES, block_of, full_precision, full_waves, inside, small, split, tile
from .launching import launch, replayed
from .tuning import Config, cdiv, programs, tuned

_ROOTS = 128  # of a program
_RANKS = 128  # at a time: with more fit so few rows that A, read again for each block of them, costs more than W


@triton.jit
def _beyond_w(cross, B, BG, rows, ranks, N, N_once, R, scale):
    """What these ranks add to ‖w‖²; cross is W Aᵀ of a part of the columns and BG is B (A Aᵀ), which one part adds."""
    B_tile = tl.load(tile(B, rows, ranks, R, 1), mask=inside(rows, ranks, N, R), other=0.0)
    BG_tile = tl.load(tile(BG, rows, ranks, R, 1), mask=inside(rows, ranks, N_once, R), other=0.0)
    return tl.sum(scale * B_tile * (2 * cross + scale * BG_tile), 1)


@triton.jit
def _add_product(W, A, acc, PRECISION: tl.constexpr):
    """acc + W Aᵀ, as near as in float32: W is of bfloat16 or TF32 numbers as it is, and A the sum of three or two."""
    if PRECISION == "bf16x3":
        W = W.to(tl.float32).to(tl.bfloat16)
        large = A.to(tl.bfloat16)
        rest = A - large.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        small = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        # Not onto acc: tensor cores truncate what they add.
        product = tl.dot(W, tl.trans(middle), tl.dot(W, tl.trans(small)))
        return acc + tl.dot(W, tl.trans(large), product)
    elif PRECISION == "tf32x2":
        W = W.to(tl.float32)
        large = (A.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)
        product = tl.dot(W, tl.trans(A - large), input_precision="tf32")  # nor here
        return acc + tl.dot(W, tl.trans(large), product, input_precision="tf32")
    else:
        return tl.dot(W.to(tl.float32), tl.trans(A), acc, input_precision=PRECISION)


@triton.jit
def _root(norm_sq):
    return tl.sqrt_rn(tl.maximum(norm_sq, 1e-12))


@triton.jit
def _root_kernel(parts, w_sq, norm, P, size, BLOCK: tl.constexpr):
    """√(‖w‖² + Σ parts), the largest last."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    beyond = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, P):
        beyond += tl.load(parts + at, mask=at < size, other=0.0)
        parts += size
    tl.store(norm + at, _root(tl.load(w_sq + at, mask=at < size, other=0.0) + beyond), mask=at < size)


@triton.jit
def _row_norm_kernel(
    W, factor, A, B, BG, w_sq, norm, scale,
    N, K, R, each, stride_we, stride_wn, stride_wk,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, p, e): the rows of block i, of their columns part p with `each`, of matrix e of a stack. W is read
    once for every BLOCK_R ranks. `factor` scales rows of int8. `norm` gets the norm where a part is the WHOLE row, and
    else what the part adds to its square."""
    part, which, copies = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    W += which * stride_we
    A += which * R * K
    B, BG = B + which * N * R, BG + which * N * R
    w_sq, norm = w_sq + which * N, norm + (part * copies + which) * N
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    N_once = tl.where(part == 0, N, 0)  # rows to which this part adds what no column has a part of
    beyond = tl.zeros((BLOCK_N,), tl.float32)
    end = tl.minimum(part * each + each, K)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        cross = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(part * each, end, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            W_tile = tl.load(tile(W, rows, cols, stride_wn, stride_wk), mask=inside(rows, cols, N, end), other=0)
            A_tile = tl.load(tile(A, ranks, cols, K, 1), mask=inside(ranks, cols, R, end), other=0.0)
            cross = _add_product(W_tile, A_tile, cross, PRECISION)
        if factor is not None:
            cross *= tl.load(factor + rows, mask=rows < N, other=0.0)[:, None]
        beyond += _beyond_w(cross, B, BG, rows, ranks, N, N_once, R, scale)
    if WHOLE:
        beyond = _root(tl.load(w_sq + rows, mask=rows < N, other=0.0) + beyond)
    tl.store(norm + rows, beyond, mask=rows < N)


@triton.jit
def _row_norm_4bit_kernel(
    W, code, absmax, absmax_code, absmax_absmax, absmax_offset, A, B, BG, w_sq, norm, scale,
    N, K, R, each,
    DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, ABSMAXES: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, p): as above, `each` bytes of the rows, BLOCK_K at a time. Byte k of a row holds weight 2k in its
    high half and 2k + 1 in its low one; each is code[half] · absmax of its block of WEIGHTS, rounded to DTYPE. With
    `absmax_code` an absmax is itself a byte: absmax_code[byte] · absmax_absmax of its block of ABSMAXES + offset."""
    part = tl.program_id(1)
    norm += part * N
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    N_once = tl.where(part == 0, N, 0)  # rows to which this part adds what no column has a part of
    beyond = tl.zeros((BLOCK_N,), tl.float32)
    end = tl.minimum(part * each + each, K // 2)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        cross = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(part * each, end, BLOCK_K):
            pairs = start + tl.arange(0, BLOCK_K)
            here = inside(rows, pairs, N, end)
            packed = tl.load(tile(W, rows, pairs, K // 2, 1), mask=here, other=0).to(tl.int32)
            block = tile(0, rows, 2 * pairs, K, 1) // WEIGHTS
            size = tl.load(absmax + block, mask=here, other=0)
            if absmax_code is not None:
                size = tl.load(absmax_code + size.to(tl.int32))
                size *= tl.load(absmax_absmax + block // ABSMAXES, mask=here, other=0.0)
                size += tl.load(absmax_offset)
            high = (tl.load(code + (packed >> 4)) * size).to(DTYPE).to(tl.float32)
            low = (tl.load(code + (packed & 15)) * size).to(DTYPE).to(tl.float32)
            real = inside(ranks, pairs, R, end)  # zeros here cancel whatever the weights beyond W's edge are
            even = tl.load(tile(A, ranks, 2 * pairs, K, 1), mask=real, other=0.0)
            odd = tl.load(tile(A, ranks, 2 * pairs + 1, K, 1), mask=real, other=0.0)
            cross = _add_product(high, even, cross, PRECISION)
            cross = _add_product(low, odd, cross, PRECISION)
        beyond += _beyond_w(cross, B, BG, rows, ranks, N, N_once, R, scale)
    if WHOLE:
        beyond = _root(tl.load(w_sq + rows, mask=rows < N, other=0.0) + beyond)
    tl.store(norm + rows, beyond, mask=rows < N)


def _products(kernel: str, W: Tensor, dtype: torch.dtype) -> tuple[str, str]:
    """(the kernel's name in the block tables, how it multiplies) where W's numbers are exactly those of this dtype:
    bfloat16 holds an int8 too, and TF32 a float16."""
    if dtype in (torch.bfloat16, torch.int8):
        return kernel, "bf16x3"
    how = full_precision(W)
    return f"{kernel}_float32", "tf32x2" if how == "tf32x3" and dtype == torch.float16 else how


def _shared_out(norm: Tensor, copies: int, width: int, config: Config) -> tuple[int, int, int, Tensor]:
    """(blocks of rows, parts of the columns, columns of a part, room for what each part gives); a single part gives the
    norm itself."""
    blocks = cdiv(norm.shape[-1], config.rows)
    count, each = split(width, config.cols, full_waves(programs(norm), blocks * copies, width, config.cols))
    return blocks, count, each, norm if count == 1 else norm.new_empty((count, *norm.shape))


def _rooted(parts: Tensor, w_sq: Tensor, norm: Tensor) -> Tensor:
    if parts is not norm:
        size = norm.numel()
        launch(_root_kernel, (cdiv(size, _ROOTS),), (parts, w_sq, norm), (len(parts), size), (_ROOTS,))
    return norm


@replayed
def launch_row_norm(
    W: Float[Tensor, "*G N K"],
    factor: Float[Tensor, " N"] | None,
    A: Float[Tensor, "*G R K"],
    B: Float[Tensor, "*G N R"],
    BG: Float[Tensor, "*G N R"],
    scale: float,
    w_sq: Float[Tensor, "*G N"],
) -> Float[Tensor, "*G N"]:
    """Of a dense W, or of factor ∘ W with W in int8. All but W are float32 and contiguous."""
    (N, K), R = W.shape[-2:], A.shape[-2]
    copies, stride = (1, 0) if W.ndim == 2 else (len(W), W.stride(0))
    norm = torch.empty_like(w_sq)
    kernel, how = _products("row_norm" if factor is None else "row_norm_int8", W, W.dtype)

    def run(config: Config) -> Tensor:
        blocks, count, each, parts = _shared_out(norm, copies, K, config)
        numbers = (float(scale), N, K, R, each, stride, *W.stride()[-2:])
        constants = (how, count == 1, config.rows, config.cols, block_of(R, _RANKS))
        tensors = (W, factor, A, B, BG, w_sq, parts)
        launch(_row_norm_kernel, (blocks, count, copies), tensors, numbers, constants, config)
        return _rooted(parts, w_sq, norm)

    read = W if factor is None else A
    return tuned(kernel, run, read, read.dtype, N, K, R)


@replayed
def launch_row_norm_4bit(
    packed: Tensor,
    code: Float[Tensor, "16"],
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    blocks: tuple[int, int],
    dtype: torch.dtype,
    A: Float[Tensor, "R K"],
    B: Float[Tensor, "N R"],
    BG: Float[Tensor, "N R"],
    scale: float,
    w_sq: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Of a packed W (N·K/2 bytes, K even). `nested` is the code, the absmax and the offset of a quantised absmax,
    `blocks` how many weights, and how many absmaxes, share one; `dtype` is what the weights are rounded to."""
    N, (R, K) = len(w_sq), A.shape
    absmax_code, absmax_absmax, absmax_offset = nested or (None, None, None)
    norm = torch.empty_like(w_sq)
    kernel, how = _products("row_norm_4bit", packed, dtype)

    def run(config: Config) -> Tensor:
        of_rows, count, each, parts = _shared_out(norm, 1, K // 2, config)
        tensors = (packed, code, absmax, absmax_code, absmax_absmax, absmax_offset, A, B, BG, w_sq, parts)
        of_blocks = (count == 1, config.rows, config.cols, block_of(R, _RANKS))
        constants = (DTYPES[dtype], *blocks, how, *of_blocks)
        launch(_row_norm_4bit_kernel, (of_rows, count), tensors, (float(scale), N, K, R, each), constants, config)
        return _rooted(parts, w_sq, norm)

    return tuned(kernel, run, A, A.dtype, N, K, R)


def _small_operands(A: Tensor, B: Tensor, w_sq: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, B (A Aᵀ) and w_sq in float32."""
    A, B, w_sq = (small(t, torch.float32) for t in (A, B, w_sq))
    with without_autocast(A.device):
        return A, B, B @ _gram(A), w_sq


def _gram(A: Float[Tensor, "*G R K"]) -> Float[Tensor, "*G R R"]:
    """A Aᵀ. Its error goes into every row: K products are added in pieces of 128, which rounds less."""
    K = A.shape[-1]
    if K <= 128:
        return A @ A.mT
    pieces = (A if K % 128 == 0 else pad(A, (0, -K % 128))).view(*A.shape[:-1], -1, 128).transpose(-3, -2)
    return (pieces @ pieces.mT).sum(-3)


@operator("lora_lite::row_norm")
def _row_norm(W: Tensor, factor: Tensor | None, A: Tensor, B: Tensor, scale: float, w_sq: Tensor) -> Tensor:
    A, B, BG, sq = _small_operands(A, B, w_sq)
    factor = None if factor is None else small(factor, torch.float32)
    return launch_row_norm(W, factor, A, B, BG, scale, sq).to(w_sq.dtype)


@_row_norm.register_fake
def _(W: Tensor, factor: Tensor | None, A: Tensor, B: Tensor, scale: float, w_sq: Tensor) -> Tensor:
    return w_sq.new_empty(w_sq.shape)


@operator("lora_lite::row_norm_4bit")
def _row_norm_4bit(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    nested: list[Tensor],
    blocks: list[int],
    dtype: torch.dtype,
    A: Tensor,
    B: Tensor,
    scale: float,
    w_sq: Tensor,
) -> Tensor:
    A, B, BG, sq = _small_operands(A, B, w_sq)
    of_absmax = (nested[0], nested[1], nested[2]) if nested else None
    sizes = (blocks[0], blocks[1])
    return launch_row_norm_4bit(packed, code, absmax, of_absmax, sizes, dtype, A, B, BG, scale, sq).to(w_sq.dtype)


@_row_norm_4bit.register_fake
def _(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    nested: list[Tensor],
    blocks: list[int],
    dtype: torch.dtype,
    A: Tensor,
    B: Tensor,
    scale: float,
    w_sq: Tensor,
) -> Tensor:
    return w_sq.new_empty(w_sq.shape)


def row_norm(
    W: Any, A: Float[Tensor, "*G R K"], B: Float[Tensor, "*G N R"], scale: float, w_sq: Float[Tensor, "*G N"]
) -> Float[Tensor, "*G N"]:
    """‖W + scale·B A‖ of each row from ‖W‖² (w_sq). Not differentiable: DoRA holds the norm constant (§4.3).

    W is a tensor, of one matrix or a stack of them, or a quantised weight of `lora_lite.quantized`; one that the
    kernels can't read is made dense.
    """
    A, B = A.detach(), B.detach()
    kind = getattr(W, "kind", "dense")
    if kind == "int8":
        return _row_norm(W.values, W.factor, A, B, scale, w_sq)
    if kind == "4bit" and A.shape[1] % 2 == 0 and W.dtype in DTYPES:
        return _row_norm_4bit(W.packed, W.code, W.absmax, W.nested, W.blocks, W.dtype, A, B, scale, w_sq)
    return _row_norm(W.detach() if isinstance(W, Tensor) else W.dense(), None, A, B, scale, w_sq)
