"""Site: what stands on an adapted layer. Its adapters in their order, which of them act and on which rows, and the
layer's only two hooks.

The hooks look the site up on the layer that they are called with, so that copies and replicas run their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import in_place, reference
from .adapter import Adapter
from .backend import select
from .calls import always_after, begin, call_with, end, forget, under_way, with_call
from .embeddings import on_ids
from .errors import AttachError, put_name
from .layer_input import input_key, input_of
from .operators import is_plain, transformed, version
from .params import SITE
from .placement import execution_device, is_managed
from .primitives import LowRankAdd, OfRows, Primitive, enter, in_part, leave
from .promise import primitive_of
from .quantized import token_dtype
from .rows import Rows
from .segments import Segments
from .shapes import is_embedding
from .siblings import share
from .stacks import Stack


class Piece(NamedTuple):
    """A primitive, and the operations that it runs on."""

    primitive: Primitive
    ops: Any


class Routed(NamedTuple):
    """Of a stack's call: whose the rows are, and their tokens."""

    segments: Segments
    tokens: Any


@dataclass
class Before:
    """What acted before a context that changes it for a while."""

    off: frozenset[str]
    rows: Rows | None
    strengths: Mapping[str, float]


class _Running(list[tuple[Piece, Any]]):
    """What is to act on a layer's output, with what `on_input` kept."""

    given: tuple[Tensor, int | None] | None = None  # the input that was handed on, where it may not arrive; its version


_NO_KWARGS = object()  # where a hook is called without them
waiting: list[Callable[[], None]] = []  # what is to be done before the next call, in whichever thread that is


