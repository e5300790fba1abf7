"""DoRA's norm under checkpointing: the forward's is taken again, and never one of other parameters."""

from collections.abc import Callable
from typing import Any

import launches
import pytest
import torch
from models import attach, randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = Layer()
    attach(model, "dora", r=4)
    randomize(model)
    return model


def run(layer: nn.Module, x: Tensor, between: Callable[[], Any], **how: Any) -> tuple[list[Tensor], list[str]]:
    """Gradients of a checkpointed step, and the kernels it launched."""
    for p in ll.parameters(layer):
        p.grad = None
    with launches.counted() as names:
        y = checkpoint(layer, x, **how) if how else layer(x)
        between()
        y.square().sum().backward()
    return [p.grad for p in ll.parameters(layer) if p.grad is not None], names


def inputs() -> Tensor:
    return torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_block_takes_the_forwards_norm(reentrant: bool) -> None:
    layer = adapted()
    plain, _ = run(layer, inputs(), lambda: None)
    for _ in range(2):
        grads, names = run(layer, inputs(), lambda: None, use_reentrant=reentrant)
        assert names.count("_row_norm_kernel") == 1
        assert names.count("_shrink_kernel") == 2
        assert len(grads) == 3
        assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


def test_parameters_that_have_changed_since_get_their_own() -> None:
    """Reentrant checkpointing computes with them as they are."""
    layer = adapted()

    @torch.no_grad()
    def change() -> None:
        for p in ll.parameters(layer):
            p.mul_(1.5)

    _, names = run(layer, inputs(), change, use_reentrant=True)
    assert names.count("_row_norm_kernel") == 2


def test_writes_that_leave_no_trace() -> None:
    """`p.data` has no version: a forward computes the norm of what is there."""
    layer, other = adapted(), adapted()
    run(layer, inputs(), lambda: None, use_reentrant=False)
    for p, q in zip(ll.parameters(layer), ll.parameters(other), strict=True):
        version = p._version
        p.data.mul_(1.5)
        assert p._version == version
        with torch.no_grad():
            q.mul_(1.5)
    x = inputs()
    assert torch.equal(layer(x), other(x))
    got, _ = run(layer, inputs(), lambda: None, use_reentrant=False)
    want, _ = run(other, inputs(), lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_accumulation_under_a_promise_takes_the_norm_once() -> None:
    layer = adapted()

    def accumulated() -> tuple[list[Tensor], list[str]]:
        for p in ll.parameters(layer):
            p.grad = None
        with launches.counted() as names:
            for _ in range(3):
                layer(inputs()).square().sum().backward()
        return [p.grad for p in ll.parameters(layer) if p.grad is not None], names

    want, names = accumulated()
    assert names.count("_row_norm_kernel") == 3
    with ll.unchanged(layer):
        grads, names = accumulated()
    assert names.count("_row_norm_kernel") == 1
    assert names.count("_shrink_kernel") == 3
    assert len(grads) == 3
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
