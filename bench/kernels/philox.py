"""Philox 4×32 in numpy, from its paper (Salmon et al. 2011, section 3.3), and the dropout mask made of it."""

import numpy as np
import torch
from torch import Tensor


def philox(counter: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
    """128 random bits, as 4 × 32, for each counter of 4 × 32 (the last dimension)."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0), second & low
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1), first & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def seed_of(bits: int, dropout: float) -> int:
    """A seed of 47 bits, with the probability's 16 above them."""
    return round(dropout * 65536) << 47 | bits & (1 << 47) - 1


def dropout_mask(seed: int, M: int, N: int) -> Tensor:
    """M×N in float64: 0 where dropped, 1 / (1 − the probability) elsewhere."""
    drop = seed >> 47
    eights, rows = np.meshgrid(np.arange((N + 7) // 8), np.arange(M))
    counter = np.stack([eights, rows, np.zeros_like(rows), np.zeros_like(rows)], -1)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32), 7)
    # Joined pairwise: (a, b), (c, d), then each one's lower and upper half.
    bits = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1)
    bits = bits.reshape(M, (N + 7) // 8, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(M, (N + 7) // 8 * 8)[:, :N]
    return torch.from_numpy((bits >= drop) * (65536 / (65536 - drop)))
