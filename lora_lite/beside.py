"""What a model has beside its adapters: the flags to restore, and what changed that no adapter's file will hold."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .params import Params

_LARGE = 1 << 20  # elements: statistics are smaller, and larger buffers would cost their size again


class Beside:
    """The base's parameters with their `requires_grad` as they were before the first adapter, and a copy of its small
    buffers: BatchNorm's running statistics are among them."""

    def __init__(self, model: nn.Module) -> None:
        self.flags: list[tuple[nn.Parameter, bool]] = [(p, p.requires_grad) for p in model.parameters()]
        self.buffers = {name: t.detach().clone() for name, t in _buffers(model).items()}

    def freeze(self, model: Any) -> None:
        """Nothing of the base trains. transformers' Trainer, which takes a quantised model only with adapters that it
        knows, is told that this one can be trained."""
        for p, _ in self.flags:
            p.requires_grad_(False)
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            model.hf_quantizer = _trainable(quantizer)

    def restore(self, model: Any) -> None:
        """The flags as they were."""
        for p, flag in self.flags:
            p.requires_grad_(flag)
        if (quantizer := getattr(getattr(model, "hf_quantizer", None), "of_the_base", None)) is not None:
            model.hf_quantizer = quantizer

    def lost(self, model: nn.Module) -> str:
        """What an adapter's file does not hold although it trains or has changed; empty: nothing."""
        own = {id(p) for module in model.modules() if isinstance(module, Params) for p in module.parameters()}
        trains = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
        changed = [name for name, t in _buffers(model).items() if _differs(self.buffers.get(name), t)]
        parts = []
        if trains:
            parts.append(f"parameters of the base that train ({_first(trains)})")
        if changed:
            parts.append(f"buffers that have changed since attach ({_first(changed)}), such as BatchNorm's statistics")
        if not parts:
            return ""
        return f"the file holds the adapter alone, and not {' nor '.join(parts)}: save those too, or they are lost"


def _trainable(quantizer: Any) -> Any:
    """The same quantizer of transformers, which says of its model that it can be trained."""
    adapted = copy.copy(quantizer)
    adapted.of_the_base = quantizer
    overridden = {"is_qat_trainable": True, "is_trainable": True, "__reduce__": _rebuild}
    adapted.__class__ = type(type(quantizer).__name__, (type(quantizer),), overridden)
    return adapted


def _rebuild(adapted: Any) -> Any:
    """How to copy and pickle one: its class has no name that could be looked up."""
    return _trainable, (adapted.of_the_base,)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The small buffers of the base that a state dict holds."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Params):
            continue
        for key, t in module.named_buffers(recurse=False):
            if t is None or t.is_meta or t.numel() > _LARGE or key in module._non_persistent_buffers_set:
                continue
            found[f"{path}.{key}" if path else key] = t
    return found


def _differs(before: Tensor | None, now: Tensor) -> bool:
    """Whether a buffer holds other values, apart from the rounding of a change of dtype."""
    if before is None or before.shape != now.shape:
        return True
    before = before.to(now.device)
    if before.dtype == now.dtype or not (before.is_floating_point() and now.is_floating_point()):
        return not torch.equal(before.nan_to_num(), now.nan_to_num())
    coarse = max(torch.finfo(before.dtype).eps, torch.finfo(now.dtype).eps)
    return not torch.allclose(before.double(), now.detach().double(), rtol=2 * coarse, atol=coarse, equal_nan=True)


def _first(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
