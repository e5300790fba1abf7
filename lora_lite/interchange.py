"""export_peft and import_peft: adapters in the files that PEFT reads and writes, which vLLM and others serve.

Whatever is y + scale · (x Aᵀ) Bᵀ leaves as a LoRA: PiSSA of rank 2r, AntiPaSTO of rank r, and methods of one's own.
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from .adapter import Adapter
from .attaching import build, check_free, derive, init, install, whole_modules
from .attachment import DEFAULT, Attachment, require_attachment, unwrap
from .backend import check_backend
from .checkpoint import (
    fill,
    filled,
    first_of,
    named_targets,
    names_now,
    not_in_file,
    read_tensors,
    replace_file,
    standalone,
    warn_of_losses,
)
from .config import AdapterConfig
from .errors import AttachError, CheckpointError, LoraLiteError
from .idle import current_names
from .peft_experts import flat, names_in_file, stacked
from .primitives import LowRankAdd
from .shapes import is_conv1d
from .stacks import Stack
from .targets import Target, candidates, stacks_among
from .variant import REGISTRY
from .whole_modules import WholeModules, inside

_PREFIX = "base_model.model."  # PEFT's wrapper around the model

# Methods that PEFT has under another name than LoRA: its type, and its tensors by ours. `_like_peft` does the shapes.
_TENSORS: dict[str, tuple[str, dict[str, str]]] = {
    "dora": ("LORA", {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_m": "lora_magnitude_vector"}),
    "delora": (
        "DELORA",
        {"lora_A": "delora_A", "lora_B": "delora_B", "lora_lambda": "delora_lambda", "lora_wnorm": "delora_w_norm"},
    ),
    "ia3": ("IA3", {"lora_g": "ia3_l"}),
    "ia3_ff": ("IA3", {"lora_g": "ia3_l"}),
    "hra": ("HRA", {"lora_U": "hra_u"}),
}
_LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

# Fields of PEFT's configs that say where an adapter came from or how it was trained, not what it computes; or are read.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "delora_lambda", "eva_config", "exclude_modules",
    "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights", "init_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "lambda_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora", "ensure_weight_tying", "module_dropout",
    "fan_in_fan_out", "modules_to_save", "target_parameters",
}  # fmt: skip
_DROPOUT = {"LORA": "lora_dropout", "DELORA": "module_dropout"}
# Starts that PEFT makes by changing the base weights, so that the file means nothing without what they became.
_CHANGED_BASE = ("olora", "corda", "loftq", "lora_ga", "pissa_niter")


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | Sequence[str] | None = None,
    uniform: bool = False,
) -> None:
    """Write the attached adapter as `adapter_config.json` and `adapter_model.safetensors`, as PEFT has them.

    `peft.PeftModel.from_pretrained(base, folder)` then computes the same. LoRA, EVA, PiSSA (as rank 2r), AntiPaSTO (as
    rank r) and any method of yours with the primitive `LowRankAdd` are written as LoRA; DoRA, DeLoRA, IA3 and HRA as
    PEFT's own. `name` says which adapter, where several are attached; an `ia3` and an `ia3_ff` may go into one file, as
    the paper has them: `name=("kv", "ff")`.

    With `uniform`, all layers of a LoRA or DoRA get one rank, padded with zeros, and each one's scale goes into its B,
    so that a reader of a single r and alpha is right: some pass over the patterns of layers that differ.

    Raises:
        AttachError: nothing is attached, PEFT has nothing that computes what this method does, or several names are not
            of an IA3 and an IA3-FF on different layers.
        CheckpointError: the folder can't be written, or a tensor has no values or not its shape.
    """
    model, folder = unwrap(model), Path(folder)
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    attachments = _of_one_file(model, name)
    for attachment in attachments:
        names = names_now(model, attachment, "export_peft")
        adapters = {names[layer]: adapter for layer, adapter in standalone(attachment, "export_peft").items()}
        warn_of_losses(model, attachment, "export_peft")
        writer = _as_its_own if attachment.cfg.variant in _TENSORS else _as_lora
        of_one, its_tensors = writer(attachment, adapters, names)
        config |= of_one
        tensors |= its_tensors
    if uniform and config["peft_type"] == "LORA":
        if any(stacks_among(each.targets) for each in attachments):
            raise AttachError(
                "export_peft(uniform=True): readers of one rank and one alpha read no stacked experts; leave it out, "
                "or write merged weights by save_merged"
            )
        config |= _make_uniform(config, tensors)
    config |= _other_fields(model, attachments, config["peft_type"])
    for attachment in attachments:
        tensors |= _in_full(model, attachment, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, sort_keys=True)
        replace_file(
            folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
        )
        replace_file(folder / "adapter_config.json", lambda path: path.write_text(text))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"export_peft: can't write {folder}: {error}") from error


def import_peft(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str = DEFAULT, backend: str = "auto"
) -> Attachment | dict[str, Attachment]:
    """Attach, under `name`, the adapter that PEFT saved in `folder`.

    LoRA (also EVA's, PiSSA's and rank-stabilised), DoRA, DeLoRA, IA3 and HRA, with rank and alpha patterns and dropout.
    An IA3 that scales the outputs of some layers and the inputs of others becomes two adapters, `name` for the outputs
    and `name` + "_ff" for the inputs, and a dict of both is returned.

    Raises:
        AttachError: an adapter is attached already.
        CheckpointError: the files are unreadable, of another method, have tensors or options that lora-lite does not
            compute, or lack a layer that `target_modules` matches; the message names them. The model is untouched.
    """
    model, folder = unwrap(model), Path(folder)
    check_backend(backend)
    check_free(model, name)
    ready: dict[str, tuple[AdapterConfig, str, list[Target], dict[str, Adapter]]] = {}
    try:
        config = _read_config(folder)
        named = _variant(config)
        stored = read_tensors(_tensor_file(folder))[1]
        whole = _whole_modules(model, config.get("modules_to_save") or [], stored)
        tensors = _unstacked(model, config, _ours(named, stored))
        _compare_targets(model, config, {name.rpartition(".")[0] for name in tensors})
        for variant, of_variant in _by_variant(named, tensors).items():
            own = f"{name}_ff" if ready else name
            cfg = _config(variant, config)
            ready[own] = (cfg, backend, *_adapters(model, cfg, config, of_variant, backend))
    except LoraLiteError as error:
        raise CheckpointError(f"import_peft: {folder}: {error}") from error
    for own in ready:
        check_free(model, own)
    without = not_in_file(model, {layer for _, _, _, adapters in ready.values() for layer in adapters})
    no_modules = whole_modules(model, [])
    attached = {
        own: install(model, own, *parts, without, whole if own == name else no_modules) for own, parts in ready.items()
    }
    return attached if len(attached) > 1 else attached[name]


# ---- out -------------------------------------------------------------------------------------------------------------


def _of_one_file(model: nn.Module, name: str | Sequence[str] | None) -> list[Attachment]:
    """The attachments of these names, which PEFT can hold in one file."""
    names = [name] if name is None or isinstance(name, str) else name
    attachments = [require_attachment(model, each) for each in names]
    layers = [layer for each in attachments for layer in each.adapters]
    pair = {each.cfg.variant for each in attachments} <= {"ia3", "ia3_ff"} and len(set(layers)) == len(layers)
    if len(attachments) > 1 and not pair:
        raise AttachError(
            f"export_peft: {', '.join(each.name for each in attachments)}: a PEFT file holds several adapters only "
            "if they are an ia3 and an ia3_ff on different layers; export them one by one"
        )
    return attachments


def _stacks(attachment: Attachment, names: dict[str, str]) -> list[Target]:
    """The adapted stacks of experts, under the names that they have now."""
    return [
        dataclasses.replace(target, name=names[target.name])
        for target in attachment.targets
        if isinstance(target.layer, Stack)
    ]


def _other_fields(model: Any, attachments: list[Attachment], kind: str) -> dict[str, Any]:
    """The fields of PEFT's config that are not of a method's own."""
    current = [current_names(model, each.targets) for each in attachments]
    stacks = [target.name for names, each in zip(current, attachments, strict=True) for target in _stacks(each, names)]
    layers = [
        (each.cfg.variant, layer)
        for names, each in zip(current, attachments, strict=True)
        for layer in names.values()
        if layer not in stacks
    ]
    config = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", "") or None,
        "inference_mode": True,
        "target_modules": [layer for _, layer in layers],
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    }
    if stacks:
        config["target_parameters"] = stacks
    if kind in ("LORA", "IA3"):
        config["fan_in_fan_out"] = any(is_conv1d(t.layer) for each in attachments for t in each.targets)
    if kind in _DROPOUT:  # of which PEFT's experts have none
        config[_DROPOUT[kind]] = 0.0 if stacks else attachments[0].cfg.dropout
    if kind == "IA3":
        return {**config, "feedforward_modules": [layer for variant, layer in layers if variant == "ia3_ff"]}
    return {**config, "bias": "none"}


def _in_full(model: nn.Module, attachment: Attachment, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of modules that train in full, under all of their names; the modules go into the config."""
    stored, whole, found = attachment.whole.stored(), attachment.whole.names, {}
    modules = set(whole)
    for first, names in attachment.whole.names_in(model).items():
        found |= {_PREFIX + alias: stored[first].clone() for alias in names}
        modules |= {alias.rpartition(".")[0] for alias in names if not inside(alias, whole)}
    if modules:
        config["modules_to_save"] = sorted({*config.get("modules_to_save", ()), *modules})
    return found


