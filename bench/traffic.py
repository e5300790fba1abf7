"""Bytes that an adapter's training step moves, counted by running it: kernels in Triton's interpreter, PyTorch's
operators on tensors without storage.

Tensors with a row a token, and the float32 parts of sums, count each time an element is loaded or stored. What is small
(A, B, g, h) counts once a kernel, and what a kernel reads of it again, which caches serve, is kept apart. Casts of
parameters to the tokens' dtype count too.
"""

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Traffic:
    """Bytes by (kernel or operator, tensor), and what was read again from cache."""

    bytes: dict[tuple[str, str], int] = field(default_factory=dict)
    again: int = 0
    fewest_programs: int = 1 << 30

    def add(self, kernel: str, tensor: str, count: int) -> None:
        self.bytes[kernel, tensor] = self.bytes.get((kernel, tensor), 0) + count

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class _Launch:
    """The tensor arguments of one launch by address, and what its programs touch."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor], large: int) -> None:
        self.kernel = kernel
        self.tensors = sorted((t.data_ptr(), name, t) for name, t in tensors.items() if t.numel())
        self.starts = [start for start, _, _ in self.tensors]
        self.executed: dict[tuple[str, bool], int] = {}
        self.seen: dict[tuple[str, bool], np.ndarray] = {}
        self.large = {name for _, name, t in self.tensors if t.numel() >= large}

    def touch(self, addresses: Any, mask: Any, store: bool) -> None:
        addresses, mask = np.broadcast_arrays(addresses.data, mask.data)
        count = int(np.count_nonzero(mask))
        if count == 0:
            return
        first = int(addresses.ravel()[mask.ravel().argmax()])
        start, name, t = self.tensors[bisect.bisect_right(self.starts, first) - 1]
        size = t.element_size()
        self.executed[name, store] = self.executed.get((name, store), 0) + count * size
        if name not in self.large and name != "parts":
            seen = self.seen.setdefault((name, store), np.zeros(t.untyped_storage().nbytes() // size, bool))
            seen[(addresses[mask].astype(np.int64) - start) // size] = True

    def report(self, traffic: Traffic) -> None:
        sizes = {name: t.element_size() for _, name, t in self.tensors}
        for (name, store), executed in self.executed.items():
            counted = executed
            if name not in self.large and name != "parts":
                counted = int(self.seen[name, store].sum()) * sizes[name]
                traffic.again += executed - counted
            traffic.add(self.kernel.strip("_").removesuffix("_kernel"), name, counted)


@contextmanager
def kernels_counted(large: int) -> Iterator[Traffic]:
    """Counts all launches in the interpreter; tensors of `large` or more elements are the tokens'."""
    from triton.runtime import interpreter

    from lora_lite.kernels import lowrank, row_norm
    from lora_lite.kernels.common import small

    traffic = Traffic()
    current: list[_Launch] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run, load, store, grid = (
        executor.__call__, builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim
    )  # fmt: skip

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        current[:] = [_Launch(self.fn.__name__, {n: t for n, t in named.items() if isinstance(t, Tensor)}, large)]
        run(self, *args, **kwargs)
        current[0].report(traffic)

    def loaded(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        current[0].touch(ptrs, mask, store=False)
        return load(self, ptrs, mask, *rest)

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[0].touch(ptrs, mask, store=True)
        return store(self, ptrs, value, mask, *rest)

    def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
        result = small(t, dtype)
        if result.data_ptr() != t.data_ptr():
            traffic.add("cast", "", t.nbytes + result.nbytes)
        return result

    def sized(self: Any, *dims: int) -> None:
        if current[0].kernel != "_sum_parts_kernel":
            traffic.fewest_programs = min(traffic.fewest_programs, int(np.prod(dims)))
        grid(self, *dims)

    with (
        mock.patch.object(lowrank, "small", cast),
        mock.patch.object(row_norm, "small", cast),
        mock.patch.object(executor, "__call__", launched),
        mock.patch.object(builder, "create_masked_load", loaded),
        mock.patch.object(builder, "create_masked_store", stored),
        mock.patch.object(builder, "set_grid_dim", sized),
    ):
        yield traffic


class OperatorsCounted(TorchDispatchMode):
    """Each ATen operator's inputs read and outputs written, views aside, but for products with the base weight W."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.traffic, self.W = Traffic(), W

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        product = name in ("mm", "addmm", "bmm", "matmul", "linear")
        base = product and any(t.shape in (self.W.shape, self.W.t().shape) for t in inputs)
        if not (func.is_view or base or name in ("detach", "empty", "empty_like", "new_empty")):
            outputs = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
            for t in [*inputs, *outputs]:
                self.traffic.add(name, "", t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes)
        return result
