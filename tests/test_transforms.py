"""Forward-mode derivatives, torch.func, traces and second derivatives: right for every method, in 16 bits too."""

import copy
import warnings
from typing import Any

import pytest
import torch
from models import VARIANTS, assert_close, attach, config, load_tests, randomize
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from zoo import ZOO

import lora_lite as ll
from lora_lite.segments import Segments

F64 = torch.float64
stack_of = load_tests("test_experts").stack_of


class Pair(nn.Module):
    """Two layers that read one x."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q(x)) * self.k(x)


def pair(variant: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = Pair()
    batches = [torch.randn(30, 8)] if variant in ("eva", "antipasto") else None
    own = {"antipasto": {"block_size": 2}, "road": {"group_size": 4}}.get(variant, {})
    attach(model, variant, batches, r=2, target_names=(), target_roles=(), **own)
    randomize(model, by=0.3)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_transforms(variant: str, dtype: torch.dtype) -> None:
    """A derivative along a direction of x, in both ways to ask for it, and each row's own gradients."""
    model, tolerance = pair(variant, dtype), 1e-5 if dtype == torch.float32 else 4e-2
    x, v = torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    exact = pair(variant, torch.float32).double()
    wide, step = x.double(), 1e-6 * v.double()
    slope = (exact(wide + step) - exact(wide - step)) / 2e-6
    assert_close(jvp(model, (x,), (v,))[1].double(), slope, tolerance, "jvp")
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    assert tangent is not None
    assert_close(tangent.double(), slope, tolerance, "dual numbers")

    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, params, (row,)).float().square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for name, p in exact.named_parameters():
        if p.requires_grad:
            rows = [torch.autograd.grad(exact(row).square().sum(), p)[0] for row in wide]
            assert_close(each[name].double(), torch.stack(rows), tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_transforms(variant: str, dtype: torch.dtype) -> None:
    """Gradients, each row's own, and derivatives along x, in one graph as without."""
    torch._dynamo.reset()
    model = pair(variant, dtype)
    x, v = torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).float().square().sum()

    def transforms(params: dict[str, Tensor], x: Tensor) -> tuple[Any, ...]:
        return grad(loss)(params, x), vmap(grad(loss), (None, 0))(params, x), {"jvp": jvp(model, (x,), (v,))[1]}

    wants, gots = transforms(params, x), torch.compile(transforms, fullgraph=True, backend="aot_eager")(params, x)
    for want, got in zip(wants, gots, strict=True):
        for name in want:
            assert_close(got[name], want[name], 1e-5 if dtype == torch.float32 else 2e-2, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives_along_the_parameters_are_their_gradients(variant: str) -> None:
    """DoRA's norm is a constant to both."""
    model, x = pair(variant, F64), torch.randn(4, 8, dtype=F64)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    along = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (x,)).square().sum()

    (slope,) = jvp(loss, (params,), (along,))[1:]
    grads = grad(loss)(params)
    assert_close(slope, sum((grads[name] * along[name]).sum() for name in params), 1e-10)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "dora"])
def test_second_derivatives_reach_the_parameters(variant: str) -> None:
    """Of layers that share an x too: a gradient penalty's own gradient, against its difference."""
    model, x = pair(variant, F64), torch.randn(4, 8, dtype=F64, requires_grad=True)
    assert_penalty_has_its_gradient(model, x)


def assert_penalty_has_its_gradient(model: nn.Module, x: Tensor) -> None:
    params = [p for p in model.parameters() if p.requires_grad]

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    grads = torch.autograd.grad(penalty(), params)
    along = [torch.randn_like(p) for p in params]
    values = []
    for by in (1e-6, -1e-6):
        with torch.no_grad():
            for p, d in zip(params, along, strict=True):
                p.add_(d, alpha=by)
        values.append(penalty().item())
        with torch.no_grad():
            for p, d in zip(params, along, strict=True):
                p.sub_(d, alpha=by)
    want = (values[0] - values[1]) / 2e-6
    got = sum((g * d).sum().item() for g, d in zip(grads, along, strict=True))
    assert abs(got - want) <= 1e-6 * abs(want)


