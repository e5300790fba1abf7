"""Adapters that get gradients and stay as they are, or are lost. Each is judged by its first steps with gradients of
its own: an expert that no batch visits is not at fault."""

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter

ENOUGH = 10  # steps with gradients that tell whether an adapter trains


class Progress:
    """Of an adapter in its first optimisers' steps, each after another gradient."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.steps = adapter, 0
        self.unchanged = self.zero = self.broken = False  # known after ENOUGH steps: its tensors, gradients, values
        self._mark: Any = None  # what tells the last step's gradients from others
        self._before: list[Any] = []  # at the first step
        self._nonzero: list[Any] = []  # of each gradient

    def look(self, backwards: int) -> bool:
        """After an optimiser's step, and so many backwards: whether it is the one after which all is known."""
        if self.steps == ENOUGH:
            return False
        grads = [p.grad for p in self.adapter.parameters() if p.grad is not None]
        mark = (backwards, [(id(g), g._version) for g in grads])
        if not grads or mark == self._mark:  # the step is another's
            return False
        self._mark, self.steps = mark, self.steps + 1
        self._nonzero += [_local(g).any() for g in grads]  # to be looked at once: on a GPU each look waits
        if self.steps == 1:
            self._before = _samples(self.adapter)
        if self.steps < ENOUGH:
            return False
        now, self.zero = _samples(self.adapter), not any(map(bool, self._nonzero))
        self.broken = not all(bool(_local(p).isfinite().all()) for p in self.adapter.parameters() if not p.is_meta)
        self.unchanged = bool(now) and len(now) == len(self._before) and all(map(torch.equal, self._before, now))
        self._before, self._nonzero = [], []
        return True

    @property
    def is_in_16_bits(self) -> bool:
        """Whether a tensor that trains is."""
        return any(p.dtype.itemsize < 4 for p in self.adapter.parameters() if p.requires_grad)


def standing_still(known: Mapping[str, Progress], held: set[str], stepped: set[str]) -> dict[str, set[str]]:
    """Of layers about which all is known those whose adapters do not train, or no more, by what is to be said of them.

    Args:
        held: layers whose adapters an optimiser holds.
        stepped: those of which one has made as many steps. Of others nothing is said: their turn has hardly come.
    """
    unchanged = {layer for layer, progress in known.items() if progress.unchanged}
    zero = {layer for layer, progress in known.items() if progress.zero} & held
    broken = {layer for layer, progress in known.items() if progress.broken}
    lost = {layer for layer in unchanged & stepped - zero if known[layer].is_in_16_bits}
    return {
        # Made before attach, say; and it holds no copies either, which would have changed them.
        "these adapters get gradients, and no optimiser holds them, so that they do not train: {}. Make the optimiser "
        "after attach or load, of lora_lite.parameters(model)": unchanged - held,
        "the gradients of these adapters were zero, so that they do not train: {}. Nothing uses their output, or their "
        "input is always zero, or their method starts from a weight of zeros (leave such layers out by exclude_names); "
        "or the loss has no gradient yet (rewards that are all equal, a mask that leaves nothing)": zero,
        "the optimiser's steps have not changed these adapters: {}. Its learning rate is too small for their dtype, if "
        "it is no accident: give the config dtype=torch.float32": lost,
        "these adapters hold NaN or infinity: {}. The learning rate is too large, or a gradient was not finite; in "
        "float16 AdamW's eps is zero: give the config dtype=torch.float32": broken,
    }


def _samples(adapter: Adapter) -> list[Any]:
    """Some elements of each tensor that trains and has values here, of each matrix of a stack."""
    trained = (p.detach() for p in adapter.parameters() if p.requires_grad and p.numel() and not p.is_meta)
    flat = [_local(p).reshape(-1) for p in trained]
    return [t[:: max(1, t.numel() // 1024)].clone() for t in flat]


def _local(t: Any) -> Any:
    """What of it this process has."""
    return getattr(t, "to_local", lambda: t)()
