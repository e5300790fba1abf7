"""Bytes that an adapter's training step moves, counted by running it: kernels in Triton's interpreter, PyTorch's
operators on tensors without storage.

Tensors with a row a token, and the float32 parts of sums, count each time an element is loaded or stored. What is small
(A, B, g, h) counts once a kernel, and what a kernel reads of it again, which caches serve, is kept apart. Casts of
parameters to the tokens' dtype count too.
"""

import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from interpreted import Observer, observed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lite.kernels import common, expand, expand_backward, launching, row_norm, shrink
from lora_lite.kernels.common import small


@dataclass
class Traffic:
    """Bytes by (kernel or operator, tensor), and what was read again from cache."""

    bytes: dict[tuple[str, str], int] = field(default_factory=dict)
    launches: Counter[str] = field(default_factory=Counter)
    again: int = 0
    fewest_programs: int = 1 << 30

    def add(self, kernel: str, tensor: str, count: int) -> None:
        self.bytes[kernel, tensor] = self.bytes.get((kernel, tensor), 0) + count

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class _Counter(Observer):
    """Adds each launch to the traffic. Of the current one: its tensors by address, and what its programs touch."""

    def __init__(self, large: int) -> None:
        self.traffic, self.large = Traffic(), large

    def begin(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.kernel = kernel.strip("_").removesuffix("_kernel")
        self.traffic.launches[self.kernel] += 1
        self.tensors = sorted((t.data_ptr(), name, t) for name, t in tensors.items() if t.numel())
        self.starts = [start for start, _, _ in self.tensors]
        self.executed: dict[tuple[str, bool], int] = {}
        self.seen: dict[tuple[str, bool], np.ndarray] = {}
        parts = {"parts", "parts_2", "parts_3"}
        self.uncached = {name for _, name, t in self.tensors if t.numel() >= self.large} | parts

    def grid(self, *dims: int) -> None:
        if self.kernel != "sum_parts":
            self.traffic.fewest_programs = min(self.traffic.fewest_programs, int(np.prod(dims)))

    def load(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        self._touch(addresses, mask, stored=False)

    def store(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        self._touch(addresses, mask, stored=True)

    def _touch(self, addresses: np.ndarray, mask: np.ndarray, stored: bool) -> None:
        count = int(np.count_nonzero(mask))
        if count == 0:
            return
        first = int(addresses.ravel()[mask.ravel().argmax()])
        start, name, t = self.tensors[bisect.bisect_right(self.starts, first) - 1]
        size = t.element_size()
        self.executed[name, stored] = self.executed.get((name, stored), 0) + count * size
        if name not in self.uncached:
            seen = self.seen.setdefault((name, stored), np.zeros(t.untyped_storage().nbytes() // size, bool))
            seen[(addresses[mask].astype(np.int64) - start) // size] = True

    def end(self) -> None:
        sizes = {name: t.element_size() for _, name, t in self.tensors}
        for (name, stored), executed in self.executed.items():
            counted = executed
            if name not in self.uncached:
                counted = int(self.seen[name, stored].sum()) * sizes[name]
                self.traffic.again += executed - counted
            self.traffic.add(self.kernel, name, counted)


@contextmanager
def kernels_counted(large: int) -> Iterator[Traffic]:
    """Counts all launches in the interpreter; tensors of `large` or more elements are the tokens'."""
    counter = _Counter(large)

    def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
        result = small(t, dtype)
        if result.data_ptr() != t.data_ptr():
            counter.traffic.add("cast", "", t.nbytes + result.nbytes)
        return result

    launching.forget()
    with (
        mock.patch.multiple(common, small=cast),
        mock.patch.multiple(shrink, small=cast),
        mock.patch.multiple(expand, small=cast),
        mock.patch.multiple(expand_backward, small=cast),
        mock.patch.multiple(row_norm, small=cast),
        mock.patch.object(launching, "_ATTEMPTS", -1),  # what is replayed casts out of sight
        observed(counter),
    ):
        yield counter.traffic


class OperatorsCounted(TorchDispatchMode):
    """Each ATen operator's inputs read and outputs written, views aside, but for products with the base weight W."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.traffic, self.W = Traffic(), W

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.namespace == "lora_lite":
            return result  # whose kernels are counted
        product = name in ("mm", "addmm", "bmm", "matmul", "linear")
        base = product and any(t.shape in (self.W.shape, self.W.t().shape) for t in inputs)
        if not (func.is_view or base or name in ("detach", "empty", "empty_like", "new_empty")):
            outputs = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
            for t in [*inputs, *outputs]:
                self.traffic.add(name, "", t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes)
        return result
