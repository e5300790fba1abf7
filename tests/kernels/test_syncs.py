"""A training step on a GPU does not wait for it: nothing asks a tensor for its values, and nothing is copied there.

Seen on a CPU: the operators that hand values to the host, or whose result's size depends on them, do not run, and no
tensor is made of a Python list. The first step makes what later ones share.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from models import VARIANTS, attach, config, llama, randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "equal", "_linalg_check_errors"}


class _Waits(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [each for arg in args if isinstance(arg, list) for each in arg] if name.startswith("index") else []
        by_mask = any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)
        if name in WAITING or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def without_waiting() -> Iterator[None]:
    """An operator that would wait for a GPU raises within the context."""
    copied = AssertionError("a list is copied to the device")
    with _Waits(), mock.patch("torch.tensor", side_effect=copied), mock.patch("torch.as_tensor", side_effect=copied):
        yield


def step(attachments: Sequence[ll.Attachment], model: nn.Module, batch: tuple[int, ...]) -> None:
    """Forward and backward of each adapted layer by itself: transformers' model around them has waits of its own."""
    layers: list[Any] = [model.get_submodule(name) for name in attachments[0].adapters]
    inputs = [torch.randn(*batch, layer.in_features, requires_grad=True) for layer in layers]
    torch.stack([layer(x).square().mean() for layer, x in zip(layers, inputs, strict=True)]).sum().backward()


@pytest.mark.parametrize("wait", ["item", "bool", "list", "solve", "mask"])
def test_a_wait_is_seen(wait: str) -> None:
    t = torch.eye(3)
    waits = {
        "item": lambda: t[0, 0].item(),
        "bool": lambda: bool(t.all()),
        "list": lambda: torch.tensor([1, 2], device=t.device),
        "solve": lambda: torch.linalg.solve(t, t),
        "mask": lambda: t[t > 0],
    }
    with without_waiting(), pytest.raises(AssertionError):
        waits[wait]()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits(variant: str) -> None:
    model = llama(num_hidden_layers=1)
    attachment = attach(model, variant)
    randomize(model)
    step([attachment], model, (3, 8))
    with without_waiting():
        step([attachment], model, (3, 8))


@pytest.mark.parametrize("lengths", [None, [5, 9, 10]])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_no_step_with_an_adapter_for_each_row_waits(variant: str, lengths: Any) -> None:
    """Sums as one grouped sum, and adapters that run on rows of their own."""
    model = llama(num_hidden_layers=1)
    attachments = [ll.attach(model, config(variant), name=name) for name in ("a", "b")]
    randomize(model)
    ll.use(model, ["a", "b", None], lengths=lengths)
    batch = (3, 8) if lengths is None else (1, 24)
    step(attachments, model, batch)
    with without_waiting():
        step(attachments, model, batch)
