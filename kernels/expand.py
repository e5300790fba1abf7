"""y + scale · h Bᵀ, the half of a low-rank sum after the base layer; and DoRA's, g ∘ (y − bias + scale · h Bᵀ) + bias.

M tokens, N out_features, R rank. Token-sized: reads y, writes out, each once.

With segments, B is G×N×R and g and bias G×N, and each row takes those of its run; where it has none it passes.
"""

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .common import block_of, inside, lies_across, named, precision, product, rows_of, small, tile, upright
from .dropout import kept, rescale
from .launching import launch
from .segments import Runs, blocks_of, own, own_vector, share_of_rows
from .tuning import Config, cdiv, of_idle, of_reads, programs, tuned

# Up to these ranks B is read as the parameter is, in float32, and converted in registers, which saves a launch. Beyond
# them, since B is read for every block of rows, more of it would be read than of y.
MOST_RANKS_UNCAST = 32


@triton.jit
def _factors(h, B, rows, cols, ranks, last, N, R, of_B, stride_hm, stride_bn, stride_br):
    """Tiles of h and Bᵀ."""
    h_tile = tl.load(tile(h, rows, ranks, stride_hm, 1), mask=inside(rows, ranks, last, R), other=0.0)
    B_tile = tl.load(tile(B, cols, ranks, stride_bn, stride_br), mask=inside(cols, ranks, N, of_B), other=0.0)
    return h_tile, tl.trans(B_tile.to(h.dtype.element_ty))


@triton.jit
def _expand_kernel(
    y, h, B, out, g, bias, table, seed, scale,
    M, N, R, stride_ym, stride_yn, stride_hm, stride_bn, stride_br,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    AT_ONCE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One tile of out a program; neighbouring programs take neighbouring columns of the same rows. A program waits for
    memory once where BLOCK_R holds all ranks (AT_ONCE): all that it reads is asked for before any of it is used."""
    blocks = tl.cdiv(N, BLOCK_N)
    top, last, matrix = share_of_rows(tl.program_id(0) // blocks, M, table, BLOCK_M)
    rows = top + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    here = inside(rows, cols, last, N)
    B, of_B = own(B, table, matrix, R, N)
    if g is not None:
        gain = own_vector(g, table, matrix, cols, N, 1.0)[None, :]
        if bias is not None:
            b = own_vector(bias, table, matrix, cols, N, 0.0)[None, :]
    if AT_ONCE:
        ranks = tl.arange(0, BLOCK_R)
        h_tile, B_tile = _factors(h, B, rows, cols, ranks, last, N, R, of_B, stride_hm, stride_bn, stride_br)
    y_tile = tl.load(tile(y, rows, cols, stride_ym, stride_yn), mask=here, other=0.0)
    if AT_ONCE:
        acc = product(h_tile, B_tile, None, PRECISION, ACROSS)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M) if ACROSS else (BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            h_tile, B_tile = _factors(h, B, rows, cols, ranks, last, N, R, of_B, stride_hm, stride_bn, stride_br)
            acc = product(h_tile, B_tile, acc, PRECISION, ACROSS)
    change = scale * upright(acc, ACROSS)
    y_tile = y_tile.to(tl.float32)
    if g is not None:
        if bias is not None:
            y_tile = (y_tile - b) * gain + b
        else:
            y_tile *= gain
        change *= gain
    if seed is not None:
        first = tl.program_id(0) % blocks * BLOCK_N
        change = tl.where(kept(seed, rows, first, BLOCK_M, BLOCK_N), rescale(seed) * change, 0.0)
    tl.store(tile(out, rows, cols, N, 1), y_tile + change, mask=here)


def rows_apart(h: Float[Tensor, "M R"]) -> Float[Tensor, "M R"]:
    """h with its ranks side by side; rows may be further apart, as those of one layer among several are."""
    return h if h.stride(1) == 1 else h.contiguous()


def launch_expand(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    g: Float[Tensor, "*G N"] | None = None,
    bias: Float[Tensor, "*G N"] | None = None,
    runs: Runs | None = None,
    seed: Int[Tensor, "1"] | None = None,
) -> Float[Tensor, "*M N"]:
    """y + scale · h Bᵀ; with g and bias, g ∘ (y − bias + scale · h Bᵀ) + bias. With a seed, what is added to y goes
    through dropout."""
    out, y = y.new_empty(y.shape), rows_of(y)
    (M, N), R = y.shape, B.shape[-1]
    if MOST_RANKS_UNCAST < R:
        B = small(B, h.dtype)
    elif B.ndim == 3 and B.stride(0) != N * R:  # its matrices may lie across, but follow each other
        B = B.contiguous()
    h = rows_apart(h)
    inner = 64 if h.element_size() == 2 else 16  # ranks in one product; few where they lie in registers
    if M == 0:
        return out

    def run(config: Config) -> Tensor:
        blocks, table, rows = blocks_of(M, config, runs)
        numbers = (float(scale), M, N, R, *y.stride(), h.stride(0), *B.stride()[-2:])
        how = precision(y, h.dtype, many_tiles=2 * inner < R)
        constants = (how, rows, config.cols, block_of(R, inner), block_of(R, inner) >= R, lies_across(y, h.dtype))
        grid = (blocks * cdiv(N, config.cols),)
        launch(_expand_kernel, grid, (y, h, B, out, g, bias, table, seed), numbers, constants, config)
        return out

    def moves(config: Config) -> float:
        blocks, of_cols = blocks_of(M, config, runs)[0], cdiv(N, config.cols)
        return of_reads(of_cols, h) + of_reads(blocks, B) + of_idle(blocks * of_cols, programs(y), y)

    return tuned(named("expand", runs, seed), run, y, h.dtype, M, N, R, moves=moves)
