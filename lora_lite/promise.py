"""Under the promise that no weight changes (`unchanged`), what adapters make of their weights alone is made once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .adapter import Adapter
from .errors import AttachError
from .operators import version
from .placement import is_managed
from .primitives import Primitive
from .quantized import stored_tensor
from .segments import once
from .targets import Target


@contextmanager
def keeping(adapters: dict[Adapter, Target]) -> Iterator[None]:
    """Within this context what is made of the tensors of these, and of their layers, alone is kept."""
    mine = {
        adapter: _kept.get(adapter) or Kept(adapter, target)
        for adapter, target in adapters.items()
        if not (is_managed(adapter) or adapter.valueless or adapter.sharded or is_parametrized(adapter))
        and not (adapter.derives and is_parametrized(target.layer))  # of which each call may make another weight
    }
    _kept.update(mine)
    for kept in mine.values():
        kept.holders += 1
    refusing = register_optimizer_step_pre_hook(_refuse)
    try:
        yield
    finally:
        refusing.remove()
        for adapter, kept in mine.items():
            kept.holders -= 1
            if not kept.holders:
                _kept.pop(adapter, None)


def primitive_of(adapter: Adapter, layer: nn.Module) -> Primitive:
    """What the adapter computes around the layer, with what is kept of it."""
    as_always = torch.compiler.is_compiling() or not _kept or is_managed(layer)  # whose weight would be held
    kept = None if as_always else _kept.get(adapter)
    return adapter.primitive(layer) if kept is None else kept.primitive(adapter, layer)


class Kept:
    """What has been made of an adapter's tensors, which are as they were."""

    def __init__(self, adapter: Adapter, target: Target) -> None:
        adapter.follow(target.layer)  # now, and not in the first call
        self.name, self.tensors, self.made = target.name, _tensors(adapter), {}
        self.weight = id(stored_tensor(target.layer))
        self.ids, self.versions, self.places = _ids(self.tensors), self._versions(), self._places()
        self.holders = 0  # contexts, which may overlap

    def primitive(self, adapter: Adapter, layer: nn.Module) -> Primitive:
        """Without gradients one that was made before."""
        if _ids(_tensors(adapter)) != self.ids or id(stored_tensor(layer)) != self.weight:
            return adapter.primitive(layer)  # others stand in for them: torch.func.functional_call
        if self._versions() != self.versions:
            raise AttachError(
                f"{self.name}: its adapter's tensors, or the weight that some are derived from, have changed within "
                "unchanged(model), which says that they don't; leave the context before"
            )
        if (places := self._places()) != self.places:  # moved, or gathered anew
            self.places, self.made = places, {}
        if torch.is_grad_enabled():
            primitive = adapter.primitive(layer)
        else:
            key = (layer, adapter.dropout_now, torch.is_inference_mode_enabled())
            primitive = once(self.made, key, lambda: adapter.primitive(layer))
        primitive.made = self.made
        return primitive

    def _versions(self) -> list[int | None]:
        return [version(t) for t in self.tensors]

    def _places(self) -> list[int]:
        return [t.data_ptr() for t in self.tensors]


def _tensors(adapter: Adapter) -> list[Tensor]:
    return [t for t in (*adapter._parameters.values(), *adapter._buffers.values()) if t is not None]


def _ids(tensors: list[Tensor]) -> list[int]:
    return [id(t) for t in tensors]


_kept: dict[Adapter, Kept] = {}  # copies and replicas of a model are under no promise


def _refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before an optimiser's step. Some write past PyTorch's sight."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for kept in list(_kept.values()):
        if not stepped.isdisjoint(kept.ids):
            raise AttachError(
                f"{kept.name}: optimizer.step() within unchanged(model) would change its adapter; leave the context "
                "before"
            )
