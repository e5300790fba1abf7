"""Find the layers to adapt, by structure: anything with the shape of a linear map and a weight. And say why not.

What a user names is a promise: each entry of `target_names`, `rank_pattern`, `alpha_pattern`, `layers` and of an
`exclude_names` that is not the default must find something, and so must "expert" and "embedding" in `target_roles`, or
`find_targets` raises.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .config import USUALLY_LEFT_OUT, AdapterConfig, Role
from .errors import AttachError, first_of
from .placement import mesh_of
from .quantized import weight_of
from .renaming import WRAPPED, dotted, named_modules, named_parameters
from .shapes import SHAPELESS, described, features, is_embedding, shape
from .stacks import STACKS, Stack, is_experts, stacks_of
from .whole_modules import inside, matched

# Names of square layers that write into the residual stream; any other square layer reads from it.
_WRITERS = re.compile(
    r"(^|\.)(o|out|output|proj)$"
    r"|(^|[._])(o_proj|out_proj|down_proj|c_proj|to_out\.0|out_lin|lin2|fc2|fc_out|linear_out|to_add_out|post_proj"
    r"|wo|w2|dense|dense2|dense_4h_to_h)$",
    re.IGNORECASE,
)

_ROLES: dict[Role, str] = {
    "reader": "reads from the residual stream",
    "writer": "writes into the residual stream",
    "inner": "neither reads from nor writes into the residual stream",
    "expert": "stacked experts, which target_roles or target_names must name",
    "embedding": "an embedding, which target_roles or target_names must name",
}


@dataclass(frozen=True)
class Target:
    """A layer to adapt: its name in the model, the module, its place beside the residual stream, the device mesh that
    FSDP2 has sharded it over, if any, the number of its block, if it is in one, whether it is an output head, and
    whether it is a part of an nn.Sequential."""

    name: str
    layer: nn.Module
    role: Role
    mesh: Any = None
    block: int | None = None
    is_head: bool = False
    in_sequence: bool = False

    @property
    def label(self) -> str:
        """Its name and shape, for people."""
        return f"{self.name} ({described(self.layer)})"


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for whatever has its shape: quantised layers are no subclasses that we import. A wrapper
    that passes for what it wraps (torch.compile's) is none, nor is a layer that has not got its shape yet."""
    return (
        features(module) is not None
        and not is_embedding(module)
        and not any(wrapped in module._modules for wrapped in WRAPPED)
        and (weight := weight_of(module)) is not None
        and not is_lazy(weight)
    )


def is_shapeless(module: nn.Module) -> bool:
    """Whether it is a linear layer that gets its shape from its first input (nn.LazyLinear)."""
    return features(module) is not None and (weight := weight_of(module)) is not None and is_lazy(weight)


def candidates(model: nn.Module) -> list[Target]:
    """Every linear layer of the model, every stack of experts, and every embedding, in its order."""
    everything = dict(_layers(model))
    others: dict[str, Role] = {name: role for name, layer in everything.items() if (role := _role_of_kind(layer))}
    linears = {name: layer for name, layer in everything.items() if name not in others}
    by_weight: dict[int, list[str]] = {}
    weights = {name: _held_weight(layer) for name, layer in linears.items()}
    for name, weight in weights.items():
        by_weight.setdefault(id(weight), []).append(name)
    outer = {name for alike in by_weight.values() for name in alike if any(_is_within(other, name) for other in alike)}
    linears = {name: layer for name, layer in linears.items() if name not in outer}
    widths, blocks, heads = _Widths(model, linears), _Blocks(model, linears), _heads(model)
    return [
        Target(
            name,
            layer,
            others.get(name) or _role(name, layer, widths.of(name)),
            mesh_of(model, name, weight_of(layer)),
            blocks.of(name),
            name in linears and (id(layer) in heads or id(weights[name]) in heads),
            isinstance(parent_of(model, name), nn.Sequential),
        )
        for name, layer in everything.items()
        if name in linears or name in others
    ]


