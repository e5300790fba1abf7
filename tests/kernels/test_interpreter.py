"""The bfloat16 shim, and the tool that watches launches: each must catch what it is there for."""

import inspect
import math
from typing import Any
from unittest import mock

import launches
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from operations import poisoned
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from lora_lite.kernels import interpreter, sums


@triton.jit
def _dot(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _copy(x, out, size, step, BLOCK: tl.constexpr):
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), mask=at < size)


def special_values() -> Tensor:
    """float32 that are hard to round: ties both ways, neighbours of ties, subnormals, the largest, infinite, NaN."""
    bits = torch.randint(-(2**31), 2**31, (50_000,), dtype=torch.int64).int()
    ties = (bits & ~0xFFFF) | 0x8000
    named = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4e38, float("inf"), -float("inf"), float("nan")])
    return torch.cat([t.view(torch.float32) for t in (bits, ties, ties + 1, ties - 1)] + [named])


def test_rounding_is_pytorchs() -> None:
    x = special_values()
    got = torch.from_numpy(interpreter.to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(interpreter.to_float32(got.view(torch.int16).numpy().view(np.uint16)))
    torch.testing.assert_close(back, got.float(), rtol=0, atol=0, equal_nan=True)


def test_stores_round_to_nearest_even() -> None:
    x = special_values()
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _copy[(triton.cdiv(len(x), 1024),)](x, out, len(x), 1024, BLOCK=1024)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def _sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N))))  # tl.sum is a device function


def test_what_the_interpreter_replaces_is_searched_for_once() -> None:
    """And put back after each launch."""
    builtins = (tl.load, tl.dot, tl.tensor.to)
    x, out = torch.randn(64), torch.empty(1)
    _sum[(1,)](x, out, N=64)
    with mock.patch.object(inspect, "getmembers", side_effect=AssertionError):
        _sum[(1,)](2 * x, out, N=64)
    torch.testing.assert_close(out[0], (2 * x).sum())
    assert (tl.load, tl.dot, tl.tensor.to) == builtins


@pytest.mark.parametrize("shape", [[4, 8], [8, 4], [tl.constexpr(4), 16]], ids=str)
@pytest.mark.parametrize(
    ("element_ty", "dtype"),
    [
        (tl.float32, np.float32),
        (tl.float16, np.float16),
        (tl.pointer_type(tl.float16), np.uint64),
        (tl.pointer_type(tl.float16, const=True), np.uint64),
    ],
    ids=str,
)
def test_what_is_of_one_type_shares_what_follows_from_it(element_ty: Any, dtype: Any, shape: Any) -> None:
    """And what is of another does not."""
    sizes = tuple(getattr(size, "value", size) for size in shape)
    first, second = (tl.block_type(element_ty, shape) for _ in range(2))
    a, b = tl.tensor("a", first), tl.tensor("b", second)
    for kind, t, handle in ((first, a, "a"), (second, b, "b")):
        assert (kind.element_ty, kind.shape, kind.numel) == (element_ty, sizes, math.prod(sizes))
        assert t.handle == handle
        assert t.type is kind
        assert t.dtype == element_ty
        assert tuple(size.value for size in t.shape) == sizes
        assert t.numel.value == kind.numel
    assert triton_interpreter._get_np_dtype(first) == dtype
    assert a.shape is b.shape


def test_watch_counts_and_shuffles() -> None:
    x, out = torch.randn(100), torch.empty(100)
    with launches.watch() as seen:
        _copy[(7,)](x, out, 100, 16, BLOCK=16)
    (launch,) = seen
    assert torch.equal(out, x)
    assert (launch.kernel, launch.programs) == ("_copy", 7)
    assert launch.passes() == {"x": (1, 0), "out": (0, 1)}
    with launches.watch() as seen:
        sums.sum_parts((torch.ones(3, 10), torch.empty(10), None))
    assert seen[0].reads["parts"] == 30


def test_watch_sees_overlapping_stores() -> None:
    x, out = torch.randn(100), torch.empty(100)
    with launches.watch(), pytest.raises(AssertionError, match="stored to twice"):
        _copy[(7,)](x, out, 100, 15, BLOCK=16)


def test_watch_sees_what_lies_outside() -> None:
    storage = torch.randn(100)
    with launches.watch(), pytest.raises(AssertionError, match="reads 10 addresses"):
        _copy[(7,)](storage[:90], torch.empty(100), 100, 16, BLOCK=16)
    with launches.watch(), pytest.raises(AssertionError, match="writes 75 addresses"):
        _copy[(7,)](storage, torch.empty(200)[::4], 100, 16, BLOCK=16)


def test_watch_runs_programs_out_of_order() -> None:
    orders = []
    for seed in range(2):
        watcher = launches._Watcher(seed)
        watcher.grid(3, 4, 5)
        orders.append([watcher.program(x, y, z) for x in range(3) for y in range(4) for z in range(5)])
    assert sorted(orders[0]) == sorted(orders[1]) == [(x, y, z) for x in range(3) for y in range(4) for z in range(5)]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_poison() -> None:
    with poisoned():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.randn(3).new_empty(4, dtype=dtype).isnan().all()
            assert torch.empty_like(torch.randn(3, dtype=dtype)).isnan().all()
