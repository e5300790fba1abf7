"""import_peft: an adapter that PEFT saved, attached."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..attaching import build, check_free, derive, init, install, whole_modules
from ..attachment import DEFAULT, Attachment, unwrap
from ..backend import check_backend
from ..checkpoint import fill, filled, named_targets, not_in_file, require_layers
from ..config import AdapterConfig, is_number
from ..errors import CheckpointError, LoraLiteError, first_of
from ..files import read_json, read_tensors
from ..quantized import weight_of
from ..renaming import Renaming, named_parameters, proposal
from ..shapes import shape
from ..stacks import Stack
from ..targets import Target, candidates
from ..variant import REGISTRY
from ..whole_modules import WholeModules, same, standing
from .conversions import WEIGHT
from .experts import names_in_file, stacked
from .formats import DROPOUT, EMBEDDING, LORA, PREFIX, ROAD, TENSORS
from .matching import (
    as_searched,
    ends,
    in_full,
    in_two_places,
    is_all_linear,
    is_in_block,
    is_named,
    matches,
    modules_of,
    value_of,
)

# Fields of PEFT's configs that say where an adapter came from or how it was trained, not what it computes; or are read.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "delora_lambda", "eva_config", "exclude_modules",
    "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights", "init_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "lambda_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora", "ensure_weight_tying", "module_dropout",
    "fan_in_fan_out", "modules_to_save", "target_parameters", "variant", "group_size",
}  # fmt: skip
# What PEFT takes where a file does not say it, and our configs' defaults are others.
_DEFAULTS = {"r": 8, "lora_alpha": 8, "init_lora_weights": True}
_TYPES = {"LORA": "lora", "DELORA": "delora", "IA3": "ia3", "HRA": "hra", "ROAD": "road"}


def import_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    backend: str = "auto",
    prefix_map: Mapping[str, str] | None = None,
) -> Attachment | dict[str, Attachment]:
    """Attach, under `name`, the adapter that PEFT saved in `folder`.

    LoRA (also EVA's, PiSSA's and rank-stabilised), DoRA, DeLoRA, IA3, HRA and RoAd, with rank and alpha patterns and
    dropout. An IA3 that scales the outputs of some layers and the inputs of others becomes two adapters, `name` for the
    outputs and `name` + "_ff" for the inputs, and a dict of both is returned.

    Args:
        prefix_map: beginnings of layers' names in the file → in this model, where they differ. Where `target_modules`
            or `modules_to_save` match other layers of a larger model too, those that the map gives are meant.

    Raises:
        AttachError: an adapter is attached already.
        CheckpointError: the files are unreadable, of another method, have tensors or options that lora-lite does not
            compute, or lack a layer that `target_modules` matches; the message names them, and proposes a `prefix_map`
            where one helps. The model is untouched.
    """
    folder = Path(folder)

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        return _read_config(folder), read_tensors(_tensor_file(folder))[1]

    return attach_stored(model, read, f"import_peft: {folder}", name, backend, Renaming(prefix_map))


def attach_stored(
    model: nn.Module,
    read: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]],
    what: str,
    name: str,
    backend: str,
    moved: Renaming,
) -> Attachment | dict[str, Attachment]:
    """Attach what `read` returns, a config and tensors in PEFT's terms, or raise an error that begins with `what`."""
    model = unwrap(model)
    check_backend(backend)
    check_free(model, name)
    ready: dict[str, tuple[AdapterConfig, str, list[Target], dict[str, Adapter]]] = {}
    try:
        config, stored = read()
        _check_fields(config)
        config = {**_DEFAULTS, **config, "modules_to_save": in_full(config)}
        if _has_no_bias(model, stored, config["modules_to_save"]):
            config["bias"] = "none"  # whatever it says
        named, config = _variant(config), _without_weights(model, config, moved)
        moved.check([key.removeprefix(PREFIX) for key in stored])
        whole = _whole_modules(model, config, stored, moved)
        tensors = _unstacked(model, config, _ours(named, _without_bases(model, named, stored, moved)), moved)
        layers = {target.name for target in candidates(model)}
        require_layers(model, [moved.new(name.rpartition(".")[0]) for name in tensors], layers)
        _compare_targets(model, config, {name.rpartition(".")[0] for name in tensors}, moved)
        for variant, of_variant in _by_variant(named, moved.keys(tensors)).items():
            own = f"{name}_ff" if ready else name
            cfg = _config(variant, config, [key.rpartition(".")[0] for key in of_variant], moved)
            cfg = cfg.renamed({old: moved.new(old) for old in (key.rpartition(".")[0] for key in tensors)})
            targets = _targets(model, config, of_variant)
            cfg = _with_widths(cfg, targets) if variant == "pissa" else cfg
            ready[own] = (cfg, backend, targets, _adapters(model, targets, cfg, of_variant, backend))
    except LoraLiteError as error:
        raise CheckpointError(f"{what}: {error}") from error
    for own in ready:
        check_free(model, own)
    without = not_in_file(model, {layer for _, _, _, adapters in ready.values() for layer in adapters})
    no_modules = whole_modules(model, [])
    attached = {
        own: install(model, own, *parts, without, whole if own == name else no_modules) for own, parts in ready.items()
    }
    return attached if len(attached) > 1 else attached[name]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        if folder.is_file():
            raise CheckpointError(
                "it is a file; name the folder that holds it and an adapter_config.json, or call load"
            )
        text = (folder / "adapter_config.json").read_text()
    except FileNotFoundError as error:
        inside = sorted(str(path.parent) for path in folder.glob("*/adapter_config.json"))
        hint = f"; is {' or '.join(inside)} meant?" if inside else ""
        here = "" if folder.is_dir() else ": there is no such folder, and nothing is fetched from a hub"
        raise CheckpointError(f"it has no adapter_config.json{here}{hint}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its adapter_config.json is not readable ({error})") from error
    return read_json(text, dict, "adapter_config.json is")