def _role_of_kind(layer: nn.Module) -> Role | None:
    """The role of a layer that its kind alone gives it."""
    return "expert" if isinstance(layer, Stack) else "embedding" if is_embedding(layer) else None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Whatever may be adapted, by name."""
    for name, module in named_modules(model):
        if is_linear(module) or is_embedding(module):
            yield name, module
        elif is_experts(module) and STACKS not in module._modules:
            yield from ((dotted(name, key), stack) for key, stack in stacks_of(module).items())


def _held_weight(layer: Any) -> Any:
    """A linear layer's weight, whose id tells who else has it; where it makes one anew each time, the layer itself."""
    weight = weight_of(layer)
    return weight if weight_of(layer) is weight else layer


def stacks_among(targets: Iterable[Target]) -> list[Stack]:
    """Those of the targets that are stacks of experts."""
    return [target.layer for target in targets if isinstance(target.layer, Stack)]


def parent_of(model: nn.Module, name: str) -> nn.Module | None:
    """The module that holds the layer of that name; None where the layer is the model."""
    return model.get_submodule(name.rpartition(".")[0]) if name else None


def _is_within(name: str, other: str) -> bool:
    """Whether a module stands in another, which then only passes on a weight that both have."""
    return name != other and (other == "" or name.startswith(f"{other}."))


def find_targets(model: nn.Module, cfg: AdapterConfig) -> list[Target]:
    """The layers that `cfg` selects, in the model's order.

    Raises:
        AttachError: there is none, or an entry that the user gave finds nothing; the message lists the candidates.
    """
    return choose(model, cfg)[0]


def choose(model: nn.Module, cfg: AdapterConfig, promised: bool = True) -> tuple[list[Target], dict[str, str]]:
    """The layers that `cfg` selects, and of each other candidate why it is left out. An AttachError where there are
    none or, as `promised`, something that `cfg` names is not among them."""
    found, in_full = candidates(model), matched(model, cfg.modules_to_save)
    others = [target.name for target in found if target.role != "embedding"]
    why = {
        target.name: "trained in full (modules_to_save)"
        if inside(target.name, in_full)
        else _why_not(target, cfg, others)
        for target in found
    }
    targets = [target for target in found if not why[target.name]]
    if promised:
        _keep_promises(model, cfg, found, targets, why)
    if not targets and any(not _why_not(target, cfg, others) for target in found):
        raise AttachError(
            f"modules_to_save={cfg.modules_to_save}: {', '.join(in_full)} train in full, and hold all layers that an "
            "adapter would stand on; name smaller modules"
        )
    if not targets:
        raise AttachError(_no_match("", model, found, cfg))
    return targets, {name: reason for name, reason in why.items() if reason}


def _why_not(target: Target, cfg: AdapterConfig, others: list[str]) -> str:
    """Why the layer is not selected; empty: it is. `others`: the names of the candidates that are no embeddings."""
    if target.role == "embedding" and not _is_meant(target.name, cfg, others):
        return _ROLES["embedding"]
    if target.role == "expert" and not (cfg.names_given or "expert" in cfg.target_roles):
        return _ROLES["expert"]
    if cfg.target_names and not any(re.search(pattern, target.name) for pattern in cfg.target_names):
        return "not in target_names"
    if target.is_head and cfg.exclude_names and not cfg.names_given:
        return "the output head"
    spared = target.role == "embedding" and cfg.exclude_names == USUALLY_LEFT_OUT  # its role asks for it
    if excluded := [pattern for pattern in cfg.exclude_names if re.search(pattern, target.name) and not spared]:
        return f"excluded by {excluded[0]!r}"
    if cfg.layers is not None and target.block not in cfg.layers:
        return f"not in layers={cfg.layers}"
    if cfg.target_roles and target.role not in cfg.target_roles:
        return f"role {target.role}: {_ROLES[target.role]}"
    return ""


def _is_meant(embedding: str, cfg: AdapterConfig, others: list[str]) -> bool:
    """Whether the user asks for this embedding: by its role, or by a pattern that finds no other kind of layer or turns
    on the embedding's own name. What ".*" or "encoder" finds, it would find under any name."""
    if "embedding" in cfg.target_roles:
        return True
    renamed = re.sub(r"[^.]+$", "layer", embedding)
    return cfg.names_given and any(
        re.search(pattern, embedding) and not (re.search(pattern, renamed) and _finds(pattern, others))
        for pattern in cfg.target_names
    )


