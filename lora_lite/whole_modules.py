"""Modules that train in full beside an adapter (`modules_to_save`): heads, embeddings, norms.

Copies of their tensors stand in the originals' places while the adapter acts. The base's own tensors are never written
to: `detach` and `disabled` put them back. A tensor that several modules hold (tied embeddings) has one copy in all.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import AttachError
from .params import SITE, Params
from .placement import is_sharded, whole
from .quantized import widened
from .renaming import dotted, named_modules, plain_name
from .shapes import SHAPELESS


class _Place(NamedTuple):
    """Where a tensor stands: its name in the model at attach, a module's _parameters or _buffers, and the key there."""

    name: str
    held: dict[str, Any]
    key: str


@dataclass
class _Entry:
    """A parameter or buffer: the places in which it stands, the base's tensor, and the one that trains instead."""

    places: list[_Place]
    original: Any
    trained: Any
    in_place: bool = False
    apart: dict[str, Any] = field(default_factory=dict)  # what stood in some places instead: a tie may be broken

    @property
    def current(self) -> Any:
        """The one that trains; sharding may have put another in its place."""
        _, held, key = self.places[0]
        return held.get(key, self.trained) if self.in_place else self.trained

    @property
    def other(self) -> Any:
        """What would stand in its places instead of what does."""
        return self.original if self.in_place else self.trained

    def standing(self) -> list[Tensor]:
        """What stands in the first of its places, and whatever else with the same values stands in the others."""
        here = list({id(t): t for _, held, key in self.places if (t := held.get(key)) is not None}.values())
        return [t for t in here if same(t, here[0])]

    def require_fit(self) -> None:
        """Raise where the other can't stand in its places."""
        name, held, key = self.places[0]
        leaving = held.get(key, self.other)
        if hasattr(leaving, "full_tensor"):
            raise AttachError(
                f"{name} of modules_to_save is sharded: it can't be switched or taken off; load a fresh model"
            )
        if leaving.shape != self.other.shape:
            raise AttachError(
                f"{name} of modules_to_save had shape {tuple(self.other.shape)} at attach and has "
                f"{tuple(leaving.shape)} now: it can't be switched; resize before attach, or detach"
            )

    def switch(self) -> None:
        """Put the other into its places, on the device and in the dtype of what is there."""
        _, held, key = self.places[0]
        arriving, leaving = self.other, held.get(key)
        if self.in_place:
            self.trained = self.current
        self.in_place = not self.in_place
        if leaving is None:  # the module has made something else of it
            return
        if (arriving.device, arriving.dtype) != (leaving.device, leaving.dtype):
            arriving.data = arriving.data.to(leaving.device, leaving.dtype)
        for name, held, key in self.places:
            there = held.get(key)
            if there is not leaving and (there is None or there.shape != arriving.shape):
                continue
            before = self.apart.pop(name, None)
            held[key] = arriving if before is None else before
            if there is not leaving:
                self.apart[name] = there


