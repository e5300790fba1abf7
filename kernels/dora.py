"""DoRA's composition: g ∘ (y − bias + scale · h Bᵀ) + bias. Its g comes from row_norm.py, its kernels are lowrank.py's.

M tokens, N out_features, R rank. Token-sized reads and writes, each tensor once a kernel:

    expand_add_rescale           reads y        writes out
    expand_add_rescale backward  reads dy, y    writes dy_base   dy_base = g ∘ dy,  dh = scale · dy (g ∘ B),
                                                                 dB = scale · g ∘ dyᵀh,
                                                                 dg = Σ dy ∘ (y − bias) + Σ B ∘ scale · dyᵀh
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..operators import operator
from ..segments import Segments
from .common import Runs, or_empty
from .launching import replayed
from .lowrank import launch_expand, launch_expand_backward


@operator("lora_lite::expand_add_rescale")
@replayed
def _expand_add_rescale(
    y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]
) -> Tensor:
    return launch_expand(y, h, B, scale, g, bias, Runs.read(runs))


@_expand_add_rescale.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]) -> Tensor:
    return y.new_empty(y.shape)


@operator("lora_lite::expand_add_rescale_backward")
@replayed
def _expand_add_rescale_backward(
    dy: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dh, dB, dy_base, dg = launch_expand_backward(dy, h, B, scale, True, True, y, g, bias, Runs.read(runs))
    return or_empty(dy_base, y), or_empty(dh, h), or_empty(dB, B), or_empty(dg, g)


@_expand_add_rescale_backward.register_fake
def _(
    dy: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, g: Tensor, bias: Tensor | None, runs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), h.new_empty(h.shape), B.new_empty(B.shape), g.new_empty(g.shape)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor | None, list[Tensor]], output: Tensor
) -> None:
    y, h, B, ctx.scale, g, bias, runs = inputs
    ctx.save_for_backward(y, h, B, g, bias, *runs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    y, h, B, g, bias, *runs = ctx.saved_tensors
    dy_base, dh, dB, dg = _expand_add_rescale_backward(dy, y, h, B, ctx.scale, g, bias, runs)
    return dy_base, dh, dB, None, dg, None, [None] * len(runs)


_expand_add_rescale.register_autograd(_backward, setup_context=_save)


def expand_add_rescale(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    g: Float[Tensor, "*G N"],
    bias: Float[Tensor, "*G N"] | None,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """g ∘ (y − bias + scale · h Bᵀ) + bias. The bias, the base layer's, gets no gradient. With segments B, g and bias
    are stacks, of which each row takes its own; y stays where it has none."""
    bias = None if bias is None else bias.detach().contiguous()
    return _expand_add_rescale(y, h, B, scale, g.contiguous(), bias, Runs.of(segments, y, B.shape[0]))
