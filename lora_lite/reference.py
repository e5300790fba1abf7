"""The token-space operations in PyTorch: readable, differentiable, fast on a CPU.

M tokens, K in_features, N out_features, R rank. Leading dimensions of x and y are free; the products see M×K and M×N.
Each operation takes its small operands in any floating dtype and computes in the dtype of its token-sized one, or in
float32 where the CPU has no instructions for products in that. With `segments`, the small operands are stacks of G, and
each row takes its own of them; a row that has none passes unchanged.
"""

import functools
import math
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import segments as of_segments
from .operators import autocast_dtype, transformed, writable
from .segments import Segments


def _without_products() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that this CPU has no instructions for matrix products in. PyTorch then multiplies in plain
    loops, or oneDNN in emulated instructions, either of which is far slower than its float32 products."""
    queries = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    has = {dtype: getattr(torch.ops.mkldnn, query, None) for dtype, query in queries.items()}  # None: not built in
    without = {dtype for dtype, asked in has.items() if asked is None or not asked()}
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        without.add(torch.bfloat16)  # which the query grants to any AVX512
    return frozenset(without)


WITHOUT_PRODUCTS = _without_products()


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which dtype to multiply matrices of `dtype` there: in theirs, unless a CPU is far faster in float32."""
    return torch.float32 if device.type == "cpu" and dtype in WITHOUT_PRODUCTS else dtype


_WORTH_16_BITS = 1 << 17  # bytes of a token-sized tensor
_WORTH_THE_HOST = 1 << 20  # likewise: of less, an autograd.Function or a copy of B takes longer than it saves


def _is_worth(t: Tensor, size: int) -> bool:
    """Whether a token-sized tensor has as many bytes. Graphs and transforms know no sizes, and are taken for large."""
    return torch.compiler.is_compiling() or transformed() or _numel(t) * t.element_size() >= size


def _numel(t: Tensor) -> float:
    """How many numbers it holds; where that is a symbol, as in a trace for any length, infinitely many."""
    return numel if type(numel := t.numel()) is int else math.inf


