"""Launches, and operators that repeat the launches they have made before.

Which kernels an operator launches, in which blocks, how large their results are: all of it follows from shapes, strides
and dtypes, and from alignment what Triton compiles. To find it out anew at each call takes several times as long as the
launches. An operator that is `replayed` is recorded when it is called a second time with the same, and from then on
what is left of a call is to look that up, to ask for memory, and to launch.

A recording is of launches, memory that was asked for, and casts. What does anything else is never replayed.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda  # as compiled graphs ask for memory
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import knobs
from triton.runtime import driver

from ..operators import NO_TENSOR
from . import tuning
from .tuning import Config

_aten = torch.ops.aten
_ROOM = (_aten.empty, _aten.empty_like, _aten.new_empty)
_CASTS = (_aten._to_copy, _aten.to)
_PARAMETER = torch.nn.Parameter
_MOST = 4096  # recordings: the lengths of batches may vary without end
_ATTEMPTS = 3
# Triton compiles for the size of a tensor's storage too on AMD, where its binder is not to be left out.
_COMPILED = torch.version.hip is None

Start = Callable[[Any, tuple[Any, ...], bool], None]  # of a kernel: the stream, its tensors, `_has_hooks`

_recordings: dict[tuple[Any, ...], "Recording | int"] = {}  # a number: how often it was called without one


class _Thread(threading.local):
    recorder: "_Recorder | None" = None


_thread = _Thread()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    constants: Sequence[Any],
    config: Config | None = None,
) -> None:
    """Start a kernel, whose parameters are these in their order, with a row's warps and stages, on the device that
    holds the first tensor."""
    options = {} if config is None else config.launch
    recorder = _thread.recorder
    with _device_of(tensors[0]), nullcontext() if recorder is None else _disable_current_modes():
        compiled = kernel[grid](*tensors, *numbers, *constants, **options)
    if recorder is not None:
        rest = (*numbers, *constants)
        if compiled is not None and _COMPILED:  # and not interpreted
            recorder.stream_of = driver.active.get_current_stream
            recorder.launches(_started(compiled, (*grid, 1, 1)[:3], rest), tensors)
        else:
            run = functools.partial(kernel[grid], **options)
            recorder.launches(lambda stream, tensors, profiled: run(*tensors, *rest), tensors)


def _started(compiled: Any, grid: tuple[int, ...], rest: tuple[Any, ...]) -> Start:
    """What `compiled[grid]` does in the end, without the looks at the driver and at hooks that it has for every launch:
    they take longer than the launch. Under a profiler of Triton's, which has hooks, it is that itself."""
    x, y, z = grid
    run, function, metadata, observed = compiled.run, compiled.function, compiled.packed_metadata, compiled[grid]

    def start(stream: Any, tensors: tuple[Any, ...], profiled: bool) -> None:
        if profiled:
            observed(*tensors, *rest)
        else:
            run(x, y, z, stream, function, metadata, None, None, None, *tensors, *rest)

    return start


def _has_hooks() -> bool:
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of them, or one, or none
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


class Recording(NamedTuple):
    """What an operator has done. Tensors are numbered: its arguments, then those that it made.

    Args:
        made: of each its shape, strides and dtype, and of which tensor it is a cast; None: memory.
        launches: what starts a kernel, and what picks its tensors from all and a None after them.
        results: which tensors it returned, as a tuple or alone.
        stream_of: the current stream of a device.
    """

    made: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int | None]]
    launches: Sequence[tuple[Start, Callable[[list[Any]], tuple[Any, ...]]]]
    results: tuple[int, ...] | int
    stream_of: Callable[[int], Any]

    def replay(self, tensors: list[Any]) -> Any:
        """Do it again with these arguments, on their device."""
        index = tensors[0].get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self.replay(tensors)
        room = _empty_strided_cpu if index < 0 else _empty_strided_cuda  # on the current device
        for shape, strides, dtype, source in self.made:
            tensors.append(room(shape, strides, dtype) if source is None else tensors[source].to(dtype))
        tensors.append(None)
        stream, profiled = self.stream_of(index), _has_hooks()
        for start, its in self.launches:
            start(stream, its(tensors), profiled)
        results = self.results
        return tensors[results] if isinstance(results, int) else tuple([tensors[i] for i in results])


