"""Segments in the kernels: each row with the matrices of its own run, against loops over the runs in float64.

As in test_correct: shuffled programs, outputs that start as NaN, no store twice, no access outside the arguments.
"""

from collections.abc import Callable
from typing import Any

import launches
import pytest
import torch
from models import load_tests
from philox import dropout_mask
from torch import Tensor

from lora_lite.kernels import dora, lowrank, ops, row_norm, scale, tuning
from lora_lite.kernels.common import SHARE, Runs
from lora_lite.segments import Segments

correct, of_dropout = load_tests("kernels/test_correct"), load_tests("kernels/test_dropout")
_watched = of_dropout._watched
DTYPES, SEED, G = correct.DTYPES, of_dropout.SEED, 3
# (rows of each run, its matrix, rows after the last run, K, N, R)
RUNS: list[tuple[list[int], list[int] | None, int, int, int, int]] = [
    ([1, 1, 1, 1, 1, 1, 1], [1, 0, -1, 2, 2, 0, 1], 0, 61, 67, 4),  # generation: a token an entry
    ([33, 33], [0, 1], 0, 50, 130, 16),  # equal entries
    ([70, 1, 3, 70], [2, -1, 2, 0], 2, 144, 101, 100),
    ([0, 130, 0], None, 0, 61, 67, 20),  # all in one: the others get nothing
    ([5, 64, 200], None, 0, 64, 48, 16),
    ([9, 0, 150], None, 7, 64, 48, 300),
    ([0, 0, 0], None, 5, 64, 48, 16),
    ([0, 0, 0], None, 0, 64, 48, 16),
]
EACH = pytest.mark.parametrize(("lengths", "which", "rest", "K", "N", "R"), RUNS, ids=str)


@pytest.fixture(autouse=True)
def _several_parts() -> Any:
    """Few programs, so that runs are cut into parts of `SHARE` rows and more."""
    with tuning.force(programs=8):
        yield


def segments_of(lengths: list[int], which: list[int] | None) -> Segments:
    ends = torch.tensor(lengths).cumsum(0).int()
    return Segments(ends, None if which is None else torch.tensor(which))


