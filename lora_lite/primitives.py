"""The token-space primitives: the only things that touch a tensor with as many rows as there are tokens.

A variant reduces its own tensors to one of these; the runtime calls `on_input` before the base layer and `on_output`
after it. `ops` is a backend: `lora_lite.reference`, or the Triton kernels with the same functions.
M tokens, K in_features, N out_features, R rank.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


class Primitive:
    """A change to a layer's input, its output, or both. The default changes nothing."""

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        """The x that the base layer gets, and whatever `on_output` will need of it."""
        return x, None

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        """The layer's new output."""
        return y


@dataclass
class LowRankAdd(Primitive):
    """y + scale · (x Aᵀ) Bᵀ"""

    A: Float[Tensor, "R K"]
    B: Float[Tensor, "N R"]
    scale: float = 1.0

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.shrink(x, self.A)

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return ops.expand_add(y, carry, self.B, self.scale)


@dataclass
class GroupedLowRankAdd(Primitive):
    """y + (mask ∘ (x Aᵀ)) Bᵀ: the ranks of several adapters side by side, of which the mask leaves each entry of the
    batch those of its own. One look at x and y however many adapters there are."""

    A: Float[Tensor, "R K"]
    B: Float[Tensor, "N R"]
    mask: Float[Tensor, "batch R"]

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        x, h = ops.shrink(x, self.A)
        return x, (h.view(len(self.mask), -1, h.shape[-1]) * self.mask[:, None].to(h.dtype)).view(h.shape)

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return ops.expand_add(y, carry, self.B, 1.0)


@dataclass
class OfRows(Primitive):
    """Another primitive on some entries of the batch; the others pass."""

    inner: Primitive
    rows: Int[Tensor, "some"]

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        part, carry = self.inner.on_input(x[self.rows], ops)
        return x.index_copy(0, self.rows, part), carry

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return y.index_copy(0, self.rows, self.inner.on_output(y[self.rows], carry, ops))


@dataclass
class LowRankAddRescale(Primitive):
    """g ∘ (y − bias + scale · (x Aᵀ) Bᵀ) + bias, with g = m / ‖W + scale · B A‖ of each row"""

    A: Float[Tensor, "R K"]
    B: Float[Tensor, "N R"]
    scale: float
    m: Float[Tensor, "N"]
    W: Any  # N×K as stored: a tensor, or a quantised weight of `lora_lite.quantized`
    w_sq: Float[Tensor, "N"]
    bias: Float[Tensor, "N"] | None

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.shrink(x, self.A)

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        g = self.m / ops.row_norm(self.W, self.A, self.B, self.scale, self.w_sq)
        return ops.expand_add_rescale(y, carry, self.B, self.scale, g, self.bias)


@dataclass
class InputLowRankAdd(Primitive):
    """x + (x Aᵀ) Bᵀ, before the base layer"""

    A: Float[Tensor, "R K"]
    B: Float[Tensor, "K R"]

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.shrink_expand(x, self.A, self.B), None


@dataclass
class ScaleOutput(Primitive):
    """y ∘ g"""

    g: Float[Tensor, "N"]

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return ops.scale(y, self.g)


@dataclass
class ScaleInput(Primitive):
    """x ∘ g, before the base layer"""

    g: Float[Tensor, "K"]

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.scale(x, self.g), None
