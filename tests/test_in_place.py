"""A sum is written into a layer's output, and into the gradient that the layer gives its input, where nobody else needs
those."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from models import assert_close, randomize
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from lora_lite import in_place, reference

KINDS = {
    "linear": lambda: nn.Linear(5, 7),
    "no bias": lambda: nn.Linear(5, 7, bias=False),
    "gpt2": lambda: Conv1D(7, 5),
}


def adapted(layer: nn.Module, variant: str = "lora") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    config = {"lora": ll.LoRAConfig, "dora": ll.DoRAConfig}[variant]
    ll.attach(model, config(r=3, alpha=5, target_roles=(), target_names=("0",)))
    randomize(model)
    return model


def base(layer: Any, x: Tensor) -> Tensor:
    """W x + b in float64."""
    W = layer.weight.detach().double()
    y = x @ (W if isinstance(layer, Conv1D) else W.T)
    return y if layer.bias is None else y + layer.bias.detach().double()


def assert_exact(model: Any, x: Tensor, y: Tensor, then: Callable[[Tensor], Tensor] = lambda t: t) -> None:
    """y and all gradients of Σ y² against `then`(W x + b) + (α/r) B A x in float64."""
    p = model[0].lora_lite["default"]
    got = torch.autograd.grad(y.square().sum(), (x, p.lora_A, p.lora_B))
    wide = [t.detach().double().requires_grad_() for t in (x, p.lora_A, p.lora_B)]
    want = then(base(model[0], wide[0])) + (5 / 3) * (wide[0] @ wide[1].T) @ wide[2].T
    for found, exact in zip((y, *got), (want, *torch.autograd.grad(want.square().sum(), wide)), strict=True):
        assert_close(found.double(), exact, 1e-6)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape(kind: str, shape: tuple[int, ...]) -> None:
    """And the output is as good as a new tensor: it can be written to."""
    model, x = adapted(KINDS[kind]()), torch.randn(shape, requires_grad=True)
    assert_exact(model, x, model(x))
    y = model(x).mul_(2)
    assert_close(y.double(), 2 * model(x).double(), 1e-6)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_close(grad, 2 * torch.autograd.grad(model(x).sum(), x)[0], 1e-6)
    with torch.no_grad():
        assert_close(model(x).double(), y.double() / 2, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_to(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, add, places = adapted(KINDS[kind]()), in_place.expand_add, []

    def noted(y: Tensor, *args: Any) -> Tensor:
        places.append(y.data_ptr())
        return add(y, *args)

    monkeypatch.setattr(in_place, "expand_add", noted)
    assert model(torch.randn(4, 5, requires_grad=True)).data_ptr() == places[0]


def test_a_small_one_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, xs = adapted(nn.Linear(5, 7)), (torch.randn(4, 5), torch.randn(8, 5))
    large = [model(x) for x in xs]
    monkeypatch.setattr(in_place, "_WORTH_A_LOOK", 8 * 7 * 4)
    with mock.patch.object(in_place, "expand_add", wraps=in_place.expand_add) as written:
        assert all(torch.equal(model(x), y) for x, y in zip(xs, large, strict=True))
    assert written.call_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_no_size_is_asked_for_in_a_trace(dtype: torch.dtype, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask picks so many rows as nobody knows."""
    monkeypatch.setattr(in_place, "_WORTH_A_LOOK", 1 << 20)
    for name, size in {"_WORTH_16_BITS": 1 << 17, "_WORTH_SHARING": 1 << 18}.items():
        monkeypatch.setattr(reference, name, size)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(5, 7), nn.Linear(5, 7)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            picked = x[mask]
            y = self.q_proj(picked) * self.k_proj(picked)
            return torch.autograd.grad(y.sum(), x)[0] if trains else y

    model = Pair()
    ll.attach(model, ll.LoRAConfig(r=3, target_names=("_proj",)))
    randomize(model)
    model.to(dtype)
    x, mask = torch.randn(6, 5).to(dtype).requires_grad_(trains), torch.tensor([True, False] * 3)
    traced = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x, mask)
    few = torch.tensor([True, *[False] * 5])
    torch.testing.assert_close(traced(x, few), model(x, few), rtol=2e-2, atol=2e-2)


# ---- somebody else needs the base's output ---------------------------------------------------------------------------


class Exp(nn.Linear):
    """Its backward needs its output."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).exp()


class Keeps(nn.Linear):
    kept: Tensor

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept


class Sees(TorchDispatchMode):
    """Keeps what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kept += [out] if isinstance(out, Tensor) and out.shape == (4, 7) else []
        return out


class SeesCalls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kept += [out] if func is nn.functional.linear else []
        return out


def keep(kept: list[Tensor], module: nn.Module, args: Any, y: Tensor) -> None:
    if isinstance(module, nn.Linear):
        kept.append(y)


