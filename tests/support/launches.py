"""Watches kernels run in Triton's interpreter: what each launch reads and writes, in which order, and where.

`watch` runs the programs of every launch in a random order, counts the elements that each tensor argument has read
from and written to it, and raises where a program touches memory that is not an argument's, or where two stores of
one launch meet at one address: on a GPU, where programs run at once, that would be a race.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from interpreted import Observer, observed
from torch import Tensor


@dataclass
class Launch:
    """One launch: elements read and written, by the name of the kernel's argument."""

    kernel: str
    tensors: dict[str, Tensor]  # held, so that no later tensor takes their addresses
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    programs: int = 0

    def passes(self) -> dict[str, tuple[float, float]]:
        """(reads, writes) of each tensor as multiples of its size."""
        return {
            name: (self.reads.get(name, 0) / t.numel(), self.writes.get(name, 0) / t.numel())
            for name, t in self.tensors.items()
            if t.numel()
        }


def _places(t: Tensor, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of these are addresses of t's elements, and for each of those its place in t's memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    belongs = torch.zeros(extent, dtype=torch.bool)
    belongs.as_strided(t.shape, t.stride()).fill_(True)
    before, rest = np.divmod(addresses - t.data_ptr(), t.element_size())
    mine = (before >= 0) & (before < extent) & (rest == 0)
    mine[mine] = belongs.numpy()[before[mine]]
    return mine, before[mine]


class _Watcher(Observer):
    def __init__(self, seed: int) -> None:
        self.launches: list[Launch] = []
        self.random = random.Random(seed)
        self.order: list[int] = []
        self.dims = (1, 1, 1)
        self.touched: dict[str, list[np.ndarray]] = {}

    def begin(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.launches.append(Launch(kernel, tensors))
        self.touched = {"reads": [], "writes": []}

    def load(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        self.touched["reads"].append(addresses[mask])

    def store(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        self.touched["writes"].append(addresses[mask])

    def end(self) -> None:
        launch = self.launches[-1]
        launch.programs = int(np.prod(self.dims))
        for kind, lists in self.touched.items():
            addresses = np.concatenate([np.empty(0, np.uint64), *lists]).astype(np.int64)
            for name, t in ((name, t) for name, t in launch.tensors.items() if t.numel()):
                mine, places = _places(t, addresses)
                getattr(launch, kind)[name] = len(places)
                if kind == "writes" and (twice := np.count_nonzero(np.bincount(places) > 1)):
                    raise AssertionError(f"{launch.kernel}: {twice} addresses are stored to twice")
                addresses = addresses[~mine]
            if outside := len(np.unique(addresses)):
                raise AssertionError(f"{launch.kernel}: {kind} {outside} addresses that belong to no argument")

    def grid(self, *dims: int) -> None:
        self.dims = dims
        self.order = list(range(int(np.prod(dims))))
        self.random.shuffle(self.order)

    def program(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        index = self.order[(x * self.dims[1] + y) * self.dims[2] + z]
        return tuple(int(i) for i in np.unravel_index(index, self.dims))  # type: ignore[return-value]


@contextmanager
def watch(seed: int = 0) -> Iterator[list[Launch]]:
    """The launches made within the context, programs shuffled by `seed`."""
    watcher = _Watcher(seed)
    with observed(watcher):
        yield watcher.launches


def main(seen: list[Launch]) -> list[Launch]:
    """Without those that only put parts together."""
    return [launch for launch in seen if launch.kernel not in ("_sum_parts_kernel", "_root_kernel")]


def assert_passes(seen: list[Launch], sizes: tuple[int, ...], wanted: dict[str, tuple[int, int]]) -> None:
    """Each tensor of as many numbers, parts aside, is read and written as often as wanted; all are seen."""
    found = set()
    for launch in seen:
        for name, passes in launch.passes().items():
            if launch.tensors[name].numel() in sizes and not name.startswith("parts"):
                assert passes == wanted[name], (launch.kernel, name)
                found.add(name)
    assert found == wanted.keys()


class _Names(Observer):
    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.names.append(kernel)


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels launched within the context; nothing else is watched, so that it is quick."""
    observer = _Names()
    with observed(observer):
        yield observer.names
