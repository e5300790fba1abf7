"""Adapters that do nothing although they are attached: their layer never runs, or no gradient reaches them.

After the first backward of a model one warning names them. A layer counts as idle where its whole kind is: experts to
which a batch was not routed are not, a layer that has left the model is.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .site import Site, waiting
from .targets import Target, fold

_READERS = (
    "nn.MultiheadAttention, fused attention or state-space kernels, or a loss that multiplies by its weight, such as "
    "lm_head.weight, read a layer's weight without calling it; an encoder may also have been skipped or removed"
)


class Watch:
    """Looks at the first backward of an attachment: which of its adapters got a gradient, and which layers ran."""

    def __init__(
        self, name: str, targets: list[Target], adapters: Mapping[str, Adapter], sites: Mapping[str, Site]
    ) -> None:
        self.name, self.targets, self.adapters, self.sites = name, targets, adapters, sites
        self.reached: set[str] = set()  # layers whose adapters got a gradient
        self.done = self._queued = False
        self._handles: list[Any] = []

    def start(self, model: nn.Module) -> None:
        """Wait for the first backward."""

        def reached(layer: str) -> Any:
            def hook(p: Any) -> None:
                self.reached.add(layer)
                if not self._queued:
                    self._queued = True
                    _at_the_end_of_backward(lambda: self._report(model))

            return hook

        for layer, adapter in self.adapters.items():
            for p in adapter.parameters():
                if p.requires_grad and p.is_leaf:
                    self._handles.append(p.register_post_accumulate_grad_hook(reached(layer)))

    def stop(self) -> None:
        """Look no further."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def idle(self, model: nn.Module) -> tuple[list[str], list[str], list[str]]:
        """Layers that never ran, that no gradient reached in the first backward, and that have left the model."""
        if not (self.done or any(site.ran for site in self.sites.values())):
            return [], [], []
        gone = gone_from(model, self.targets)
        here = [t.name for t in self.targets if t.name not in gone and self.name not in self.sites[t.name].off]
        trains = {name for name in here if any(p.requires_grad for p in self.adapters[name].parameters())}
        ran = {name for name in here if self.sites[name].ran or name in self.reached}
        without = trains - self.reached if self.done else set()
        never = whole_kinds(model, here, set(here) - ran)
        return never, whole_kinds(model, [name for name in here if name in ran], without & ran), gone

    def _report(self, model: nn.Module) -> None:
        if self.done:
            return
        self.stop()
        self.done = True
        if text := self.describe(model):
            warnings.warn(f"after the first backward: {text}", stacklevel=2)

    def describe(self, model: nn.Module) -> str:
        """What is idle, and what to do; empty: nothing."""
        never, unreached, gone = self.idle(model)
        parts = []
        if never:
            parts.append(f"these adapted layers never ran, and their adapters do nothing: {listing(never)}. {_READERS}")
        if unreached:
            parts.append(
                f"these ran, but no gradient reached their adapters (a part under no_grad, or detached?): "
                f"{listing(unreached)}"
            )
        if gone:
            parts.append(f"these are no longer part of the model: {listing(gone)}")
        if not parts:
            return ""
        return f"{'; '.join(parts)}. Leave such layers out by exclude_names, or detach and attach again"

    def __getstate__(self) -> dict[str, Any]:
        # Hooks of parameters are neither copied nor pickled.
        return {**vars(self), "_handles": []}


def gone_from(model: nn.Module, targets: list[Target]) -> list[str]:
    """Targets that are no longer part of the model."""
    present = {id(module) for module in model.modules()}
    return [target.name for target in targets if id(target.layer) not in present]


def whole_kinds(model: nn.Module, layers: list[str], wanted: set[str]) -> list[str]:
    """Of the wanted layers those whose whole kind is wanted. Linear layers in an nn.Sequential, which runs all of them,
    are a kind each; in a ModuleList they are experts of one."""

    def kind(name: str) -> str:
        parent = model.get_submodule(name.rpartition(".")[0])
        return name if isinstance(parent, nn.Sequential) else fold(name)

    others = {kind(name) for name in layers if name not in wanted}
    return [name for name in layers if name in wanted and kind(name) not in others]


def listing(layers: list[str]) -> str:
    """The layers by kind, with how many there are of each."""
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(fold(name), []).append(name or "the model itself")
    names = [f"{kind} ×{len(alike)}" if len(alike) > 1 else alike[0] for kind, alike in kinds.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more kinds" if len(names) > 8 else "")


def _at_the_end_of_backward(callback: Callable[[], None]) -> None:
    """Run the callback when the whole backward is over. Reentrant checkpointing runs one backward inside of another,
    and only the inner one's end can be known: the callback then waits for the next call of an adapted layer."""

    def ended() -> None:
        if _inside_a_backward():
            waiting.append(callback)
        else:
            callback()

    torch.autograd.Variable._execution_engine.queue_callback(ended)  # type: ignore[attr-defined]


def _inside_a_backward() -> bool:
    """Whether a torch.autograd.Function's backward is among this thread's callers."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_globals.get("__name__") == "torch.autograd.function":
            return True
        frame = frame.f_back
    return False
