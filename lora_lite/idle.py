"""Adapters that do nothing although they are attached, in words: which layers are idle, of which kinds, and why."""

from collections.abc import Mapping

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
        "unreached": "these ran, but no gradient reached their adapters (a part under no_grad, detached, or an "
        "output that nothing uses?): {}",
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


def copied(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Layers of the model, by name, with their sites, that no attachment knows: copies of adapted ones."""
    here = list(model.named_modules())
    known = {id(s) for _, m in here for each in vars(m).get(ATTACHMENTS, {}).values() for s in each.sites.values()}
    found = ((name, module, module._modules.get(SITE)) for name, module in here)
    return {name: (module, site) for name, module, site in found if site is not None and id(site) not in known}


def whole_kinds(targets: list[Target], wanted: set[str], blocks: bool) -> list[str]:
    """Of the wanted layers those whose whole kind is wanted: a name apart from its numbers, but those of the layers in
    an nn.Sequential, which runs all of them. With `blocks`, a name apart from the numbers of experts alone."""

    def kind(target: Target) -> str:
        if blocks:
            before, experts, behind = target.name.partition("experts")
            return before + experts + fold(behind)
        above, _, last = target.name.rpartition(".")
        return f"{fold(above)}.{last}" if target.in_sequence else fold(target.name)

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
