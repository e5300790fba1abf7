"""Dropout's mask from a counter-based generator: computed where it is needed, in forward and backward alike, and never
stored.

M tokens, N the width of the token-sized tensor. Philox 4×32 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") turns (seed, row, column // 8) into 128 bits, 16 for each of eight neighbouring elements. Seven rounds are the
fewest that pass BigCrush (their table 2). A seed's upper 16 bits are its threshold: an element is dropped if its own
16 bits are below that, which has the probability threshold / 2¹⁶, and what is kept is scaled by the inverse of exactly
the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_THRESHOLD = tl.constexpr(47)  # its lowest bit in a seed, whose 64th is the sign


@triton.jit
def _drop(seed):
    return (seed >> _THRESHOLD).to(tl.int32)


@triton.jit
def kept(seed, rows, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of a tile stay. Its columns begin at `first`, a multiple of 8."""
    seed = tl.load(seed)
    eights = first // 8 + tl.arange(0, BLOCK_N // 8)
    zero = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
    a, b, c, d = tl.philox(seed, eights[None, :] + zero, rows[:, None] + zero, zero, zero, 7)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)).to(tl.int32) >= _drop(seed)


@triton.jit
def rescale(seed):
    """1 / the probability to stay."""
    return 65536.0 / (65536 - _drop(tl.load(seed)))


def threshold(dropout: float) -> int:
    """Of a probability."""
    return min(round(dropout * 65536), 65535)


def new_seed(like: Tensor, dropout: float) -> Tensor:
    """One of PyTorch's generator for this device, so that its state, which checkpointing keeps, sets the mask."""
    first, step = threshold(dropout) << _THRESHOLD.value, 1 << _THRESHOLD.value
    return torch.randint(first, first + step - 1, (1,), device=like.device)
