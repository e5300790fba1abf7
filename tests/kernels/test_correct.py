"""Each kernel, forward and backward, against the formula in float64: as accurate as PyTorch in the same dtype.

The bar is 1.5 times the relative norm error of the plain formula in the dtype at hand, or that dtype's unit roundoff
where the plain formula is luckier than one rounding. Results of a few elements, or that come through a few, such as the
one element of h that a token has at rank 1, are drawn until there are enough of them to compare two errors by. Programs
run in shuffled order, outputs start as NaN, no program may touch memory outside its arguments and no two may store to
one address.
"""

import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import launches
import pytest
import torch
from models import rel_error
from torch import Tensor

from lora_lite.kernels import ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (0, 1, 7, 64, 333)
RANKS = (1, 4, 16, 64, 100, 256)
# (K, N): primes, multiples of 16, and neither, on either side
WIDTHS = ((61, 67), (64, 48), (50, 130), (257, 96), (144, 101))
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "3-D", "4-D")


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    with launches.poisoned(), launches.watch() as seen:
        yield
    tokens = getattr(request.node, "callspec", None) and request.node.callspec.params.get("M")
    assert seen or tokens == 0, "no kernel ran"


def cases() -> Iterator[Any]:
    """Every (dtype, M, R), with widths, layout, bias and the parameters' dtype drawn for each."""
    draw = random.Random(0).choice
    for dtype, M, R in product(DTYPES, TOKENS, RANKS):
        (K, N), layout, bias, wide = draw(WIDTHS), draw(LAYOUTS), draw((True, False)), draw((True, False))
        name = f"{str(dtype)[6:]}-M{M}-K{K}-N{N}-R{R}-{layout}{'-bias' if bias else ''}{'-float32' if wide else ''}"
        yield pytest.param(dtype, M, K, N, R, layout, bias, torch.float32 if wide else dtype, id=name)


EACH_CASE = pytest.mark.parametrize(("dtype", "M", "K", "N", "R", "layout", "bias", "wide"), list(cases()))


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values (M × N), with other strides or more dimensions."""
    M, N = t.shape
    match layout:
        case "transposed":
            return t.t().contiguous().t()
        case "sliced":
            wide = torch.full((M, N + 5), 1e4, dtype=t.dtype)
            wide[:, 3 : N + 3] = t
            return wide[:, 3 : N + 3]
        case "strided":
            wide = torch.full((2 * M, 3 * N), 1e4, dtype=t.dtype)
            wide[::2, ::3] = t
            return wide[::2, ::3]
        case "3-D":
            return t.reshape(M // 9, 9, N) if M % 9 == 0 else t[None]
        case "4-D":
            return t.reshape(M // 32, 2, 16, N) if M % 32 == 0 else t[:, None, None]
    return t


Results = dict[str, Tensor]


def assert_as_good(
    draw: Callable[[], tuple[Results, Results, Results]], dtype: torch.dtype, enough: int = 100, through: int = 0
) -> None:
    """`draw` gives results in float64, those of the plain formula in dtype, and ours, anew at each call. `through`: how
    many elements an intermediate has through which all results come; half as many of those are enough."""
    draws = [draw()]
    fewest = min((n for n in (2 * through, *(t.numel() for t in draws[0][0].values())) if n), default=enough)
    draws += [draw() for _ in range((enough - 1) // fewest)]
    for name in draws[0][0]:
        want, eager, got = (torch.stack([results[i][name] for results in draws]) for i in range(3))
        assert got.dtype == eager.dtype, name
        assert got.isfinite().all(), name
        if not want.any():  # no tokens
            assert got.shape == want.shape, name
            assert not got.any(), name
            continue
        error, bar = rel_error(got, want), max(1.5 * rel_error(eager, want), torch.finfo(dtype).eps / 2)
        assert error <= bar, f"{name}: {error:.2e} > {bar:.2e}"


def compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Callable[[], dict[str, Tensor | None]],
    dtype: torch.dtype,
    through: int = 0,
) -> None:
    """Outputs, and gradients of all inputs that want them, of `ours` beside `plain` in dtype and in float64."""
    assert_as_good(lambda: results(ours, plain, inputs(), dtype), dtype, through=through)


def results(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: dict[str, Tensor | None], dtype: torch.dtype
) -> tuple[Results, Results, Results]:
    grad_output = None
    found = []
    for run, to in ((plain, torch.float64), (plain, None), (ours, None)):
        leaves = {
            name: t if t is None else (t if to is None else t.to(to)).detach().requires_grad_(t.requires_grad)
            for name, t in inputs.items()
        }
        y = run(**leaves)
        if grad_output is None:
            grad_output = torch.randn(y.shape).to(dtype)
        wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), laid_out_like(grad_output, y))
        found.append({"output": y.detach(), **dict(zip(wanted, grads, strict=True))})
    return found[0], found[1], found[2]


def laid_out_like(grad_output: Tensor, y: Tensor) -> Tensor:
    """The output's gradient; transposed in memory, as a reduction or an expand upstream may leave it."""
    return grad_output.to(y.dtype).transpose(0, -1).contiguous().transpose(0, -1)


