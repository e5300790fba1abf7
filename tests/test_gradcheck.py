"""Derivatives against finite differences, in float64: first order, and second order through plain autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import VARIANTS, attach, only_adapter, randomize
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from lora_lite import reference, stacks

CASES = [
    *((variant, {}) for variant in VARIANTS),
    ("antipasto", {"rotate_basis": "U"}),
    ("antipasto", {"rotate_basis": "none"}),
    ("road", {"kind": 2}),
    ("road", {"kind": 4}),
]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=CASES, ids=str)
def layer_and_inputs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A randomised layer as a function of x and of all its trainable parameters."""
    variant, fields = request.param
    model = nn.Sequential(nn.Linear(5, 6)).double()
    batches = [torch.randn(20, 5, dtype=torch.float64)] if variant == "eva" else None
    own = {"antipasto": {"block_size": 2}, "road": {"group_size": 6}}.get(variant, {})
    fields = {"target_names": (), "target_roles": (), **own, **fields}
    attach(model, variant, batches, dtype=torch.float64, **fields)
    randomize(model)
    if variant == "dora":
        # The method holds the norm constant in the backward; so must the finite differences.
        x, adapter = rand(1, 5), only_adapter(model)
        norms: list[Tensor] = []
        with monkeypatch.context() as patch:
            original = reference.row_norm
            patch.setattr(reference, "row_norm", lambda *args: norms.append(original(*args)) or norms[-1])
            model(x)
        assert adapter.lora_m.requires_grad
        monkeypatch.setattr(reference, "row_norm", lambda *args: norms[0])
    trainable = [p for p in model.parameters() if p.requires_grad]
    # gradcheck nudges its inputs in place, and the adapter reads these very tensors.
    return lambda x, *_: model(x), (rand(2, 3, 5), *trainable)


def test_layer(layer_and_inputs: Any) -> None:
    assert gradcheck(*layer_and_inputs)


def test_layer_twice(layer_and_inputs: Any) -> None:
    assert gradgradcheck(*layer_and_inputs)


PLACES = torch.tensor([4, 0, 5, 2, 1, 3])  # of the two rows of each of three tokens
ORDER = PLACES.argsort()

FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "shrink": (reference.shrink, ((2, 3, 5), (4, 5))),
    "shrink 2-D": (reference.shrink, ((3, 5), (1, 5))),
    "expand_add": (lambda *a: reference.expand_add(*a, 1.7), ((2, 3, 6), (2, 3, 4), (6, 4))),
    "expand_add 2-D": (lambda *a: reference.expand_add(*a, -0.3), ((3, 6), (3, 1), (6, 1))),
    "expand_add_rescale": (
        lambda y, h, B, g, bias: reference.expand_add_rescale(y, h, B, 1.7, g, bias.detach()),
        ((2, 3, 6), (2, 3, 4), (6, 4), (6,), (6,)),
    ),
    "expand_add_rescale without bias": (
        lambda y, h, B, g: reference.expand_add_rescale(y, h, B, 1.7, g, None),
        ((2, 3, 6), (2, 3, 4), (6, 4), (6,)),
    ),
    "scale": (reference.scale, ((2, 3, 5), (5,))),
    "scale 1-D": (reference.scale, ((5,), (5,))),
    "rotate_pairs": (lambda *a: reference.rotate_pairs(*a, 6), ((2, 3, 12), (12,), (12,))),
    "weighted_sum": (
        lambda hidden, weights: stacks._weighted_sum(hidden, weights, PLACES.view(3, 2), ORDER, ORDER // 2),
        ((6, 5), (3, 2)),
    ),
    "rotate_pairs 1-D": (lambda *a: reference.rotate_pairs(*a, 2), ((6,), (6,), (6,))),
}


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_function(name: str, check: Callable[..., bool]) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [rand(*shape) for shape in shapes]
    if "bias" in name or name == "expand_add_rescale":
        inputs[-1].requires_grad_(len(shapes) == 4)  # the base layer's bias is frozen
    assert check(function, tuple(inputs))


def test_row_norm_is_a_constant() -> None:
    W, A, B = rand(6, 5), rand(4, 5), rand(6, 4)
    norm = reference.row_norm(W, A, B, 1.7, W.detach().square().sum(1))
    assert not norm.requires_grad
    torch.testing.assert_close(norm, (W + 1.7 * B @ A).norm(dim=1).detach(), rtol=1e-12, atol=0)
