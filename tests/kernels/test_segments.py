"""Segments in the kernels: each row with the matrices of its own run, against loops over the runs in float64.

As in test_correct: shuffled programs, outputs that start as NaN, no store twice, no access outside the arguments.
"""

from collections.abc import Iterator
from typing import Any

import launches
import operations
import pytest
import torch
from models import load_tests
from operations import DTYPES, SEGMENTED, Case, G, Runs, poisoned

from lora_lite import reference
from lora_lite.kernels import expand, low_rank, ops, rotate, row_norm, scale, shrink, shrink_expand, tuning
from lora_lite.kernels.expand_backward import launch_expand_backward
from lora_lite.kernels.segments import SHARE, make_runs
from lora_lite.kernels.segments import Runs as Shares
from lora_lite.kernels.shrink_backward import launch_shrink_backward
from lora_lite.segments import Segments

correct = load_tests("kernels/test_correct")


@pytest.fixture
def _watched() -> Iterator[None]:
    with poisoned(), launches.watch():
        yield


@pytest.fixture(autouse=True)
def _several_parts() -> Any:
    """Few programs, so that runs are cut into parts of `SHARE` rows and more."""
    with tuning.force(programs=8):
        yield


OPERATIONS = (
    ("lowrank_add", {}),
    ("lowrank_add", {"dropout": 0.3}),
    ("lowrank_add_rescale", {}),
    ("lowrank_add_rescale", {"bias": True}),
    ("shrink_expand", {}),
    ("scale", {}),
    ("rotate_pairs", {}),
)


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operation", "options"), OPERATIONS, ids=str)
@pytest.mark.parametrize(("runs", "K", "N", "R"), SEGMENTED, ids=str)
def test_as_accurate_as_pytorch(
    dtype: torch.dtype, operation: str, options: dict[str, Any], runs: Runs, K: int, N: int, R: int
) -> None:
    case = Case(dtype, runs.rows, K, N, R, runs=runs, **options)
    correct.assert_within(operations.errors_of(getattr(operations, operation), case))


def segments_of(lengths: list[int], which: list[int] | None) -> Segments:
    return Runs(tuple(lengths), which and tuple(which)).segments()


