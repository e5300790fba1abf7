"""Runs kernels in Triton's interpreter under an observer's eyes: launches, programs, loads and stores."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


class Observer:
    """Sees nothing and changes nothing; override what is of interest."""

    def begin(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        """A launch starts, with these tensor arguments by name."""

    def end(self) -> None:
        """It has run."""

    def grid(self, *dims: int) -> None:
        """How many programs it has, in each dimension."""

    def program(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        """Which program runs where (x, y, z) would."""
        return x, y, z

    def load(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        """A program reads these addresses where the mask is true."""

    def store(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        """A program writes them."""


@contextmanager
def observed(by: Observer) -> Iterator[None]:
    """Every launch within the context."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        by.begin(self.fn.__name__, {name: t for name, t in named.items() if isinstance(t, Tensor)})
        run(self, *args, **kwargs)
        by.end()

    def loaded(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        by.load(*np.broadcast_arrays(ptrs.data, mask.data))
        return load(self, ptrs, mask, *rest)

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        by.store(*np.broadcast_arrays(ptrs.data, mask.data))
        return store(self, ptrs, value, mask, *rest)

    def grid_dim(self: Any, *dims: int) -> None:
        by.grid(*dims)
        set_dim(self, *dims)

    with (
        mock.patch.object(executor, "__call__", launched),
        mock.patch.object(builder, "create_masked_load", loaded),
        mock.patch.object(builder, "create_masked_store", stored),
        mock.patch.object(builder, "set_grid_dim", grid_dim),
        mock.patch.object(builder, "set_grid_idx", lambda self, *at: set_idx(self, *by.program(*at))),
    ):
        yield