class WholeModules:
    """The modules of one attachment that train in full, by name. `others`: those of the model's other attachments."""

    def __init__(self, model: nn.Module, names: Iterable[str], others: Iterable["WholeModules"] = ()) -> None:
        self.names = tuple(names)
        self.entries: dict[str, _Entry] = {}
        originals = {id(e.current): e.original for other in others for e in other.entries.values() if e.in_place}
        places: dict[int, list[_Place]] = {}
        for place, t in standing(model):
            places.setdefault(id(t), []).append(place)
        for name in self.names:
            for path, module in model.get_submodule(name).named_modules():
                place = plain_name(f"{name}.{path}".strip("."))
                if SITE in module._modules or isinstance(module, Params):
                    raise AttachError(
                        f"modules_to_save: {place} carries an adapter and can't train in full too; detach that, or "
                        "leave it out"
                    )
                for _, key, t in _held(module):
                    if is_lazy(t):
                        raise AttachError(f"{name}, which modules_to_save matches, can't train yet: {SHAPELESS}")
                    original = originals.get(id(t), t)
                    if original.shape != t.shape:
                        raise AttachError(
                            f"modules_to_save: {place}.{key} was resized since it trains in full with another adapter; "
                            "detach that first"
                        )
                    trained = _copy(f"{place}.{key}", original)
                    self.entries[places[id(t)][0].name] = _Entry(places[id(t)], original, trained)

    def tensors(self) -> dict[str, Any]:
        """The tensors that train or change, by their first name in the model."""
        return {name: entry.current for name, entry in self.entries.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Those for an optimiser."""
        return [t for t in self.tensors().values() if isinstance(t, nn.Parameter) and t.requires_grad]

    def stored(self) -> dict[str, Tensor]:
        """What a file holds, whole and on the CPU; every process that has a part must call it."""
        return {name: whole(t).detach().cpu().contiguous() for name, t in self.tensors().items()}

    def names_in(self, model: nn.Module) -> dict[str, list[str]]:
        """Of each tensor, by its first name, all the names that it has in the model, or has where another attachment's
        stands there now. A tie that loading has broken counts as long as the values are the same."""
        names: dict[int, list[str]] = {}
        for place, t in standing(model):
            names.setdefault(id(t), []).append(place.name)
        return {
            first: [name for t in entry.standing() for name in names.get(id(t), ())]
            for first, entry in self.entries.items()
        }

    def give_up(self, model: nn.Module) -> list[str]:
        """Leave as it is, and name, what can't be taken off: modules that have left the model, and resized tensors."""
        here = {(id(place.held), place.key) for place, _ in standing(model)} if self.entries else set()
        given_up: list[str] = []
        for first, entry in list(self.entries.items()):
            if not entry.in_place:
                continue
            resized, places = entry.current.shape != entry.original.shape, entry.places
            entry.places = [] if resized else [p for p in places if (id(p.held), p.key) in here]
            kept = {place.name for place in entry.places}
            given_up += [place.name for place in places if place.name not in kept]
            if not kept:
                del self.entries[first]
        return given_up

    @property
    def sharded(self) -> bool:
        """Whether this process holds only parts of its tensors."""
        return any(is_sharded(t) for t in self.tensors().values())

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the copies, which don't act yet."""
        with torch.no_grad():
            for name, entry in self.entries.items():
                entry.current.copy_(tensors[name])

    def __str__(self) -> str:
        return f"{', '.join(self.names)} ({sum(p.numel() for p in self.parameters()):,} parameters)"


def settle(groups: list[tuple[WholeModules, bool]]) -> None:
    """Put in each place the copy of the last attachment that acts, or the base's tensor. `groups`: all of a model's,
    each with whether it acts.

    Raises:
        AttachError: a tensor is sharded, or has another shape by now. Nothing is changed then.
    """
    moves: list[_Entry] = []
    for name in {name for group, _ in groups for name in group.entries}:
        here = [(group.entries[name], acts) for group, acts in groups if name in group.entries]
        wanted = next((entry for entry, acts in reversed(here) if acts), None)
        before = next((entry for entry, _ in here if entry.in_place), None)
        if wanted is not before:
            moves += [entry for entry in (before, wanted) if entry is not None]
    for entry in moves:
        entry.require_fit()
    for entry in moves:
        entry.switch()


def standing(model: nn.Module) -> Iterator[tuple[_Place, Tensor]]:
    """Where the model's parameters and persistent buffers stand, by each of their names."""
    for name, module in named_modules(model, remove_duplicate=False):
        for held, key, t in _held(module):
            yield _Place(dotted(name, key), held, key), t


def _held(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """A module's own parameters and persistent buffers: (where, key, tensor)."""
    for held in (module._parameters, module._buffers):
        for key, t in held.items():
            if t is not None and key not in module._non_persistent_buffers_set:
                yield held, key, t


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they are one tensor, or two with the same values that this process can see."""
    if a is b:
        return True
    if is_sharded(a) or is_sharded(b) or a.is_meta or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(widened(a), widened(b))


def _copy(name: str, t: Tensor) -> Tensor:
    if is_sharded(t) or t.is_meta:
        raise AttachError(f"modules_to_save: {name} is sharded or on the meta device; attach before that")
    if not isinstance(t, nn.Parameter):
        return t.detach().clone()
    if not t.is_floating_point() or t.dtype.itemsize == 1 or type(t) is not nn.Parameter:
        raise AttachError(
            f"modules_to_save: {name} is quantised ({type(t).__name__} of {t.dtype}) and can't be trained"
        )
    return nn.Parameter(t.detach().clone())


def matched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The outermost modules in whose names a pattern is found.

    Raises:
        AttachError: a pattern finds none.
    """
    found: list[str] = []
    paths = [path for path, _ in model.named_modules() if path and SITE not in path.split(".")]
    named = list(filter(None, dict.fromkeys(map(plain_name, paths))))
    for pattern in patterns:
        mine = [name for name in named if re.search(pattern, name)]
        if not mine:
            raise AttachError(
                f"modules_to_save: {pattern!r} matches no module of the model; correct it or leave it out"
            )
        found += mine
    return [name for name in dict.fromkeys(found) if not inside(name, [other for other in found if other != name])]


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a layer is one of the modules, or in one."""
    return any(name == each or name.startswith(f"{each}.") for each in modules)
