"""Which layers and modules PEFT means by the names in its config, by PEFT 0.21.2.

check_target_module_exists (peft/tuners/tuners_utils.py), get_pattern_key and _set_trainable (peft/utils/other.py),
and the heads that its classes of a task add to `modules_to_save` (peft/peft_model.py).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..params import SITE
from ..renaming import dotted, named_modules, plain_name
from ..stacks import Stack
from ..targets import Target

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def as_searched(key: str) -> str:
    """A key of `rank_pattern` or `alpha_pattern` as an expression that finds the same names by `re.search`."""
    return rf"^(.*\.)?({key})$"


def value_of(patterns: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    """What the patterns give the layer of that name."""
    return next((value for key, value in (patterns or {}).items() if re.search(as_searched(key), name)), usual)


def matches(wanted: str | Collection[str], name: str) -> bool:
    """Whether an expression matches the whole name, or one of several names is the end of it, from a dot on."""
    if isinstance(wanted, str):
        return is_all_linear(wanted) or re.fullmatch(wanted, name) is not None
    parts = name.split(".")
    return any(".".join(parts[i:]) in wanted for i in range(len(parts)))


def is_all_linear(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def is_named(config: Mapping[str, Any], name: str) -> bool:
    """Whether `target_modules` name the layer, and nothing leaves it out."""
    if matches(config.get("exclude_modules") or [], name):
        return False
    if any(re.match(rf"(^|.*\.){each}($|\..*)", name) for each in config.get("modules_to_save") or ()):
        return False
    return matches(config.get("target_modules") or [], name)


def is_in_block(config: Mapping[str, Any], name: str) -> bool:
    """Whether the layer is in one of the blocks to adapt, or named in full."""
    blocks, names = config.get("layers_to_transform"), config.get("target_modules")
    if blocks in (None, []) or (isinstance(names, list) and name in names):
        return True
    return _block(name, config.get("layers_pattern")) in ([blocks] if isinstance(blocks, int) else blocks)


def _block(name: str, layers: str | list[str] | None) -> int | None:
    """The number of the block that a layer is in. `layers`: what holds the blocks."""
    kinds = [layers] if isinstance(layers, str) and layers else layers
    starts = [rf"(?:^|.*?\.){each}" for each in kinds] if kinds else [r".*?\.[^.]*"]
    found = (re.match(rf"{start}\.(?P<number>\d+)\.", name) for start in starts)
    return next((int(match["number"]) for match in found if match), None)


def listed(
    names: list[str], others: Iterable[str], finds: Callable[[Collection[str], str], bool] = matches
) -> list[str] | str:
    """The names as they are; as an expression of the whole names where PEFT would find one of the others too."""
    wanted = frozenset(names)
    return f"({'|'.join(map(re.escape, names))})" if any(finds(wanted, other) for other in others) else names


def in_full(config: Mapping[str, Any]) -> list[str]:
    """The names of `modules_to_save`, with the heads of the task. One that names nothing is none."""
    names = [*(config.get("modules_to_save") or ()), *_HEADS.get(str(config.get("task_type")), ())]
    return list(dict.fromkeys(names))


def ends(names: Iterable[str], name: str) -> bool:
    """Whether one of the names is the end of it, in the midst of a part too: so PEFT reads `modules_to_save`, and the
    `feedforward_modules` of IA3."""
    return name.endswith(tuple(names))


def modules_of(model: nn.Module) -> dict[str, str]:
    """The names of the model's modules, all that each has, and its first by each."""
    first, found = {}, {}
    for name, module in named_modules(model, remove_duplicate=False):
        if SITE not in name.split("."):
            found[name] = first.setdefault(id(module), name)
    return found


def in_two_places(model: nn.Module, targets: Iterable[Target]) -> list[str]:
    """The names of the first of these layers that stands in several places: PEFT adapts it in one, the first. A block
    that stands in several is no such layer, nor are those within it. A plain list is a place too: what a forward takes
    from there, PEFT does not replace."""
    places: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        for key, child in module._modules.items():
            places.setdefault(id(child), []).append(plain_name(dotted(name, key)))
        for key, value in vars(module).items() if not isinstance(module, Stack) else ():
            for i, each in enumerate(value if type(value) in (list, tuple) else ()):
                if isinstance(each, nn.Module):
                    places.setdefault(id(each), []).append(f"{name}.{key}[{i}]".removeprefix("."))
    layers: Iterable[Any] = (target.layer for target in targets)
    found = (places.get(id(layer.experts if isinstance(layer, Stack) else layer), []) for layer in layers)
    return next((names for names in found if len(names) > 1), [])