class _Recorder(TorchDispatchMode):
    """Watches a call. `complete`: it has done nothing but what can be replayed."""

    def __init__(self, arguments: list[Tensor]) -> None:
        super().__init__()
        self.arguments = arguments
        self.number = {id(t): i for i, t in enumerate(arguments)}  # of a tensor or a view of all of it
        self.complete = len(self.number) == len(arguments)  # one that is passed twice would stand for both
        self.made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int | None]] = []
        self.own: dict[int, int] = {}  # numbers of tensors that the call made, views aside
        self.launched: list[tuple[Start, list[int | None]]] = []
        self.stream_of: Callable[[int], Any] = lambda index: None
        self.alive: list[Any] = []  # so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive.append(out)
        source = self.number.get(id(args[0])) if args else None
        plain = isinstance(out, Tensor) and out.device == self.arguments[0].device and out.is_contiguous()
        if plain and func.overloadpacket in _ROOM and out.data_ptr() % 16 == 0:
            self._made(out, None)
        elif plain and func.overloadpacket in _CASTS and source is not None:
            self._made(out, source)
        elif func.is_view and source is not None and isinstance(out, Tensor) and _same(out, args[0]):
            self.number[id(out)] = source
            if id(args[0]) in self.own and out.shape == args[0].shape:
                self.own[id(out)] = source
        else:
            self.complete = False
        return out

    def _made(self, out: Tensor, source: int | None) -> None:
        self.number[id(out)] = self.own[id(out)] = len(self.arguments) + len(self.made)
        self.made.append((tuple(out.shape), out.stride(), out.dtype, source))

    def launches(self, start: Start, tensors: Sequence[Tensor | None]) -> None:
        """A launch, as it is to be made again."""
        which = [None if t is None else self.number.get(id(t), -1) for t in tensors]
        self.complete &= -1 not in which
        self.launched.append((start, which))

    def recording(self, returned: Any) -> Recording | None:
        """Of the whole call; None: it can't be replayed."""
        results = [self.own.get(id(t), -1) for t in (returned if isinstance(returned, tuple) else (returned,))]
        if not self.complete or -1 in results or not self.launched:
            return None
        none = len(self.arguments) + len(self.made)
        launches = [(start, _picks([none if i is None else i for i in which])) for start, which in self.launched]
        returns = tuple(results) if isinstance(returned, tuple) else results[0]
        return Recording(self.made, launches, returns, self.stream_of)


def _picks(which: Sequence[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    return itemgetter(*which) if len(which) > 1 else lambda tensors: (tensors[which[0]],)


def _same(view: Tensor, of: Tensor) -> bool:
    """Whether a kernel finds the same at both, given strides."""
    return view.data_ptr() == of.data_ptr() and view.dtype == of.dtype


def replayed(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors and what goes with them, positional all, which returns new tensors and does nothing else;
    what it does follows from what its key holds. Its `again` only replays: None where there is no recording yet."""

    def again(*args: Any) -> Any:
        tensors: list[Tensor] = []
        known = _recordings.get(_key(call, args, tensors))
        return known.replay(tensors) if type(known) is Recording else None

    @functools.wraps(call)
    def run(*args: Any) -> Any:
        tensors: list[Tensor] = []
        key = _key(call, args, tensors)
        known = _recordings.get(key)
        if type(known) is Recording:
            return known.replay(tensors)
        calls = known or 0
        if not key or calls > _ATTEMPTS or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return call(*args)  # nothing has been timed for a graph's capture
        if len(_recordings) >= _MOST:
            _recordings.clear()
        _recordings[key] = calls + 1
        return call(*args) if calls == 0 else _record(key, tensors, call, args)

    run.again = again  # type: ignore[attr-defined]
    return run


def _key(call: Callable[..., Any], args: Sequence[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """What the call does follows from this. Collects the tensors; empty: it is not to be recorded."""
    key: list[Any] = [call, tuning.allows_tf32(), torch._C._get_deterministic_algorithms()]
    return () if tuning._forced or not _look(args, tensors, key) else tuple(key)


def _look(args: Sequence[Any], tensors: list[Tensor], key: list[Any]) -> bool:
    """Collect the tensors among the arguments, and what tells calls apart. False: a tensor is of a class of its own."""
    for each in args:
        kind = type(each)
        if kind is Tensor or kind is _PARAMETER:
            tensors.append(each)
            strides = each.is_contiguous() or each.stride()  # shorter, and quicker to get and compare
            key += (each.dtype, each.shape, strides, each.data_ptr() & 15, each.device)
        elif kind is list or kind is tuple:
            key.append(len(each))
            if each and not _look(each, tensors, key):
                return False
        elif kind not in NO_TENSOR and isinstance(each, Tensor):
            return False
        else:
            key.append(each)
    return True


def _record(key: tuple[Any, ...], tensors: list[Tensor], call: Callable[..., Any], args: Sequence[Any]) -> Any:
    before, _thread.recorder = _thread.recorder, _Recorder(tensors)
    try:
        with _thread.recorder as recorder:
            returned = call(*args)
    finally:
        _thread.recorder = before
    if (recording := recorder.recording(returned)) is not None:
        _recordings[key] = recording
    return returned


def forget() -> None:
    """All recordings: for benchmarks, which put another driver under Triton."""
    _recordings.clear()


def _device_of(t: Tensor | None) -> AbstractContextManager[Any]:
    """Where that is the current one, and on a CPU, nothing changes."""
    here = t is None or not t.is_cuda or t.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(t.device)