@pytest.mark.parametrize("R", [2, 40])
def test_stacks_that_do_not_follow_each_other(R: int) -> None:
    """One matrix for all, every second of more, some ranks of more: what a method of one's own may hand over."""
    segments, N = segments_of([30, 3], None), 24
    y, h, g = torch.randn(33, N), torch.randn(33, R), torch.randn(2, N)
    dense = torch.randn(2, N, R)
    views = {
        "one": (dense[:1].expand(2, N, R), g[:1].expand(2, N)),
        "every second": (torch.randn(4, N, R)[::2], torch.randn(4, N)[::2]),
        "of more ranks": (torch.randn(2, N, R + 3)[..., :R], torch.randn(2, N + 5)[:, :N]),
        "across": (torch.randn(2, R, N).mT, torch.randn(N, 2).mT),
    }
    for B, gain in views.values():
        for of, operands in (("expand_add", ()), ("expand_add_rescale", (gain, gain))):
            with poisoned(), launches.watch():
                got = getattr(ops, of)(y, h, B, 0.7, *operands, segments)
            want = getattr(reference, of)(
                *(t.double() for t in (y, h, B)), 0.7, *(t.double() for t in operands), segments
            )
            assert ((got - want).norm() / want.norm()).item() < 1e-6
        for of in ("scale", "rotate_pairs"):
            operands = (gain,) if of == "scale" else (gain, gain, 4)
            with poisoned(), launches.watch():
                got = getattr(ops, of)(y, *operands, segments)
            exact = [t.double() if isinstance(t, torch.Tensor) else t for t in operands]
            want = getattr(reference, of)(y.double(), *exact, segments)
            assert ((got - want).norm() / want.norm()).item() < 1e-6
    for A in (torch.randn(1, R, N).expand(2, R, N), torch.randn(4, R, N)[::2], torch.randn(2, N, R).mT):
        with poisoned(), launches.watch():
            got = ops.shrink(y, A, segments=segments)[1]
        want = reference.shrink(y.double(), A.double(), segments=segments)[1]
        assert ((got - want).norm() / want.norm()).item() < 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_row_norm_of_a_stack(transposed: bool) -> None:
    W, A, B = torch.randn(G, 61, 50), torch.randn(G, 5, 50), torch.randn(G, 61, 5)
    W = W.mT.contiguous().mT if transposed else W
    with poisoned(), launches.watch() as seen:
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
    runs = Shares.read(Shares.of(segments, x, G))
    wanted = {
        "x": (1, 0), "y": (1, 0), "dy": (1, 0), "dx_base": (1, 0), "out": (0, 1), "dx": (0, 1), "dy_base": (0, 1),
        "t": (1, 0), "dt": (0, 1),
    }  # fmt: skip
    with tuning.force(config=tuning.Config(32, 64), programs=20), launches.watch() as seen:
        shrink.launch_shrink(x, A, bf16, runs)
        expand.launch_expand(y, h, B, 0.7, g, bias, runs)
        launch_expand_backward(torch.randn(M, N).to(bf16), h, B, 0.7, True, True, runs=runs)
        launch_expand_backward(torch.randn(M, N).to(bf16), h, B, 0.7, True, True, y, g, bias, runs)
        launch_shrink_backward([torch.randn(M, K).to(bf16)], [h], x, A, True, True, None, runs)
        scale.launch_scale(y, g, runs)
        scale.launch_scale_backward(torch.randn(M, N).to(bf16), y, g, True, True, runs)
        rotate.launch_rotate(y, g, bias, 64, runs)
        rotate.launch_rotate_backward(torch.randn(M, N).to(bf16), y, g, bias, 64, True, True, runs)
    launches.assert_passes(seen, (M * K, M * N), wanted)


def test_tables() -> None:
    """Every row is in one share of each table, with the matrix of its run; what is left over has no rows."""
    lengths, which = [3, 0, 200, 64, 1], [2, 0, -1, 1, 2]
    M = sum(lengths) + 9
    runs = Shares.read(Shares.of(segments_of(lengths, which), torch.empty(M, 4), G))
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


def test_no_more_shares_than_rows() -> None:
    """A token of a large mixture visits few of its experts, and an idle share would walk through all of K."""
    segments = segments_of([1, 1, *[0] * 126], None)
    for M, most in ((2, 3), (0, 1)):
        for table in make_runs(segments.ends.clamp_max(M), None, M, 128)[:2]:
            assert len(table) <= most
    assert len(make_runs(torch.full((70_000,), 9, dtype=torch.int32), None, 9, 70_000)[1]) <= 65_535  # a grid's y


def test_opcheck() -> None:
    check = torch.library.opcheck
    segments = segments_of([2, 0, 3], None)
    x, y, h = torch.randn(6, 12).requires_grad_(), torch.randn(6, 10).requires_grad_(), torch.randn(6, 4)
    A, B = torch.randn(G, 4, 12).requires_grad_(), torch.randn(G, 10, 4).requires_grad_()
    C, g, bias = torch.randn(G, 12, 4).requires_grad_(), torch.rand(G, 10).requires_grad_(), torch.randn(G, 10)
    runs = Shares.of(segments, x, G)
    check(low_rank._shrink, (x, A, torch.float32, runs, None))
    check(low_rank._expand_add, (y, h, B, 0.7, runs))
    check(shrink_expand._shrink_expand, (x, A, C, torch.float32, runs))
    check(low_rank._expand_add_rescale, (y, h, B, 0.7, g, bias, runs))
    check(scale._scale, (y, g, runs))
    check(rotate._rotate_pairs, (y, g, bias, 10, runs))
    check(row_norm._row_norm, (torch.randn(G, 10, 12), None, A.detach(), B.detach(), 0.7, torch.rand(G, 10)))