def _as_lora(
    attachment: Attachment, adapters: dict[str, Adapter], names: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, ranks, alphas = {}, {}, {}
    in_file = names_in_file(_stacks(attachment, names))
    for target in attachment.targets:
        name = names[target.name]
        adapter = adapters[name]
        with torch.no_grad():
            primitive = adapter.primitive(target.layer)
        if not isinstance(primitive, LowRankAdd):
            raise AttachError(
                f"export_peft: {target.name}: PEFT has nothing that computes {attachment.cfg.variant}'s "
                f"{type(primitive).__name__}; use save(model, path)"
            )
        A, B, ranks[name] = primitive.A, primitive.B, primitive.A.shape[-2]
        alphas[name] = _whole(primitive.scale * ranks[name])
        A, B = flat(A, B) if name in in_file else (A, B)
        layer = in_file.get(name, name)
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = _stored(A)
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = _stored(B)
    return {"peft_type": "LORA", **_patterns(ranks, alphas)}, tensors


def _as_its_own(
    attachment: Attachment, adapters: dict[str, Adapter], _: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name = attachment.cfg.variant
    if stacks := stacks_among(attachment.targets):
        raise AttachError(
            f"export_peft: PEFT has no {name} on stacked experts ({stacks[0].key}); it has LoRA there. Use "
            "save(model, path)"
        )
    kind, names = _TENSORS[name]
    tensors = {
        f"{_PREFIX}{layer}.{its}": _stored(_like_peft(getattr(adapter, mine), its, name))
        for layer, adapter in adapters.items()
        for mine, its in names.items()
    }
    ranks = {layer: adapter.cfg.r for layer, adapter in adapters.items()}
    config: dict[str, Any] = {"peft_type": kind}
    if name == "dora":
        alphas = {layer: _whole(a.cfg.scale * a.cfg.r) for layer, a in adapters.items()}
        config |= {"use_dora": True, **_patterns(ranks, alphas)}
    elif name == "delora":
        config |= {"delora_lambda": attachment.cfg.lambda0, **_patterns(ranks, {})}  # type: ignore[attr-defined]
    elif name == "hra":
        if len(set(ranks.values())) > 1:
            raise AttachError("export_peft: PEFT's HRA has one r for all layers, and rank_pattern gave several")
        config["r"] = next(iter(ranks.values()))
    return config, tensors


def _patterns(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """PEFT's fields for ranks and alphas by layer: the most frequent, and patterns for the layers that differ."""
    config: dict[str, Any] = {}
    for values, one, pattern in ((ranks, "r", "rank_pattern"), (alphas, "lora_alpha", "alpha_pattern")):
        if values:
            usual = Counter(values.values()).most_common(1)[0][0]
            others = {f"^{re.escape(layer)}": value for layer, value in values.items() if value != usual}
            config |= {one: usual, pattern: others}
    return config


def _make_uniform(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """All A and B of one rank, with the scale in B; and the fields of the config that say so."""
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    R = max(len(tensors[f"{layer}.lora_A.weight"]) for layer in layers)
    for layer in layers:
        A, B = (tensors[f"{layer}.lora_{side}.weight"] for side in "AB")
        own = [
            alpha
            for pattern, alpha in config["alpha_pattern"].items()
            if re.fullmatch(pattern, layer.removeprefix(_PREFIX))
        ]
        scale = (own[0] if own else config["lora_alpha"]) / len(A)
        tensors[f"{layer}.lora_A.weight"] = pad(A, (0, 0, 0, R - len(A)))
        tensors[f"{layer}.lora_B.weight"] = pad(scale * B, (0, R - len(A)))
    return {"r": R, "lora_alpha": R, "rank_pattern": {}, "alpha_pattern": {}}


def _like_peft(t: Tensor, name: str, variant: str) -> Tensor:
    if name == "ia3_l":
        return t.unsqueeze(1) if variant == "ia3" else t.unsqueeze(0)
    return t.t() if name == "hra_u" else t


def _stored(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().clone()  # safetensors takes no two tensors of one storage


def _whole(value: float) -> float:
    """As an int where it is one: some readers of PEFT's files want alpha so."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


# ---- in --------------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its adapter_config.json is not readable ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError("its adapter_config.json is no object")
    return config


def _tensor_file(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            "its tensors are a pickle (adapter_model.bin), which can run any code when it is read; save it again with "
            "safe_serialization=True where you trust it"
        )
    return path


def _variant(config: dict[str, Any]) -> str:
    kind, start = config.get("peft_type"), str(config.get("init_lora_weights"))
    refused = [
        f"{name}={value!r}"
        for name, value in config.items()
        if (value and name not in _HARMLESS) or (name == "bias" and value != "none")
    ]
    if refused:
        raise CheckpointError(f"lora-lite does not compute its {', '.join(refused)}")
    if kind == "LORA" and start.startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"PEFT changed the base weights for init_lora_weights={start!r}, and the file is no use without them; save "
            "it with path_initial_model_for_weight_conversion"
        )
    match kind:
        case "LORA":
            return "dora" if config.get("use_dora") else "pissa" if start == "pissa" else "lora"
        case "IA3":
            return "ia3"
        case "DELORA" | "HRA":
            return kind.lower()
    raise CheckpointError(f"its peft_type is {kind!r}; lora-lite takes LORA, DELORA, IA3 and HRA")


def _ours(variant: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names."""
    ours = {its: mine for mine, its in _TENSORS.get(variant, ("", _LORA))[1].items()}
    found, strange = {}, []
    for name, t in tensors.items():
        layer, its = next(((name.removesuffix(f".{its}"), its) for its in ours if name.endswith(f".{its}")), (name, ""))
        if its and layer.startswith(_PREFIX):
            found[f"{layer.removeprefix(_PREFIX)}.{ours[its]}"] = t
        else:
            strange.append(name)
    if strange:
        raise CheckpointError(f"lora-lite adapts linear layers and can't take {first_of(strange)}")
    return found


def _unstacked(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of experts as stacks, under the names of their parameters."""
    wanted = config.get("target_parameters") or []
    if not wanted:
        return tensors
    found = {t.name: t for t in candidates(model) if isinstance(t.layer, Stack)}
    mine = [t for t in found.values() if _peft_matches(wanted, t.name)]
    if missing := [name for name in wanted if not any(_peft_matches([name], t.name) for t in mine)]:
        raise CheckpointError(f"the model has no stacked experts {first_of(missing)} (target_parameters)")
    tensors = dict(tensors)
    for name, layer in names_in_file(mine).items():
        if not {f"{layer}.lora_A", f"{layer}.lora_B"} <= tensors.keys():
            raise CheckpointError(f"its target_parameters match {name}, and it has no tensors for that")
        parts = (tensors.pop(f"{layer}.{key}") for key in ("lora_A", "lora_B"))
        stack: Any = found[name].layer
        tensors |= dict(zip((f"{name}.lora_A", f"{name}.lora_B"), stacked(*parts, stack.num_experts), strict=True))
    return tensors


def _whole_modules(model: nn.Module, names: list[str], stored: dict[str, Tensor]) -> WholeModules:
    """The modules that PEFT trained in full, filled; their tensors are taken out of `stored`."""
    modules = [path for path, _ in model.named_modules() if path and _peft_matches(names, path)]
    if missing := [name for name in names if not any(_peft_matches([name], path) for path in modules)]:
        raise CheckpointError(f"the model has no module {first_of(missing)}, which it trains in full (modules_to_save)")
    found = {}
    for first, aliases in whole_modules(model, modules).names_in(model).items():
        mine = {alias: stored.pop(_PREFIX + alias) for alias in aliases if _PREFIX + alias in stored}
        if len(mine) < len(aliases) or any(not torch.equal(t, next(iter(mine.values()))) for t in mine.values()):
            raise CheckpointError(
                f"this model ties {' and '.join(aliases)}, and it trains {' and '.join(mine) or 'none of them'} apart"
                if len(aliases) > 1
                else f"{first} is missing, of a module that it trains in full"
            )
        found[first] = next(iter(mine.values()))
    return filled(model, modules, found)


def _compare_targets(model: nn.Module, config: dict[str, Any], layers: set[str]) -> None:
    """Raise where the file's layers are not those that its `target_modules` match, as PEFT matches them."""
    wanted, left = config.get("target_modules") or [], config.get("exclude_modules") or []
    blocks = config.get("layers_to_transform")
    blocks = {blocks} if isinstance(blocks, int) else set(blocks or ())
    names = [
        t.name
        for t in candidates(model)
        if not isinstance(t.layer, Stack)
        and _peft_matches(wanted, t.name)
        and not _peft_matches(left, t.name)
        and not (wanted == "all-linear" and (t.is_head or t.role == "embedding"))
        and (not blocks or t.block in blocks)
    ]
    parameters = config.get("target_parameters") or []
    extra = [name for name in sorted(layers) if not (_peft_matches(wanted, name) or _peft_matches(parameters, name))]
    if (wanted or parameters) and extra:
        raise CheckpointError(f"its target_modules do not match {first_of(extra)}, for which it has tensors")
    if missing := [name for name in names if name not in layers]:
        raise CheckpointError(
            f"its target_modules match {len(names)} layers of this model, and it has no tensors for "
            f"{first_of(missing)}: the file is not whole, or is of another model"
        )


def _peft_matches(wanted: str | list[str], name: str) -> bool:
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def _by_variant(variant: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """IA3's file may have both kinds: N×1 on outputs, 1×K on inputs. All others have one."""
    if variant != "ia3":
        return {variant: tensors}
    kinds: dict[str, dict[str, Tensor]] = {"ia3": {}, "ia3_ff": {}}
    for name, t in tensors.items():
        kinds["ia3" if t.shape[-1] == 1 else "ia3_ff"][name] = t
    return {kind: found for kind, found in kinds.items() if found} or {variant: tensors}


def _adapters(
    model: nn.Module, cfg: AdapterConfig, config: dict[str, Any], tensors: dict[str, Tensor], backend: str
) -> tuple[list[Target], dict[str, Adapter]]:
    targets = named_targets(model, {"base_model": str(config.get("base_model_name_or_path"))}, tensors)
    adapters = {t.name: build(t, REGISTRY[cfg.variant], cfg, backend) for t in targets}
    if cfg.variant == "pissa":
        init(targets, adapters)  # the start that PEFT took from the base weights, and does not save
        tensors |= {
            f"{layer}.{key}": getattr(adapter, key)
            for layer, adapter in adapters.items()
            for key in ("lora_A0", "lora_B0")
        }
    _reshape(adapters, tensors)
    fill(adapters, tensors)
    derive(targets, adapters)
    return targets, adapters


def _config(variant: str, config: dict[str, Any]) -> AdapterConfig:
    names, inputs = config.get("target_modules") or [], config.get("feedforward_modules") or []
    if isinstance(names, list) and isinstance(inputs, list) and variant in ("ia3", "ia3_ff"):
        names = [name for name in names if (name in inputs) == (variant == "ia3_ff")]
    fields: dict[str, Any] = {"target_roles": (), "exclude_names": ()}
    if isinstance(names, list):
        names = [*names, *(config.get("target_parameters") or ())]
        fields["target_names"] = tuple(rf"(^|\.){re.escape(name)}$" for name in names)
    if variant == "delora":
        fields["lambda0"] = float(config.get("delora_lambda") or 15.0)
    if dropout := config.get(_DROPOUT.get(str(config.get("peft_type")), "")):
        fields["dropout"] = float(dropout)
    if variant == "pissa":
        fields["svd"] = "exact"
    if "r" in config:
        fields["r"] = config["r"]
        fields["rank_pattern"] = _as_searched(config.get("rank_pattern"))
    if "lora_alpha" in config:
        fields["alpha"] = config["lora_alpha"]
        fields["rslora"] = bool(config.get("use_rslora"))
        fields["alpha_pattern"] = _as_searched(config.get("alpha_pattern"))
    return REGISTRY[variant].config(**fields)


def _as_searched(patterns: dict[str, Any] | None) -> dict[str, Any]:
    """PEFT wants its patterns at the end of a name, from its start or after a dot; ours are searched for."""
    return {
        rf"^{key.removeprefix('^')}$" if key.startswith("^") else rf"(^|\.)({key})$": value
        for key, value in (patterns or {}).items()
    }


def _reshape(adapters: dict[str, Adapter], tensors: dict[str, Tensor]) -> None:
    """PEFT keeps some tensors transposed or with an axis of size 1."""
    for layer, adapter in adapters.items():
        for key, wanted in adapter.state_dict().items():
            t = tensors.get(f"{layer}.{key}")
            if t is not None and key == "lora_U":
                tensors[f"{layer}.{key}"] = t.t()
            elif t is not None and t.numel() == wanted.numel() and 1 in t.shape:
                tensors[f"{layer}.{key}"] = t.reshape(wanted.shape)
