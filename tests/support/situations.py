"""Models in which something is amiss, and what the library says of them."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import assert_same, snapshot
from torch import Tensor, nn

import lora_lite as ll

L = ll.LoRAConfig


def warned(call: Callable[[], Any]) -> list[str]:
    """The library's warnings during a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [
        str(w.message)
        for w in caught
        if re.match(r"after (the first |\d+ )(backward|step)s?:|\w*(save|export|verify|merged)\w*:", str(w.message))
    ]


def refused(model: nn.Module, cfg: Any, message: str, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(ll.AttachError, match=message):
        ll.attach(model, cfg, **options)
    assert_same(model, before)


class Inference(nn.Module):
    """A quantised layer whose kernel has no backward."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = size, size
        self.weight = nn.Parameter(torch.randint(-127, 127, (size, size), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
        self.classifier = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def step(loss: Tensor, parameters: Any) -> None:
    loss.backward()
    torch.optim.SGD(list(parameters), lr=1e-3).step()


class Body(nn.Module):
    """A body of which the caller says how it is run, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor, how: str = "") -> Tensor:
        if how == "skipped":
            return self.head(x)
        with torch.set_grad_enabled(how != "no_grad"):
            h = self.body(x)
        return self.head(h.detach() if how == "detached" else h)
