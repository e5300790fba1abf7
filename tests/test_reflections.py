"""Products of reflections in compact WY form against one reflection after the other, in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lora_lite.linalg import reflections


def one_by_one(U: Tensor) -> Tensor:
    product = torch.eye(U.shape[-1], dtype=U.dtype)
    for u in U:
        product = (torch.eye(len(u), dtype=U.dtype) - 2 * torch.outer(u, u) / u.square().sum()) @ product
    return product


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("r", [1, 2, 7, 64])
def test_product(r: int, length: float) -> None:
    U = length * torch.randn(r, 80, dtype=torch.float64)
    got = torch.eye(80, dtype=torch.float64) + U.T @ reflections(U)
    torch.testing.assert_close(got, one_by_one(U), rtol=1e-9, atol=1e-9)
    narrow = U.float()
    got = torch.eye(80) + narrow.T @ reflections(narrow)
    torch.testing.assert_close(got @ got.T, torch.eye(80), rtol=0, atol=2e-5)


def test_stack_and_pairs_that_cancel() -> None:
    U = torch.randn(3, 4, 20, dtype=torch.float64).repeat_interleave(2, dim=1)
    assert (U.mT @ reflections(U)).abs().max() < 1e-12
    U = torch.randn(3, 5, 20, dtype=torch.float64)
    assert torch.allclose(reflections(U)[1], reflections(U[1]), rtol=1e-12)


def test_a_row_of_zeros_reflects_nothing() -> None:
    U = torch.randn(4, 20, dtype=torch.float64)
    U[2] = 0
    want = one_by_one(U[[0, 1, 3]])
    U.requires_grad_()
    got = torch.eye(20, dtype=torch.float64) + U.T @ reflections(U)
    torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-9)
    got.square().sum().backward()
    assert U.grad is not None
    assert U.grad.isfinite().all()


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 5)])
def test_gradients(check, shape: tuple[int, ...]) -> None:
    assert check(reflections, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_in_inference_first() -> None:
    """What is kept for later calls must serve training too."""
    U = torch.randn(9, 12)
    with torch.inference_mode():
        reflections(U)
    U.requires_grad_()
    reflections(U).sum().backward()
    assert U.grad is not None
