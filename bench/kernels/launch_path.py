"""Runs everything of a kernel's launch but the launch, on CPU tensors, so that host time is measured without a GPU.

Triton's own binder, specialisation and compiler run for an H100, under a driver whose launcher only counts; results
are whatever memory held. What this leaves out of a real step: the launch itself (2 to 4 µs a kernel, PyTorch's too).
"""

import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lora_lite import backend, kernels
from lora_lite.kernels import interpreter, launching

# Operators of PyTorch that launch nothing: they look at tensors, or only ask for memory.
_NAMES = (
    "empty empty_like empty_strided new_empty view _unsafe_view view_as as_strided detach alias expand "
    "expand_as slice select transpose t permute reshape squeeze unsqueeze split split_with_sizes unbind narrow "
    "diagonal result_type resize_ resolve_conj resolve_neg lift_fresh to _to_copy contiguous _reshape_alias item "
    "is_nonzero promote_types unflatten flatten mT mH T as_strided_ transpose_ "
)
_WITH_COPIES = {"aten::linalg_solve_triangular"}  # calls others and computes something itself
_FREE = {f"aten::{name}" for name in _NAMES.split()}


H100 = GPUTarget("cuda", 90, 32)


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[None]:
    """A launch binds and specialises its arguments, and compiles, as for that GPU. Its warm-up is all that can run."""
    device = SimpleNamespace(
        get_current_device=lambda: target,  # by which Triton keeps what it has compiled
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
        get_active_torch_device=lambda: torch.device("cpu"),
        is_active=lambda: True,
    )
    active = driver._active  # type: ignore[attr-defined]
    driver.set_active(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = active  # type: ignore[attr-defined]


class _Driver(SimpleNamespace):
    """An H100 that runs nothing. Kernels' names stand for what is loaded of them."""

    def __init__(self, counts: Counter[str]) -> None:
        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                pass

            def __call__(
                self, x: int, y: int, z: int, stream: int, function: str, packed: Any, metadata: Any, before: Any,
                after: Any, *arguments: Any,
            ) -> None:  # fmt: skip
                counts[function] += 1
                for hook in (before, after):
                    if hook is not None:
                        hook(metadata)

        super().__init__(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: H100,
            get_active_torch_device=lambda: torch.device("cpu"),
            is_active=lambda: True,
            launcher_cls=Launcher,
            utils=SimpleNamespace(
                load_binary=lambda name, *rest: (name, name, 0, 0, 1024),  # module, function, …, most threads
                unload_module=lambda module: None,
                get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            ),
        )


@contextmanager
def without_launching() -> Iterator[Counter[str]]:
    """The kernels run for CPU tensors within the context, up to the launch. Yields how often each would have."""
    if interpreter.ACTIVE:
        raise RuntimeError("TRITON_INTERPRET is set, and the interpreter has no launch path")
    counts: Counter[str] = Counter()
    active = driver._active  # type: ignore[attr-defined]
    driver.set_active(_Driver(counts))  # type: ignore[arg-type]
    _forget()
    try:
        with mock.patch.object(interpreter, "ACTIVE", True):  # what lets `select` choose kernels for a CPU
            yield counts
    finally:
        _forget()
        driver._active = active  # type: ignore[attr-defined]


def _forget() -> None:
    """What was compiled and chosen for a driver is not another's."""
    backend._in_force.clear()
    launching.forget()
    for kernel in jit_functions():
        kernel.device_caches.clear()


def jit_functions() -> set[Any]:
    """The kernels and what they call, in whichever file they stand."""
    modules = [import_module(f"{kernels.__name__}.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    return {each for module in modules for each in vars(module).values() if isinstance(each, JITFunction)}


def torch_launches(step: Any) -> int:
    """How many kernels of PyTorch's a call would launch: its operators that call no other and compute something."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    count = 0
    for event in profile.events() or ():
        inner = [child for child in event.cpu_children if child.name.startswith("aten::") and not _free(child.name)]
        computes = event.name.startswith("aten::") and not _free(event.name)
        count += computes and (not inner or event.name in _WITH_COPIES)
    return count


def _free(name: str) -> bool:
    return name in _FREE
