"""float32 by three products in TF32 or bfloat16 on NVIDIA's tensor cores is no less accurate than its own instructions.

No GPU is needed: the cores' arithmetic is imitated as it was measured (Fasi, Higham, Mikaitis and Pranesh 2021,
"Numerical behavior of NVIDIA tensor cores", §3: exact products, a sum of a few at a time in which each addend is
truncated to the place of the largest), and the compiled code is read for where the sums of tiles are added.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from compiling import compiled_value
from numpy.typing import NDArray

from lora_lite.kernels import expand_backward, shrink, shrink_backward, sums

Array = NDArray[np.float64]
Product = Callable[..., Array]


def tf32(x: Array) -> Array:
    """To 11 significant bits, ties away from zero, as `cvt.rna.tf32.f32` does."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.sign(fraction) * np.floor(np.abs(fraction) * 2.0**11 + 0.5) / 2.0**11, exponent)


def tensor_core(a: Array, b: Array, c: Array, at_once: int, extra_bits: int) -> Array:
    """c + a bᵀ, some products at a time, all truncated to the last place of the largest and `extra_bits` beyond."""
    for k in range(0, a.shape[1], at_once):
        products = a[:, None, k : k + at_once] * b[None, :, k : k + at_once]
        terms = np.concatenate([products, c[..., None]], -1)
        place = np.ldexp(1.0, np.frexp(np.abs(terms).max(-1, keepdims=True))[1] - 24 - extra_bits)
        total = (np.trunc(terms / place) * place).sum(-1)
        last = np.ldexp(1.0, np.frexp(total)[1] - 24)
        c = np.trunc(total / last) * last
    return c


def by_tiles(pairs: Sequence[tuple[Array, Array]], tile: int, at_once: int, extra_bits: int) -> Array:
    """Σ left rightᵀ over the pairs, the small parts first, and a tile's sum added to the others' in float32."""
    left, right = pairs[0]
    total = np.zeros((len(left), len(right)), np.float32)
    for k in range(0, left.shape[1], tile):
        of, mine = slice(k, k + tile), np.zeros(total.shape)
        for left, right in pairs:
            mine = tensor_core(left[:, of], right[:, of], mine, at_once, extra_bits)
        total += mine.astype(np.float32)
    return total


def three_products(a: Array, b: Array, *how: int) -> Array:
    """a bᵀ as Triton's "tf32x3" has it."""
    a_large, b_large = tf32(a), tf32(b)
    a_small, b_small = tf32(a - a_large), tf32(b - b_large)
    return by_tiles([(a_small, b_large), (a_large, b_small), (a_large, b_large)], *how)


def two_products(a: Array, b: Array, *how: int) -> Array:
    """As DoRA's row norm has it where a is of TF32 numbers: b's larger part is cut off, not rounded."""
    b_large = np.float32(b).view(np.int32) & -(1 << 13)
    large = b_large.view(np.float32).astype(np.float64)
    return by_tiles([(a, tf32(b - large)), (a, large)], *how)


def bf16(x: Array) -> Array:
    """To 8 significant bits, ties to even."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 2.0**8) / 2.0**8, exponent)


def three_parts(a: Array, b: Array, *how: int) -> Array:
    """As DoRA's row norm has it where a is of bfloat16 numbers: b is the sum of three."""
    large = bf16(b)
    middle = bf16(b - large)
    return by_tiles([(a, bf16(b - large - middle)), (a, middle), (a, large)], *how)


def fused_multiply_add(a: Array, b: Array) -> Array:
    """a bᵀ by float32's own instruction, one product after another."""
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1]):
        total = (total.astype(np.float64) + a[:, k, None] * b[None, :, k]).astype(np.float32)
    return total


def error(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("at_once", "extra_bits"), [(4, 1), (8, 2)])
def test_a_long_sum_is_nearer(at_once: int, extra_bits: int, positive: bool) -> None:
    """Over 2,048 products in the tiles of 32 and 64 that the tables have; where all have one sign truncation leans."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((12, 2048)).astype(np.float32).astype(np.float64) for _ in range(2))
    a, b = (np.abs(a), np.abs(b)) if positive else (a, b)
    own = error(fused_multiply_add(a, b), a @ b.T)
    for tile in (32, 64):
        assert error(three_products(a, b, tile, at_once, extra_bits), a @ b.T) < own
    assert error(tf32(a) @ tf32(b).T, a @ b.T) > 10 * own
    untiled = error(three_products(a, b, 2048, at_once, extra_bits), a @ b.T)
    assert untiled > own, "left to the tensor cores alone, a long sum loses more"


@pytest.mark.parametrize(("bits", "product"), [(8, three_parts), (11, two_products)])
@pytest.mark.parametrize(("at_once", "extra_bits"), [(4, 1), (8, 2), (16, 2)])
def test_the_row_norms_products_are_nearer(at_once: int, extra_bits: int, bits: int, product: Product) -> None:
    """W in bf16 or fp16 beside A in float32, in the tiles of the row norm."""
    rng = np.random.default_rng(0)
    W, A = (rng.standard_normal((12, 2048)).astype(np.float32).astype(np.float64) for _ in range(2))
    fraction, exponent = np.frexp(W)
    W = np.ldexp(np.round(fraction * 2.0**bits) / 2.0**bits, exponent)
    own = error(fused_multiply_add(W, A), W @ A.T)
    for tile in (32, 64):
        assert error(product(W, A, tile, at_once, extra_bits), W @ A.T) < own


@pytest.mark.parametrize(("at_once", "extra_bits"), [(4, 1), (8, 2)])
def test_a_sum_over_ranks_takes_many_tiles(at_once: int, extra_bits: int) -> None:
    """In `expand`'s tiles of 16 from r = 64 on; where one tile is all, float32's own instructions are nearer."""
    rng = np.random.default_rng(0)
    for ranks, tile, nearer in ((64, 16, True), (256, 16, True), (16, 16, False), (64, 64, False)):
        h, B = (rng.standard_normal((60, ranks)).astype(np.float32).astype(np.float64) for _ in range(2))
        own = error(fused_multiply_add(h, B), h @ B.T)
        assert (error(three_products(h, B, tile, at_once, extra_bits), h @ B.T) < own) == nearer


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_tiles_are_added_outside_of_the_cores(architecture: str) -> None:
    """In the loops over the columns and over the tokens: each product of large parts takes a sum of this tile alone,
    and what it gives is added to a variable of the loop."""
    of_kernels = compiled_value(f"""
