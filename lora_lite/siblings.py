"""Layers that read the same x share the work: q, k and v under one attention, gate and up under one feed-forward block.

Their parent gets two hooks. While it runs, the first of such children to be called takes x Aᵀ for all of them from one
read of x, and leaves each an alias of x: all gradients then come back to one function, which adds them at once
(`shrink_together`). Which children read the same tensor shows at their calls, by its identity: one that gets another
computes alone, and belongs from later calls on to those that get that one: from when no checkpoint is left that will
run an earlier call again, as it was.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from .backend import select
from .calls import Call, always_after, begin, end, under_way, with_call
from .in_place import backend
from .operators import autocast_dtype, transformed
from .params import SITE
from .placement import is_managed, is_sharded
from .primitives import Shrinks, only_shrinks, require_width
from .recomputation import is_checkpoints, reentrant, saving
from .shapes import shape
from .targets import Target

if TYPE_CHECKING:
    from .adapter import Adapter
    from .site import Piece, Site

SIBLINGS = "_lora_lite_siblings"  # attribute of a parent


class Siblings:
    """The groups of a parent's children that have read the same x so far, by name. Holds no module, so that copies and
    replicas of the parent group their own children."""

    def __init__(self, parent: nn.Module) -> None:
        self.groups: list[list[str]] = []
        self.regrouped: list[list[str]] | None = None  # to be in force once no call is left to be run again
        self.to_rerun: list[ref[Any]] = []  # what lives as long as a checkpoint of a call does
        self.handles = [
            parent.register_forward_pre_hook(self.enter, with_kwargs=True),
            always_after(parent, self.leave, -2),
        ]
        vars(parent)[SIBLINGS] = self

    def enter(self, parent: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook of the parent."""
        if torch.compiler.is_compiling():
            return self._given_to_children(parent, args, kwargs)
        under_way()
        packing = saving()
        self._settle()
        self._note_checkpoint(packing)
        begin(parent, Family(self, packing))
        return None

    def leave(self, parent: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the parent; also called where its forward raised. What nobody fetched is dropped."""
        if torch.compiler.is_compiling():
            return
        end(parent)
        if self.regrouped is not None:
            self._settle()

    def _given_to_children(self, parent: nn.Module, args: Any, kwargs: Any) -> Any:
        """The parent's arguments with the call's family on those that its children may read."""
        family = Family(self, saving())
        children = [parent._modules.get(name) for group in self.groups if len(group) > 1 for name in group]
        widths = {shape(child)[0] for child in children if child is not None and SITE in child._modules}

        def given(each: Any) -> Any:
            reads = isinstance(each, Tensor) and each.is_floating_point() and each.ndim > 1 and each.shape[-1] in widths
            return with_call(each, parent, family) if reads else each

        args = tuple(given(each) for each in args)
        return args if kwargs is None else (args, {name: given(each) for name, each in kwargs.items()})

    def _settle(self) -> None:
        """Put new groups in force where nothing stands against it."""
        self.to_rerun = [each for each in self.to_rerun if each() is not None]
        if self.regrouped is not None and not self.to_rerun and torch._C._current_graph_task_id() == -1:
            self.groups, self.regrouped = self.regrouped, None

    def _note_checkpoint(self, packing: Any) -> None:
        if packing is not None and torch.is_grad_enabled() and is_checkpoints(packing[0]):
            self.to_rerun.append(ref(packing[1]))  # kept with each tensor that is saved
        if self.regrouped is not None:
            self.note_reentrant()

    def note_reentrant(self) -> None:
        """Remember the calls of reentrant checkpointing that this is in, and forget those that it runs again. To look
        for them takes a while, and is worth it where groups are to change."""
        for call, is_forward in reentrant():
            if is_forward:
                self.to_rerun.append(ref(call))
            else:
                self.to_rerun = [each for each in self.to_rerun if each() is not call]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "to_rerun": []}  # a copy has no calls to run again

    def remove(self, parent: nn.Module) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        del vars(parent)[SIBLINGS]


@dataclass
class Shared:
    """What a child of a group finds ready: its pieces, and what `on_input` of the first returns, if that was done."""

    pieces: "list[Piece]"
    selection: tuple[Any, ...] | None  # which of its adapters acted when these were made, and how strongly
    x: Tensor | None = None
    h: Tensor | None = None


@dataclass
class _OfGroup:
    x: Tensor
    context: tuple[Any, ...]
    ready: dict[str, Shared] = field(default_factory=dict)
    shares: bool = False  # whether some x Aᵀ came from one read of x


class Family:
    """One call of a parent: what the groups of its children share."""

    def __init__(self, siblings: Siblings, packing: Any) -> None:
        self.siblings, self.groups, self.packing = siblings, siblings.groups, packing
        self.done: dict[int, _OfGroup] = {}
        self.read: dict[str, Tensor] = {}  # what each child got
        self.regrouped: list[list[str]] | None = None  # by what has shown in this call

    def share(self, parent: nn.Module, layer: nn.Module, x: Tensor) -> Shared | None:
        """What is ready for this layer, of which x is the input; None: it computes alone."""
        found = next(
            ((i, name) for i, group in enumerate(self.groups) for name in group if parent._modules.get(name) is layer),
            None,
        )
        # A checkpoint in the middle of the parent's forward runs its own layers again, and must find them alone.
        if found is None or not _groupable(x) or saving() != self.packing:
            return None
        i, name = found
        called_before = name in self.read
        self.read[name] = x
        if i not in self.done:
            made = _shared(parent, self.groups[i], x) if len(self.groups[i]) > 1 else {}
            context = _context(x) if made else ()
            self.done[i] = _OfGroup(x, context, made, any(each.h is not None for each in made.values()))
        done = self.done[i]
        ready = done.ready.pop(name, None)
        if done.x is not x:
            if not (called_before or torch.compiler.is_compiling()):
                self._regroup(name, x)
            return None
        as_prepared = ready is not None and done.context == _context(x) and ready.selection == _selection(layer)
        return ready if as_prepared else None

    @property
    def shares(self) -> bool:
        """Whether some of the children have shared the read of their x so far."""
        return any(each.shares for each in self.done.values())

    def _regroup(self, name: str, x: Tensor) -> None:
        """The child leaves its group, for that of the children that got its x in this call, if there is one."""
        if self.siblings.regrouped is None:
            self.siblings.note_reentrant()
        before = self.regrouped or self.groups
        alike = {other for other, its in self.read.items() if its is x} - {name}
        groups = [[other for other in group if other != name] for group in before]
        joined = next((group for group in groups if not alike.isdisjoint(group)), None)
        if joined is None:
            groups.append([name])
        else:
            joined.append(name)
        self.regrouped = self.siblings.regrouped = [group for group in groups if group]


def family_under_way() -> tuple[nn.Module, Family] | None:
    """The parent that calls a layer now, where it has groups of children, and what they share in this call."""
    calls = under_way()
    return (calls[-1].module, calls[-1].kept) if calls and isinstance(calls[-1].kept, Family) else None


@contextmanager
def as_called_by(parent: nn.Module) -> Iterator[Family]:
    """Within this context its children are called as in its forward."""
    family = Family(vars(parent)[SIBLINGS], saving())
    begin(parent, family)
    try:
        yield family
    finally:
        end(parent)


def share(layer: nn.Module, x: Tensor, caller: Call | None) -> Shared | None:
    """What its caller has ready for the layer; None: it computes alone, as where that is not its parent, or one of both
    is compiled by itself."""
    return caller.kept.share(caller.module, layer, x) if caller and isinstance(caller.kept, Family) else None


def settle_siblings(model: nn.Module, targets: Iterable[Target]) -> None:
    """Group the children that may read the same x, once adapters have come or gone: those that read from the residual
    stream, and are as wide. `targets`: of all attachments."""
    readers = {id(target.layer) for target in targets if target.role == "reader"}
    for parent in list(model.modules()):
        by_width: dict[int, list[str]] = {}
        for name, child in parent._modules.items() if not isinstance(parent, nn.Sequential) else ():
            if child is not None and id(child) in readers and SITE in child._modules:
                by_width.setdefault(shape(child)[0], []).append(name)
        groups = [names for names in by_width.values() if len(names) > 1]
        standing = cast("Siblings | None", vars(parent).get(SIBLINGS))
        if groups:
            standing = standing or Siblings(parent)
            standing.groups, standing.regrouped = groups, None
        elif standing is not None:
            standing.remove(parent)


def _groupable(x: Tensor) -> bool:
    """Not where something differentiates forward, maps or traces, nor where no version tells whether x has changed."""
    return not transformed() and (torch.compiler.is_compiling() or not x.is_inference())


def _context(x: Tensor) -> tuple[Any, ...]:
    """What must not change between the calls of two that share: x itself, where its gradient goes, and how it is
    computed."""
    own: tuple[Any, ...] = ()
    if not torch.compiler.is_compiling():
        address = x.data_ptr() if type(x) is Tensor else None  # another one's values by `x.data = `
        own = (x._version, x.requires_grad, x.grad_fn, address)
    return (torch.is_grad_enabled(), autocast_dtype(x.device), *own)


def _shared(parent: nn.Module, names: list[str], x: Tensor) -> dict[str, Shared]:
    """The pieces of each of these children that acts, and whose backend finds it worth to share x; and of those that
    shrink x, x Aᵀ."""
    ready: dict[str, Shared] = {}
    for name in names:
        layer = parent._modules.get(name)
        site = cast("Site | None", None if layer is None else layer._modules.get(SITE))
        if layer is None or site is None or site.rows is not None or is_managed(layer):
            continue
        acting = site.acting()
        if acting and _worth_sharing(acting[0][1], x) and not any(_away(adapter) for _, adapter in acting):
            ready[name] = Shared(site.pieces(acting, layer, x), _selection(layer))
    by_backend: dict[str, list[Shared]] = {}
    for each in ready.values():
        if _shrinks(each.pieces[0], x):
            by_backend.setdefault(backend(each.pieces[0].ops).__name__, []).append(each)
    for alike in by_backend.values():
        if len(alike) > 1:
            shrinks = [cast(Shrinks, each.pieces[0].primitive) for each in alike]
            ops = alike[0].pieces[0].ops
            if any(each.pieces[0].ops is not ops for each in alike):
                ops = backend(ops)
            for each in shrinks:
                require_width(x, each.A.shape[-1])
            xs, hs = ops.shrink_together(x, [each.A for each in shrinks], [each.dropout for each in shrinks])
            for each, own_x, h in zip(alike, xs, hs, strict=True):
                each.x, each.h = own_x, h
    return ready


def _worth_sharing(adapter: "Adapter", x: Tensor) -> bool:
    """Graphs know no sizes, and share every x."""
    return torch.compiler.is_compiling() or select(adapter.backend, x.device, x.dtype)[0].worth_sharing(x)


def _selection(layer: nn.Module) -> tuple[Any, ...] | None:
    """None: another thread has detached the adapter meanwhile."""
    site = cast("Site | None", layer._modules.get(SITE))
    return None if site is None else (site.off, site.strengths)


def _away(adapter: nn.Module) -> bool:
    """Whether its tensors come when its own layer is called, or have no values."""
    return is_managed(adapter) or cast(Any, adapter).valueless or any(is_sharded(p) for p in adapter.parameters())


def _shrinks(piece: "Piece", x: Tensor) -> bool:
    """Whether all that its `on_input` does is x Aᵀ."""
    primitive = cast(Shrinks, piece.primitive)
    return only_shrinks(primitive) and primitive.segments is None and primitive.A.device == x.device