def parameter(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def token_sized(M: int, N: int, dtype: torch.dtype, layout: str) -> Tensor:
    return laid_out(torch.randn(M, N).to(dtype), layout).detach().requires_grad_()


@EACH_CASE
def test_lowrank_add(
    dtype: torch.dtype, M: int, K: int, N: int, R: int, layout: str, bias: bool, wide: torch.dtype
) -> None:
    """The two halves around a base layer: x's gradient is the base's plus the adapter's."""
    inputs = lambda: {  # noqa: E731
        "x": token_sized(M, K, dtype, layout),
        "A": parameter(R, K, dtype=wide, scale=K**-0.5),
        "B": parameter(N, R, dtype=wide, scale=R**-0.5),
        "W": (torch.randn(N, K) * K**-0.5).to(dtype),
        "b": torch.randn(N).to(dtype) if bias else None,
    }

    def plain(x: Tensor, A: Tensor, B: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        y = torch.nn.functional.linear(x, W, b)
        return y + 0.7 * ((x @ A.to(x.dtype).t()) @ B.to(x.dtype).t())

    def ours(x: Tensor, A: Tensor, B: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        x, h = ops.shrink(x, A)
        return ops.expand_add(torch.nn.functional.linear(x, W, b), h, B, 0.7)

    compare(ours, plain, inputs, dtype, through=M * R)


@EACH_CASE
def test_shrink_expand(
    dtype: torch.dtype, M: int, K: int, N: int, R: int, layout: str, bias: bool, wide: torch.dtype
) -> None:
    """HRA's: both halves with no layer between, so that x's gradient is that of the sum."""
    inputs = lambda: {  # noqa: E731
        "x": token_sized(M, K, dtype, layout),
        "A": parameter(R, K, dtype=wide, scale=K**-0.5),
        "B": parameter(K, R, dtype=wide, scale=R**-0.5),
    }
    compare(
        ops.shrink_expand,
        lambda x, A, B: x + (x @ A.to(x.dtype).t()) @ B.to(x.dtype).t(),
        inputs,
        dtype,
        through=M * R,
    )


@EACH_CASE
def test_lowrank_add_rescale(
    dtype: torch.dtype, M: int, K: int, N: int, R: int, layout: str, bias: bool, wide: torch.dtype
) -> None:
    """DoRA's composition, with the base's output and h as inputs of their own."""
    inputs = lambda: {  # noqa: E731
        "y": token_sized(M, N, dtype, layout),
        "h": parameter(M, R, dtype=dtype),
        "B": parameter(N, R, dtype=wide, scale=R**-0.5),
        "g": parameter(N, dtype=wide),
        "b": torch.randn(N).to(dtype) if bias else None,
    }

    def plain(y: Tensor, h: Tensor, B: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        g, B = g.to(y.dtype), B.to(y.dtype)
        b = torch.zeros_like(g) if b is None else b
        return g * (y - b + 0.7 * (h @ B.t()).view(y.shape)) + b

    def ours(y: Tensor, h: Tensor, B: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        return ops.expand_add_rescale(y, h, B, 0.7, g, b)

    compare(ours, plain, inputs, dtype)


@EACH_CASE
def test_scale(dtype: torch.dtype, M: int, K: int, N: int, R: int, layout: str, bias: bool, wide: torch.dtype) -> None:
    compare(
        ops.scale,
        lambda t, g: t * g.to(t.dtype),
        lambda: {"t": token_sized(M, N * 3, dtype, layout), "g": parameter(N * 3, dtype=wide)},
        dtype,
    )


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize(("K", "N"), WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norm(dtype: torch.dtype, K: int, N: int, R: int) -> None:
    def draw() -> tuple[Results, Results, Results]:
        W = laid_out((torch.randn(N, K)).to(dtype), LAYOUTS[(K + R) % 4])
        A, B = torch.randn(R, K), torch.randn(N, R)
        want = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
        eager = (W.float() + 0.7 * B @ A).norm(dim=1)
        return {"norm": want}, {"norm": eager}, {"norm": ops.row_norm(W, A, B, 0.7, W.double().square().sum(1).float())}

    assert_as_good(draw, torch.float32, enough=300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_beyond_one_launch(dtype: torch.dtype) -> None:
    """PiSSA at r=256 has 512 columns; more ranks than a launch holds take several."""
    test_lowrank_add(dtype, 70, 96, 80, 300, "sliced", True, torch.float32)
    test_lowrank_add_rescale(dtype, 70, 96, 80, 520, "contiguous", True, torch.float32)
    test_shrink_expand(dtype, 70, 96, 80, 300, "sliced", True, torch.float32)
    W, A, B = torch.randn(40, 60).to(dtype), torch.randn(300, 60), torch.randn(40, 300)
    want = (W.double() + 0.1 * B.double() @ A.double()).norm(dim=1)
    got = ops.row_norm(W, A, B, 0.1, W.double().square().sum(1).float())
    assert rel_error(got, want) < 1e-6


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

    compare(ours, lambda x, A, B, y: y + 0.7 * (x @ A.t()) @ B.t() + x.sum(), inputs, torch.float32)


def bits(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """All results of all operators on fixed inputs, with the programs shuffled by `seed`."""
    torch.manual_seed(0)
    M, K, N, R = 333, 144, 101, 16
    x, y = (torch.randn(M, size).to(dtype).requires_grad_() for size in (K, N))
    A, B, C, g = (torch.randn(shape).requires_grad_() for shape in ((R, K), (N, R), (K, R), (N,)))
    with launches.watch(seed):
        _, h = ops.shrink(x, A)
        out = ops.scale(ops.expand_add_rescale(ops.expand_add(y, h, B, 0.7), h, B, 0.3, g, None), g)
        turned = ops.shrink_expand(x, A, C)
        norm = ops.row_norm(torch.randn(N, K).to(dtype), A, B, 0.7, torch.ones(N))
        return [out, turned, norm, *torch.autograd.grad(out.sum() + turned.sum(), [x, y, A, B, C, g])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype: torch.dtype) -> None:
    first, second = bits(1, dtype), bits(2, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
