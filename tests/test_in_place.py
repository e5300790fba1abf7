"""A sum is written into the layer's output where nobody else needs that, and nowhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from models import assert_close, randomize
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import lora_lite as ll

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


def test_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model, linear, places = adapted(nn.Linear(5, 7)), nn.functional.linear, []

    def noted(*args: Any) -> Tensor:
        y = linear(*args)
        places.append(y.data_ptr())
        return y

    monkeypatch.setattr(nn.functional, "linear", noted)
    assert model(torch.randn(4, 5, requires_grad=True)).data_ptr() == places[0]


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
