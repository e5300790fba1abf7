"""Each kernel, forward and backward, against the formula in float64: as accurate as PyTorch in the same dtype.

The operations, their formulas and the bar are bench/kernels/operations.py's, which a GPU is held to as well. Programs
run in shuffled order, outputs start as NaN, no program may touch memory outside its arguments and no two may store to
one address.
"""

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import launches
import operations
import pytest
import torch
from operations import DTYPES, LAYOUTS, Case
from torch import Tensor

from lora_lite.kernels import ops, tuning

TOKENS = (0, 1, 7, 64, 333)
RANKS = (1, 4, 16, 64, 100, 256)
# (K, N): primes, multiples of 16, and neither, on either side
WIDTHS = ((61, 67), (64, 48), (50, 130), (257, 96), (144, 101))


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    with operations.poisoned(), launches.watch() as seen:
        yield
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    assert seen or case.M == 0, "no kernel ran"


def cases() -> Iterator[Any]:
    """Every (dtype, M, R), with widths, layout, bias and the parameters' dtype drawn for each."""
    draw = random.Random(0).choice
    for dtype, M, R in product(DTYPES, TOKENS, RANKS):
        (K, N), layout, bias, wide = draw(WIDTHS), draw(LAYOUTS), draw((True, False)), draw((True, False))
        yield Case(dtype, M, K, N, R, layout, bias, torch.float32 if wide else dtype)


EACH_CASE = pytest.mark.parametrize("case", list(cases()), ids=str)


def assert_within(errors: dict[str, tuple[float, float]]) -> None:
    for name, (error, bar) in errors.items():
        assert error <= bar, f"{name}: {error:.2e} > {bar:.2e}"


@pytest.mark.parametrize("operation", ["lowrank_add", "shrink_expand", "lowrank_add_rescale", "scale", "rotate_pairs"])
@EACH_CASE
def test_as_accurate_as_pytorch(operation: str, case: Case) -> None:
    assert_within(operations.errors_of(getattr(operations, operation), case))


@pytest.mark.parametrize("case", list(cases())[::7], ids=str)
def test_layers_that_read_the_same_tokens(case: Case) -> None:
    assert_within(operations.errors_of(operations.lowrank_add_together, case))


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize(("K", "N"), WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norm(dtype: torch.dtype, K: int, N: int, R: int) -> None:
    assert_within(operations.errors_of(operations.row_norm, Case(dtype, 0, K, N, R, LAYOUTS[(K + R) % 4])))


@pytest.mark.parametrize(("R", "reads"), [(5, 1), (200, 2)])
@pytest.mark.parametrize("programs", [1, 7, 132])
def test_row_norm_in_parts(programs: int, R: int, reads: int) -> None:
    """Columns are shared out until the programs fill the device; W is read once all the same, or once for every 128
    ranks."""
    W, A, B = torch.randn(70, 900), torch.randn(R, 900), torch.randn(70, R)
    with tuning.force(programs=programs), launches.watch() as seen:
        got = ops.row_norm(W, A, B, 0.7, W.double().square().sum(1).float())
    assert operations.error(got, (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)) < 1e-7
    assert [launch.kernel for launch in seen] == ["_row_norm_kernel", "_root_kernel"][: 1 + (programs > 1)]
    assert seen[0].passes()["W"] == (reads, 0)
    assert seen[0].programs >= min(programs, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_beyond_one_launch(dtype: torch.dtype) -> None:
    """PiSSA at r=256 has 512 columns; more ranks than a launch holds take several."""
    for operation, case in (
        (operations.lowrank_add, Case(dtype, 70, 96, 80, 300, "sliced", True)),
        (operations.lowrank_add_rescale, Case(dtype, 70, 96, 80, 520, "contiguous", True)),
        (operations.shrink_expand, Case(dtype, 70, 96, 80, 300, "sliced", True)),
    ):
        assert_within(operations.errors_of(operation, case))
    W, A, B = torch.randn(40, 60).to(dtype), torch.randn(300, 60), torch.randn(40, 300)
    want = (W.double() + 0.1 * B.double() @ A.double()).norm(dim=1)
    got = ops.row_norm(W, A, B, 0.1, W.double().square().sum(1).float())
    assert operations.error(got, want) < 1e-6


@pytest.mark.parametrize("needs", ["x", "A", "B", "y", "x B", "A y"])
def test_only_what_is_needed(needs: str) -> None:
    """Frozen inputs and frozen parameters: the other gradients are right, and these are not computed."""
    inputs = lambda: {  # noqa: E731
        name: torch.randn(shape).requires_grad_(name in needs.split())
        for name, shape in {"x": (70, 40), "A": (5, 40), "B": (30, 5), "y": (70, 30)}.items()
    }

    def ours(x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
        x, h = ops.shrink(x, A)
        return ops.expand_add(y, h, B, 0.7) + x.sum()

    def plain(x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
        return y + 0.7 * (x @ A.t()) @ B.t() + x.sum()

    f32 = torch.float32
    assert_within(operations.errors(lambda: operations.results(ours, plain, inputs(), f32), f32))


def bits(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """All results of all operators on fixed inputs, with the programs shuffled by `seed`."""
    torch.manual_seed(0)
    M, K, N, R = 333, 144, 102, 16
    x, y = (torch.randn(M, size).to(dtype).requires_grad_() for size in (K, N))
    A, B, C, g, s = (torch.randn(shape).requires_grad_() for shape in ((R, K), (N, R), (K, R), (N,), (N,)))
    with launches.watch(seed):
        _, h = ops.shrink(x, A)
        out = ops.scale(ops.expand_add_rescale(ops.expand_add(y, h, B, 0.7), h, B, 0.3, g, None), g)
        out = ops.rotate_pairs(out, g, s, 34)
        turned = ops.shrink_expand(x, A, C)
        norm = ops.row_norm(torch.randn(N, K).to(dtype), A, B, 0.7, torch.ones(N))
        return [out, turned, norm, *torch.autograd.grad(out.sum() + turned.sum(), [x, y, A, B, C, g, s])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype: torch.dtype) -> None:
    first, second = bits(1, dtype), bits(2, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
