"""Segments: the rows of a token-sized tensor in runs, each with the matrices of its own from a stack.

One thing serves a mixture's experts (rows sorted by expert), packed sequences, and a batch whose entries have adapters
of their own. M rows, S runs, G matrices of a stack, each P×Q.

On a CPU sums are added run by run, while a run is in the cache; elsewhere the device finds the runs, without a host
sync.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .operators import operator

T = TypeVar("T")

# Products of runs without a host sync, from torch 2.10; before that, and in float64, run by run.
grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)
_GROUPED = (torch.float32, torch.bfloat16, torch.float16) if grouped_mm is not None else ()


def once(made: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    """What `make` makes, kept in `made`. A graph that is compiled makes its own."""
    if torch.compiler.is_compiling():
        return make()
    if key not in made:
        made[key] = make()
    return made[key]


@dataclass(frozen=True)
class Segments:
    """Which rows take which matrices. Rows after the last run, and those of a run without a matrix, take none.

    Args:
        ends: the row after the last of each run: not decreasing, on the rows' device, of dtype int32.
        which: the matrix that each run takes; below 0: none. Without it run i takes matrix i.
        whole: each row is known to take a matrix.
    """

    ends: Int[Tensor, " S"]
    which: Int[Tensor, " S"] | None = None
    whole: bool = False
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def equal(cls, which: Int[Tensor, " S"], rows: int) -> "Segments":
        """Runs of as many rows each."""
        S = len(which)
        return cls(torch.arange(rows, (S + 1) * rows, rows, device=which.device, dtype=torch.int32)[:S], which)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` makes, made once: layers and their backwards share what follows from the segments."""
        return once(self._made, key, make)

    def runs(self, M: int) -> Iterator[tuple[int | None, slice]]:
        """(matrix, rows) of each run that is not empty, what belongs to none at the end; no matrix: None. Asks the
        device where the runs end."""
        which = range(len(self.ends)) if self.which is None else self.which.tolist()
        start = 0
        for matrix, end in zip((*which, -1), (*self.ends.tolist(), M), strict=True):
            if end > start:
                yield (matrix if matrix >= 0 else None), slice(start, end)
            start = max(start, end)

    def matrix_of_rows(self, M: int) -> Int[Tensor, " M"]:
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


def shrink(
    x: Float[Tensor, "M Q"], stack: Float[Tensor, "G P Q"], segments: Segments
) -> tuple[Float[Tensor, "M Q"], Float[Tensor, "M P"]]:
    """(x, `product`). Hand the returned x on: its gradient and the product's are then added run by run."""
    if not _by_run(x):
        return x, product(x, stack.to(x.dtype), segments)
    return _Shrink.apply(x, stack, segments)  # type: ignore[return-value]


def expand_add(
    y: Float[Tensor, "M P"], h: Float[Tensor, "M Q"], stack: Float[Tensor, "G P Q"], scale: float, segments: Segments
) -> Float[Tensor, "M P"]:
    """y + scale · `product` of h."""
    if not _by_run(y):
        return y + product(h.to(y.dtype), scale * stack.to(y.dtype), segments)
    return _ExpandAdd.apply(y, h, stack, scale, segments)  # type: ignore[return-value]


# ---- run by run, on a CPU --------------------------------------------------------------------------------------------


def _by_run(t: Tensor) -> bool:
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: many small products start too slowly in 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def _in_runs(segments: Segments, *tensors: Tensor) -> Iterator[tuple[int | None, tuple[Tensor, ...]]]:
    """(matrix, the rows of each tensor) of each run that is not empty."""
    runs = list(segments.runs(len(tensors[0])))
    sizes = [rows.stop - rows.start for _, rows in runs]
    parts = zip(*(t.split(sizes) for t in tensors), strict=True) if runs else ()
    return zip((matrix for matrix, _ in runs), parts, strict=True)


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, stack)
        ctx.segments = segments
        wide = x.to(_wide(x.dtype))
        return x.view_as(x), _grouped(wide, stack.to(wide.dtype), segments, narrow=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dx_base, dh), (x, stack) = grads, ctx.saved_tensors
        needs_x, needs_stack, _ = ctx.needs_input_grad
        dx = d_stack = None
        if needs_x:
            dx = _add_product(dx_base, dh, stack.to(dh.dtype).mT, 1.0, ctx.segments)
        if needs_stack:
            d_stack = _grouped_outer(dh, x.to(dh.dtype), ctx.segments, len(stack)).to(stack.dtype)
        return dx, d_stack, None