def _dtype_for(t: Tensor) -> torch.dtype:
    """In which dtype to multiply a token-sized tensor. On a CPU a product in 16 bits takes some 15 µs to start, five
    times as long as in float32, in which few tokens are done sooner."""
    if t.device.type == "cpu" and t.dtype.itemsize == 2 and not _is_worth(t, _WORTH_16_BITS):
        return torch.float32
    return product_dtype(t.device, t.dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is for tokens: in its dtype a rotation of parameters is not orthogonal, and a start not the identity."""
    return _AS_IT_IS if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


_AS_IT_IS = nullcontext()


def _scale(t: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """g ∘ (t − bias) + bias."""
    if t.dtype == g.dtype:
        return t * g if bias is None else torch.addcmul(bias, t - bias, g)
    if transformed() or not _is_worth(t, _WORTH_THE_HOST):
        return _scale_wide(t, g, bias)
    return _ScaleLowPrecision.apply(t, g, bias)  # type: ignore[return-value]


def _scale_wide(t: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """In the wider dtype of both, in which whoever differentiates it sums over the tokens then."""
    if bias is None:
        return (t * g).to(t.dtype)
    wide = torch.promote_types(t.dtype, g.dtype)
    return _scale(t.to(wide), g.to(wide), bias.to(wide)).to(t.dtype)


def _scale_low_precision(t: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """For a t of less precision than g, which the products keep as two numbers of t's: rounded to one, a gain of 1.001
    would be 1. The bias counts with (1 − g)."""
    high, low = _in_two(g, t.dtype)
    rest = t * low if bias is None else torch.addcmul((bias * (1 - g)).to(t.dtype), t, low)
    return torch.addcmul(rest, t, high)


def _in_two(g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g as the sum of two of a dtype of half its precision."""
    high = g.to(dtype)
    return high, (g - high).to(dtype)


class _ScaleLowPrecision(torch.autograd.Function):
    """Its sums over the tokens in g's precision. The bias gets no gradient."""

    @staticmethod
    def forward(t: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        return _scale_low_precision(t, g, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,) = grads
        t, g, bias = ctx.saved_tensors
        dt = dg = None
        if ctx.needs_input_grad[0]:
            dt = (_scale_wide if torch.is_grad_enabled() else _scale_low_precision)(dy, g, None)
        if ctx.needs_input_grad[1]:
            if g.ndim > 1:  # each row has a g of its own
                dg = dy.to(g.dtype) * (t if bias is None else t - bias)
            else:
                dg = _summed(dy, t, g)
                if bias is not None:
                    dg = dg - bias * dy.sum(tuple(range(dy.ndim - 1)), dtype=g.dtype)
        return dt, dg, None


def _rows(t: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return t if t.ndim == 2 else t.reshape(-1, t.shape[-1])


def shrink(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    dropout: float = 0.0,
    segments: Segments | None = None,
    own: bool = False,
) -> tuple[Float[Tensor, "*M K"], Float[Tensor, "M R"]]:
    """(x, x Aᵀ), the second with its leading dimensions as one, and of x after dropout. Hand the returned x, not the
    argument, to the layer. Where the gradient that the layer gives it is our `own`, that may be written to."""
    if segments is not None:
        return _shrink_segments(x, A, dropout, segments, own)
    if _worth_a_function(x, dropout):
        (x,), (h,) = (_shrink_together_own if own else shrink_together)(x, [A])
        return x, h
    dtype = _dtype_for(x)
    kept = (nn.functional.dropout(x, dropout) if dropout else x).to(dtype)
    return x, _rows(kept) @ A.to(dtype).t()


_WORTH_SHARING = 1 << 18  # elements of x: for a smaller one the host's work takes longer than what it saves


def worth_sharing(x: Tensor) -> bool:
    """Whether layers that read x had better take x Aᵀ together (`shrink_together`)."""
    return _numel(x) >= _WORTH_SHARING


def _worth_a_function(x: Tensor, dropout: float) -> bool:
    """Whether dh A is better added to the gradient that the layer gives x than by autograd, in memory of its own. What
    a recomputation finds as it was decides: it has to save the same tensors again. Of an x in another dtype than that
    of the products it would save all, and not the copy."""
    if torch.compiler.is_compiling() or transformed() or dropout or not (x.requires_grad and torch.is_grad_enabled()):
        return False
    return _is_worth(x, _WORTH_THE_HOST) and _together_dtype(x) == x.dtype


def _shrink_segments(x: Tensor, A: Tensor, dropout: float, segments: Segments, own: bool) -> tuple[Tensor, Tensor]:
    rows, dtype = _rows(x), _dtype_for(x)
    kept = nn.functional.dropout(rows, dropout) if dropout else rows
    with without_autocast(x.device):
        same, h = of_segments.shrink(kept, A, segments, dtype, own)
    return x if dropout or same is rows else same.view(x.shape), h


def sharing(
    dtype_of: Callable[[Tensor], torch.dtype],
    draw: Callable[[Tensor, Sequence[float]], list[Tensor]],
    product: Callable[..., tuple[Tensor, Tensor]],
    gradients: Callable[..., Any],
) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """A backend's `shrink_together`.

    Args:
        dtype_of: of the products with x.
        draw: (x, dropouts) to whatever stands for the layers' masks; without dropout, nothing.
        product: (x, As, masks, dtype) to x Aᵀ of all, and all A as it was multiplied.
        gradients: (dx_bases, dhs, x, A, masks, dtype of dA, needs_dx, needs_dA) to Σ dx_bases + dh A and dhᵀ x.
    """

    class Together(torch.autograd.Function):
        """x Aᵀ of all layers, and where x needs a gradient an alias of x for each. The gradients of all come back
        together: they are added once, and multiplied in one product each for x and A."""

        # With more names Dynamo leaves ctx out, without gradients, for as many tensors as there are names.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            x, dtype, masks, *As = inputs
            h, A = product(x, As, masks, dtype)
            ctx.save_for_backward(x, A, *masks, *As)
            ctx.dtype, ctx.dtypes, ctx.ranks = dtype, [A.dtype for A in As], [len(A) for A in As]
            ctx.set_materialize_grads(False)
            aliases = [x.view_as(x) for _ in As] if ctx.needs_input_grad[0] else []
            return *aliases, *h.split(ctx.ranks, 1)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            x, A, *rest = ctx.saved_tensors
            M, L = x.numel() // x.shape[-1], len(ctx.ranks)
            masks, As = rest[:-L], rest[-L:]
            if torch.is_grad_enabled():  # this is to be differentiated again, which leads back to the layers' own
                A = torch.cat(As).to(A.dtype)
            bases, found = [base for base in grads[:-L] if base is not None], grads[-L:]
            parts = zip(found, ctx.ranks, strict=True)
            dhs = [x.new_zeros((M, R), dtype=ctx.dtype) if part is None else part for part, R in parts]
            needs_dx, _, _, *needs_dAs = ctx.needs_input_grad
            wide = functools.reduce(torch.promote_types, ctx.dtypes)
            dx, dA = gradients(bases, dhs, x, A, masks, wide, needs_dx, any(needs_dAs))
            dAs = dA.split(ctx.ranks) if any(needs_dAs) else [None] * L
            of_each = zip(dAs, found, ctx.dtypes, strict=True)
            dAs = [None if dh is None or dA is None else dA.to(dtype) for dA, dh, dtype in of_each]
            return dx if needs_dx else None, None, None, *dAs

    def shrink_together(
        x: Float[Tensor, "*M K"], As: Sequence[Float[Tensor, "R K"]], dropouts: Sequence[float] = ()
    ) -> tuple[list[Float[Tensor, "*M K"]], list[Float[Tensor, "M R"]]]:
        """For each of several layers that read x: (x, x Aᵀ) as `shrink` has it, from one read of x; each with a mask of
        its own where it has dropout. A layer whose results get no gradient gives none to its A."""
        dtype = dtype_of(x)
        with without_autocast(x.device):  # the backward is without it
            found = list(Together.apply(x, dtype, draw(x, dropouts), *As))  # type: ignore[arg-type]
        return found[: -len(As)] or [x] * len(As), found[-len(As) :]

    return shrink_together


def _together_dtype(x: Tensor) -> torch.dtype:
    return autocast_dtype(x.device) or _dtype_for(x)


def _masks(x: Tensor, dropouts: Sequence[float]) -> list[Tensor]:
    """Factors of x's elements: 0, or 1 / the probability to stay."""
    return [nn.functional.dropout(torch.ones_like(_rows(x)), p) for p in dropouts] if any(dropouts) else []


def _product(x: Tensor, As: Sequence[Tensor], masks: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, A = _rows(x), torch.cat(list(As)).to(dtype)
    if not masks:
        return rows.to(dtype) @ A.t(), A
    own = zip(masks, A.split([len(each) for each in As]), strict=True)
    return torch.cat([(rows * mask).to(dtype) @ each.t() for mask, each in own], 1), A


def _gradients(
    dx_bases: Sequence[Tensor],
    dhs: Sequence[Tensor],
    x: Tensor,
    A: Tensor,
    masks: Sequence[Tensor],
    dtype: torch.dtype,
    needs_dx: bool,
    needs_dA: bool,
    own: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Where dx_bases are our `own`, the first may be written to."""
    rows, dx, dA = _rows(x), None, None
    bases = [_rows(base).to(A.dtype) for base in dx_bases]
    if masks:
        of_each = list(zip(masks, dhs, A.split([dh.shape[1] for dh in dhs]), strict=True))
        if needs_dA:
            dA = torch.cat([dh.t() @ (rows * mask).to(dh.dtype) for mask, dh, _ in of_each])
        if needs_dx:
            dx, *others = [mask * (dh @ each) for mask, dh, each in of_each]
            for each in (*others, *bases):
                dx += each
    else:
        dh = torch.cat(list(dhs), 1)
        if needs_dA:
            dA = dh.t() @ rows.to(dh.dtype)
        if needs_dx:
            own = own and bool(bases) and writable(bases[0]) and not torch.is_grad_enabled()
            for base in bases:
                if dx is None:
                    dx = base
                else:
                    dx, own = (dx.add_(base) if own else dx + base), True
            dx = dh @ A if dx is None else dx.addmm_(dh, A) if own else torch.addmm(dx, dh, A)
    return None if dx is None else dx.to(x.dtype).view(x.shape), None if dA is None else dA.to(dtype)


shrink_together = sharing(_together_dtype, _masks, _product, _gradients)
_shrink_together_own = sharing(_together_dtype, _masks, _product, functools.partial(_gradients, own=True))


# A view that autograd takes for a new tensor. A write to one that it knows for a view costs the backward a copy of dy.
_as_new = torch.ops.aten._unsafe_view.default


def expand_add(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "*M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    segments: Segments | None = None,
    own: bool = False,
) -> Float[Tensor, "*M N"]:
    """y + scale · h Bᵀ. A y that is our `own`, so that nobody else needs it, may be written to."""
    dtype = _dtype_for(y)
    if segments is not None:
        with without_autocast(y.device):
            own = own and writable(y)
            rows = _as_new(y, (-1, y.shape[-1])) if own else _rows(y)
            return of_segments.expand_add(rows, _rows(h), B, scale, segments, dtype, own).view(y.shape)
    Bt, h = B.t().to(dtype), _rows(h).to(dtype)
    if B.shape[1] < 16 or _is_worth(y, _WORTH_THE_HOST):
        # Row by row: autograd then forms its gradient as hᵀ dy, up to nine times as fast as (dyᵀ h)ᵀ on a CPU.
        Bt = Bt.contiguous()
    if own and dtype == y.dtype and writable(y):
        if y.ndim == 2 and not y._is_view():
            return y.addmm_(h, Bt, alpha=scale)
        return _as_new(_as_new(y, (-1, y.shape[-1])).addmm_(h, Bt, alpha=scale), y.shape)
    rows = _rows(y).to(dtype)
    add = Tensor.addmm_ if dtype != y.dtype and writable(rows) else torch.addmm  # into the copy
    return add(rows, h, Bt, alpha=scale).view(y.shape).to(y.dtype)


def shrink_expand(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    B: Float[Tensor, "*G K R"],
    segments: Segments | None = None,
) -> Float[Tensor, "*M K"]:
    """x + (x Aᵀ) Bᵀ."""
    x, h = shrink(x, A, 0.0, segments)
    return expand_add(x, h, B, 1.0, segments)


def expand_add_rescale(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "*M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    g: Float[Tensor, "*G N"],
    bias: Float[Tensor, "*G N"] | None,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """g ∘ (y − bias + scale · h Bᵀ) + bias."""
    if segments is None:
        return expand_add(_scale(y, g, bias), h, g.unsqueeze(-1) * B, scale, own=True)
    rows = _rows(y)
    mine = None if bias is None else segments.vectors(bias, len(rows), 0.0)
    rescaled = _scale(rows, segments.vectors(g, len(rows), 1.0), mine)
    return expand_add(rescaled, h, g.unsqueeze(-1) * B, scale, segments, own=True).view(y.shape)


def scale(
    t: Float[Tensor, "*M D"], g: Float[Tensor, "*G D"], segments: Segments | None = None
) -> Float[Tensor, "*M D"]:
    """t ∘ g."""
    if segments is None:
        return _scale(t, g, None)
    rows = _rows(t)
    return _scale(rows, segments.vectors(g, len(rows), 1.0), None).view(t.shape)


def _partner(t: Float[Tensor, "*M N"], group_size: int) -> Float[Tensor, "*M N"]:
    """Of each element the one group_size/2 away in its group: the two halves of each group, swapped."""
    return t.reshape(*t.shape[:-1], t.shape[-1] // group_size, 2, group_size // 2).flip(-2).reshape(t.shape)


def rotate_pairs(
    y: Float[Tensor, "*M N"],
    c: Float[Tensor, "*G N"],
    s: Float[Tensor, "*G N"],
    group_size: int,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """y ∘ c + partner(y) ∘ s, the partner being the element group_size/2 away in its group."""
    if segments is None:
        return _rotate(y, c, s, group_size)
    rows = _rows(y)
    mine = (segments.vectors(c, len(rows), 1.0), segments.vectors(s, len(rows), 0.0))
    return _rotate(rows, *mine, group_size).view(y.shape)


def _rotate(y: Tensor, c: Tensor, s: Tensor, group_size: int) -> Tensor:
    if y.dtype == c.dtype:
        return torch.addcmul(y * c, _partner(y, group_size), s)
    if transformed() or not _is_worth(y, _WORTH_THE_HOST):
        return _turned_wide(y, c, s, group_size)
    return _RotateLowPrecision.apply(y, c, s, group_size)  # type: ignore[return-value]


def _turned_wide(y: Tensor, c: Tensor, s: Tensor, group_size: int) -> Tensor:
    """In the wider dtype, as `_scale_wide`."""
    wide = torch.promote_types(y.dtype, c.dtype)
    return _rotate(y.to(wide), c.to(wide), s.to(wide), group_size).to(y.dtype)


def _turned(y: Tensor, c: Tensor, s: Tensor, group_size: int) -> Tensor:
    """y∘c + partner(y)∘s, the largest of the three products last, so that little is lost in rounding the others."""
    high, low = _in_two(c, y.dtype)
    turned = torch.addcmul(_partner(y, group_size).mul_(s.to(y.dtype)), y, low)
    return torch.addcmul(turned, y, high)  # no view: whoever gets it may write to it


class _RotateLowPrecision(torch.autograd.Function):
    """For a y of less precision than c and s: `_in_two`."""

    @staticmethod
    def forward(y: Tensor, c: Tensor, s: Tensor, group_size: int) -> Tensor:
        return _turned(y, c, s, group_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        *tensors, ctx.group_size = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (dy,) = grads
        y, c, s = ctx.saved_tensors
        needs_y, needs_c, needs_s, _ = ctx.needs_input_grad
        # What y gives its partner comes back from there: the same map, with s where it is taken from.
        turned = _turned_wide if torch.is_grad_enabled() else _turned
        d = turned(dy, c, _partner(s, ctx.group_size), ctx.group_size) if needs_y else None
        dc = _summed(dy, y, c) if needs_c else None
        ds = _summed(dy, _partner(y, ctx.group_size), s) if needs_s else None
        return d, dc, ds, None


def _summed(dy: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Σ dy ∘ t over the tokens; where each row has a vector of its own, dy ∘ t."""
    if like.ndim > 1:
        return dy.to(like.dtype) * t
    return (dy * t).sum(tuple(range(dy.ndim - 1)), dtype=like.dtype)


def row_norm(
    W: Any,
    A: Float[Tensor, "*G R K"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    w_sq: Float[Tensor, "*G N"],
) -> Float[Tensor, "*G N"]:
    """‖W + scale·B A‖ of each row, from ‖W‖² (w_sq), W Aᵀ and the Gram matrix A Aᵀ: B A is never built.

    ‖w + s·bA‖² = ‖w‖² + 2s·b·(A w) + s²·b·(A Aᵀ)·b. Not differentiable: DoRA holds the norm constant (§4.3).
    W is N×K, or G×N×K: a tensor, or a quantised weight of `lora_lite.quantized`, which is made dense for the while.
    """
    with torch.no_grad(), without_autocast(w_sq.device):
        A, B = A.detach(), B.detach()  # forward derivatives know no `no_grad`
        W = W if isinstance(W, Tensor) else W.dense()
        if W.ndim == 3:
            return torch.stack([_row_norm(*each, scale) for each in zip(W, A, B, w_sq, strict=True)])
        return _row_norm(W, A, B, w_sq, scale)


def _row_norm(W: Tensor, A: Tensor, B: Tensor, w_sq: Tensor, scale: float) -> Tensor:
    A, B = A.to(w_sq.dtype), B.to(w_sq.dtype)
    cross = torch.cat([rows.to(A.dtype) @ A.t() for rows in W.split(1024)])
    norm_sq = w_sq + (((2 * scale) * cross + (scale * scale) * (B @ (A @ A.t()))) * B).sum(1)
    return norm_sq.clamp_min(1e-12).sqrt()  # not in place: a checkpoint may keep what each operator gave
