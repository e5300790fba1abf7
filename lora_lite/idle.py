"""Adapters that do nothing although they are attached, in words: which layers are idle, of which kinds, and why."""

import re
from collections.abc import Mapping
from typing import Literal

from torch import nn

from .params import ATTACHMENTS, SITE
from .renaming import named_modules
from .targets import Target, fold
from .whole_modules import WholeModules, standing

_READERS = (
    "nn.MultiheadAttention, fused attention or state-space kernels, or a loss that multiplies by its weight, such as "
    "lm_head.weight, read a layer's weight without calling it; an encoder may also have been skipped or removed"
)


def describe(idle: Mapping[str, list[str]]) -> str:
    """What is idle, and what to do; empty: nothing."""
    texts = {
        "never": f"these adapted layers never ran, and their adapters do nothing: {{}}. {_READERS}",
        "unreached": "these ran, but no gradient reached their adapters (a part under no_grad, detached, an output "
        "that nothing uses, or a checkpoint whose inputs need none: model.enable_input_require_grads()?): {}",
        "frozen": "these adapters do not train, since requires_grad was switched off after attach: {}",
        "PEFT": "PEFT was put on this model and has frozen these adapters; call its unload(), train one of both: {}",
        "copied": "these are copies of adapted layers, whose adapters act, and are not trained, switched, saved or "
        "detached with the rest; copy them before attach: {}",
        "gone": "these are no longer part of the model: {}",
        "astray": "these train in full (modules_to_save), and the model has other modules in their places: {}",
    }
    parts = [texts[kind].format(listing(idle[kind])) for kind in texts if idle.get(kind)]
    return f"{'; '.join(parts)}. Leave such layers out by exclude_names, or detach and attach again" if parts else ""


def here_and_gone(model: nn.Module, targets: list[Target]) -> tuple[list[Target], list[str]]:
    """The targets that are part of the model, and the names of those that are not any more."""
    present = {id(module) for module in model.modules()}
    return [t for t in targets if id(t.layer) in present], [t.name for t in targets if id(t.layer) not in present]


def copied(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of the model, by name, whose sites were made for others: copies of adapted ones, in no attachment."""
    adapted = ((module, module._modules.get(SITE)) for module in model.modules())
    found = [module for module, site in adapted if site is not None and vars(site).get("layer_id") != id(module)]
    if not found:
        return {}
    here = list(model.named_modules())
    # Of a copied model each is another's copy, and its own attachments', which were copied with it.
    known = {id(s) for _, m in here for each in vars(m).get(ATTACHMENTS, {}).values() for s in each.sites.values()}
    copies = {id(module) for module in found if id(module._modules[SITE]) not in known}
    return {name: module for name, module in here if id(module) in copies}


def whole_kinds(targets: list[Target], wanted: set[str], apart: Literal["kinds", "blocks", "entries"]) -> list[str]:
    """Of the wanted layers those whose whole kind is wanted.

    Args:
        apart: what makes two kinds: a name apart from its numbers, but those of the layers in an nn.Sequential, which
            runs all of them; the block too; or all of a name but the number of an expert, to which nothing may be sent.
    """

    def kind(target: Target) -> str:
        if apart == "entries":
            return re.sub(r"(expert[^.]*(?:\.|_))[0-9]+(?![^.])", r"\1*", target.name)
        above, _, last = target.name.rpartition(".")
        kept = f"{fold(above)}.{last}" if target.in_sequence else fold(target.name)
        return f"{kept} of {target.block}" if apart == "blocks" else kept

    others = {kind(target) for target in targets if target.name not in wanted}
    return [target.name for target in targets if target.name in wanted and kind(target) not in others]


def listing(layers: list[str]) -> str:
    """The layers by kind, with how many there are of each."""
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(fold(name), []).append(name or "the model itself")
    names = [f"{kind} ×{len(alike)}" if len(alike) > 1 else alike[0] for kind, alike in kinds.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more kinds (see diagnose)" if len(names) > 8 else "")


def current_names(model: nn.Module, targets: list[Target]) -> dict[str, str]:
    """Each target's name in the model as it is now, by the name that it had; a layer that has left keeps its own."""
    names = {id(module): name for name, module in named_modules(model)}
    return {t.name: names.get(id(t.layer), t.name) for t in targets}


def astray(model: nn.Module, whole: WholeModules) -> list[str]:
    """Names of tensors that train in full under which the model has another module's by now, or none."""
    if not whole.entries:
        return []
    now = {place.name: id(place.held) for place, _ in standing(model)}
    places = [place for entry in whole.entries.values() for place in entry.places]
    return [place.name for place in places if now.get(place.name) != id(place.held)]