import json, re, kernels_report as k
found = []
of = dict.fromkeys(("shrink", "expand", "expand_backward"), "float32")
of |= dict(row_norm="bfloat16", row_norm_float32="bfloat16", row_norm_int8="float32", row_norm_4bit="float32")
for name, dtype in of.items():
    config = k.rows_of(name, "{architecture}", dtype, 64)[0]
    with k.tuning.force(config=config, architecture="{architecture}"):
        launch, *_ = k.record(k.kernel_calls(getattr(k.torch, dtype), 8192, 4096, 4096, 64)[name])
    code = k.compiled(launch, k.ARCHITECTURES["{architecture}"].target).asm["ttgir"]
    of_loops = [name for names in re.findall(r"iter_args\\((.*?)\\)", code) for name in re.findall(r"(%\\w+) =", names)]
    starts = re.findall(r"(?:tt.dot|warp_group_dot) %\\S+ %\\S+ (%[^\\s,]+)", code)
    sums = [name for pair in re.findall(r"arith.addf (%[\\w#]+), (%[\\w#]+)", code) for name in pair]
    found.append([name, len(starts), sorted(set(starts) & set(of_loops)), sorted(set(sums) & set(of_loops))])
print(json.dumps(found))""")
    for name, dots, goes_on, added_to in of_kernels:
        assert dots % (2 if name == "row_norm_float32" else 3) == 0 < dots, name
        assert goes_on == [], name
        assert added_to, name


@pytest.mark.parametrize(
    ("M", "K", "N", "of_h", "of_dh", "of_dB", "of_dA"),
    [
        (300, 200, 160, "tf32x3", "tf32x3", "tf32x3", "tf32x3"),
        (1, 200, 160, "ieee", "ieee", "ieee", "ieee"),  # a measured 2·10⁻⁷ in TF32, of one product
        (300, 60, 40, "ieee", "ieee", "tf32x3", "tf32x3"),
        (60, 200, 160, "ieee", "ieee", "ieee", "ieee"),
    ],
)
def test_short_sums_take_float32s_own_instructions(
    M: int, K: int, N: int, of_h: str, of_dh: str, of_dB: str, of_dA: str
) -> None:
    """The three parts of a TF32 product leave as much out of a sum of one as of many."""
    x, y, h, A, B = (torch.randn(*size) for size in ((M, K), (M, N), (M, 8), (8, K), (N, 8)))
    seen: dict[str, Any] = {}

    def note(kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Sequence[Any], config: Any = None) -> None:
        seen.setdefault(kernel.fn.__name__, constants)

    with ExitStack() as stack:
        for module in (shrink, expand_backward, shrink_backward):
            stack.enter_context(mock.patch.object(module, "launch", note))
        shrink.launch_shrink(x, A, torch.float32)
        expand_backward.launch_expand_backward(y, h, B, 1.0, True, True)
        shrink_backward.launch_shrink_backward([x], [h], x, A, True, True)
    assert seen["_shrink_kernel"][0] == of_h
    assert seen["_expand_backward_kernel"][:2] == (of_dh, of_dB)
    assert seen["_shrink_backward_kernel"][:2] == ("ieee", of_dA)


def test_parts_are_added_in_short_chains() -> None:
    """One by one, 500 numbers lose several times what eight at a time do."""
    parts = torch.rand(500, 700) + 0.5
    out = torch.empty(700)
    sums.sum_parts((parts, out, None))
    want, one_by_one = parts.double().sum(0), parts[0].clone()
    for part in parts[1:]:
        one_by_one += part
    lost, chain = ((each - want).norm() / want.norm() for each in (out, one_by_one))
    assert lost < chain / 2


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_root_is_rounded_once(architecture: str) -> None:
    """`tl.sqrt` is an approximation on NVIDIA's, twice as far off as a rounded root may be."""
    code = compiled_value(f"""
import json, kernels_report as k
config = k.rows_of("row_norm", "{architecture}", "bfloat16", 16)[0]
with k.tuning.force(config=config, architecture="{architecture}"):
    *_, last = k.record(k.kernel_calls(k.torch.bfloat16, 64, 4096, 4096, 16)["row_norm"])
print(json.dumps(k.compiled(last, k.ARCHITECTURES["{architecture}"].target).asm["ptx"]))""")
    assert "sqrt.rn" in code
    assert "sqrt.approx" not in code