def _finds(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _keep_promises(
    model: nn.Module, cfg: AdapterConfig, found: list[Target], targets: list[Target], why: dict[str, str]
) -> None:
    chosen = [target.name for target in targets]
    if cfg.names_given:
        for pattern in cfg.target_names:
            if not _finds(pattern, chosen):
                raise AttachError(_no_match(f"{pattern!r} of ", model, found, cfg, pattern, why))
        for name, module in named_modules(model):
            wanted, excluded = (any(_finds(each, [name]) for each in p) for p in (cfg.target_names, cfg.exclude_names))
            if wanted and not excluded and is_shapeless(module):
                raise AttachError(f"{name}, which target_names matches, can't be adapted yet: {SHAPELESS}")
    for index in cfg.layers or ():
        if not any(target.block == index for target in targets):
            raise AttachError(_no_match(f"{index} of ", model, found, cfg))
    for kind in cfg.kinds_given:
        if targets and not any(target.role == kind for target in targets):
            raise AttachError(_none_of_a_kind(kind, model, {t.name: why[t.name] for t in found if t.role == kind}))
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(cfg, field):
            if targets and not _finds(pattern, chosen):
                raise AttachError(
                    f"{field}: {pattern!r} matches none of the {len(chosen)} layers that are adapted, such as "
                    f"{chosen[0]}{_nearest(pattern, chosen)}; correct it or leave it out"
                )
    everything = [name for name, _ in (*named_modules(model), *named_parameters(model))]
    for pattern in cfg.exclude_names:
        if pattern not in USUALLY_LEFT_OUT and not _finds(pattern, everything):
            raise AttachError(
                f"exclude_names: {pattern!r} matches nothing in the model{_nearest(pattern, everything)}; correct it "
                "or leave it out"
            )


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The names whose last part, or whole, is most like the pattern."""
    parts = dict.fromkeys(part for name in names for part in (name, name.rpartition(".")[2]) if part)
    plain = re.sub(r"\\(.)|[$^()*+?|\[\]]", r"\1", pattern).strip(".")
    near = get_close_matches(plain, parts, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


# ---- the model's structure -------------------------------------------------------------------------------------------


def _heads(model: nn.Module) -> set[int]:
    """Ids of output heads and of embeddings' weights, to which heads may be tied."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            found.add(id(module.weight))
        of_module = getattr(module, "get_output_embeddings", None)
        if callable(of_module):
            try:
                found.add(id(of_module()))
            except Exception:  # it is the model's own code, and only asked
                continue
    return found - {id(None)}


def _numbered(name: str) -> Iterator[tuple[str, int]]:
    """(prefix, number) of each numbered part above the layer itself: ("encoder.layers", 3) of encoder.layers.3.fc1."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            yield ".".join(parts[:i]), int(part)


def fold(name: str) -> str:
    """The name with its numbers left out: the kind of the layer."""
    return re.sub(r"(?<![^.])[0-9]+(?![^.])|(?<=expert_)[0-9]+(?![^.])", "*", name)


class _Blocks:
    """The numbers of transformer blocks: those of the longest run of numbered siblings of one class that hold linear
    layers, the outer of two as long. A mixture's experts are no blocks."""

    def __init__(self, model: nn.Module, linears: Iterable[str]) -> None:
        classes: dict[str, dict[int, type]] = {}
        for name in linears:
            for prefix, number in _numbered(name):
                if number not in classes.setdefault(prefix, {}):
                    sibling = model.get_submodule(dotted(prefix, number))
                    classes[prefix][number] = type(sibling)
        self.length: Counter[str] = Counter()
        for prefix, siblings in classes.items():
            (_, count), *_ = Counter(siblings.values()).most_common(1)
            self.length[fold(prefix)] = max(self.length[fold(prefix)], count)

    def of(self, name: str) -> int | None:
        found = [(prefix, number) for prefix, number in _numbered(name) if not prefix.endswith("experts")]
        return max(found, key=lambda each: self.length[fold(each[0])])[1] if found else None


class _Widths:
    """Widths of the residual stream, by block: the width that most of its linear layers read or write, where a
    hidden_size of the model's config counts twice. Where two are level the block around it decides."""

    def __init__(self, model: nn.Module, linears: dict[str, Any]) -> None:
        config = getattr(model, "config", None)
        parts = [each for each in getattr(config, "__dict__", {}).values() if hasattr(each, "hidden_size")]
        holders = [getattr(config, "text_config", None), config, *parts]
        declared = [getattr(holder, "hidden_size", None) for holder in holders]
        self.declared = [width for width in declared if isinstance(width, int)]
        counts: dict[str, Counter[int]] = {}
        for name, layer in linears.items():
            for block in self._around(name):
                counts.setdefault(block, Counter()).update(shape(layer))
        self.by_block = {block: width for block, counter in counts.items() if (width := self._most(counter))}
        everything: Counter[int] = Counter(w for m in linears.values() for w in shape(m))
        self.outside = set(self.by_block.values())
        if not self.outside:
            self.outside = {self.declared[0]} if self.declared else {w for w, _ in everything.most_common(1)}

    @staticmethod
    def _around(name: str) -> list[str]:
        return [dotted(prefix, number) for prefix, number in _numbered(name)]

    def _most(self, counter: Counter[int]) -> int | None:
        weighed = {width: count * (2 if width in self.declared else 1) for width, count in counter.items()}
        best = [width for width, count in weighed.items() if count == max(weighed.values())]
        return best[0] if len(best) == 1 else None

    def of(self, name: str) -> set[int]:
        inside = [self.by_block[block] for block in reversed(self._around(name)) if block in self.by_block]
        return {inside[0]} if inside else self.outside


def _role(name: str, layer: Any, widths: set[int]) -> Role:
    reads, writes = (size in widths for size in shape(layer))
    if reads and writes:
        return "writer" if _WRITERS.search(name) else "reader"
    return "reader" if reads else "writer" if writes else "inner"


def _none_of_a_kind(kind: Role, model: nn.Module, reasons: dict[str, str]) -> str:
    """Of a kind that `target_roles` asks for. `reasons`: why each layer of that kind is left out."""
    from .left_out import EXPERTS, unreachable

    found = [f"{name}: {why}" for name, why in reasons.items()]
    if kind == "expert":
        found += [f"{each.kind} ×{each.count}: {each.why}" for each in unreachable(model) if EXPERTS in each.why]
    what = "a stack of experts" if kind == "expert" else "an embedding"
    return (
        f"target_roles: no layer that is adapted is {what} ({first_of(found) or 'the model has none'}); leave {kind!r} "
        "out of target_roles"
    )


def _no_match(
    entry: str,
    model: nn.Module,
    found: list[Target],
    cfg: AdapterConfig,
    pattern: str = "",
    why: Mapping[str, str] | None = None,
) -> str:
    """One line a kind of layer: block indices are folded, so a deep model's list stays short. `pattern`: the one of
    target_names that matches none that is chosen. `why`: of each layer why it is not."""
    from .left_out import out_of_reach, unreachable

    kinds: dict[str, int] = Counter(f"{fold(t.name)} ({t.role})" for t in found)
    listing = "\n".join(f"  {kind} ×{count}" for kind, count in kinds.items()) or "  (the model has no linear layer)"
    near = _nearest(pattern, (t.name for t in found)) if pattern else ""
    others = [each for each in unreachable(model) if each.matters]
    if pattern and why and (left := [f"{t.name}: {why[t.name]}" for t in found if re.search(pattern, t.name)]):
        near = f". It finds what is left out ({first_of(left)})"
    elif pattern and (named := out_of_reach(model, pattern)):
        near = f". It finds what is not adaptable ({named})"
    rest = "".join(f"\n  {each.kind} ×{each.count}: not adaptable, {each.why}" for each in others)
    return (
        f"no layer matches {entry}target_names={cfg.target_names}, target_roles={cfg.target_roles}, "
        f"exclude_names={cfg.exclude_names}, layers={cfg.layers}{near}. The model's candidates are:\n{listing}{rest}"
    )
