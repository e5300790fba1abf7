"""Names of layers: without what wraps them, and of those that have moved since a file was written.

A user passes `prefix_map={"model.layers": "model.language_model.layers"}`; where a file's layers are not in the model,
`proposal` finds the map under which they would be.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

from torch import nn

from .errors import CheckpointError
from .stacks import STACKS

T = TypeVar("T")

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", STACKS)


def dotted(*parts: object) -> str:
    """The parts of a name with dots between them; the model itself is ""."""
    return ".".join(str(part) for part in parts if part != "")


def plain_name(name: str) -> str:
    """The name without the wrappers that torch.compile and checkpointing put around modules."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The model's, by plain names."""
    return ((plain_name(path), module) for path, module in model.named_modules(remove_duplicate=remove_duplicate))


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's, by plain names."""
    return ((plain_name(path), p) for path, p in model.named_parameters(remove_duplicate=remove_duplicate))


class Renaming:
    """Names in a file to names in a model and back.

    Args:
        prefix_map: beginnings of names in the file → those in the model, in whole parts between dots; "" begins every
            name. The longest that begins a name counts.
    """

    def __init__(self, prefix_map: Mapping[str, str] | None = None) -> None:
        self.prefixes = dict(prefix_map or {})
        if not all(isinstance(each, str) for pair in self.prefixes.items() for each in pair):
            raise TypeError(f"prefix_map must be a dict of names' beginnings, str to str; got {prefix_map!r}")

    def new(self, name: str) -> str:
        """A name of the file as it is in the model."""
        return _moved(name, self.prefixes)

    def old(self, name: str) -> str:
        """A name of the model as the file has it."""
        return _moved(name, {new: old for old, new in self.prefixes.items()})

    def reaches(self, name: str) -> bool:
        """Whether a name of the model is one that the map gives; all are, where there is none."""
        return not self.prefixes or any(_begins(new, name) for new in self.prefixes.values())

    def check(self, names: Collection[str]) -> None:
        """Raise a CheckpointError where an entry of the map begins none of the file's names."""
        for prefix in self.prefixes:
            if not any(_begins(prefix, name) for name in names):
                raise CheckpointError(
                    f"prefix_map: {prefix!r} begins none of its names, such as {next(iter(names), '')}"
                )

    def keys(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """The same values under their names in the model; a CheckpointError where two names become one."""
        found: dict[str, T] = {}
        for name, value in tensors.items():
            if self.new(name) in found:
                raise CheckpointError(f"prefix_map: {name} and another of its names both become {self.new(name)}")
            found[self.new(name)] = value
        return found


def proposal(names: Collection[str], layers: Collection[str]) -> str:
    """How an error goes on where some of a file's names are none of the model's layers: with the prefix_map under
    which all of them are; empty where there is none."""
    found: dict[str, str] = {}
    while missing := [name for name in names if Renaming(found).new(name) not in layers]:
        maps = [{**found, old: new} for old, new in _moves(missing[0], layers)]
        best = max(maps, key=lambda each: _hits(names, layers, each), default=found)
        if _hits(names, layers, best) <= _hits(names, layers, found):
            return ""
        found = best
    return f". If its layers have other names here, pass prefix_map={found!r}" if found else ""


def _hits(names: Collection[str], layers: Collection[str], prefixes: Mapping[str, str]) -> int:
    return len({new for name in names if (new := _moved(name, prefixes)) in layers})


def _moves(name: str, layers: Collection[str]) -> Iterator[tuple[str, str]]:
    """(beginning, what it would be) of each layer that ends as the name does, the longest ends first."""
    parts = name.split(".")
    for i in range(len(parts)):
        end = ".".join(parts[i:])
        for layer in layers:
            if layer != name and (layer == end or layer.endswith(f".{end}")):
                yield ".".join(parts[: i + 1]), layer.removesuffix(end) + parts[i]


def _moved(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = max((each for each in prefixes if _begins(each, name)), key=len, default=None)
    if prefix is None:
        return name
    rest = name.removeprefix(prefix).removeprefix(".")
    return ".".join(part for part in (prefixes[prefix], rest) if part)


def _begins(prefix: str, name: str) -> bool:
    return prefix in ("", name) or name.startswith(f"{prefix}.")
