"""What a model has beside its adapters: the flags to restore, what changed that no adapter's file holds, and PEFT."""

import copy
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import AttachError
from .params import Params
from .quantized import is_dense, widened
from .renaming import dotted, named_modules, named_parameters

_LARGE = 1 << 20  # elements: statistics are smaller, and larger buffers would cost their size again


class Beside:
    """Of the base as it was before the first adapter: its parameters' `requires_grad`, a few of their elements, and a
    copy of its small buffers, BatchNorm's running statistics among them. No tensor of the base is kept alive."""

    def __init__(self, model: nn.Module) -> None:
        self.flags = {name: p.requires_grad for name, p in named_parameters(model, remove_duplicate=False)}
        self.size = sum(p.numel() for p in model.parameters() if not is_lazy(p))
        self.samples = {name: _sample(p) for name, p in named_parameters(model) if _readable(p)}
        self.buffers = {name: t.detach().clone() for name, t in buffers(model).items()}

    def freeze(self, model: Any) -> None:
        """Nothing of the base trains. transformers' Trainer, which takes a quantised model only with adapters that it
        knows, is told that this one can be trained."""
        for p in model.parameters():
            p.requires_grad = False  # not by requires_grad_, which a parameter without a shape refuses
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            model.hf_quantizer = _trainable(quantizer)

    def restore(self, model: Any) -> None:
        """The flags as they were, by name: tensors may have been replaced meanwhile. One under a new name gets the flag
        that most had."""
        most = sum(self.flags.values()) * 2 > len(self.flags)
        for name, p in named_parameters(model, remove_duplicate=False):
            if p.is_floating_point() or p.is_complex():
                p.requires_grad = self.flags.get(name, most)
        if (quantizer := getattr(getattr(model, "hf_quantizer", None), "of_the_base", None)) is not None:
            model.hf_quantizer = quantizer

    def lost(self, model: nn.Module, held: Container[str] = ()) -> str:
        """What an adapter's file does not hold although it trains or has changed; empty: nothing. `held`: names of
        the base's tensors that some adapter's file holds."""
        own = {id(p) for module in model.modules() if isinstance(module, Params) for p in module.parameters()}
        trains = [name for name, p in named_parameters(model) if p.requires_grad and id(p) not in own]
        changed = [name for name, t in buffers(model).items() if differs(self.buffers.get(name), t)]
        moved = [
            name
            for name, p in named_parameters(model)
            if name in self.samples and name not in trains and _readable(p) and self._is_another(name, _sample(p))
        ]
        trains, changed, moved = ([name for name in names if name not in held] for names in (trains, changed, moved))
        parts = []
        if trains:
            parts.append(f"parameters of the base that train ({_first(trains)})")
        if moved:
            parts.append(f"parameters of the base that have changed since attach ({_first(moved)})")
        if changed:
            parts.append(f"buffers that have changed since attach ({_first(changed)}), such as BatchNorm's statistics")
        if not parts:
            return ""
        lost = " nor ".join(parts)
        return f"the file holds the adapter alone, and not {lost}; modules_to_save in the config saves whole modules"

    def _is_another(self, name: str, now: Tensor) -> bool:
        """Whether a weight is none of those that there were: a block may have moved."""
        return not _alike(self.samples[name], now) and not any(_alike(before, now) for before in self.samples.values())


def peft_in(model: nn.Module) -> str:
    """A layer that PEFT has adapted, or else a module of its own (prompts, wrappers), and what it is; empty: none."""
    found = [(path, m) for path, m in model.named_modules() if _is_pefts(m)]
    for path, module in sorted(found, key=lambda each: not hasattr(each[1], "base_layer")):
        return f"{path or type(model).__name__} is PEFT's {type(module).__name__}"
    return ""


def _is_pefts(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def require_no_peft(model: nn.Module, what: str) -> None:
    """Raise where PEFT was put on the model after attach: layers have other names, and adapters of which we know none.

    Raises:
        AttachError: the message names one.
    """
    if found := peft_in(model):
        raise AttachError(
            f"{what}: {found}, put there after attach: layers have other names now, and what is attached here is "
            "frozen or not alone. Call PEFT's unload() or merge_and_unload() first"
        )


def _trainable(quantizer: Any) -> Any:
    """The same quantizer of transformers, which says of its model that it can be trained."""
    adapted = copy.copy(quantizer)
    adapted.of_the_base = quantizer
    overridden = {"is_qat_trainable": True, "__reduce__": _rebuild}
    adapted.__class__ = type(type(quantizer).__name__, (type(quantizer),), overridden)
    return adapted


def _rebuild(adapted: Any) -> Any:
    """How to copy and pickle one: its class has no name that could be looked up."""
    return _trainable, (adapted.of_the_base,)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The small buffers of the base that a state dict holds."""
    found = {}
    for path, module in named_modules(model):
        if isinstance(module, Params):
            continue
        for key, t in module.named_buffers(recurse=False):
            if t is None or is_lazy(t) or t.is_meta or t.numel() > _LARGE or key in module._non_persistent_buffers_set:
                continue
            found[dotted(path, key)] = t
    return found


def _readable(p: Tensor) -> bool:
    # Of ZeRO-3 each process has nothing, or a part.
    return is_dense(p) and not is_lazy(p) and not p.is_meta and not hasattr(p, "ds_id")


def _sample(p: Tensor, count: int = 64) -> Tensor:
    """A few elements, spread over the tensor: what trains changes all, and a copy of all would cost its size."""
    flat = p.detach().reshape(-1) if p.is_contiguous() else p.detach().flatten()
    return flat[:: max(1, flat.numel() // count)].clone()


def differs(before: Tensor | None, now: Tensor) -> bool:
    """Whether a buffer holds other values, apart from the rounding of a change of dtype."""
    if before is None:
        return False  # it was not there, or held no values
    if before.shape != now.shape:
        return True
    before = before.to(now.device)
    if before.dtype == now.dtype or not (before.is_floating_point() and now.is_floating_point()):
        return not torch.equal(widened(before).nan_to_num(), widened(now).nan_to_num())
    coarse = max(torch.finfo(before.dtype).eps, torch.finfo(now.dtype).eps)
    return not torch.allclose(before.double(), now.detach().double(), rtol=2 * coarse, atol=coarse, equal_nan=True)


def _alike(before: Tensor, now: Tensor) -> bool:
    """Whether elements of a weight are the same, apart from what a detour by way of bfloat16 does to them."""
    return before.shape == now.shape and torch.allclose(before.to(now), now, rtol=2**-7, atol=0, equal_nan=True)


def _first(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
