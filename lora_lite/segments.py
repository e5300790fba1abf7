"""Segments: the rows of a token-sized tensor in runs, each with the matrices of its own from a stack.

One thing serves a mixture's experts (rows sorted by expert), packed sequences, and a batch whose entries have adapters
of their own. M rows, S runs, G matrices of a stack, each P×Q.

On a CPU the host knows the runs, and batches short products; elsewhere the device finds the runs, without a host sync.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import AttachError
from .operators import of_a_batch, operator, traced, transformed, without_values, writable

T = TypeVar("T")

# Products of runs without a host sync, from torch 2.10; before that, and in float64, run by run.
grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)
_GROUPED = (torch.float32, torch.bfloat16, torch.float16) if grouped_mm is not None else ()


def once(made: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    """What `make` makes, kept in `made`. A graph that is compiled or traced makes its own, and so does a
    FakeTensorMode, whose tensors hold no values."""
    if torch.compiler.is_compiling() or without_values() or traced():
        return make()
    if key not in made:
        made[key] = make()
    return made[key]


def once_for_training(made: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    """`once`, of indices: where inference makes them first, a training step is to find tensors that it can save."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return once(made, key, make)
    with torch.inference_mode(False), torch.no_grad():
        return once(made, key, make)


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

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` makes, made once: layers and their backwards share what follows from the segments."""
        return once_for_training(self._made, key, make)

    def runs(self, M: int) -> Iterator[tuple[int | None, slice]]:
        """(matrix, rows) of each run that is not empty, what belongs to none at the end; no matrix: None. Asks the
        device where the runs end."""
        start = 0
        for matrix, size in zip(self.matrices(), self.sizes(M), strict=True):
            if size:
                yield (matrix if matrix >= 0 else None), slice(start, start + size)
            start += size

    def matrices(self) -> list[int]:
        """The matrix of each run, and of what is behind the last; below 0: none. Asks the device."""
        return [*(range(len(self.ends)) if self.which is None else self.which.tolist()), -1]

    def sizes(self, M: int) -> list[int]:
        """How many rows each run has, and how many are behind the last. Asks the device, once.

        Raises:
            AttachError: in a trace.
        """

        if traced():
            raise AttachError(
                "a trace takes the runs of rows of its example for constants, which other tokens do not have; make the "
                "program by torch.export, or merge the adapters first (save_merged)"
            )

        def make() -> list[int]:
            ends = [0, *self.ends.tolist(), M]
            return [after - before for before, after in pairwise(ends)]

        return self.once(("sizes", M), make)

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
    if transformed() and not traced():
        return _by_formula(x, stack, segments)
    return _product(x, stack, segments.ends, segments.which, segments.whole)


def _by_formula(x: Tensor, stack: Tensor, segments: Segments) -> Float[Tensor, "M P"]:
    """`product` run by run, in operators of PyTorch's that differentiate forward and map."""
    runs = segments.runs(len(x))
    parts = [x.new_zeros(len(x[rows]), stack.shape[1]) if i is None else x[rows] @ stack[i].t() for i, rows in runs]
    return torch.cat(parts) if parts else x.new_zeros(0, stack.shape[1])


def _outer_by_formula(dy: Tensor, x: Tensor, segments: Segments, G: int) -> Float[Tensor, "G P Q"]:
    """Of each matrix Σ dyᵀ x over its rows, likewise."""
    none = dy[:0].t() @ x[:0]
    found = [none] * G
    for i, rows in segments.runs(len(x)):
        if i is not None:
            found[i] = found[i] + dy[rows].t() @ x[rows]
    return torch.stack(found)


def shrink(
    x: Float[Tensor, "M Q"], stack: Float[Tensor, "G P Q"], segments: Segments, dtype: torch.dtype, own: bool = False
) -> tuple[Float[Tensor, "M Q"], Float[Tensor, "M P"]]:
    """(x, `product`), multiplied in `dtype`. Hand the returned x on: its gradient and the product's are then added in
    one; if that gradient is our `own`, it is written to."""
    if not _by_hand(x):
        return x, product(x.to(dtype), stack.to(dtype), segments)
    return _Shrink.apply(x, stack, segments, dtype, own and x.dtype == dtype)  # type: ignore[return-value]


def expand_add(
    y: Float[Tensor, "M P"],
    h: Float[Tensor, "M Q"],
    stack: Float[Tensor, "G P Q"],
    scale: float,
    segments: Segments,
    dtype: torch.dtype,
    own: bool = False,
) -> Float[Tensor, "M P"]:
    """y + scale · `product` of h, multiplied and added in `dtype`; a y that is our `own` is written to."""
    if not _by_hand(y):
        return (y + product(h.to(dtype), scale * stack.to(dtype), segments)).to(y.dtype)
    return _ExpandAdd.apply(y, h, stack, scale, segments, dtype, own and y.dtype == dtype)  # type: ignore[return-value]


def _by_hand(t: Tensor) -> bool:
    """Where asking for the ends of runs is no sync. A graph that is compiled asks nothing, nor do tensors without
    values; who transforms derives."""
    return t.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed() or without_values())


# ---- on a CPU --------------------------------------------------------------------------------------------------------


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stack: Tensor, segments: Segments, dtype: torch.dtype, own: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, stack)
        ctx.products, ctx.segments, ctx.own = _products(segments, len(x), len(stack), dtype), segments, own
        return x.view_as(x), ctx.products.narrow(ctx.products.cut(x.to(dtype)), stack.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dx_base, dh), (x, stack) = grads, ctx.saved_tensors
        needs_x, needs_stack, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or of_a_batch(dh):
            dx, d_stack = _gradients(dh, x.to(dh.dtype), stack.to(dh.dtype), ctx.segments)
            return (dx_base + dx).to(x.dtype), d_stack.to(stack.dtype), None, None, None
        dx = d_stack = None
        if needs_x:
            dx = ctx.products.add_wide(dx_base, dh, stack.to(dh.dtype).mT, ctx.own and writable(dx_base))
        if needs_stack:
            d_stack = ctx.products.outer(dh, ctx.products.cut(x.to(dh.dtype)), len(stack)).to(stack.dtype)
        return dx, d_stack, None, None, None


class _ExpandAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, stack: Tensor, scale: float, segments: Segments, dtype: torch.dtype, own: bool
    ) -> Tensor:
        ctx.save_for_backward(h, stack)
        ctx.products, ctx.segments = _products(segments, len(y), len(stack), dtype), segments
        ctx.scale, ctx.dtype = scale, dtype
        if own:
            ctx.mark_dirty(y)
        return ctx.products.add_wide(y, (scale * h).to(dtype), stack.to(dtype), own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (h, stack) = grads, ctx.saved_tensors
        _, needs_h, needs_stack, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or of_a_batch(dy):
            scaled = ctx.scale * dy.to(ctx.dtype)
            dh, d_stack = _gradients(scaled, h.to(ctx.dtype), stack.to(ctx.dtype), ctx.segments)
            return dy, dh.to(h.dtype), d_stack.to(stack.dtype), None, None, None, None
        dys, dh, d_stack = ctx.products.cut(dy.to(ctx.dtype)), None, None
        if needs_h:
            dh = ctx.products.narrow(dys, stack.to(ctx.dtype).mT).mul_(ctx.scale).to(h.dtype)
        if needs_stack:
            transposed = ctx.products.outer((ctx.scale * h).to(ctx.dtype), dys, len(stack))
            d_stack = transposed.mT.contiguous().to(stack.dtype)
        return dy, dh, d_stack, None, None, None, None


def _gradients(dy: Tensor, x: Tensor, stack: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Of `product`: by operators, which can be differentiated again, and take many dy at once."""
    return product(dy, stack.mT, segments), _outer(dy, x, segments.ends, segments.which, len(stack))


def _products(segments: Segments, M: int, G: int, dtype: torch.dtype) -> "_InRuns | _InBlocks":
    """In 16 bits a product takes some 15 µs to start, five times as long as in float32, and a copy of rows half."""
    if dtype.itemsize > 2:
        return _InRuns(segments)
    return segments.once(("blocks", M, G), lambda: _InBlocks.of(segments, M, G))


@dataclass(frozen=True)
class _InRuns:
    """Products run by run, of tensors of one dtype."""

    segments: Segments

    def cut(self, t: Float[Tensor, "M D"]) -> Tensor:
        """`narrow` and `outer` take their wide side cut, so that two of them share it."""
        return t

    def narrow(self, x: Tensor, stack: Float[Tensor, "G P Q"]) -> Float[Tensor, "M P"]:
        """`product` of x. Of matrices that lie in memory row by row: others take a CPU up to four times as long."""
        return _grouped(x, stack.contiguous(), self.segments, narrow=True)

    def add_wide(
        self, base: Float[Tensor, "M P"], h: Float[Tensor, "M Q"], stack: Float[Tensor, "G P Q"], own: bool
    ) -> Float[Tensor, "M P"]:
        """base + `product` of h, in base's dtype, which may be a narrower one; into a base of h's that is our `own`."""
        out = base if own else base.to(h.dtype, copy=True)
        sizes, matrices = self.segments.sizes(len(base)), stack.mT.unbind()
        runs = list(zip(self.segments.matrices(), out.split(sizes), h.split(sizes), strict=True))
        if not writable(out):
            added = [rows if i < 0 else rows.addmm(each, matrices[i]) for i, rows, each in runs]
            return torch.cat(added).to(base.dtype)
        for i, rows, each in runs:
            if i >= 0:
                rows.addmm_(each, matrices[i])
        return out.to(base.dtype)

    def outer(self, h: Float[Tensor, "M P"], x: Tensor, G: int) -> Float[Tensor, "G P Q"]:
        """Of each of G matrices Σ hᵀ x over its rows."""
        return _grouped_outer(h, x, self.segments, G)


@dataclass(frozen=True)
class _InBlocks:
    """The same products of n blocks of `length` slots each, a row in a slot, the last block of a run filled up: one
    batched product serves all runs, where one for each would take longer to start than to run."""

    length: int
    row_of_slot: Int[Tensor, " slots"]  # in a slot that fills up: the run's last row
    slot_of_row: Int[Tensor, " M"]
    which: Int[Tensor, " n"] | None  # of the matrices, and of one of zeros behind them; None: block i takes matrix i
    idle: Int[Tensor, " some"] | None = None  # of those the ones that no row takes, whose slots hold another's row

    @classmethod
    def of(cls, segments: Segments, M: int, G: int) -> "_InBlocks":
        """For M rows and G matrices."""
        runs = list(segments.runs(M))
        length = _block_length([rows.stop - rows.start for _, rows in runs])
        blocks = [
            (G if matrix is None else matrix, first, min(length, rows.stop - first))
            for matrix, rows in runs
            for first in range(rows.start, rows.stop, length)
        ]
        taken = [matrix for matrix, *_ in blocks]
        in_order = G not in taken and taken == sorted(set(taken)) and 2 * len(taken) >= G
        if in_order:  # a few idle blocks cost less than a copy of all matrices
            of_each = dict(zip(taken, blocks, strict=True))
            blocks = [of_each.get(matrix, (matrix, 0, 0)) for matrix in range(G)]
        which, start, size = torch.tensor(blocks, dtype=torch.int64).view(-1, 3).unbind(1)
        row_of_slot = (start[:, None] + torch.arange(length).minimum(size[:, None] - 1)).clamp_min(0)
        ahead = length * torch.arange(len(blocks)) - start  # by how much a block's first slot is ahead of its first row
        slot_of_row = torch.arange(M) + ahead.repeat_interleave(size)
        idle = (size == 0).nonzero()[:, 0] if len(taken) < len(blocks) else None
        return cls(length, row_of_slot.view(-1), slot_of_row, None if in_order else which, idle)

    def cut(self, t: Float[Tensor, "M D"]) -> Float[Tensor, "n length D"]:
        return t.index_select(0, self.row_of_slot).view(-1, self.length, t.shape[1])

    def narrow(self, x: Float[Tensor, "n length Q"], stack: Float[Tensor, "G P Q"]) -> Float[Tensor, "M P"]:
        return self._rows((self._matrices(stack) @ x.mT).mT)

    def add_wide(
        self, base: Float[Tensor, "M P"], h: Float[Tensor, "M Q"], stack: Float[Tensor, "G P Q"], own: bool
    ) -> Float[Tensor, "M P"]:
        cut = self.cut(base.to(h.dtype))  # what is added where a slot fills up, no row takes
        add = Tensor.baddbmm_ if writable(cut) else torch.baddbmm
        summed = add(cut, self.cut(h), self._matrices(stack).mT)
        return self._rows(summed, base if own else None).to(base.dtype)

    def outer(self, h: Float[Tensor, "M P"], x: Float[Tensor, "n length Q"], G: int) -> Float[Tensor, "G P Q"]:
        slots = h.new_zeros(len(self.row_of_slot), h.shape[1]).index_copy_(0, self.slot_of_row, h)
        parts = slots.view(-1, self.length, h.shape[1]).mT @ x
        if self.idle is not None:
            parts.index_fill_(0, self.idle, 0.0)  # a row that is infinite or NaN comes through zeros
        if self.which is None:
            return parts
        parts = parts.float()  # each is rounded already; their sum is not to be
        return parts.new_zeros(G + 1, *parts.shape[1:]).index_add_(0, self.which, parts)[:-1]

    def _rows(self, slots: Float[Tensor, "n length D"], out: Tensor | None = None) -> Float[Tensor, "M D"]:
        return torch.index_select(slots.reshape(-1, slots.shape[2]), 0, self.slot_of_row, out=out)

    def _matrices(self, stack: Float[Tensor, "G P Q"]) -> Float[Tensor, "n P Q"]:
        if self.which is None:
            return stack
        if not stack.is_contiguous() and stack.mT.is_contiguous():
            return self._matrices(stack.mT).mT
        return torch.cat([stack, torch.zeros_like(stack[:1])]).index_select(0, self.which)


def _block_length(sizes: list[int]) -> int:
    """What costs least: slots that fill up, or blocks, of which each takes a copy of its matrix and gives a part of
    that one's gradient, as dear as some 8 slots. In eights, so that few shapes come up."""
    longest = -(-max(sizes, default=1) // 8) * 8
    cost = {longest: longest * len(sizes)}
    for length in (8, 16, 32, 64, 128, 256):
        if length < longest:
            cost[length] = (length + 8) * sum(-(-size // length) for size in sizes)
    return min(cost, key=cost.__getitem__)


# ---- all at once -----------------------------------------------------------------------------------------------------


def _grouped(x: Tensor, stack: Tensor, segments: Segments, narrow: bool = False) -> Float[Tensor, "M P"]:
    if x.dtype not in _GROUPED or of_a_batch(x):
        return _by_formula(x, stack, segments)
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
    if x.dtype not in _GROUPED or of_a_batch(dy):
        return _outer_by_formula(dy, x, segments, G)
    if P > Q and dy.device.type == "cpu":  # which multiplies (xᵀ dy)ᵀ up to ten times as fast
        return _grouped_outer(x, dy, segments, G).mT.contiguous()
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
    if pad := -t.shape[-1] % step:
        return torch.nn.functional.pad(t, (0, pad))
    return t.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves strides of dimensions of size one


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


def _save_outer(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_outer(ctx: Any, d_stack: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, ends, which = ctx.saved_tensors
    return _product(x, d_stack, ends, which, False), _product(dy, d_stack.mT, ends, which, False), None, None, None


_outer.register_autograd(_backward_outer, setup_context=_save_outer)