def _check_fields(config: dict[str, Any]) -> None:
    """Raise where a field is of another kind than PEFT has it."""
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "a list of names": ("target_parameters", _are_names),
        "a list of names, read as regular expressions": (
            "modules_to_save",  # so PEFT leaves out layers within them
            lambda value: _are_names(value) and all(map(_is_expression, value)),
        ),
        "a regular expression or a list of them": (
            "layers_pattern",
            lambda value: all(map(_is_expression, value if isinstance(value, list) else [value])),
        ),
        "a list of names or a regular expression": (
            "target_modules exclude_modules feedforward_modules",
            lambda value: _are_names(value) or _is_expression(value),
        ),
        "a dict of regular expressions": (
            "rank_pattern alpha_pattern",
            lambda value: isinstance(value, dict) and all(map(_is_expression, map(as_searched, value))),
        ),
        "a number": ("lora_dropout module_dropout delora_lambda", lambda value: value == 0 or is_number(value)),
        "an index or a list of indices": (
            "layers_to_transform",
            lambda value: all(isinstance(i, int) for i in (value if isinstance(value, list) else [value])),
        ),
        "a name": ("peft_type variant", lambda value: isinstance(value, str)),
    }
    for wanted, (fields, fits) in kinds.items():
        for field in fields.split():
            if (value := config.get(field)) is not None and not fits(value):
                raise CheckpointError(f"its {field} must be {wanted}; it is {value!r}")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_expression(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _tensor_file(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            "its tensors are a pickle (adapter_model.bin), which can run any code when it is read; save it again with "
            "safe_serialization=True where you trust it"
        )
    return path


def _has_no_bias(model: nn.Module, stored: Mapping[str, Tensor], in_full: Sequence[str]) -> bool:
    """Whether neither model nor file has a bias outside of the modules that train in full."""
    names = [*stored, *(name for name, _ in model.named_parameters())]
    return not any(name.endswith(".bias") and set(in_full).isdisjoint(name.split(".")) for name in names)


def _variant(config: dict[str, Any]) -> str:
    kind, start, dora = config.get("peft_type"), config["init_lora_weights"], config.get("use_dora")
    if kind not in _TYPES:
        raise CheckpointError(f"its peft_type is {kind!r}; lora-lite takes {', '.join(_TYPES)}")
    refused = [
        f"{name}={value!r}"
        for name, value in config.items()
        if (value and name not in _HARMLESS) or (name == "bias" and value != "none")
    ]
    if refused:
        raise CheckpointError(
            f"lora-lite does not compute its {', '.join(refused)}; merge it with PEFT (merge_and_unload), or save it "
            "without"
        )
    if kind != "LORA":
        return _TYPES[kind]
    if _leaves_the_base(start):
        return "dora" if dora else "lora"
    if start == "pissa" and not dora:
        return "pissa"  # of which the residual can be told from the base weights
    raise CheckpointError(
        f"PEFT changed the base weights for init_lora_weights={start!r}{' (with use_dora)' if dora else ''}, or "
        "lora-lite does not know that start, and the file is no use without them; save it with "
        "path_initial_model_for_weight_conversion, or merge it with PEFT"
    )


def _leaves_the_base(start: Any) -> bool:
    """Whether PEFT starts layers so without a change of their weights. It takes capitals in some names."""
    if isinstance(start, str):
        return start in ("eva", "orthogonal") or start.lower() in ("gaussian", "mica")
    return start is None or isinstance(start, bool)


def _ours(variant: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names."""
    ours = {its: mine for mine, its in TENSORS.get(variant, ("", LORA))[1].items()}
    ours |= {its: mine for mine, its in EMBEDDING.items()} if "lora_A.weight" in ours else {}
    found, strange = {}, []
    for name, t in tensors.items():
        layer, its = next(((name.removesuffix(f".{its}"), its) for its in ours if name.endswith(f".{its}")), (name, ""))
        if its and layer.startswith(PREFIX):
            found[f"{layer.removeprefix(PREFIX)}.{ours[its]}"] = t
        else:
            strange.append(name)
    if strange:
        raise CheckpointError(f"lora-lite adapts linear layers and can't take {first_of(strange)}")
    return found


def _without_bases(model: nn.Module, variant: str, stored: dict[str, Tensor], moved: Renaming) -> dict[str, Tensor]:
    """The tensors but the base's own embeddings and heads, which PEFT saves beside an adapter of theirs: of a linear
    layer's PiSSA what that left of them."""
    end, own = ".base_layer.weight", dict(model.named_parameters(remove_duplicate=False))
    for key in [key for key in stored if key.startswith(PREFIX) and key.endswith(end)]:
        layer = key.removeprefix(PREFIX).removesuffix(end)
        base, its = own.get(f"{moved.new(layer)}.weight"), stored[key]
        is_rest = variant == "pissa" and f"{PREFIX}{layer}.{LORA['lora_A']}" in stored
        if base is None or (is_rest and base.shape == its.shape):
            continue
        if not same(base.detach().cpu(), its.to(base.dtype)):
            raise CheckpointError(f"its base has another {layer} than this model: in its vocabulary or its values")
    return {key: t for key, t in stored.items() if not key.endswith(end)}


def _without_weights(model: nn.Module, config: dict[str, Any], moved: Renaming) -> dict[str, Any]:
    """The config with linear layers of which `target_parameters` names the weights among the `target_modules`, where
    they are the same. PEFT's patterns are of the weights' names, there."""
    parameters, modules = config.get("target_parameters") or [], config.get("target_modules") or []
    linears = [moved.old(t.name) for t in candidates(model) if not _is_stack(t) and t.role != "embedding"]
    of_weights = {
        name: [layer for layer in linears if matches([name], layer + WEIGHT)]
        for name in parameters
        if name.endswith(WEIGHT)
    }
    layers = [layer for found in of_weights.values() for layer in found]
    if not layers:
        return config
    if isinstance(modules, str):
        modules = [layer for layer in linears if matches(modules, layer)]
    patterns = {}
    for field, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        old = config.get(field) or {}
        own = {f"^{re.escape(layer)}": value_of(old, layer + WEIGHT, config[usual]) for layer in layers}
        patterns[field] = {**own, **old} if old else {}
    rest = [name for name in parameters if not of_weights.get(name)]
    return {**config, **patterns, "target_parameters": rest, "target_modules": [*modules, *layers]}


def _unstacked(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], moved: Renaming
) -> dict[str, Tensor]:
    """The tensors with those of experts as stacks, under the names of their parameters."""
    wanted = config.get("target_parameters") or []
    if not wanted:
        return tensors
    found = {moved.old(t.name): replace(t, name=moved.old(t.name)) for t in candidates(model) if _is_stack(t)}
    mine = [t for t in found.values() if matches(wanted, t.name)]
    if missing := [name for name in wanted if not any(matches([name], t.name) for t in mine)]:
        own = [moved.old(name) for name, _ in named_parameters(model)]
        if others := [name for name in missing if any(matches([name], each) for each in own)]:
            raise CheckpointError(
                f"its target_parameters name {first_of(others)}, and lora-lite adapts stacked experts and linear layers"
            )
        raise CheckpointError(f"the model has no stacked experts {first_of(missing)} (target_parameters)")
    tensors = dict(tensors)
    for name, layer in names_in_file(mine).items():
        if not {f"{layer}.lora_A", f"{layer}.lora_B"} <= tensors.keys():
            raise CheckpointError(f"its target_parameters match {name}, and it has no tensors for that")
        parts = (tensors.pop(f"{layer}.{key}") for key in ("lora_A", "lora_B"))
        stack: Any = found[name].layer
        tensors |= dict(zip((f"{name}.lora_A", f"{name}.lora_B"), stacked(*parts, stack.num_experts), strict=True))
    return tensors


def _whole_modules(
    model: nn.Module, config: dict[str, Any], stored: dict[str, Tensor], moved: Renaming
) -> WholeModules:
    """The modules that PEFT trained in full, filled; their tensors are taken out of `stored`."""
    names = config["modules_to_save"]
    old = {moved.old(name): first for name, first in modules_of(model).items() if name}
    mine = [  # of a larger model the map says which part the file is of
        name
        for name, first in old.items()
        if moved.reaches(first) or any(key.startswith(f"{PREFIX}{name}.") for key in stored)
    ]
    modules = list(dict.fromkeys(old[name] for name in mine if ends(names, name)))
    absent = [name for name in names if not any(ends([name], module) for module in mine)]
    if missing := [name for name in absent if any(f"{name}." in key for key in stored)]:
        raise CheckpointError(
            f"the model has no module {first_of(missing)}, which it trains in full (modules_to_save)"
            f"{proposal(missing, old)}"
        )
    found = {}
    for first, aliases in whole_modules(model, modules).names_in(model).items():
        in_file = {alias: PREFIX + moved.old(alias) for alias in aliases}
        if not stored.keys() & in_file.values():
            raise CheckpointError(f"{first} is missing, of a module that it trains in full{_proposal(first, stored)}")
        found |= {alias: stored.pop(key) for alias, key in in_file.items() if key in stored}
    rest = [place.name for place, _ in standing(model) if PREFIX + moved.old(place.name) in stored]
    if rest and config.get("ensure_weight_tying"):
        raise CheckpointError(
            f"its ensure_weight_tying makes {first_of(rest)} one with an embedding that trains in full, and this model "
            "has them apart; tie them first, as tie_word_embeddings=True in its config does"
        )
    return filled(model, modules, found, aliases={})  # PEFT writes a tensor for each name


def _proposal(name: str, stored: Mapping[str, Tensor]) -> str:
    """The prefix_map under which a tensor of the file that is no adapter's has this name."""
    end = name.split(".")[-2:]  # the module and its parameter
    names = [key.removeprefix(PREFIX) for key in stored if key.split(".")[-2:] == end]
    return next((found for each in names if (found := proposal([each], [name]))), "")


def _compare_targets(model: nn.Module, config: dict[str, Any], layers: set[str], moved: Renaming) -> None:
    """Raise where the file's layers are not those that its `target_modules` match, as PEFT matches them."""
    old = [(t, moved.old(t.name)) for t in candidates(model)]
    wanted, parameters = config.get("target_modules") or [], config.get("target_parameters") or []
    names = [
        name
        for t, name in old
        if not _is_stack(t)
        and moved.reaches(t.name)
        and is_named(config, name)
        and is_in_block(config, name)
        and not (is_all_linear(wanted) and (t.is_head or t.role == "embedding"))
    ]
    meant = {name for name in layers if is_named(config, name) and is_in_block(config, name)}
    extra = [name for name in sorted(layers - meant) if not matches(parameters, name)]
    if extra and config.get("ensure_weight_tying"):
        raise CheckpointError(
            f"its ensure_weight_tying puts an embedding's adapter on {first_of(extra)} too, and here each layer has "
            "its own; merge it with PEFT"
        )
    if (wanted or parameters) and extra:
        raise CheckpointError(
            f"its target_modules, or its layers_to_transform, do not match {first_of(extra)}, for which it has tensors"
        )
    if missing := [name for name in names if name not in layers]:
        raise CheckpointError(
            f"its target_modules match {len(names)} layers of this model, and it has no tensors for "
            f"{first_of(missing)}: the file is not whole, or is of another model"
            f"{proposal([moved.new(name) for name in layers], [t.name for t, _ in old])}"
        )


def _is_stack(target: Target) -> bool:
    """Whether PEFT has it among `target_parameters`."""
    return isinstance(target.layer, Stack)


def _by_variant(variant: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """IA3's file may have both kinds: N×1 on outputs, 1×K on inputs. All others have one."""
    if variant != "ia3":
        return {variant: tensors}
    kinds: dict[str, dict[str, Tensor]] = {"ia3": {}, "ia3_ff": {}}
    for name, t in tensors.items():
        kinds["ia3" if t.shape[-1:] == (1,) else "ia3_ff"][name] = t
    return {kind: found for kind, found in kinds.items() if found} or {variant: tensors}


def _targets(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Target]:
    """The layers of the tensors."""
    targets = named_targets(model, {"base_model": config.get("base_model_name_or_path") or "unnamed"}, tensors)
    if twice := in_two_places(model, targets):
        raise CheckpointError(
            f"{' and '.join(twice)} are one layer, in whose first place alone PEFT's adapter acts, and one here would "
            "in all; give the model a copy in one of them"
        )
    return targets


def _with_widths(cfg: AdapterConfig, targets: list[Target]) -> AdapterConfig:
    """The config with no r above a layer's width: so many singular triplets PEFT's PiSSA has there, under the scale of
    the r that it was given. Embeddings, which it starts the ordinary way, keep theirs."""
    ranks, alphas = {}, {}
    for target in targets:
        own, width = cfg.for_layer(target.name), min(shape(target.layer))
        if own.r > width and target.role != "embedding":
            pattern = rf"^{re.escape(target.name)}$"
            ranks[pattern] = width
            alphas[pattern] = own.alpha * own.scale / replace(own, r=width).scale
    patterns = {"rank_pattern": {**ranks, **cfg.rank_pattern}, "alpha_pattern": {**alphas, **cfg.alpha_pattern}}
    return replace(cfg, **patterns)


def _adapters(
    model: nn.Module, targets: list[Target], cfg: AdapterConfig, tensors: dict[str, Tensor], backend: str
) -> dict[str, Adapter]:
    adapters = {t.name: build(t, REGISTRY[cfg.variant], cfg, backend) for t in targets}
    for t in targets:
        _check_embedding(t, adapters[t.name])
    if cfg.variant == "pissa":
        # The start that PEFT took from the base weights, and does not save; embeddings start as zero.
        changed = [t for t in targets if t.role != "embedding"]
        _check_ties(model, changed)
        init(changed, adapters)
        tensors |= {
            f"{layer}.{key}": getattr(adapter, key)
            for layer, adapter in adapters.items()
            for key in ("lora_A0", "lora_B0")
        }
    _reshape(adapters, tensors)
    fill(adapters, tensors)
    derive(targets, adapters)
    return adapters


def _check_ties(model: nn.Module, targets: list[Target]) -> None:
    """Raise where PEFT's start took a part off another module's weight, too."""
    names: dict[int, list[str]] = {}
    for place, t in standing(model):
        names.setdefault(id(t), []).append(place.name)
    for target in targets:
        if len(tied := names.get(id(weight_of(target.layer)), [])) > 1:
            raise CheckpointError(
                f"PEFT changed {' and '.join(tied)}, which are one, for init_lora_weights='pissa', and lora-lite "
                "changes no base weights; save it with path_initial_model_for_weight_conversion"
            )


def _check_embedding(target: Target, adapter: Adapter) -> None:
    """Raise where the file has for an embedding what lora-lite can't put there."""
    if target.role == "embedding" and adapter.variant.name not in ("lora", "pissa"):
        raise CheckpointError(
            f"{target.name}: lora-lite has no {adapter.variant.name} on an embedding; merge it with PEFT"
        )


def _config(variant: str, config: dict[str, Any], layers: list[str], moved: Renaming) -> AdapterConfig:
    """The config of an adapter on these layers of the model."""
    names, inputs = config.get("target_modules") or [], config.get("feedforward_modules") or []
    fields: dict[str, Any] = {"target_roles": (), "exclude_names": ()}
    if isinstance(names, str) or isinstance(inputs, str):
        fields["target_names"] = tuple(rf"^{re.escape(layer)}$" for layer in dict.fromkeys(layers))
    else:
        if variant in ("ia3", "ia3_ff"):
            names = [name for name in names if (name in inputs) == (variant == "ia3_ff")]
        names = [*names, *(config.get("target_parameters") or ())]
        fields["target_names"] = tuple(rf"(^|\.){re.escape(moved.new(name))}$" for name in names)
    if variant == "delora":
        fields["lambda0"] = float(config.get("delora_lambda") or 15.0)
    if variant == "road":
        kinds = {its: kind for kind, its in ROAD.items()}
        fields["kind"] = kinds.get(config.get("variant", ROAD[1]))
        fields["group_size"] = config.get("group_size", 64)
    if dropout := config.get(DROPOUT.get(str(config.get("peft_type")), "")):
        fields["dropout"] = float(dropout)
    if variant == "pissa":
        fields["svd"] = "exact"
    for field in ("rank_pattern", "alpha_pattern"):
        fields[field] = {as_searched(key): value for key, value in (config.get(field) or {}).items()}
    fields |= {"r": config["r"], "alpha": config["lora_alpha"], "rslora": bool(config.get("use_rslora"))}
    return REGISTRY[variant].config(**fields)


def _reshape(adapters: dict[str, Adapter], tensors: dict[str, Tensor]) -> None:
    """PEFT keeps some tensors transposed or with an axis of size 1."""
    for layer, adapter in adapters.items():
        for key, wanted in adapter.state_dict().items():
            t = tensors.get(f"{layer}.{key}")
            if t is not None and key == "lora_U":
                tensors[f"{layer}.{key}"] = t.t() if t.ndim == 2 else t
            elif t is not None and t.numel() == wanted.numel() and 1 in t.shape:
                tensors[f"{layer}.{key}"] = t.reshape(wanted.shape)
