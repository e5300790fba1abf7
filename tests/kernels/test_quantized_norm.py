"""DoRA's row norm read from bitsandbytes' own bytes, against float64 on bitsandbytes' own dequantised weight."""

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import launches
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from models import rel_error
from operations import poisoned
from torch import Tensor

import lora_lite as ll
from lora_lite.kernels import ops, row_norm, tuning
from lora_lite.quantized import dense_weight, stored_weight

SHAPES = ((67, 62), (48, 128), (101, 258))
KINDS = ("nf4", "nf4-nested", "fp4", "fp4-nested", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def layer(kind: str, N: int, K: int, dtype: torch.dtype = torch.float32) -> Any:
    """A bitsandbytes layer of random weights whose rows differ in size by up to a hundred times."""
    W = (torch.randn(N, K) * torch.logspace(-1, 1, N).unsqueeze(1)).to(dtype)
    if kind == "int8":
        linear = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
        linear.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": kind.endswith("nested")}
        linear = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, **options)
        linear.weight = bnb.nn.Params4bit(W, requires_grad=False, **options)
    return linear.to("cpu")


def oracle(linear: Any) -> Tensor:
    """The dense weight in float64, by bitsandbytes' own functions alone."""
    weight = linear.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state).double()
    return weight.data.double() * (weight.SCB.double() / 127).unsqueeze(1)


def norms(linear: Any, R: int) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """In float64, by the plain formula in float32, by the kernel; and the kernel's arguments."""
    W = oracle(linear)
    A, B = torch.randn(R, W.shape[1]), torch.randn(len(W), R)
    arguments = (stored_weight(linear), A, B, 0.7, W.square().sum(1).float())
    return (
        (W + 0.7 * B.double() @ A.double()).norm(dim=1),
        (W.float() + 0.7 * B @ A).norm(dim=1),
        ops.row_norm(*arguments),
        arguments,
    )


@pytest.mark.parametrize("R", [1, 4, 16, 64, 100, 256, 300])
@pytest.mark.parametrize(("N", "K", "dtype"), [*((*shape, "float32") for shape in SHAPES), (67, 62, "bfloat16")])
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_pytorch(kind: str, N: int, K: int, R: int, dtype: str) -> None:
    """K·n is no multiple of a block of 64 weights, so that blocks run over rows' ends."""
    draws = []
    with launches.watch() as seen:
        for _ in range(3):
            draws.append(norms(layer(kind, N, K, DTYPES[dtype]), R)[:3])
    assert len(launches.main(seen)) == 3
    want, plain, got = (torch.stack([draw[i] for draw in draws]) for i in range(3))
    bar = max(1.5 * rel_error(plain, want), torch.finfo(torch.float32).eps / 2)
    assert rel_error(got, want) <= bar


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_as_stored(kind: str, dtype: str) -> None:
    """With B = 0 the cross term is all that W's values enter by: it must be W's as the layer uses them."""
    linear = layer(kind, 67, 128, DTYPES[dtype])
    W, A = oracle(linear), torch.randn(4, 128)
    B = torch.full((67, 4), 1e-3)
    with launches.watch():
        got = ops.row_norm(stored_weight(linear), A, B, 1.0, torch.zeros(67))
    sq = 2 * (B.double() * (W @ A.double().t())).sum(1) + (B.double() @ A.double()).square().sum(1)
    assert (sq > 1e-4).any()
    torch.testing.assert_close(got.double(), sq.clamp_min(1e-12).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_half_a_byte_or_a_byte_a_weight(kind: str) -> None:
    N, K, R = 150, 384, 20
    arguments = norms(layer(kind, N, K), R)[3]
    with tuning.force(config=tuning.Config(16, 32)), launches.watch() as seen:
        ops.row_norm(*arguments)
    (launch,) = launches.main(seen)
    assert launch.programs > 4
    assert launch.passes()["W"] == (1, 0)
    assert launch.tensors["W"].numel() * launch.tensors["W"].element_size() == (N * K if kind == "int8" else N * K // 2)
    large = [name for name, t in launch.tensors.items() if t.numel() >= N * K // 2 and name != "W"]
    assert large == [], "a dense copy"


def test_same_bits_twice() -> None:
    for kind in KINDS:
        arguments = norms(layer(kind, 67, 62), 16)[3]
        found = []
        for seed in range(2):
            with launches.watch(seed):
                found.append(ops.row_norm(*arguments))
        assert torch.equal(*found)


def test_odd_widths_are_made_dense() -> None:
    """A row of an odd number of weights starts in the middle of a byte."""
    linear = layer("nf4", 30, 63)
    with launches.watch() as seen:
        want, _, got, _ = norms(linear, 4)
    assert seen[0].tensors["W"].dtype == torch.float32
    assert rel_error(got, want) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_dora_on_a_quantised_layer(kind: str) -> None:
    """Through attach, forward and backward: the reference makes W dense, the kernels do not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(layer(kind, 64, 128))
    x, found = torch.randn(5, 128), []
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        ll.attach(model, ll.DoRAConfig(r=4, target_roles=(), dtype=torch.float32), backend=backend)
        with torch.no_grad():
            for p in ll.parameters(model):
                p.add_(torch.randn_like(p) * 0.1)
        y = model(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().mean(), ll.parameters(model))])
        ll.detach(model)
    for got, want in zip(found[1], found[0], strict=True):
        assert rel_error(got, want) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_stored_and_dense_agree_with_bitsandbytes(kind: str) -> None:
    linear = layer(kind, 48, 130)
    for _ in range(2):
        torch.testing.assert_close(dense_weight(linear, torch.float64), oracle(layer_again(linear)), rtol=1e-6, atol=0)
        linear(torch.randn(2, 130))  # after a forward, int8 keeps its factors elsewhere


def layer_again(linear: Any) -> Any:
    """The layer, with its int8 factors where `oracle` looks for them."""
    if not isinstance(linear.weight, bnb.nn.Params4bit) and linear.weight.SCB is None:
        linear.weight.SCB = linear.state.SCB
    return linear


def test_operators() -> None:
    check = torch.library.opcheck
    A, B, sq = torch.randn(3, 64), torch.randn(10, 3), torch.rand(10)
    eight = stored_weight(layer("int8", 10, 64))
    check(row_norm._row_norm, (eight.values, eight.factor, A, B, 0.7, sq))
    for kind in ("nf4", "nf4-nested"):
        four = stored_weight(layer(kind, 10, 64))
        arguments = (four.packed, four.code, four.absmax, four.nested, four.blocks, four.dtype)
        check(row_norm._row_norm_4bit, (*arguments, A, B, 0.7, sq))
