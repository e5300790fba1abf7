"""DoRA: g ∘ (y − bias + scale · h Bᵀ) + bias, and the row norms of W + scale · B A from which g comes.

M tokens, K in_features, N out_features, R rank. Token-sized reads and writes, each tensor once a kernel:

    expand_add_rescale          reads y        writes out       see lowrank.py for the kernel
    expand_add_rescale backward reads dy, y    writes dy_base   dy_base = g ∘ dy,  dh = scale · dy (g ∘ B),
                                                                dB = scale · g ∘ dyᵀh,  dg = Σ dy ∘ (y − bias + …)
    row_norm                    reads W        writes –         no N×K temporary
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from .common import block_of, device, inside, rows_of, small, tile
from .lowrank import launch_expand, launch_expand_backward
from .tuning import Config, architecture, tuned

# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _row_norm_kernel(
    W, A, B, BG, w_sq, norm, scale,
    N, K, R, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program i: the rows of block i. BG is B (A Aᵀ). W is read once for every BLOCK_R ranks."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    norm_sq = tl.load(w_sq + rows, mask=rows < N, other=0.0)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        cross = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            W_tile = tl.load(tile(W, rows, cols, stride_wn, stride_wk), mask=inside(rows, cols, N, K), other=0.0)
            A_tile = tl.load(tile(A, ranks, cols, K, 1), mask=inside(ranks, cols, R, K), other=0.0)
            cross = tl.dot(W_tile.to(tl.float32), tl.trans(A_tile), cross, input_precision=PRECISION)
        here = inside(rows, ranks, N, R)
        B_tile = tl.load(tile(B, rows, ranks, R, 1), mask=here, other=0.0)
        BG_tile = tl.load(tile(BG, rows, ranks, R, 1), mask=here, other=0.0)
        norm_sq += tl.sum(scale * B_tile * (2 * cross + scale * BG_tile), 1)
    tl.store(norm + rows, tl.sqrt(tl.maximum(norm_sq, 1e-12)), mask=rows < N)


# ---- launchers -------------------------------------------------------------------------------------------------------


def launch_row_norm(
    W: Float[Tensor, "N K"],
    A: Float[Tensor, "R K"],
    B: Float[Tensor, "N R"],
    BG: Float[Tensor, "N R"],
    scale: float,
    w_sq: Float[Tensor, "N"],
) -> Float[Tensor, "N"]:
    """‖W + scale · B A‖ of each row, in float32 throughout; all but W are float32 and contiguous."""
    (N, K), R = W.shape, len(A)
    norm = torch.empty_like(w_sq)

    def run(config: Config) -> Tensor:
        with device(W):
            _row_norm_kernel[(triton.cdiv(N, config.rows),)](
                W, A, B, BG, w_sq, norm, scale, N, K, R, *W.stride(),
                # Three TF32 products are float32 to the last bits on NVIDIA's tensor cores; AMD's take float32 itself.
                PRECISION="ieee" if architecture(W).startswith("gfx") else "tf32x3",
                BLOCK_N=config.rows, BLOCK_K=config.cols, BLOCK_R=block_of(R), **config.launch,
            )  # fmt: skip
        return norm

    return tuned("row_norm", run, W, N, K, R)


# ---- operators -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lora_lite::row_norm", mutates_args=())
def _row_norm(W: Tensor, A: Tensor, B: Tensor, scale: float, w_sq: Tensor) -> Tensor:
    A, B = small(A, torch.float32), small(B, torch.float32)
    with torch.autocast(W.device.type, enabled=False):
        # The Gram matrix's error goes into every row: add its K products in pieces, which rounds less.
        pieces = pad(A, (0, -A.shape[1] % 128)).view(len(A), -1, 128).transpose(0, 1)
        BG = B @ torch.bmm(pieces, pieces.mT).sum(0)
    return launch_row_norm(W, A, B, BG, scale, small(w_sq, torch.float32)).to(w_sq.dtype)


@_row_norm.register_fake
def _(W: Tensor, A: Tensor, B: Tensor, scale: float, w_sq: Tensor) -> Tensor:
    return w_sq.new_empty(w_sq.shape)


@torch.library.custom_op("lora_lite::expand_add_rescale", mutates_args=())
def _expand_add_rescale(y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None) -> Tensor:
    return launch_expand(rows_of(y), h, g[:, None] * B, scale, g, bias).view(y.shape)


@_expand_add_rescale.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("lora_lite::expand_add_rescale_backward", mutates_args=())
def _expand_add_rescale_backward(
    dy: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dh, dB, dy_base, dg = launch_expand_backward(rows_of(dy), h, g[:, None] * B, scale, True, True, rows_of(y), g, bias)
    dg += (B * dB).sum(1)
    return dy_base.view(y.shape), dh, (g[:, None] * dB).to(B.dtype), dg.to(g.dtype)


@_expand_add_rescale_backward.register_fake
def _(
    dy: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), h.new_empty(h.shape), B.new_empty(B.shape), g.new_empty(g.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor | None], output: Tensor) -> None:
    y, h, B, ctx.scale, g, bias = inputs
    ctx.save_for_backward(y, h, B, g, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, h, B, g, bias = ctx.saved_tensors
    dy_base, dh, dB, dg = _expand_add_rescale_backward(dy, y, h, B, ctx.scale, g, bias)
    return dy_base, dh, dB, None, dg, None


_expand_add_rescale.register_autograd(_backward, setup_context=_save)


def expand_add_rescale(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "N R"],
    scale: float,
    g: Float[Tensor, "N"],
    bias: Float[Tensor, "N"] | None,
) -> Float[Tensor, "*M N"]:
    """g ∘ (y − bias + scale · h Bᵀ) + bias. The bias, the base layer's, gets no gradient."""
    return _expand_add_rescale(y, h, B, scale, g, None if bias is None else bias.detach())


def row_norm(
    W: Float[Tensor, "N K"],
    A: Float[Tensor, "R K"],
    B: Float[Tensor, "N R"],
    scale: float,
    w_sq: Float[Tensor, "N"],
) -> Float[Tensor, "N"]:
    """‖W + scale·B A‖ of each row from ‖W‖² (w_sq). Not differentiable: DoRA holds the norm constant (§4.3)."""
    return _row_norm(W.detach(), A.detach(), B.detach(), scale, w_sq)
