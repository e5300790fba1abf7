"""Several layers that read the same x, in one launch: which of the ranks are whose.

R ranks, of up to three layers: the first's end at R_1, the second's at R_2, the third's at R. With dropout each layer
has a mask, and so a seed, of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from .common import MAX_RANK
from .dropout import rescale

MOST_LAYERS = 3  # whose results, of one x, a launch takes

# Ranks of several layers that a launch takes with a mask or a dh each, by their bytes an element: where there are more,
# registers don't hold them. Then dh is copied together, and layers with dropout take a launch each.
MOST_RANKS_APART = {2: 64, 4: 32}
MOST_RANKS_MASKED = {2: 64, 4: 0}


@triton.jit
def ranks_of(ranks, i: tl.constexpr, LAYERS: tl.constexpr, R_1, R_2):
    """Which ranks are layer i's, of several."""
    if i == 0:
        mine = ranks < R_1
    elif i == 1:
        mine = ranks >= R_1
        if LAYERS > 2:
            mine &= ranks < R_2
    else:
        mine = ranks >= R_2
    return mine


@triton.jit
def rescales(seeds, ranks, LAYERS: tl.constexpr, R_1, R_2):
    """Of each rank, 1 / the probability of its layer's inputs to stay."""
    found = ranks * 0.0 + rescale(seeds)
    for i in tl.static_range(1, LAYERS):
        found = tl.where(ranks_of(ranks, i, LAYERS, R_1, R_2), rescale(seeds + i), found)
    return found


class Ranks(NamedTuple):
    """The ranks and the layers of one launch: `ends` of each layer's ranks, of those that are here."""

    ranks: slice
    layers: slice
    ends: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, int, int]:
        """R, R_1, R_2 of a kernel."""
        R_1, R_2, *_ = (*self.ends, self.ends[-1], self.ends[-1])
        return self.ends[-1], R_1, R_2


def launches_of(R: int, ends: Sequence[int], layers: int = MOST_LAYERS) -> list[Ranks]:
    """R ranks, of layers that end at these (none: of one), in launches of at most MAX_RANK and so many layers."""
    ends, found = tuple(ends) or (R,), []
    for at in range(0, len(ends), layers):
        of = slice(at, at + layers)
        begin, end = ends[at - 1] if at else 0, ends[of][-1]
        for first in range(begin, max(end, begin + 1), MAX_RANK):
            last = min(first + MAX_RANK, end)
            found.append(Ranks(slice(first, last), of, tuple(min(max(e, first), last) - first for e in ends[of])))
    return found
