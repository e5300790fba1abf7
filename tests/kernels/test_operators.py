"""Operators: plain calls and dispatched ones agree, in results, gradients and errors."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import load_tests
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from lora_lite import operators
from lora_lite.kernels import low_rank, rotate, scale, shrink_expand

transforms = load_tests("test_transforms")
test_transforms = transforms.test_transforms
test_a_trace_is_a_program = transforms.test_a_trace_is_a_program


def low_rank_sum(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    same, h = low_rank.shrink(x, A)
    return low_rank.expand_add(same, h, B, 0.7)


def rescaled(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return scale.scale(shrink_expand.shrink_expand(x, A, B), A[0])


def rotated(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return rotate.rotate_pairs(shrink_expand.shrink_expand(x, A, B)[..., :8], A[0, :8], B[:8, 0], 4)


@pytest.mark.parametrize("layer", [low_rank_sum, rescaled, rotated])
def test_plain_calls_give_the_bits_of_dispatched_ones(layer) -> None:
    x, A, B = (torch.randn(size, requires_grad=True) for size in ((3, 5, 9), (4, 9), (9, 4)))
    y = layer(x, A, B)
    y = y.mul_(2)  # not a view that autograd forbids to write to
    grads = torch.autograd.grad(y.square().sum(), (x, A, B))
    with operators.dispatched():
        y_dispatched = layer(x, A, B).mul(2)
        again = torch.autograd.grad(y_dispatched.square().sum(), (x, A, B))
    assert torch.equal(y, y_dispatched)
    assert all(torch.equal(a, b) and a.norm() > 0 for a, b in zip(grads, again, strict=True))


def test_a_second_derivative_is_an_error_not_a_constant() -> None:
    t, g = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    (dg,) = torch.autograd.grad(scale.scale(t, g).square().sum(), g, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(dg.sum(), g)


def test_a_dispatch_mode_sees_the_operator() -> None:
    seen = []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with See():
        scale.scale(torch.randn(3, 5), torch.randn(5))
    assert "lora_lite.scale.default" in seen


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_on_two_devices_are_named(dispatched: bool, requires_grad: bool) -> None:
    """A launch would read a pointer of another device as its own; here, of no memory at all."""
    x, A, g = torch.randn(3, 12), torch.randn(4, 12, device="meta"), torch.ones(12, device="meta")
    for _ in range(3):  # right ones, which are remembered
        low_rank.shrink(x, torch.randn(4, 12))
        scale.scale(x, torch.randn(12))
    x.requires_grad_(requires_grad)
    with operators.dispatched() if dispatched else nullcontext():
        with pytest.raises(RuntimeError, match=r"lora_lite::shrink got x on cpu, A on meta; move the adapter"):
            low_rank.shrink(x, A)
        with pytest.raises(RuntimeError, match=r"lora_lite::scale got t on cpu, g on meta; move the adapter"):
            scale.scale(x, g)


def test_tensors_on_two_devices_are_named_in_a_graph() -> None:
    x, g = torch.randn(3, 12), torch.ones(12, device="meta")
    with pytest.raises(RuntimeError, match=r"lora_lite::scale got t on cpu, g on meta"):
        torch.compile(scale.scale, backend="eager")(x, g)


def test_who_asked_for_the_kernels_is_told_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have no forward derivatives: a tangent of zeros would be silence."""
    monkeypatch.setattr("lora_lite.backend._warned", set())
    model: Any = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=()), backend="triton")
    with pytest.warns(UserWarning, match=r"reference instead: the kernels neither differentiate forward"):
        _, slope = torch.func.jvp(model, (torch.randn(3, 8),), (torch.ones(3, 8),))
    assert slope.norm() > 0