class _ExpandAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, stack: Tensor, scale: float, segments: Segments) -> Tensor:
        ctx.save_for_backward(h, stack)
        ctx.scale, ctx.segments = scale, segments
        return _add_product(y, h, stack.to(h.dtype), scale, segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (h, stack) = grads, ctx.saved_tensors
        _, needs_h, needs_stack, _, _ = ctx.needs_input_grad
        wide, dh, d_stack = dy.to(h.dtype), None, None
        if needs_h:
            dh = _grouped(wide, stack.to(h.dtype).mT, ctx.segments, narrow=True).mul_(ctx.scale)
        if needs_stack:
            d_stack = _grouped_outer(ctx.scale * h, wide, ctx.segments, len(stack)).mT.to(stack.dtype)
        return dy, dh, d_stack, None, None


def _add_product(base: Tensor, x: Tensor, stack: Tensor, scale: float, segments: Segments) -> Tensor:
    """base + scale · `product`, multiplied and added in x's dtype, which is no narrower than base's."""
    return _grouped(x, stack if scale == 1 else scale * stack, segments).add_(base).to(base.dtype)


# ---- all at once -----------------------------------------------------------------------------------------------------


def _grouped(x: Tensor, stack: Tensor, segments: Segments, narrow: bool = False) -> Float[Tensor, "M P"]:
    if x.dtype not in _GROUPED:
        out = x.new_zeros(len(x), stack.shape[1])
        for matrix, (xs, outs) in _in_runs(segments, x, out):
            if matrix is not None:
                torch.mm(xs, stack[matrix].t(), out=outs)
        return out
    each = stack if segments.which is None else stack[segments.which.clamp_min(0)]
    if pad := -x.shape[1] % (16 // x.element_size()):
        x, each = (torch.nn.functional.pad(t, (0, pad)) for t in (x, each))
    x, each = _aligned(x), _aligned(each)
    out = grouped_mm(each, x.mT, offs=segments.ends).mT if narrow else grouped_mm(x, each.mT, offs=segments.ends)
    if segments.whole:
        return out
    # What belongs to no run, grouped_mm leaves as it was.
    return out.masked_fill((segments.matrix_of_rows(len(x)) < 0)[:, None], 0.0)


def _grouped_outer(dy: Tensor, x: Tensor, segments: Segments, G: int) -> Float[Tensor, "G P Q"]:
    """Of each matrix Σ dyᵀ x over its rows."""
    P, Q = dy.shape[1], x.shape[1]
    if x.dtype not in _GROUPED:
        out = x.new_zeros(G, P, Q)
        for matrix, (dys, xs) in _in_runs(segments, dy, x):
            if matrix is not None:
                out[matrix].addmm_(dys.t(), xs)
        return out
    each = grouped_mm(_aligned(dy).mT, _aligned(x), offs=segments.ends)[:, :P, :Q]
    if segments.which is None:
        return each.contiguous()
    kept = each.masked_fill((segments.which < 0)[:, None, None], 0.0)
    return each.new_zeros(G, P, Q).index_add_(0, segments.which.clamp_min(0), kept)


def _aligned(t: Tensor) -> Tensor:
    """With rows, or columns, of whole 16 bytes, as grouped products want it; a copy only where they are not."""
    step = 16 // t.element_size()
    strides = sorted(t.stride()[-2:])
    if strides[0] == 1 and all(stride % step == 0 for stride in (*t.stride()[:-2], strides[1])):
        return t
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % step)).contiguous()


# ---- operators -------------------------------------------------------------------------------------------------------


@operator("lora_lite::segment_product")
def _product(x: Tensor, stack: Tensor, ends: Tensor, which: Tensor | None, whole: bool) -> Tensor:
    return _grouped(x, stack, Segments(ends, which, whole))


@_product.register_fake
def _(x: Tensor, stack: Tensor, ends: Tensor, which: Tensor | None, whole: bool) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[1])


@operator("lora_lite::segment_outer")
def _outer(dy: Tensor, x: Tensor, ends: Tensor, which: Tensor | None, G: int) -> Tensor:
    return _grouped_outer(dy, x, Segments(ends, which), G)


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