@contextmanager
def hook_before_attach() -> Iterator[tuple[Any, list[Tensor]]]:
    kept, layer = [], nn.Linear(5, 7)
    layer.register_forward_hook(partial(keep, kept))
    yield adapted(layer), kept


@contextmanager
def hook_put_in_front() -> Iterator[tuple[Any, list[Tensor]]]:
    kept, model = [], adapted(nn.Linear(5, 7))
    model[0].register_forward_hook(partial(keep, kept), prepend=True)
    yield model, kept


@contextmanager
def hook_on_all_modules() -> Iterator[tuple[Any, list[Tensor]]]:
    kept: list[Tensor] = []
    handle = register_module_forward_hook(partial(keep, kept))
    try:
        yield adapted(nn.Linear(5, 7)), kept
    finally:
        handle.remove()


@contextmanager
def own_forward() -> Iterator[tuple[Any, list[Tensor]]]:
    kept, model = [], adapted(nn.Linear(5, 7))
    forward = model[0].forward

    def keeping(x: Tensor) -> Tensor:
        kept.append(forward(x))
        return kept[-1]

    model[0].forward = keeping
    yield model, kept


@contextmanager
def patched(owner: Any, name: str) -> Iterator[tuple[Any, list[Tensor]]]:
    kept, call = [], getattr(owner, name)

    @functools.wraps(call)
    def keeping(*args: Any) -> Tensor:
        kept.append(call(*args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, keeping)
        yield adapted(nn.Linear(5, 7)), kept


@contextmanager
def conv1d_of_the_user() -> Iterator[tuple[Any, list[Tensor]]]:
    kept: list[Tensor] = []

    class Conv1D(transformers.pytorch_utils.Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(super().forward(x))
            return kept[-1]

    model = adapted(Conv1D(7, 5))
    kept.clear()  # attach tries the layer
    yield model, kept


@contextmanager
def class_of_the_user() -> Iterator[tuple[Any, list[Tensor]]]:
    model, kept = adapted(Keeps(5, 7)), []
    model.register_forward_hook(lambda module, args, y: kept.append(model[0].kept))
    yield model, kept


@contextmanager
def mode(kind: type) -> Iterator[tuple[Any, list[Tensor]]]:
    model = adapted(nn.Linear(5, 7))
    with kind() as seen:
        yield model, seen.kept


NEEDED: dict[str, Callable[[], Any]] = {
    "a hook before attach": hook_before_attach,
    "a hook put in front": hook_put_in_front,
    "a hook on all modules": hook_on_all_modules,
    "a forward of its own": own_forward,
    "a class of the user's": class_of_the_user,
    "a Conv1D of the user's": conv1d_of_the_user,
    "a forward for all layers": lambda: patched(nn.Linear, "forward"),
    "another product": lambda: patched(nn.functional, "linear"),
    "operators": lambda: mode(Sees),
    "functions": lambda: mode(SeesCalls),
}


@pytest.mark.parametrize("who", NEEDED)
def test_who_needs_the_output_finds_it(who: str) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    with NEEDED[who]() as (model, kept):
        y = model(x)
    assert_close(kept[0].double(), base(model[0], x.double()), 1e-6)
    assert_exact(model, x, y)


def test_a_backward_that_needs_the_output() -> None:
    model, x = adapted(Exp(5, 7)), torch.randn(4, 5, requires_grad=True)
    assert_exact(model, x, model(x), torch.exp)


# ---- somebody else needs the gradient that the layer gives its input -------------------------------------------------


class Pair(nn.Module):
    """Two layers that read one x."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.gate(x)


Seen = list[tuple[Tensor, Tensor]]  # tensors, and what they held then


def of_backward_hook(layer: nn.Module, seen: Seen) -> Any:
    return layer.register_full_backward_hook(lambda module, grads, _: seen.append((grads[0], grads[0].clone())))


def of_all_backward_hooks(layer: nn.Module, seen: Seen) -> Any:
    def see(module: nn.Module, grads: Any, _: Any) -> None:
        if module is layer:
            seen.append((grads[0], grads[0].clone()))

    return register_module_full_backward_hook(see)


def of_input(layer: nn.Module, seen: Seen) -> Any:
    def before(module: nn.Module, args: Any) -> None:
        args[0].register_hook(lambda grad: seen.append((grad, grad.clone())))

    return layer.register_forward_pre_hook(before)


def of_input_after_the_call(layer: nn.Module, seen: Seen) -> Any:
    def after(module: nn.Module, args: Any, y: Tensor) -> None:
        args[0].register_hook(lambda grad: seen.append((grad, grad.clone())))

    return layer.register_forward_hook(after)


@pytest.mark.parametrize("ask", [of_backward_hook, of_all_backward_hooks, of_input, of_input_after_the_call])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "shared"])
def test_who_needs_the_gradient_keeps_it(alone: bool, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layer's input; and x gets all of it."""
    monkeypatch.setattr(reference, "_WORTH_THE_HOST", 0)
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 7)) if alone else Pair()
    ll.attach(model, ll.LoRAConfig(r=3, target_roles=(), target_names=(r"^\w+$",)))
    randomize(model)
    x, seen = torch.randn(4, 5, requires_grad=True), []
    (want,) = torch.autograd.grad(model.double()(wide := x.double()).square().sum(), x)
    model.float()
    del wide
    handle = ask(next(model.children()), seen)
    try:
        (got,) = torch.autograd.grad(model(x).square().sum(), x)
    finally:
        handle.remove()
    ((kept, then),) = seen
    assert torch.equal(kept, then)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "shared"])
