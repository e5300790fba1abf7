"""Every variant against its paper's formula, written with dense matrices and slow loops, in float64."""

import math
import platform
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VARIANTS, assert_close, attach, only_adapter, randomize, rel_error
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite.reference
from lora_lite.linalg import rotations
from lora_lite.segments import Segments

R, ALPHA = 4, 6.0
SCALE = ALPHA / R
Formula = Callable[[nn.Linear, Any, Tensor, Any], Tensor]


def lora(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    return linear(x, layer.weight + SCALE * p.lora_B @ p.lora_A, layer.bias)


def pissa(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    residual = layer.weight - SCALE * p.lora_B0 @ p.lora_A0
    return linear(x, residual + SCALE * p.lora_B @ p.lora_A, layer.bias)


def dora(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    V = layer.weight + SCALE * p.lora_B @ p.lora_A
    norm = torch.stack([row.norm() for row in V]).detach()  # §4.3
    return linear(x, p.lora_m[:, None] * V / norm[:, None], layer.bias)


def delora(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    column_norms = torch.stack([column.norm() for column in layer.weight.t()])
    W = layer.weight
    for a, b in zip(p.lora_A, p.lora_B.t(), strict=True):
        strength = p.lora_lambda / R / a.norm().clamp(min=1e-4) / b.norm().clamp(min=1e-4)
        W = W + strength * torch.outer(b, a * column_norms)
    return linear(x, W, layer.bias)


def ia3(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    bias = None if layer.bias is None else p.lora_g * layer.bias
    return linear(x, torch.diag(p.lora_g) @ layer.weight, bias)


def ia3_ff(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    return linear(x, layer.weight @ torch.diag(p.lora_g), layer.bias)


def hra(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    """W H₁ H₂ … H_r, the order of the paper's equation 2 and of PEFT."""
    W, eye = layer.weight, torch.eye(layer.in_features, dtype=x.dtype)
    for u in p.lora_U:
        W = W @ (eye - 2 * torch.outer(u, u) / u.square().sum())
    return linear(x, W, layer.bias)


def cayley(rot_T: Tensor, size: int, angle: float) -> Tensor:
    """The dense block-diagonal rotation, entry by entry."""
    bound = math.tan(angle / 2)
    blocks = []
    for entries in rot_T:
        remaining = iter(entries)
        X = [[torch.zeros((), dtype=rot_T.dtype) for _ in range(size)] for _ in range(size)]
        for i in range(size):
            for j in range(i + 1, size):
                X[i][j] = bound * torch.tanh(next(remaining) / (4 * bound))
                X[j][i] = -X[i][j]
        X, eye = torch.stack([torch.stack(row) for row in X]), torch.eye(size, dtype=rot_T.dtype)
        blocks.append(torch.linalg.inv(eye - X) @ (eye + X))
    return torch.block_diag(*blocks)


def antipasto(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    U, S, Vh, S_new = p.lora_U, torch.diag(p.lora_S), p.lora_Vh, torch.diag(p.lora_S + p.lora_delta_s)
    residual = layer.weight - U @ S @ Vh
    if cfg.rotate_basis == "none":
        return linear(x, residual + U @ S_new @ Vh, layer.bias)
    Q = cayley(p.lora_rot_T, cfg.block_size, cfg.max_rotation_angle)
    tuned = U @ S_new @ Q @ Vh if cfg.rotate_basis == "V" else U @ Q.t() @ S_new @ Vh
    return linear(x, residual + tuned, layer.bias)


def road(layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    """R W, with R entry by entry."""
    N, half = layer.out_features, cfg.group_size // 2
    R = torch.zeros(N, N, dtype=p.lora_theta.dtype)
    for i in (i for i in range(N) if i % cfg.group_size < half):
        j = i + half
        group, place = i // cfg.group_size, i % cfg.group_size
        if cfg.kind == 1:
            ii = ij = ji = jj = group * half + place
        elif cfg.kind == 2:
            ii, ij, ji, jj = i, i, j, j
        else:
            ii, jj = (2 * group * cfg.group_size + each for each in (place, place + half))
            ij, ji = ii + cfg.group_size, jj + cfg.group_size
        R[i, i], R[i, j] = p.lora_alpha[ii] * p.lora_theta[ii].cos(), -p.lora_alpha[ij] * p.lora_theta[ij].sin()
        R[j, i], R[j, j] = p.lora_alpha[ji] * p.lora_theta[ji].sin(), p.lora_alpha[jj] * p.lora_theta[jj].cos()
    return linear(x, R @ layer.weight, None if layer.bias is None else R @ layer.bias)


FORMULAS: dict[str, Formula] = {
    "lora": lora,
    "eva": lora,
    "pissa": pissa,
    "dora": dora,
    "delora": delora,
    "ia3": ia3,
    "ia3_ff": ia3_ff,
    "hra": hra,
    "antipasto": antipasto,
    "road": road,
}
CASES = [
    *((variant, {}) for variant in VARIANTS),
    ("hra", {"r": 2}),
    ("antipasto", {"rotate_basis": "U"}),
    ("antipasto", {"rotate_basis": "none"}),
    ("antipasto", {"block_size": 2, "max_rotation_angle": 1.3}),
    ("antipasto", {"block_size": 2, "rotate_basis": "U"}),
    ("road", {"kind": 2}),
    ("road", {"kind": 4}),
    ("road", {"kind": 4, "group_size": 2}),
]
# A leaf's shape and the view of it that the layer reads, of 11 features.
INPUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "1-D": ((11,), lambda x: x),
    "2-D": ((5, 11), lambda x: x),
    "one row": ((1, 11), lambda x: x),
    "3-D": ((2, 3, 11), lambda x: x),
    "4-D": ((2, 1, 3, 11), lambda x: x),
    "transposed": ((3, 2, 11), lambda x: x.transpose(0, 1)),
    "strided features": ((2, 3, 22), lambda x: x[..., ::2]),
    "features first": ((11, 5), lambda x: x.t()),
    "sliced": ((2, 7, 13), lambda x: x[:, 1::2, 2:]),
    "expanded": ((1, 3, 11), lambda x: x.expand(4, 3, 11)),
}


def single(
    variant: str, in_features: int, out_features: int, bias: bool, layer_dtype: torch.dtype, **fields: Any
) -> tuple[nn.Module, nn.Linear, Any, Any]:
    """A model of one layer with a randomised adapter: (model, layer, adapter, config)."""
    layer = nn.Linear(in_features, out_features, bias=bias).to(layer_dtype)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    model = nn.Sequential(layer)
    batches = [torch.randn(40, in_features, dtype=layer_dtype)] if variant == "eva" else None
    attachment = attach(model, variant, batches, target_names=(), target_roles=(), **{"alpha": ALPHA, **fields})
    randomize(model)
    return model, layer, only_adapter(model), attachment.cfg


def compare(
    model: nn.Module,
    layer: nn.Linear,
    adapter: Any,
    cfg: Any,
    leaf_shape: tuple[int, ...],
    view: Callable[[Tensor], Tensor],
    tolerance: float = 1e-10,
    x_needs_grad: bool = True,
) -> None:
    leaf = torch.randn(leaf_shape, dtype=torch.float64, requires_grad=x_needs_grad)
    names = [name for name, p in adapter.named_parameters() if p.requires_grad]
    wrt = [*([leaf] if x_needs_grad else []), *(getattr(adapter, name) for name in names)]
    want = FORMULAS[cfg.variant](layer, adapter, view(leaf), cfg)
    got = model(view(leaf))
    assert_close(got, want, tolerance, "output")
    dy = torch.randn_like(want)
    labels = [*(["x"] if x_needs_grad else []), *names]
    pairs = zip(torch.autograd.grad(got, wrt, dy), torch.autograd.grad(want, wrt, dy), strict=True)
    for label, (g, w) in zip(labels, pairs, strict=True):
        assert_close(g, w, tolerance, f"gradient of {label}")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("variant", "fields"), CASES, ids=str)
def test_output_and_all_gradients(variant: str, fields: dict[str, Any], bias: bool) -> None:
    for out_features in (8, 12, 20) if variant == "road" else (7, 11, 19):  # RoAd's are multiples of its groups
        model, layer, adapter, cfg = single(
            variant, 11, out_features, bias, torch.float64, dtype=torch.float64, **fields
        )
        assert all(t.dtype == torch.float64 for t in adapter.state_dict().values())
        for shape, view in INPUTS.values():
            compare(model, layer, adapter, cfg, shape, view)
        compare(model, layer, adapter, cfg, *INPUTS["3-D"], x_needs_grad=False)


@pytest.mark.parametrize("variant", ["lora", "dora", "delora", "eva"])
def test_where_b_is_zero(variant: str) -> None:
    """As at step 0, where DeLoRA's norms are clamped: some gradients are exactly zero, the others are the formula's."""
    model, layer, adapter, cfg = single(variant, 11, 7, True, torch.float64, dtype=torch.float64)
    nn.init.zeros_(adapter.lora_B)
    x = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    wrt = [x, *(p for p in adapter.parameters() if p.requires_grad)]
    want, got = FORMULAS[variant](layer, adapter, x, cfg), model(x)
    assert_close(got, want, 1e-10, "output")
    dy = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, wrt, dy), torch.autograd.grad(want, wrt, dy), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant: str) -> None:
    """A batch without tokens, as a router may send to an expert, flows through and leaves zero gradients."""
    model, _, adapter, _ = single(variant, 11, 8, True, torch.float32)
    x = torch.randn(2, 0, 11, requires_grad=True)
    y = model(x)
    assert y.shape == (2, 0, 8)
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters())


def test_attach_to_a_bare_layer() -> None:
    layer = nn.Linear(11, 7).double()
    attachment = attach(layer, "lora", dtype=torch.float64)
    randomize(layer)
    compare(layer, layer, only_adapter(layer), attachment.cfg, *INPUTS["2-D"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_wide_and_deep_enough_to_catch_rounding(variant: str) -> None:
    """Larger odd sizes, where a wrong accumulation type would show at 1e-7."""
    out_features = 100 if variant == "road" else 97
    model, layer, adapter, cfg = single(variant, 131, out_features, True, torch.float64, dtype=torch.float64, r=4)
    compare(model, layer, adapter, cfg, (3, 17, 131), lambda x: x)


# ---- AntiPaSTO's rotation ----


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("angle", [0.1, 0.5, 2.0, 3.1])
def test_rotation_is_a_rotation(size: int, angle: float) -> None:
    rot_T = torch.randn(6, size * (size - 1) // 2, dtype=torch.float64) * 10
    blocks = rotations(rot_T, size, angle)
    assert_close(torch.block_diag(*blocks), cayley(rot_T, size, angle), 1e-12, "rotation")
    eye = torch.eye(size, dtype=torch.float64).expand(6, size, size)
    torch.testing.assert_close(blocks @ blocks.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(blocks), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("angle", [0.1, 0.5, 2.0, 3.1])
def test_a_plane_never_turns_by_more_than_the_angle(angle: float) -> None:
    rot_T = torch.tensor([0.0, 1e-3, 0.3, -2.0, 50.0, -1e6, 1e6], dtype=torch.float64).unsqueeze(1)
    turned = torch.atan2(rotations(rot_T, 2, angle)[:, 0, 1], rotations(rot_T, 2, angle)[:, 0, 0])
    assert turned.abs().max() <= angle * (1 + 1e-12)
    assert turned[0] == 0
    assert turned[-1].item() == pytest.approx(angle)  # the bound is reached, not merely kept
    assert (turned.sign() == rot_T[:, 0].sign()).all()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_how_far_a_block_turns(size: int) -> None:
    """Entries are bounded, not the block: n axes can turn in concert, up to 2·atan(cot(π/2n)·tan(θ/2)), θ for n = 2."""
    angle = 0.5
    most = 2 * math.atan(math.tan(angle / 2) / math.tan(math.pi / (2 * size)))
    upper = size * (size - 1) // 2
    extreme = torch.cat([torch.randn(200, upper, dtype=torch.float64).sign() * 1e9, torch.full((1, upper), 1e9)])
    turned = torch.linalg.eigvals(rotations(extreme.double(), size, angle)).angle().abs().amax(1)
    assert turned.max() <= most * (1 + 1e-9)
    assert turned[-1].item() == pytest.approx(most)


@pytest.mark.parametrize("gain", [1.003, 1.005, 1.01, 0.99, 1.02])
def test_gains_near_one_are_not_rounded_to_bfloat16(gain: float) -> None:
    """bfloat16 has nothing between 1 and 1.0078. As good as the product in float32, rounded once."""
    t, g = torch.randn(8192, 1).bfloat16(), torch.tensor([gain])
    want = t.double() * g.double()
    once, twice = rel_error((t * g).bfloat16(), want), rel_error(t * g.bfloat16(), want)
    assert twice > 1.15 * once  # the test can tell them apart
    assert rel_error(lora_lite.reference.scale(t, g), want) <= 1.05 * once


@pytest.mark.parametrize("gain", [0.3, 0.01, -0.002, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gains_far_from_one(gain: float, dtype: torch.dtype, bias: bool) -> None:
    """As good as float32 rounded once, in output and gradient."""
    t, dy = (torch.randn(64, 96).to(dtype).requires_grad_() for _ in range(2))
    g = (gain * (0.5 + torch.rand(96))).requires_grad_()
    b = torch.randn(96).to(dtype) if bias else None
    got = lora_lite.reference._scale(t, g, b)
    turned = lora_lite.reference.rotate_pairs(t, g, 0.1 * g, 4)
    exact = [each.detach().double().requires_grad_() for each in (t, g)]
    offset = b.double() if b is not None else 0.0
    want = exact[1] * (exact[0] - offset) + offset
    swapped = exact[0].unflatten(-1, (-1, 2, 2)).flip(-2).flatten(1)
    for mine, theirs in ((got, want), (turned, exact[0] * exact[1] + 0.1 * exact[1] * swapped)):
        assert rel_error(mine, theirs) <= 1.5 * rel_error(theirs.to(dtype), theirs)
        for own, its in zip(
            torch.autograd.grad(mine, (t, g), dy), torch.autograd.grad(theirs, exact, dy.double()), strict=True
        ):
            assert rel_error(own, its) <= 1.5 * rel_error(its.to(dtype), its)


@pytest.mark.parametrize("turn", [3e-3, 5e-3, 1e-2])
def test_turns_near_none_are_not_rounded_to_bfloat16(turn: float) -> None:
    """As good as the sum in float32, rounded once: c − 1 is not lost, and y is rounded with what is added to it."""
    y, angle = torch.randn(4096, 8).bfloat16(), torch.full((8,), turn)
    c, s = (1 + turn) * angle.cos(), (1 + turn) * angle.sin()
    swapped = y.unflatten(-1, (2, 2, 2)).roll(1, -2).flatten(1)
    want = y.double() * c.double() + swapped.double() * s.double()
    once = rel_error(want.bfloat16(), want)
    assert rel_error(y * c.bfloat16() + swapped * s.bfloat16(), want) > 1.15 * once  # the test can tell them apart
    assert rel_error(lora_lite.reference.rotate_pairs(y, c, s, 4), want) <= 1.05 * once


# ---- Tokens in bfloat16 or float16 beside float32 parameters ----


def eager(variant: str, layer: nn.Linear, p: Any, x: Tensor, cfg: Any) -> Tensor:
    """The straightforward PyTorch of each method: small operands cast to the tokens' dtype, one operation at a time."""
    t = x.dtype
    y = linear(x, layer.weight, layer.bias)
    match variant:
        case "lora" | "eva":
            return y + linear(linear(x, p.lora_A.to(t)), p.lora_B.to(t)) * SCALE
        case "pissa":
            frozen = linear(linear(x, p.lora_A0.to(t)), p.lora_B0.to(t))
            return y - SCALE * frozen + SCALE * linear(linear(x, p.lora_A.to(t)), p.lora_B.to(t))
        case "dora":
            norm = (layer.weight.float() + SCALE * p.lora_B @ p.lora_A).norm(dim=1).detach()
            g = (p.lora_m / norm).to(t)
            update = linear(linear(x, p.lora_A.to(t)), p.lora_B.to(t))
            return y + (g - 1) * (y - layer.bias) + g * update * SCALE
        case "delora":
            strength = p.lora_lambda / R / (p.lora_A.norm(dim=1) * p.lora_B.norm(dim=0))
            h = linear(x * p.lora_wnorm.to(t), p.lora_A.to(t)) * strength.to(t)
            return y + linear(h, p.lora_B.to(t))
        case "ia3":
            return y * p.lora_g.to(t)
        case "ia3_ff":
            return linear(x * p.lora_g.to(t), layer.weight, layer.bias)
        case "hra":
            for u in p.lora_U.flip(0):
                v = (u / u.norm()).to(t)
                x = x - 2 * (x @ v).unsqueeze(-1) * v
            return linear(x, layer.weight, layer.bias)
        case "antipasto":
            Q = cayley(p.lora_rot_T, cfg.block_size, cfg.max_rotation_angle)
            h = linear(linear(x, p.lora_Vh.to(t)), Q.to(t)) * (p.lora_S + p.lora_delta_s).to(t)
            frozen = linear(x, p.lora_Vh.to(t)) * p.lora_S.to(t)
            return y + linear(h, p.lora_U.to(t)) - linear(frozen, p.lora_U.to(t))
        case "road":
            cos, sin = ((p.lora_alpha * of).to(t).view(-1, 2) for of in (p.lora_theta.cos(), p.lora_theta.sin()))
            first, second = y.unflatten(-1, (-1, 2, 2)).unbind(-2)
            return torch.stack([cos * first - sin * second, sin * first + cos * second], -2).flatten(-3)
    raise AssertionError(variant)


class Widened:
    """An adapter's tensors in float64, as leaves with gradients where the adapter has them."""

    def __init__(self, adapter: Any) -> None:
        for name, t in [*adapter.named_parameters(), *adapter.named_buffers()]:
            setattr(self, name, t.detach().double().requires_grad_(t.requires_grad))


@pytest.fixture(params=["all products", "none in 16 bit", "few tokens"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU that has instructions for products in every dtype, and one that has none for the 16-bit ones, for both of
    which these tensors are large; and one for which they are as small as they are."""
    without = {torch.bfloat16, torch.float16} if request.param == "none in 16 bit" else set()
    monkeypatch.setattr(lora_lite.reference, "WITHOUT_PRODUCTS", without)
    few = request.param == "few tokens"
    monkeypatch.setattr(lora_lite.reference, "_WORTH_16_BITS", 1 << 17 if few else 0)
    monkeypatch.setattr(lora_lite.reference, "_WORTH_THE_HOST", 1 << 20 if few else 0)
    return request.param


class Products(TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.baddbmm_):
            self.dtypes[args[-1].dtype] += 1
        elif func.namespace == "lora_lite":  # products of segments
            self.dtypes[args[0].dtype] += 1
        return func(*args, **kwargs or {})


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="runs on x86-64 Linux")
def test_what_this_cpu_has_products_for() -> None:
    """oneDNN emulates bf16 on any AVX512, several times slower than float32, and PyTorch says that it supports it."""
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]))
    assert (torch.bfloat16 in lora_lite.reference.WITHOUT_PRODUCTS) == ("avx512_bf16" not in flags)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_base_multiplies_in_what_the_cpu_can_not(variant: str, dtype: torch.dtype, cpu: str) -> None:
    """There PyTorch multiplies in plain loops, far slower than in float32."""
    model, layer, _, _ = single(variant, 24, 20, True, dtype)

    def products(call: Callable[[Tensor], Tensor]) -> int:
        x = torch.randn(2, 3, 24).to(dtype).requires_grad_()
        with Products() as seen:
            call(x).sum().backward()
        return seen.dtypes[dtype]

    alone = products(layer.forward)
    assert alone == 2
    if cpu == "all products" and not variant.startswith("ia3") and variant != "road":
        assert products(model) > alone
    else:
        assert products(model) == alone


# Runs and their matrices: a batch's entries; one far longer than the others, one empty, rows after the last; a stack in
# its order, with idle ones too; no rows at all.
RUNS = {
    "entries": ([9, 9, 9, 9], [1, -1, 0, 1]),
    "uneven": ([1, 0, 300, 5, 2, 7], [0, 1, 1, 0, -1, 1]),
    "a stack": ([17, 12], None),
    "idle ones": ([0, 9, 0, 4, 12], None),
    "no rows": ([0, 0], None),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tokens_in_more_precision_than_the_adapter(dtype: torch.dtype) -> None:
    """As after a cast of the adapter alone: nothing is rounded to its dtype, however few the tokens."""
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    y, bias = torch.randn(4, 16, dtype=wider), torch.randn(16, dtype=wider)
    c, s = torch.randn(16).to(dtype), torch.randn(16).to(dtype)
    for op in (
        lambda t, c, s: lora_lite.reference.rotate_pairs(t, c, s, 4),
        lambda t, c, s: lora_lite.reference._scale(t, c, None),
        lambda t, c, s: lora_lite.reference._scale(t, c, bias.to(t.dtype)),
    ):
        want = op(y.double(), c.double(), s.double())
        assert rel_error(op(y, c, s), want) <= 4 * torch.finfo(wider).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("K", "N", "R"), [(24, 20, 1), (1, 20, 3), (24, 1, 3), (1, 1, 1)])
def test_dimensions_of_one(dtype: torch.dtype, K: int, N: int, R: int) -> None:
    """Products of runs want strides of whole 16 bytes, which those of a dimension of one need not be."""
    sizes, M = [5, 0, 8], 16
    segments = Segments(torch.tensor(sizes).cumsum(0).int())
    x, y, A, B = torch.randn(M, K), torch.randn(M, N), torch.randn(3, R, K), torch.randn(3, N, R)
    for rows in (M, 0):
        leaves = [t.to(dtype).requires_grad_() for t in (x[:rows], y[:rows], A, B)]
        of_rows = segments if rows else Segments(torch.zeros(3, dtype=torch.int32))
        same, h = lora_lite.reference.shrink(leaves[0], leaves[2], segments=of_rows)
        out = lora_lite.reference.expand_add(leaves[1], h, leaves[3], SCALE, of_rows)
        grads = torch.autograd.grad(out.sum() + same.sum(), leaves, materialize_grads=True)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        which = of_rows.matrix_of_rows(rows).clamp_min(0)
        has = (of_rows.matrix_of_rows(rows) >= 0)[:, None]
        delta = torch.einsum("mk,mrk,mnr->mn", exact[0], exact[2][which], exact[3][which])
        want = exact[1] + SCALE * has * delta
        wanted = torch.autograd.grad(want.sum() + exact[0].sum(), exact, materialize_grads=True)
        for mine, theirs in zip((out, *grads), (want, *wanted), strict=True):
            assert mine.shape == theirs.shape
            if rows:
                assert rel_error(mine, theirs) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_group_for_each_run_on_either_cpu(dtype: torch.dtype, cpu: str, runs: str) -> None:
    lengths, which = RUNS[runs]
    M = sum(lengths) + (4 if which and sum(lengths) > 99 else 0)
    x, y, dy = (torch.randn(M, size).to(dtype) for size in (24, 20, 20))
    G = 2 if which else len(lengths)
    A, B = torch.randn(G, 3, 24) / 24**0.5, torch.randn(G, 20, 3) / 3**0.5
    A, B = A.to(dtype).float(), B.to(dtype).float()  # so that adapters in either dtype are the same
    segments = Segments(torch.tensor(lengths).cumsum(0).int(), None if which is None else torch.tensor(which))

    def run(to: torch.dtype, small: torch.dtype, of: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [*(t.to(to).requires_grad_() for t in (x, y)), *(apart(t.to(small)).requires_grad_() for t in (A, B))]
        out = of(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dy.to(to), materialize_grads=True)]

    def apart(t: Tensor) -> Tensor:
        """Contiguous neither as it is nor transposed."""
        return t.repeat_interleave(2, -1)[..., ::2]

    def eager(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        sizes, matrices = [*lengths, M - sum(lengths)], [*(which or range(len(lengths))), -1]
        A, B, done = A.to(x.dtype), B.to(x.dtype), []
        for g, xs, ys in zip(matrices, x.split(sizes), y.split(sizes), strict=True):
            done.append(ys + SCALE * (xs @ A[g].t()) @ B[g].t() if g >= 0 else ys)
        return torch.cat(done)

    def ours(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x, h = lora_lite.reference.shrink(x, A, segments=segments)
        return lora_lite.reference.expand_add(y, h, B, SCALE, segments)

    exact = run(torch.float64, torch.float64, eager)
    for small in (torch.float32, dtype):
        with Products() as seen:
            got = run(dtype, small, ours)
        few = 6 if cpu == "all products" else 0
        assert seen.dtypes[dtype] <= few, "a product for each run starts too slowly in 16 bits"
        for mine, theirs, want in zip(got, run(dtype, small, eager), exact, strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert mine.isfinite().all()
            if M:
                assert rel_error(mine, want) <= 1.5 * rel_error(theirs, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_a_row_that_is_nan_spoils_its_own_matrix_alone(dtype: torch.dtype, cpu: str) -> None:
    lengths = [9, 0, 4, 0, 12]
    segments = Segments(torch.tensor(lengths).cumsum(0).int())
    x, y, dy = (torch.randn(25, size).to(dtype) for size in (24, 20, 20))
    x[0], dy[0] = torch.nan, torch.inf
    A, B = torch.randn(5, 3, 24, requires_grad=True), torch.randn(5, 20, 3, requires_grad=True)
    _, h = lora_lite.reference.shrink(x, A, segments=segments)
    out = lora_lite.reference.expand_add(y, h, B, SCALE, segments)
    assert [bool(row.isfinite().all()) for row in out] == [False] + 24 * [True]
    for grad in torch.autograd.grad(out, (A, B), dy):
        assert [bool(each.isfinite().all()) for each in grad] == [False, True, True, True, True]
        assert not grad[1].any()
        assert not grad[3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_error_is_no_worse_than_eager(variant: str, dtype: torch.dtype, cpu: str) -> None:
    """Over several draws: a gradient of four numbers is by chance twice as far off."""
    draws = [low_precision_results(variant, dtype) for _ in range(6)]
    for name in draws[0]:
        got, plain, want = (torch.stack(each) for each in zip(*(draw[name] for draw in draws), strict=True))
        assert got.dtype == plain.dtype
        error, eager_error = rel_error(got, want), rel_error(plain, want)
        assert eager_error < 0.03, f"{name}: the eager formula is no measure, it is off by {eager_error:.2e}"
        assert error <= 1.5 * eager_error, f"{name}: {error:.2e} against {eager_error:.2e}"


def low_precision_results(variant: str, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Output and gradients by name: ours, eager PyTorch's, float64's."""
    model, layer, adapter, cfg = single(variant, 96, 80, True, dtype)
    x = torch.randn(2, 33, 96).to(dtype).requires_grad_()
    dy = torch.randn(2, 33, 80).to(dtype)
    names = [name for name, p in adapter.named_parameters() if p.requires_grad]

    def run(y: Tensor, x: Tensor, p: Any) -> dict[str, Tensor]:
        grads = torch.autograd.grad(y, [x, *(getattr(p, n) for n in names)], dy.to(y.dtype))
        return {"output": y, **dict(zip(["x", *names], grads, strict=True))}

    exact_layer, exact_x, exact_p = nn.Linear(96, 80).double(), x.detach().double().requires_grad_(), Widened(adapter)
    with torch.no_grad():
        exact_layer.weight.copy_(layer.weight)
        exact_layer.bias.copy_(layer.bias)
    exact = run(FORMULAS[variant](exact_layer, exact_p, exact_x, cfg), exact_x, exact_p)
    plain = run(eager(variant, layer, adapter, x, cfg), x, adapter)
    got = run(model(x), x, adapter)
    return {name: (got[name], plain[name], want) for name, want in exact.items()}
