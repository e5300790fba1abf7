"""Dropout in the low-rank kernels: the mask, and results with it, against independent formulas.

The mask's oracle is its generator in numpy, written from the paper and held to the authors' known answers; results are
compared with the formula in float64 by the rules of bench/kernels/operations.py.
"""

from collections.abc import Iterator

import launches
import numpy as np
import operations
import pytest
import torch
from models import load_tests
from operations import DTYPES, SEED, Case, poisoned, with_seed
from philox import dropout_mask, philox, seed_of
from torch import Tensor

from lora_lite.kernels import expand, low_rank, ops, shrink, tuning
from lora_lite.kernels.expand_backward import launch_expand_backward
from lora_lite.kernels.segments import Runs
from lora_lite.kernels.shrink_backward import launch_shrink_backward

correct = load_tests("kernels/test_correct")


@pytest.fixture
def _watched() -> Iterator[None]:
    """Outputs start as NaN, programs run in shuffled order, none touches what it may not."""
    with poisoned(), launches.watch():
        yield


def mask_of(M: int, N: int, dropout: float, seed: int = SEED) -> Tensor:
    """What the kernel keeps: 0 or 1 / (1 − dropout)."""
    with with_seed(seed):
        return ops.shrink(torch.ones(M, N), torch.eye(N), dropout)[1]


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (7, 4 * [0], (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (10, 4 * [0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, 4 * [0xFFFFFFFF], 2 * (0xFFFFFFFF,), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            10,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generators_known_answers(rounds: int, counter: list[int], key: tuple[int, int], words: str) -> None:
    """kat_vectors of the authors' library Random123."""
    assert [f"{word:08x}" for word in philox(np.array(counter), key, rounds)] == words.split()


@pytest.mark.parametrize(("M", "N"), [(1, 1), (7, 61), (64, 48), (333, 130)])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.99])
def test_mask_is_the_generators(M: int, N: int, dropout: float) -> None:
    torch.testing.assert_close(
        mask_of(M, N, dropout).double(), dropout_mask(seed_of(SEED, dropout), M, N), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5])
def test_statistics(dropout: float) -> None:
    """Of the kernel's own masks: the rate, of all, of rows, of columns and of each of the eight elements of a draw; and
    that no neighbour and no other seed tells anything. Bounds are five standard deviations."""
    M, N = 768, 128
    dropped = (mask_of(M, N, dropout) == 0).double()
    spread = (dropout * (1 - dropout)) ** 0.5
    for what, counts, each in (
        ("all", dropped.flatten(), M * N),
        ("rows", dropped, N),
        ("columns", dropped.t(), M),
        ("elements of a draw", dropped.view(M, -1, 8).permute(2, 0, 1).flatten(1), M * N // 8),
    ):
        off = (counts.mean(-1) - dropout).abs() / (spread / each**0.5)
        assert off.max() < 5, what
        assert each == M * N or off.max() > 0.1, f"{what}: too regular"
    centred = (dropped - dropout) / spread
    other = ((mask_of(M, N, dropout, SEED + 1) == 0).double() - dropout) / spread
    shifts = [(i, j) for i in (0, 1, 2, 8, 32, 128) for j in (0, 1, 2, 3, 4, 7, 8, 64) if i or j]
    for partner, of in ((centred, shifts), (other, [(0, 0), *shifts])):
        for shift in of:
            correlation = (centred * partner.roll(shift, (0, 1))).mean().abs()
            assert correlation < 5 / (M * N) ** 0.5, shift


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "K", "N", "R", "layout"),
    [
        (0, 61, 67, 4, "contiguous"),
        (1, 50, 130, 16, "contiguous"),
        (7, 144, 101, 1, "strided"),
        (64, 61, 67, 100, "transposed"),
        (333, 257, 96, 16, "sliced"),
        (333, 64, 48, 64, "3-D"),
        (70, 96, 80, 300, "sliced"),  # more ranks than a launch holds
    ],
)
def test_lowrank_add_with_dropout(dtype: torch.dtype, M: int, K: int, N: int, R: int, layout: str) -> None:
    case = Case(dtype, M, K, N, R, layout, dropout=0.3)
    correct.assert_within(operations.errors_of(operations.lowrank_add, case))


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N", "R", "layout"), [
    (7, 50, 130, 2, "contiguous"), (64, 61, 67, 5, "transposed"), (333, 257, 96, 16, "sliced"),
    (70, 96, 80, 100, "3-D"),  # more ranks in all than a launch holds
])  # fmt: skip
def test_layers_that_share_x_with_dropout(dtype: torch.dtype, M: int, K: int, N: int, R: int, layout: str) -> None:
    case = Case(dtype, M, K, N, R, layout, dropout=0.3)
    correct.assert_within(operations.errors_of(operations.lowrank_add_together, case))


@pytest.mark.parametrize("grouped", [False, True])
def test_passes_are_the_same(grouped: bool) -> None:
    """The mask is computed, not stored: each token-sized tensor is read and written as often as without dropout, and
    there is no other of that size."""
    M, K, N, R = 200, 260, 300, 20
    segments = operations.Runs((50,) * 4, (1, -1, 0, 1)).segments() if grouped else None
    stack = (3,) if grouped else ()
    bf16 = torch.bfloat16
    x, y, h = (torch.randn(M, size).to(bf16).requires_grad_() for size in (K, N, R))
    A, B = (torch.randn(*stack, *shape).to(bf16) for shape in ((R, K), (N, R)))
    runs = Runs.read(Runs.of(segments, x, 3))
    options = (runs, torch.tensor([seed_of(SEED, 0.1)]))
    wanted = {
        "x": (1, 0), "y": (1, 0), "dy": (1, 0), "dx_base": (1, 0), "out": (0, 1), "dx": (0, 1),
    }  # fmt: skip
    with tuning.force(config=tuning.Config(32, 64), programs=20), launches.watch() as seen:
        shrink.launch_shrink(x, A, bf16, *options)
        expand.launch_expand(y, h, B, 0.7, None, None, *options)
        launch_expand_backward(torch.randn(M, N).to(bf16), h, B, 0.7, True, True, runs=runs)
        launch_shrink_backward([torch.randn(M, K).to(bf16)], [h], x, A, True, True, None, *options)
    launches.assert_passes(seen, (M * K, M * N), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck(dropout: float, grouped: bool) -> None:
    segments = operations.Runs((2,) * 3, (1, 0, -1)).segments() if grouped else None
    stack = (2,) if grouped else ()
    seed = torch.tensor([seed_of(SEED, dropout)]) if dropout else None
    x, y, h = (torch.randn(3, 2, 12).requires_grad_(), torch.randn(3, 2, 10).requires_grad_(), torch.randn(6, 4))
    A, B = torch.randn(*stack, 4, 12).requires_grad_(), torch.randn(*stack, 10, 4).requires_grad_()
    group = Runs.of(segments, x, 2)
    torch.library.opcheck(low_rank._shrink, (x, A, torch.float32, group, seed))
    torch.library.opcheck(low_rank._expand_add, (y, h, B, 0.7, group))
    x, y, A, B = (t.detach() for t in (x, y, A, B))
    torch.library.opcheck(low_rank._shrink_backward, ([x], [h], x, A, group, seed, A.dtype, True, True))
    torch.library.opcheck(low_rank._expand_add_backward, (y, h, B, 0.7, group, True, True))
