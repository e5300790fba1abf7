"""The token-space primitives: the only things that touch a tensor with as many rows as there are tokens.

A variant reduces its own tensors to one of these; the runtime calls `on_input` before the base layer and `on_output`
after it. `ops` is a backend: `lora_lite.reference`, or the Triton kernels with the same functions.
M tokens, K in_features, N out_features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad


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
    """y + scale · (dropout(x) Aᵀ) Bᵀ"""

    A: Float[Tensor, "R K"]
    B: Float[Tensor, "N R"]
    scale: float = 1.0
    dropout: float = 0.0

    @classmethod
    def side_by_side(cls, sums: "Sequence[LowRankAdd]") -> "LowRankAdd":
        """One sum that is all of these, which have no dropout: one look at x and y."""
        return cls(torch.cat([each.A for each in sums]), torch.cat([each.scale * each.B for each in sums], 1))

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.shrink(x, self.A, self.dropout)

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return ops.expand_add(y, carry, self.B, self.scale)


@dataclass
class GroupedLowRankAdd(Primitive):
    """y + (dropout(x) Aᵀ) Bᵀ with the A and B of each entry's group; none, where that is below 0. One look at x and y
    however many groups there are."""

    A: Float[Tensor, "G R K"]
    B: Float[Tensor, "G N R"]
    group: Int[Tensor, "batch"]
    dropout: float = 0.0

    @classmethod
    def of(cls, parts: "Sequence[LowRankAdd]", group: Int[Tensor, "batch"]) -> Self:
        """Of sums that may differ in rank; the lower get zeros."""
        R = max(len(part.A) for part in parts)
        A = torch.stack([pad(part.A, (0, 0, 0, R - len(part.A))) for part in parts])
        B = torch.stack([pad(part.scale * part.B, (0, R - len(part.A))) for part in parts])
        return cls(A, B, group, parts[0].dropout)

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.shrink(x, self.A, self.dropout, self.group)

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return ops.expand_add(y, carry, self.B, 1.0, self.group)


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
    """g ∘ (y − bias + scale · (dropout(x) Aᵀ) Bᵀ) + bias, with g = m / ‖W + scale · B A‖ of each row"""

    A: Float[Tensor, "R K"]
    B: Float[Tensor, "N R"]
    scale: float
    m: Float[Tensor, "N"]
    W: Any  # N×K as stored: a tensor, or a quantised weight of `lora_lite.quantized`
    w_sq: Float[Tensor, "N"]
    bias: Float[Tensor, "N"] | None
    dropout: float = 0.0

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        return ops.shrink(x, self.A, self.dropout)

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