class OfRuns(nn.Module):
    """A stack of experts, with the runs of its rows."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.stack, _, self.segments = stack_of(variant, F64, dtype=F64, r=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x, segments=self.segments)


def in_runs(kind: str, variant: str) -> tuple[nn.Module, Tensor]:
    """A module whose rows have adapters of their own, by entry of the batch or by expert, and its x."""
    if kind == "a stack":
        model: Any = OfRuns(variant)
        return model, torch.randn(13, model.stack.in_features, dtype=F64, requires_grad=True)
    if kind == "entries":
        model, x = Pair(), torch.randn(3, 4, 8, dtype=F64, requires_grad=True)
        for name in "ab":
            ll.attach(model, config(variant, r=2, target_names=(), target_roles=()), name=name)
        ll.use(model, ["a", None, "b"])
    else:
        model, x = ZOO["qwen3_moe"][0]().model.layers[0].mlp, torch.randn(1, 5, 32, dtype=F64, requires_grad=True)
        model.experts.config._experts_implementation = "eager"
        attach(model, variant, r=2, target_names=(r"experts\.",), target_roles=())
    randomize(model, by=0.3)
    return model.double(), x


@pytest.mark.parametrize("kind", ["entries", "a stack", "experts"])
@pytest.mark.parametrize("variant", ["lora", "hra", "ia3", "road"])
def test_rows_in_runs(kind: str, variant: str) -> None:
    model, x = in_runs(kind, variant)
    if kind != "experts":  # whose router computes in float32
        assert_penalty_has_its_gradient(model, x)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    along = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (x.detach(),)).square().sum()

    grads = grad(loss)(params)
    (slope,) = jvp(loss, (params,), (along,))[1:]
    assert_close(slope, sum((grads[name] * along[name]).sum() for name in params), 1e-10)
    model(x.detach()).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert_close(grads[name], p.grad, 1e-10, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trace_is_a_program(variant: str, tmp_path: Any) -> None:
    model, x = pair(variant, torch.float32), torch.randn(4, 8)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "traced.pt")
        assert_close(torch.jit.load(tmp_path / "traced.pt")(x), model(x), 1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("variant", ["lora", "hra", "ia3"])
def test_a_trace_of_experts_takes_other_tokens(variant: str) -> None:
    model, x = in_runs("experts", variant)
    others = torch.randn_like(x)
    with torch.no_grad():
        assert_close(torch.jit.trace(model, x)(others), model(others), 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_bakes_no_runs_in() -> None:
    """Whose tokens go where is another thing for other tokens."""
    with pytest.raises(ll.AttachError, match=r"torch\.export"):
        torch.jit.trace(lambda ends: torch.tensor(Segments(ends).sizes(5)), torch.tensor([2, 4]))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["experts", "q and k"])
@pytest.mark.parametrize("variant", ["lora", "hra", "ia3", "road"])
def test_many_gradients_at_once(variant: str, kind: str, dtype: torch.dtype) -> None:
    """As jacobian(vectorize=True) asks for them, which maps by another way than `vmap`."""
    model, x = in_runs(kind, variant) if kind == "experts" else (pair(variant, F64), torch.randn(1, 4, 8, dtype=F64))
    y = model.to(dtype)(x.to(dtype)).flatten()[:6]
    adapters = [p for p in model.parameters() if p.requires_grad]
    directions = torch.eye(6, dtype=dtype)
    at_once = torch.autograd.grad(y, adapters, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        one_by_one = torch.autograd.grad(y, adapters, direction, retain_graph=True)
        for got, want in zip(at_once, one_by_one, strict=True):
            assert_close(got[i], want, 3e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_what_is_derived_of_a_weight_that_stands_in(kind: str) -> None:
    """DoRA's ‖W‖² of another base, in a call and in transforms; the model keeps its own, and what is compiled too."""
    if kind == "experts":
        model, x = in_runs("experts", "dora")
    else:
        model, x = pair("dora", torch.float32), torch.randn(4, 8)
    adapted = {name for name, t in model.named_parameters() if not t.requires_grad and t.ndim > 1}
    assert adapted
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, t in other.named_parameters():
            if name in adapted:
                t.mul_(torch.rand_like(t) + 0.5)
    own, want = model(x), other(x)
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    bases = {name: t.detach() for name, t in other.named_parameters() if name in adapted}
    assert_close(functional_call(model, bases, (x,)), want, 1e-6)
    assert all(torch.equal(t, buffers[name]) for name, t in model.named_buffers())
    if kind == "linear":
        both = {name: torch.stack([dict(model.named_parameters())[name].detach(), t]) for name, t in bases.items()}
        found = vmap(lambda p: functional_call(model, p, (x,)))(both)
        assert_close(found[0], own, 1e-5)
        assert_close(found[1], want, 1e-5)
        assert_close(vmap(model)(x[:, None])[:, 0], own, 1e-5)
        got, _ = jvp(lambda x: functional_call(model, bases, (x,)), (x,), (x,))
        assert_close(got, want, 1e-5)
        with torch.no_grad():  # a write that PyTorch sees, and no call since
            for name, t in model.named_parameters():
                if name in adapted:
                    t.copy_(bases[name])
        assert_close(vmap(model)(x[:, None])[:, 0], want, 1e-5)


@pytest.mark.parametrize("how", ["torch.func", "twice"])
@pytest.mark.parametrize("variant", ["ia3", "ia3_ff", "road", "dora"])
def test_sums_over_many_tokens_are_of_the_vectors_precision(variant: str, how: str) -> None:
    """Of a float16 base, whose numbers end at 65,504, and with the vectors in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32).half()).requires_grad_(False)
    attach(model, variant, target_names=(".*",))
    x = (torch.randn(40_000, 16) + 1).half()
    own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def loss(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(model, own, (x,)).float() * 10).sum()

    if how == "torch.func":
        found = torch.func.grad(loss)(own, x)
    else:
        x, of = x.requires_grad_(), {name: t.requires_grad_() for name, t in own.items()}
        (dx,) = torch.autograd.grad(loss(of, x), x, create_graph=True)
        grads = torch.autograd.grad(dx.float().square().sum(), list(of.values()), allow_unused=True)
        found = {name: t for name, t in zip(of, grads, strict=True) if t is not None}
    assert all(t.isfinite().all() for t in found.values())
    assert max(t.abs().max() for t in found.values()) > 65_504, "a sum that float16 could hold shows nothing"


def test_nothing_is_said_where_nothing_was_asked() -> None:
    """`backend="auto"` runs what works, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pair("lora", torch.float32)
        jvp(model, (torch.randn(4, 8),), (torch.randn(4, 8),))
