"""export_peft: the attached adapter as PEFT would have saved it."""

import dataclasses
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from ..adapter import Adapter
from ..attachment import Attachment, attachments, require_attachment, unwrap
from ..checkpoint import names_now, standalone, warn_of_losses
from ..errors import AttachError, first_of
from ..files import replace_files, writing_folder
from ..idle import current_names
from ..params import SITE
from ..primitives import LowRankAdd
from ..quantized import weight_of
from ..renaming import named_parameters
from ..shapes import is_conv1d
from ..stacks import Stack
from ..targets import stacks_among
from ..whole_modules import inside
from .conversions import WEIGHT, taken_for_experts
from .experts import flat, names_in_file
from .formats import DROPOUT, EMBEDDING, LORA, PREFIX, ROAD, TENSORS
from .matching import ends, in_two_places, listed, matches, modules_of
from .servers import Reader, check_reader, check_served


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | Sequence[str] | None = None,
    uniform: bool = False,
    for_: Reader = "peft",
) -> None:
    """Write the attached adapter as `adapter_config.json` and `adapter_model.safetensors`, as PEFT has them.

    `peft.PeftModel.from_pretrained(base, folder)` then computes the same. LoRA, EVA, PiSSA (as rank 2r), AntiPaSTO (as
    rank r) and any method of yours with the primitive `LowRankAdd` are written as LoRA; DoRA, DeLoRA, IA3, HRA
    and RoAd as PEFT's own. `name` says which adapter, where several are attached; an `ia3` and an `ia3_ff` may go into
    one file, as the paper has them: `name=("kv", "ff")`.

    With `uniform`, all layers of a LoRA or DoRA get one rank, padded with zeros, and each one's scale goes into its B,
    so that a reader of a single r and alpha is right: some pass over the patterns of layers that differ.

    Args:
        for_: who reads the file. "vllm" and "llama.cpp" (its convert_lora_to_gguf.py) get one that is `uniform`, or an
            AttachError that names what they do not take.

    Raises:
        AttachError: nothing is attached, PEFT, or whom the file is for, has nothing that computes what this method
            does on one of its layers, PEFT would find other layers or modules by these names, or several names are not
            of an IA3 and an IA3-FF on different layers.
        CheckpointError: the folder can't be written, or a tensor has no values or not its shape.
    """
    check_reader(for_)
    model, folder = unwrap(model), Path(folder)
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    by_weight: list[str] = []
    chosen = _of_one_file(model, name)
    for attachment in chosen:
        names, adapters = as_they_are(model, attachment, "export_peft")
        if (kind := TENSORS.get(attachment.cfg.variant, ("LORA",))[0]) == "LORA":
            by_weight = _by_weight(model, attachment, names) if for_ == "peft" else []
            as_one = uniform or for_ != "peft"
            of_one, its_tensors = as_lora(attachment, adapters, names, as_one, "export_peft", by_weight)
        else:
            of_one, its_tensors = _as_its_own(attachment, adapters)
        warn_of_losses(model, attachment, "export_peft", its_tensors)
        config |= {**of_one, "peft_type": kind}
        tensors |= {PREFIX + key: t for key, t in its_tensors.items()}
    config |= _other_fields(model, chosen, config["peft_type"], by_weight)
    check_served(for_, model, chosen, config)
    for attachment in chosen:
        tensors |= _in_full(model, attachment, config)
    text = json.dumps(config, indent=2, sort_keys=True)
    with writing_folder("export_peft", folder):
        replace_files(  # together: tensors beside an earlier config would load, with its alpha
            {
                folder / "adapter_model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
                folder / "adapter_config.json": lambda path: path.write_text(text),
            }
        )


def _of_one_file(model: nn.Module, name: str | Sequence[str] | None) -> list[Attachment]:
    """The attachments of these names, which PEFT can hold in one file."""
    names = [name] if name is None or isinstance(name, str) else name
    found = attachments(model)
    if name is None and sorted(each.cfg.variant for each in found) == ["ia3", "ia3_ff"]:
        raise AttachError(
            f"export_peft: {found[0].name!r} and {found[1].name!r} are attached, an ia3 and an ia3_ff; for one file of "
            f"both, as PEFT has them, give name={tuple(each.name for each in found)}"
        )
    chosen = [require_attachment(model, each) for each in names]
    layers = [layer for each in chosen for layer in each.adapters]
    pair = {each.cfg.variant for each in chosen} <= {"ia3", "ia3_ff"} and len(set(layers)) == len(layers)
    if len(chosen) > 1 and not pair:
        raise AttachError(
            f"export_peft: {', '.join(each.name for each in chosen)}: a PEFT file holds several adapters only "
            "if they are an ia3 and an ia3_ff on different layers; export them one by one"
        )
    return chosen