def test_the_gradient_is_written_to(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """dh A is added where the layer's gradient lies, once for each backward of a graph that is kept; not into one that
    is to be differentiated again."""
    monkeypatch.setattr(reference, "_WORTH_THE_HOST", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7)) if alone else Pair()
    ll.attach(model, ll.LoRAConfig(r=3, target_roles=(), target_names=(r"^\w+$",)))
    randomize(model)
    added, into = [], Tensor.addmm_
    monkeypatch.setattr(Tensor, "addmm_", lambda t, *args, **kwargs: added.append(t.shape) or into(t, *args, **kwargs))
    x = torch.randn(4, 5, requires_grad=True)
    y = model(x).square().sum()
    added.clear()
    grads = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    assert added == [(4, 5)] * 2
    added.clear()
    grads.append(torch.autograd.grad(y, x, create_graph=True)[0])
    assert len(added) == (0 if alone else 1), "the sum of two is ours in any case"
    assert torch.equal(grads[0], grads[1])
    assert_close(grads[2], grads[0], 1e-6)
    wide = copy.deepcopy(model).double()
    assert torch.autograd.gradgradcheck(wide, (x.detach().double().requires_grad_(),))


def test_two_adapters_and_a_scale_between() -> None:
    """The scale's backward needs what the first sum made."""
    model, x = adapted(nn.Linear(5, 7)), torch.randn(4, 5)
    ll.attach(model, ll.IA3Config(target_roles=(), target_names=("0",)), name="scale")
    ll.attach(model, ll.LoRAConfig(r=2, target_roles=(), target_names=("0",)), name="last")
    randomize(model)
    model.double()
    wide = x.double().requires_grad_()
    assert torch.autograd.gradcheck(model, (wide,))


def test_selective_checkpointing_finds_what_it_saved() -> None:
    model, x = adapted(nn.Linear(5, 7)), torch.randn(4, 5, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE)
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    assert_exact(model, x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_16_bits_under_autocast(variant: str, dtype: torch.dtype) -> None:
    """As without it, whatever the CPU multiplies in."""
    model, x = adapted(nn.Linear(5, 7), variant).to(dtype), torch.randn(4, 5, dtype=dtype)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    assert_close(y, model(x), 2e-2)


def test_no_rows() -> None:
    model, x = adapted(nn.Linear(5, 7)), torch.randn(0, 5, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == (0, 7)
    assert x.grad is not None
    assert x.grad.shape == (0, 5)


def test_a_recomputation_without_the_forwards_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves what the forward saved, whoever looked on then."""
    monkeypatch.setattr(reference, "_WORTH_THE_HOST", 0)
    model = adapted(nn.Linear(5, 7))
    x, kept = torch.randn(4, 5, requires_grad=True), []
    handle = model[0].register_forward_hook(lambda layer, args, y: kept.append(y.clone()))
    y = checkpoint(model, x, use_reentrant=False)
    handle.remove()
    assert_exact(model, x, y)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("rows", [8, 600])
def test_products_have_autocasts_dtype(together: bool, rows: int) -> None:
    """Of an x of any size, alone and shared; and what is saved is the copy that was multiplied."""
    x, A = torch.randn(rows, 512, requires_grad=True), torch.randn(4, 512, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for ops in (reference, in_place):
            h = ops.shrink_together(x, [A])[1][0] if together else ops.shrink(x, A)[1]
            assert h.dtype == torch.bfloat16
    assert_close(h.float(), x @ A.t(), 2e-2)
    h.sum().backward()
    assert A.grad is not None
    assert_close(A.grad, x.detach().sum(0).expand(4, 512), 2e-2)


def test_compiled_for_batches_of_any_length() -> None:
    """One graph serves all lengths, and so does an exported one."""
    model = adapted(nn.Linear(512, 7))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    exported = torch.export.export(
        model, (torch.randn(3, 512),), dynamic_shapes=({0: torch.export.Dim("rows")},)
    ).module()
    for rows in (3, 5, 700, 9):
        x = torch.randn(rows, 512, requires_grad=True)
        for run in (compiled, exported):
            assert_close(run(x), model(x), 1e-5)
