"""Segments: the rows of a token-sized tensor in runs, each with the matrices of its own from a stack.

One thing serves a mixture's experts (rows sorted by expert), packed sequences, and a batch whose entries have adapters
of their own. M rows, S runs, G matrices of a stack, each P×Q.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Products of runs without a host sync, from torch 2.10.
grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)


@dataclass(frozen=True)
class Segments:
    """Which rows take which matrices. Rows after the last run, and those of a run without a matrix, take none.

    Args:
        ends: the row after the last of each run: not decreasing, on the rows' device, of dtype int32.
        which: the matrix that each run takes; below 0: none. Without it run i takes matrix i.
        whole: each row is known to take a matrix.
    """

    ends: Int[Tensor, "S"]
    which: Int[Tensor, "S"] | None = None
    whole: bool = False

    @classmethod
    def equal(cls, which: Int[Tensor, "S"], rows: int) -> "Segments":
        """Runs of as many rows each."""
        S = len(which)
        return cls(torch.arange(rows, (S + 1) * rows, rows, device=which.device, dtype=torch.int32)[:S], which)

    def runs(self, M: int) -> Iterator[tuple[int | None, slice]]:
        """(matrix, rows) of each run that is not empty, what belongs to none at the end; no matrix: None. Asks the
        device where the runs end."""
        which = range(len(self.ends)) if self.which is None else self.which.tolist()
        start = 0
        for matrix, end in zip((*which, -1), (*self.ends.tolist(), M), strict=True):
            if end > start:
                yield (matrix if matrix >= 0 else None), slice(start, end)
            start = max(start, end)

    def matrix_of_rows(self, M: int) -> Int[Tensor, "M"]:
        """The matrix of each of M rows; -1: none."""
        S = len(self.ends)
        run = torch.searchsorted(self.ends, torch.arange(M, device=self.ends.device, dtype=torch.int32), right=True)
        which = torch.arange(S, device=self.ends.device) if self.which is None else self.which.clamp_min(-1)
        return torch.cat([which, which.new_full((1,), -1)])[run]

    def vectors(self, stack: Float[Tensor, "G D"], M: int, none: float) -> Float[Tensor, "M D"]:
        """The vector of each of M rows; `none` where it has none."""
        return torch.cat([stack, torch.full_like(stack[:1], none)])[self.matrix_of_rows(M)]


def product(x: Float[Tensor, "M Q"], stack: Float[Tensor, "G P Q"], segments: Segments) -> Float[Tensor, "M P"]:
    """Of each row its product with its matrix's transpose; zeros where it has none. x and stack are of one dtype."""
    return _product(x, stack, segments.ends, segments.which, segments.whole)


@torch.library.custom_op("lora_lite::segment_product", mutates_args=())
def _product(x: Tensor, stack: Tensor, ends: Tensor, which: Tensor | None, whole: bool) -> Tensor:
    if by_device(x):
        return _grouped_product(x, stack, ends, which, whole)
    out = x.new_zeros(len(x), stack.shape[1])
    for matrix, rows in Segments(ends, which).runs(len(x)):
        if matrix is not None:
            torch.mm(x[rows], stack[matrix].t(), out=out[rows])
    return out


@_product.register_fake
def _(x: Tensor, stack: Tensor, ends: Tensor, which: Tensor | None, whole: bool) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[1])


@torch.library.custom_op("lora_lite::segment_outer", mutates_args=())
def _outer(dy: Tensor, x: Tensor, ends: Tensor, which: Tensor | None, G: int) -> Tensor:
    """Of each matrix Σ dyᵀ x over its rows: G×P×Q."""
    if by_device(x):
        return _grouped_outer(dy, x, ends, which, G)
    out = x.new_zeros(G, dy.shape[1], x.shape[1])
    for matrix, rows in Segments(ends, which).runs(len(x)):
        if matrix is not None:
            out[matrix].addmm_(dy[rows].t(), x[rows])
    return out


@_outer.register_fake
def _(dy: Tensor, x: Tensor, ends: Tensor, which: Tensor | None, G: int) -> Tensor:
    return x.new_empty(G, dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, stack, ends, which, ctx.whole = inputs
    needs_x, needs_stack = ctx.needs_input_grad[:2]
    ctx.G = len(stack)
    ctx.save_for_backward(x if needs_stack else None, stack if needs_x else None, ends, which)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, stack, ends, which = ctx.saved_tensors
    dx = None if stack is None else _product(dy, stack.mT, ends, which, ctx.whole)
    return dx, None if x is None else _outer(dy, x, ends, which, ctx.G), None, None, None


_product.register_autograd(_backward, setup_context=_save)


# ---- without a host sync ---------------------------------------------------------------------------------------------


def by_device(x: Tensor) -> bool:
    """Whether the device finds the runs itself. A CPU reads their ends anyway, and float64 has no grouped product."""
    return x.device.type != "cpu" and grouped_mm is not None and x.dtype != torch.float64


def _grouped_product(x: Tensor, stack: Tensor, ends: Tensor, which: Tensor | None, whole: bool) -> Tensor:
    each = stack if which is None else stack[which.clamp_min(0)]
    out = grouped_mm(_aligned(x), _aligned(each).mT, offs=ends)
    if whole:
        return out
    # What belongs to no run, grouped_mm leaves as it was.
    return out.masked_fill((Segments(ends, which).matrix_of_rows(len(x)) < 0)[:, None], 0.0)


def _grouped_outer(dy: Tensor, x: Tensor, ends: Tensor, which: Tensor | None, G: int) -> Tensor:
    P, Q = dy.shape[1], x.shape[1]
    each = grouped_mm(_aligned(dy).mT, _aligned(x), offs=ends)[:, :P, :Q]
    if which is None:
        return each
    kept = each.masked_fill((which < 0)[:, None, None], 0.0)
    return each.new_zeros(G, P, Q).index_add_(0, which.clamp_min(0), kept)


def _aligned(t: Tensor) -> Tensor:
    """With rows, or columns, of whole 16 bytes, as grouped products want it; a copy only where they are not."""
    step = 16 // t.element_size()
    strides = sorted(t.stride()[-2:])
    if strides[0] == 1 and all(stride % step == 0 for stride in (*t.stride()[:-2], strides[1])):
        return t
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % step)).contiguous()