def by_run(lengths: list[int], which: list[int] | None, rest: int, of: Callable[[int, slice], Tensor]) -> Tensor:
    """Put together what `of` makes of each run, given its matrix (below 0: none) and rows."""
    parts, start = [], 0
    for i, length in enumerate((*lengths, rest)):
        matrix = -1 if i == len(lengths) else i if which is None else which[i]
        parts.append(of(matrix, slice(start, start + length)))
        start += length
    return torch.cat(parts)


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@EACH
def test_lowrank_add(dtype: Any, dropout: float, lengths: Any, which: Any, rest: int, K: int, N: int, R: int) -> None:
    M, segments = sum(lengths) + rest, segments_of(lengths, which)
    mask = dropout_mask(SEED, M, K, dropout)

    def plain(x: Tensor, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        def run(matrix: int, rows: slice) -> Tensor:
            y = x[rows] @ W.t()
            if matrix < 0:
                return y
            kept = x[rows] * mask[rows].to(x.dtype)
            return y + 0.7 * (kept @ A[matrix].to(x.dtype).t()) @ B[matrix].to(x.dtype).t()

        return by_run(lengths, which, rest, run) + 0 * (A.sum() + B.sum())

    def ours(x: Tensor, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        with of_dropout.with_seed(SEED):
            x, h = ops.shrink(x, A, dropout, segments)
        return ops.expand_add(x @ W.t(), h, B, 0.7, segments)

    inputs = lambda: {  # noqa: E731
        "x": torch.randn(M, K).to(dtype).requires_grad_(),
        "A": correct.parameter(G, R, K, dtype=torch.float32, scale=K**-0.5),
        "B": correct.parameter(G, N, R, dtype=torch.float32, scale=R**-0.5),
        "W": (torch.randn(N, K) * K**-0.5).to(dtype),
    }
    correct.compare(ours, plain, inputs, dtype)


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@EACH
def test_rescale(dtype: Any, bias: bool, lengths: Any, which: Any, rest: int, K: int, N: int, R: int) -> None:
    M, segments = sum(lengths) + rest, segments_of(lengths, which)

    def plain(y: Tensor, h: Tensor, B: Tensor, g: Tensor, b: Tensor) -> Tensor:
        def run(matrix: int, rows: slice) -> Tensor:
            if matrix < 0:
                return y[rows]
            gain, of = g[matrix].to(y.dtype), b[matrix].to(y.dtype) if bias else 0.0
            return gain * (y[rows] - of + 0.7 * h[rows].to(y.dtype) @ B[matrix].to(y.dtype).t()) + of

        return by_run(lengths, which, rest, run) + 0 * (B.sum() + g.sum() + h.sum())

    def ours(y: Tensor, h: Tensor, B: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return ops.expand_add_rescale(y, h, B, 0.7, g, b if bias else None, segments)

    inputs = lambda: {  # noqa: E731
        "y": torch.randn(M, N).to(dtype).requires_grad_(),
        "h": torch.randn(M, R).to(dtype).requires_grad_(),
        "B": correct.parameter(G, N, R, dtype=torch.float32, scale=R**-0.5),
        "g": (1 + 0.2 * torch.randn(G, N)).requires_grad_(),
        "b": torch.randn(G, N).to(dtype),
    }
    correct.compare(ours, plain, inputs, dtype)


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_shrink_expand(dtype: Any, lengths: Any, which: Any, rest: int, K: int, N: int, R: int) -> None:
    M, segments = sum(lengths) + rest, segments_of(lengths, which)

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        def run(matrix: int, rows: slice) -> Tensor:
            if matrix < 0:
                return x[rows]
            return x[rows] + (x[rows] @ A[matrix].to(x.dtype).t()) @ B[matrix].to(x.dtype).t()

        return by_run(lengths, which, rest, run) + 0 * (A.sum() + B.sum())

    inputs = lambda: {  # noqa: E731
        "x": torch.randn(M, K).to(dtype).requires_grad_(),
        "A": correct.parameter(G, R, K, dtype=torch.float32, scale=K**-0.5),
        "B": correct.parameter(G, K, R, dtype=torch.float32, scale=R**-0.5),
    }
    correct.compare(lambda x, A, B: ops.shrink_expand(x, A, B, segments), plain, inputs, dtype)


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", DTYPES)
@EACH
def test_scale(dtype: Any, lengths: Any, which: Any, rest: int, K: int, N: int, R: int) -> None:
    M, segments = sum(lengths) + rest, segments_of(lengths, which)

    def plain(t: Tensor, g: Tensor) -> Tensor:
        gained = by_run(lengths, which, rest, lambda i, rows: t[rows] if i < 0 else t[rows] * g[i].to(t.dtype))
        return gained + 0 * g.sum()

    inputs = lambda: {  # noqa: E731
        "t": torch.randn(M, N).to(dtype).requires_grad_(),
        "g": (1 + 0.2 * torch.randn(G, N)).requires_grad_(),
    }
    correct.compare(lambda t, g: ops.scale(t, g, segments), plain, inputs, dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_row_norm_of_a_stack(transposed: bool) -> None:
    W, A, B = torch.randn(G, 61, 50), torch.randn(G, 5, 50), torch.randn(G, 61, 5)
    W = W.mT.contiguous().mT if transposed else W
    with launches.poisoned(), launches.watch() as seen:
        got = ops.row_norm(W, A, B, 0.7, W.square().sum(-1))
    assert len(seen) == 1
    want = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=-1)
    assert ((got - want).norm() / want.norm()).item() < 1e-6


def test_passes() -> None:
    """Each token-sized tensor as often as without segments: once a kernel."""
    M, K, N, R, bf16 = 270, 96, 128, 20, torch.bfloat16
    segments = segments_of([70, 0, 150], None)
    x, y, h, A, B = (torch.randn(*shape).to(bf16) for shape in ((M, K), (M, N), (M, R), (G, R, K), (G, N, R)))
    g, bias = torch.randn(G, N), torch.randn(G, N)
    runs = Runs.read(Runs.of(segments, x, G))
    wanted = {
        "x": (1, 0), "y": (1, 0), "dy": (1, 0), "dx_base": (1, 0), "out": (0, 1), "dx": (0, 1), "dy_base": (0, 1),
        "t": (1, 0), "dt": (0, 1),
    }  # fmt: skip
    with tuning.force(config=tuning.Config(32, 64), programs=20), launches.watch() as seen:
        lowrank.launch_shrink(x, A, bf16, runs)
        lowrank.launch_expand(y, h, B, 0.7, g, bias, runs)
        lowrank.launch_expand_backward(torch.randn(M, N).to(bf16), h, B, 0.7, True, True, runs=runs)
        lowrank.launch_expand_backward(torch.randn(M, N).to(bf16), h, B, 0.7, True, True, y, g, bias, runs)
        lowrank.launch_shrink_backward([torch.randn(M, K).to(bf16)], h, x, A, True, True, None, runs)
        scale.launch_scale(y, g, runs)
        scale.launch_scale_backward(torch.randn(M, N).to(bf16), y, g, True, True, runs)
    found = set()
    for launch in seen:
        for name, passes in launch.passes().items():
            if launch.tensors[name].numel() in (M * K, M * N) and not name.startswith("parts"):
                assert passes == wanted[name], (launch.kernel, name)
                found.add(name)
    assert found == wanted.keys()


def test_tables() -> None:
    """Every row is in one share of each table, with the matrix of its run; what is left over has no rows."""
    lengths, which = [3, 0, 200, 64, 1], [2, 0, -1, 1, 2]
    M = sum(lengths) + 9
    runs = Runs.read(Runs.of(segments_of(lengths, which), torch.empty(M, 4), G))
    assert runs is not None
    of_rows = segments_of(lengths, which).matrix_of_rows(M)
    for table, most in ((runs.blocks, SHARE), (runs.parts, 4 * SHARE)):
        seen = torch.zeros(M, dtype=torch.int64)
        for first, last, matrix in table.tolist():
            assert last - first <= most
            seen[first:last] += 1
            assert (of_rows[first:last] == matrix).all()
        assert (seen == 1).all()
    starts = runs.starts.tolist()
    for matrix in range(G):
        mine = runs.parts[runs.order[starts[matrix] : starts[matrix + 1]].long()]
        assert (mine[:, 2] == matrix).all()
        assert (mine[:, 1] - mine[:, 0]).sum() == (of_rows == matrix).sum()


def test_opcheck() -> None:
    check = torch.library.opcheck
    segments = segments_of([2, 0, 3], None)
    x, y, h = torch.randn(6, 12).requires_grad_(), torch.randn(6, 10).requires_grad_(), torch.randn(6, 4)
    A, B = torch.randn(G, 4, 12).requires_grad_(), torch.randn(G, 10, 4).requires_grad_()
    C, g, bias = torch.randn(G, 12, 4).requires_grad_(), torch.rand(G, 10).requires_grad_(), torch.randn(G, 10)
    runs = Runs.of(segments, x, G)
    check(lowrank._shrink, (x, A, torch.float32, runs, None, 0.0))
    check(lowrank._expand_add, (y, h, B, 0.7, runs))
    check(lowrank._shrink_expand, (x, A, C, torch.float32, runs))
    check(dora._expand_add_rescale, (y, h, B, 0.7, g, bias, runs))
    check(scale._scale, (y, g, runs))
    check(row_norm._row_norm, (torch.randn(G, 10, 12), None, A.detach(), B.detach(), 0.7, torch.rand(G, 10)))