def as_they_are(model: nn.Module, attachment: Attachment, what: str) -> tuple[dict[str, str], dict[str, Adapter]]:
    """The names that the layers have now, by those at attach; and by the former the adapters, with whole tensors."""
    names = names_now(model, attachment, what)
    if twice := in_two_places(model, attachment.targets):
        raise AttachError(
            f"{what}: {' and '.join(twice)} are one layer, and PEFT would adapt it in its first place alone; give the "
            "model a copy in one of them before attach, or use save(model, path)"
        )
    return names, {names[layer]: adapter for layer, adapter in standalone(attachment, what).items()}


# ---- LoRA ------------------------------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """A layer's low-rank sum, and DoRA's magnitudes."""

    A: Float[Tensor, "*E R K"]
    B: Float[Tensor, "*E N R"]
    scale: float
    m: Float[Tensor, " N"] | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def padded(self, rank: int) -> "Sum":
        """The same of a larger rank, with the scale in B."""
        more = rank - self.rank
        return Sum(pad(self.A, (0, 0, 0, more)), pad(self.scale * self.B, (0, more)), 1.0, self.m)


def as_lora(
    attachment: Attachment,
    adapters: dict[str, Adapter],
    names: dict[str, str],
    uniform: bool,
    what: str,
    by_weight: Container[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and tensors of a LoRA or DoRA, by the names that the layers have now. `what` is called. The layers
    of `by_weight` stand under `target_parameters`, and so PEFT's patterns are of their weights.

    Raises:
        AttachError: the method is neither, or a DoRA is on stacked experts.
    """
    layers = {names[target.name]: target for target in attachment.targets}
    sums = {name: _sum(attachment, adapters[name], layers[name].layer, name, what) for name in layers}
    if uniform:
        rank = max(each.rank for each in sums.values())
        sums = {name: each.padded(rank) for name, each in sums.items()}
    in_file, tensors = names_in_file(_stacks(attachment, names)), {}
    for name, (A, B, _, m) in sums.items():
        keys = EMBEDDING if isinstance(layers[name].layer, nn.Embedding) else LORA
        A, B = flat(A, B) if name in in_file else (A, B)
        prefix = in_file.get(name, name)
        tensors |= {f"{prefix}.{keys['lora_A']}": _stored(A), f"{prefix}.{keys['lora_B']}": _stored(B)}
        if m is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = _stored(m)
    listed = {name: name + WEIGHT if name in by_weight else name for name in sums}
    ranks = {listed[name]: each.rank for name, each in sums.items()}
    alphas = {listed[name]: _whole(each.scale * each.rank) for name, each in sums.items()}
    dora = {"use_dora": True} if attachment.cfg.variant == "dora" else {}
    return {**patterns(ranks, alphas), **dora}, tensors


def _sum(attachment: Attachment, adapter: Any, layer: nn.Module, name: str, what: str) -> Sum:
    if attachment.cfg.variant == "dora":
        _refuse_stacks(attachment)
        return Sum(adapter.lora_A, adapter.lora_B, adapter.cfg.scale, adapter.lora_m)
    with torch.no_grad():
        primitive = adapter.primitive(layer)
    if type(primitive) is not LowRankAdd:  # a subclass may compute something else of A and B
        raise AttachError(
            f"{what}: {name}: there is nothing in such a file that computes {attachment.cfg.variant}'s "
            f"{type(primitive).__name__}; use save(model, path) or, where it is linear, save_merged(model, folder) for "
            "weights with it"
        )
    return Sum(primitive.A, primitive.B, primitive.scale)


def patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's fields for ranks and alphas by layer: the most frequent, and patterns for the layers that differ."""
    config: dict[str, Any] = {}
    for values, one, pattern in ((ranks, "r", "rank_pattern"), (alphas, "lora_alpha", "alpha_pattern")):
        usual = Counter(values.values()).most_common(1)[0][0]
        others = {f"^{re.escape(layer)}": value for layer, value in values.items() if value != usual}
        config |= {one: usual, pattern: others}
    return config


# ---- other methods ---------------------------------------------------------------------------------------------------


def _as_its_own(attachment: Attachment, adapters: dict[str, Adapter]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of a method that PEFT has beside LoRA. r and lora_alpha are there for readers that ask for them before they see
    what the file holds, so that their error is of that."""
    _refuse_stacks(attachment)
    name, cfg = attachment.cfg.variant, attachment.cfg
    _warn_of_codes(attachment)
    tensors = {
        f"{layer}.{its}": _stored(_like_peft(getattr(adapter, mine), its, name))
        for layer, adapter in adapters.items()
        for mine, its in TENSORS[name][1].items()
    }
    ranks = {layer: adapter.cfg.r for layer, adapter in adapters.items()}
    config: dict[str, Any] = {"r": cfg.r, "lora_alpha": _whole(cfg.alpha)}
    if name == "delora":
        ranks_as = patterns(ranks, ranks)
        config |= {"delora_lambda": cfg.lambda0, "r": ranks_as["r"], "rank_pattern": ranks_as["rank_pattern"]}  # type: ignore[attr-defined]
    elif name == "hra":
        if len(set(ranks.values())) > 1:
            raise AttachError("export_peft: PEFT's HRA has one r for all layers, and rank_pattern gave several")
        config["r"] = next(iter(ranks.values()))
    elif name == "road":
        config |= {"variant": ROAD[cfg.kind], "group_size": cfg.group_size}  # type: ignore[attr-defined]
    return config, tensors


def _warn_of_codes(attachment: Attachment) -> None:
    """PEFT's HRA and DeLoRA compute with what a layer stores, which of a quantised one are codes: the former goes on in
    8 bits, with other outputs; else it fails."""
    layers = [t.name for t in attachment.targets if (w := weight_of(t.layer)) is not None and w.dtype.itemsize == 1]
    if layers and attachment.cfg.variant in ("hra", "delora"):
        warnings.warn(
            f"export_peft: PEFT's {attachment.cfg.variant} takes a quantised base's codes for its weights, here of "
            f"{first_of(layers)}: load the file on the unquantised base, or use save(model, path)",
            stacklevel=4,
        )


def _refuse_stacks(attachment: Attachment) -> None:
    if stacks := stacks_among(attachment.targets):
        raise AttachError(
            f"export_peft: PEFT has no {attachment.cfg.variant} on stacked experts ({stacks[0].key}); it has LoRA "
            "there. Use save(model, path)"
        )


def _like_peft(t: Tensor, name: str, variant: str) -> Tensor:
    if name == "ia3_l":
        return t.unsqueeze(1) if variant == "ia3" else t.unsqueeze(0)
    return t.t() if name == "hra_u" else t


# ---- both ------------------------------------------------------------------------------------------------------------


def _stacks(attachment: Attachment, names: dict[str, str]) -> list[Any]:
    """The adapted stacks of experts, under the names that they have now."""
    return [
        dataclasses.replace(target, name=names[target.name])
        for target in attachment.targets
        if isinstance(target.layer, Stack)
    ]


def _by_weight(model: nn.Module, attachment: Attachment, names: dict[str, str]) -> list[str]:
    """The layers of which `target_parameters` has to name the weights, so that PEFT takes them for what they are."""
    return taken_for_experts(model, [names[t.name] for t in attachment.targets if not isinstance(t.layer, Stack)])


def _other_fields(model: Any, attachments: list[Attachment], kind: str, by_weight: list[str]) -> dict[str, Any]:
    """The fields of PEFT's config that are not of a method's own."""
    current = [current_names(model, each.targets) for each in attachments]
    stacks = [target.name for names, each in zip(current, attachments, strict=True) for target in _stacks(each, names)]
    layers = [
        (each.cfg.variant, layer)
        for names, each in zip(current, attachments, strict=True)
        for layer in names.values()
        if layer not in stacks
    ]
    names = [layer for _, layer in layers if layer not in by_weight]
    config = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", "") or None,
        "inference_mode": True,
        "target_modules": listed(names, modules_of(model).keys() - set(names)),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
    }
    if parameters := [*stacks, *(layer + WEIGHT for layer in by_weight)]:
        own = {name for name, _ in named_parameters(model) if SITE not in name.split(".")}
        if more := [name for name in sorted(own - set(parameters)) if matches(parameters, name)]:
            raise AttachError(
                f"export_peft: {more[0]} ends as an adapted parameter is named, and PEFT would adapt it too; adapt "
                "both, or use save(model, path)"
            )
        config["target_parameters"] = parameters
    if kind in ("LORA", "IA3"):
        config["fan_in_fan_out"] = any(is_conv1d(t.layer) for each in attachments for t in each.targets)
    if kind in DROPOUT:
        dropout = attachments[0].cfg.dropout
        if dropout and parameters:
            warnings.warn(
                f"export_peft: PEFT has no dropout in a file with target_parameters ({parameters[0]}): the file says "
                "0, for all layers, and whoever trains it on trains without",
                stacklevel=3,
            )
        config[DROPOUT[kind]] = 0.0 if parameters else dropout
    if kind == "IA3":
        inputs = [layer for variant, layer in layers if variant == "ia3_ff"]
        return {**config, "feedforward_modules": listed(inputs, set(names) - set(inputs), ends)}
    return config if kind == "ROAD" else {**config, "bias": "none"}


def _in_full(model: nn.Module, attachment: Attachment, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of modules that train in full, under all of their names; the modules go into the config."""
    stored, whole, found = attachment.whole.stored(), attachment.whole.names, {}
    modules = set(whole)
    for first, names in attachment.whole.names_in(model).items():
        found |= {PREFIX + alias: stored[first].clone() for alias in names}
        modules |= {alias.rpartition(".")[0] for alias in names if not inside(alias, whole)}
    if modules:
        modules |= {*config.get("modules_to_save", ())}
        if more := [name for name in modules_of(model) if ends(modules, name) and name not in modules]:
            raise AttachError(
                f"export_peft: {more[0]} ends as a module that trains in full is named, and PEFT would take it for "
                "one; name both in modules_to_save, or use save(model, path)"
            )
        config["modules_to_save"] = sorted(modules)
    return found


def _stored(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().clone()  # safetensors takes no two tensors of one storage


def _whole(value: float) -> float:
    """As an int where it is one: some readers of PEFT's files want alpha so."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