class Site(nn.ModuleDict):
    """A layer's adapters by name."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name or type(layer).__name__  # of the layer in its model
        self.layer_id = id(layer)  # by which a copy is known
        self.off: frozenset[str] = frozenset()  # adapters that don't act
        self.rows: Rows | None = None  # of each entry of a batch the adapter, where they share it
        self.strengths: Mapping[str, float] = {}  # of those of them whose change is to be that many times as large
        self.contexts: list[Before] = []  # that are entered, the last one last
        # Whether the layer has been called, with gradients, or in training without. A compiled call leaves no trace.
        self.ran = self.ran_with_grad = self.ran_in_training = False
        self.handles: list[RemovableHandle] = []
        self.train(layer.training)
        layer.add_module(SITE, self)
        self.handles.append(layer.register_forward_pre_hook(self.before, with_kwargs=True))
        self.handles.append(always_after(layer, self.after, -1, with_kwargs=True))
        self.handles.append(layer.register_load_state_dict_post_hook(self.loaded))

    @classmethod
    def of(cls, layer: nn.Module, name: str) -> "Site":
        """The layer's site, made where it has none."""
        return getattr(layer, SITE, None) or cls(layer, name)

    def leave(self, layer: nn.Module, name: str) -> None:
        """Take an adapter off, and with the last one the site itself."""
        del self[name]
        for each in (self, *self.contexts):
            each.off -= {name}
            each.strengths = {other: its for other, its in each.strengths.items() if other != name}
        if not self:
            for handle in self.handles:
                handle.remove()
            delattr(layer, SITE)
            forget(layer)

    # ---- the hooks ----

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Forward pre-hook. Without kwargs where another library has registered it again so."""
        compiling = torch.compiler.is_compiling()
        if waiting and not compiling and torch._C._current_graph_task_id() == -1:
            _do_waiting()  # but not while a backward computes a block again
        # A layer that another library made in this one's stead has no site, and keeps these adapters.
        site = cast(Site, layer._modules.get(SITE, self))
        running: list[tuple[Piece, Any]] = [] if compiling else _Running()
        caller = None
        if not compiling:
            calls = under_way()
            caller = calls[-1] if calls else None
            begin(layer, running)
            if not site.ran_with_grad:
                site._note_call(torch.is_grad_enabled(), layer.training)
        acting = site.acting()
        if not acting:
            return None
        key = None if args else input_key(site.name, kwargs)
        x: Tensor = args[0] if key is None else cast(dict[str, Any], kwargs)[key]
        of_ids = is_embedding(layer)
        if not isinstance(x, Tensor) or x.is_nested or not (of_ids or (x.is_floating_point() and x.ndim)):
            raise AttachError(f"{site.name}: {_unfit_input(x)}")
        if is_managed(layer) and (device := execution_device(layer)) is not None:
            x = x.to(device)
        if of_ids:
            if x.is_floating_point():
                raise AttachError(f"{site.name}: its adapter looks up ids, and it got rows of {x.dtype}; use disabled")
            x = x.unsqueeze(-1)  # an id is a row of one number, so that rows are counted as everywhere
        routed = Routed(kwargs["segments"], kwargs.get("tokens")) if kwargs and isinstance(layer, Stack) else None
        if compiling:
            caller = call_with(x)
        shared = share(layer, x, caller) if caller and site.rows is None else None
        pieces = shared.pieces if shared else site.pieces(acting, layer, x, routed)
        if shared and shared.x is not None:
            x, pieces = shared.x, pieces[1:]
            running.append((shared.pieces[0], shared.h))
        try:
            for piece in pieces:
                x, carry = enter(piece.primitive, x, piece.ops)
                running.append((piece, carry))
        except Exception as error:
            put_name(site.name, error)
            raise
        if of_ids:
            x = x.squeeze(-1)
        if compiling:
            x = with_call(x, layer, running)
        elif len(layer._forward_pre_hooks) > 1:
            cast(_Running, running).given = x, version(x)
        if key is None:
            args = (x, *args[1:])
        else:
            kwargs = {**cast(dict[str, Any], kwargs), key: x}
        return args if kwargs is None else (args, kwargs)

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, y: Any = _NO_KWARGS) -> Any:
        """Forward hook; also called, with y None, where the call raised. Without kwargs as `before`."""
        if y is _NO_KWARGS:
            kwargs, y = {}, kwargs
        compiling = torch.compiler.is_compiling()
        call = None if compiling else end(layer)
        if y is None:
            return None
        site = cast(Site, layer._modules.get(SITE, self))
        if call is None and site.acting():
            call = call_with(input_of(site.name, args, kwargs))
            if call is None or call.module is not layer:  # the pre-hook was not compiled
                call = end(layer)
        running = None if call is None else call.kept
        if running is None:
            if site.acting():
                raise AttachError(
                    f"{site.name}: the adapter's forward pre-hook did not run; was it removed? Detach and attach "
                    "again. In a graph that is compiled: has another pre-hook replaced the input since? Register that "
                    "with prepend=True"
                )
            return None
        if running and not isinstance(y, Tensor):
            raise AttachError(
                f"{site.name}: its output is a {type(y).__name__}, and an adapter acts on a tensor; leave it out by "
                "exclude_names"
            )
        if running and len(layer._forward_pre_hooks) > 1 and not compiling:
            running = site._as_it_ran(layer, input_of(site.name, args, kwargs), cast(_Running, running))
        try:
            for piece, carry in running:
                y = leave(piece.primitive, y, carry, piece.ops)
        except Exception as error:
            put_name(site.name, error)
            raise
        return y

    def _note_call(self, with_grad: bool, in_training: bool) -> None:
        """Only what is new: to set an attribute of a module takes as long as a product of one token."""
        if with_grad or not self.ran:
            self.ran, self.ran_with_grad = True, with_grad
        if in_training and not self.ran_in_training:
            self.ran_in_training = True

    def _as_it_ran(self, layer: nn.Module, x: Any, running: _Running) -> list[tuple[Piece, Any]]:
        """The pieces for what other pre-hooks have made of the call since: the base weight, as the older spectral_norm
        and weight_norm do, or the input."""
        found: list[tuple[Piece, Any]] = running
        if isinstance(layer, Stack) or not isinstance(x, Tensor):
            return found
        acting = self.acting()
        if any(adapter.derives for _, adapter in acting):
            own = self.pieces(acting, layer, x)
            found = [(piece, carry) for piece, (_, carry) in zip(own, running, strict=True)]
        if (handed := getattr(running, "given", None)) is None:  # nothing came between, or the pre-hook was compiled
            return found
        given, before = handed
        if before == version(given) and _same(given, x, untold=False):
            return found
        rows, again = x.unsqueeze(-1) if is_embedding(layer) else x, []
        for piece, _ in found:
            handed_on, carry = enter(piece.primitive, rows, piece.ops)
            again.append((piece, carry))
            if not _same(handed_on, rows, untold=True):
                raise AttachError(
                    f"{self.name}: a forward pre-hook that was registered after the adapter's has changed the layer's "
                    "input, from which the adapter makes another; register it with prepend=True, or before attach"
                )
        return again

    def loaded(self, layer: nn.Module, keys: Any) -> None:
        """Of `load_state_dict`, by which the base weight may be another."""
        for adapter in cast(Site, layer._modules.get(SITE, self)).values():
            cast(Adapter, adapter).follow(layer)

    # ---- composition ----

    def acting(self) -> list[tuple[str, Adapter]]:
        """The adapters that act, in their order."""
        adapters = cast("dict[str, Adapter]", self._modules)
        if not self.off:
            return list(adapters.items())
        # Of a copy, which is made at once: another thread may attach or detach meanwhile.
        return [(name, adapter) for name, adapter in list(adapters.items()) if name not in self.off]

    def in_part(self, name: str, primitive: Primitive) -> Primitive:
        """The primitive of the adapter of that name, as strong as `use` has it."""
        return in_part(primitive, self.strengths.get(name, 1)) if self.strengths else primitive

    def pieces(
        self, acting: Sequence[tuple[str, Adapter]], layer: nn.Module, x: Tensor, routed: Routed | None = None
    ) -> list[Piece]:
        """What to run, in order; around a stack on the segments of its rows. Low-rank sums that act together become
        one: on all rows with their ranks side by side, on rows of their own as a stack. The rest nests: each acts on
        the input that the one before it leaves, and on the output likewise."""
        if self.rows is None and len(acting) == 1:  # as nearly always: nothing to put together
            return [self._alone(self._piece(*acting[0], layer, x, routed), layer, x)]
        together: list[list[Piece]] = []
        by_row: dict[str, Piece] = {}
        for name, adapter in acting:
            piece = self._piece(name, adapter, layer, x, routed)
            if self.rows is not None and name in self.rows.names:
                if not by_row:
                    together.append([])  # their place
                by_row[name] = piece
            elif together and together[-1] and _add_up(together[-1][0], piece):
                together[-1].append(piece)
            else:
                together.append([piece])
        found: list[Piece] = []
        for pieces in together:
            found += [_as_one(pieces)] if pieces else self._of_rows(cast(Rows, self.rows), by_row, x, routed)
        return [self._alone(found[0], layer, x)] if len(found) == 1 else found

    def _alone(self, piece: Piece, layer: nn.Module, x: Tensor) -> Piece:
        """The only piece around a layer."""
        serves = piece.ops is reference and in_place.serves(piece.primitive, x, layer, self.handles)
        return Piece(piece.primitive, in_place) if serves else piece

    def _piece(self, name: str, adapter: Adapter, layer: nn.Module, x: Tensor, routed: Routed | None) -> Piece:
        if adapter.valueless and x.device.type != "meta":
            raise AttachError(
                f"{self.name}: its adapter is on the meta device, or was given memory there and no values; attach, or "
                "load the adapter's file, after the model's weights are loaded"
            )
        try:
            primitive, dtype = primitive_of(adapter, layer), x.dtype
        except Exception as error:
            put_name(self.name, error)
            raise
        if is_embedding(layer):
            primitive, dtype = on_ids(primitive, layer), token_dtype(layer)
        ops = select(adapter.backend, x.device, dtype)[0]
        primitive = self.in_part(name, primitive)
        return Piece(primitive.on(routed.segments) if routed else primitive, ops)

    def _of_rows(self, rows: Rows, by_row: dict[str, Piece], x: Tensor, routed: Routed | None) -> list[Piece]:
        """The pieces where adapters share a batch: each on its own entries or, if all are low-rank sums with the same
        dropout, as one sum of which each row takes its own."""
        names, pieces, ops = list(by_row), list(by_row.values()), next(iter(by_row.values())).ops
        sums = [piece.primitive for piece in pieces if type(piece.primitive) is LowRankAdd and piece.ops is ops]
        as_one = len(sums) == len(pieces) and len({each.dropout for each in sums}) == 1

        def runs(of: Sequence[str]) -> Segments:
            return rows.of_experts(*routed, of, self.name) if routed else rows.segments(x, of, self.name)

        if as_one and (routed or rows.batch_dim == 0):
            return [Piece(LowRankAdd.stacked(sums, runs(names)), ops)]
        if routed:
            return [Piece(piece.primitive.on(runs([name])), piece.ops) for name, piece in by_row.items()]
        packed = rows.lengths is not None
        return [
            Piece(OfRows(piece.primitive, rows.entries(x, name, self.name), rows.batch_dim, packed), piece.ops)
            for name, piece in by_row.items()
        ]


def _do_waiting() -> None:
    """Another thread may do some of it meanwhile."""
    while waiting:
        try:
            now = waiting.pop()
        except IndexError:
            return
        now()


def _same(a: Tensor, b: Tensor, untold: bool) -> bool:
    """Whether b is a, or has its values, be it in another dtype: hooks may put an alias into a graph, copy or cast.
    `untold`: what to take where none can be asked for, as within a transform."""
    if a is b or a.shape != b.shape:
        return a is b
    if transformed() or not (is_plain(a) and is_plain(b)):
        return untold
    return a.data_ptr() == b.data_ptr() or torch.equal(a.detach().to(b.dtype), b.detach())


def _unfit_input(x: Any) -> str:
    if isinstance(x, Tensor) and x.is_nested:
        return (
            "its adapter got a nested tensor, whose rows it can't count; nn.TransformerEncoder makes one of padded "
            "input in evaluation unless its use_nested_tensor is False"
        )
    if type(x).__name__ == "Proxy":
        return "its adapter got a Proxy of torch.fx, which traces no hooks; trace by torch.export"
    got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    return f"its adapter got {got}, and acts on rows of floating-point numbers; leave it out by exclude_names"


def _add_up(first: Piece, second: Piece) -> bool:
    """Whether they may become one. Dropout draws a mask for each."""
    sums = (each.primitive for each in (first, second))
    return first.ops is second.ops and all(type(each) is LowRankAdd and each.dropout == 0 for each in sums)


def _as_one(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece(LowRankAdd.side_by_side([cast(LowRankAdd, piece.primitive) for piece in pieces]), pieces[0].ops)
