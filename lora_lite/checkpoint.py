"""save and load: one safetensors file with the adapter's tensors and, as JSON metadata, all that attach needs."""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import heads
from .adapter import Adapter, named_tensors, require_size
from .attaching import build, check_free, derive, install, whole_modules
from .attachment import DEFAULT, Attachment, attachments, require_attachment, state_dict, unwrap
from .backend import check_backend
from .beside import require_no_peft
from .config import AdapterConfig
from .errors import AttachError, CheckpointError, LoraLiteError, first_of, naming
from .files import apart, read_json, read_tensors, replace_files, writing
from .fitness import unfit
from .idle import astray, current_names, describe
from .params import SITE
from .placement import is_sharded
from .quantized import widened
from .renaming import Renaming, named_modules, plain_name, proposal
from .shapes import copies, shape
from .targets import Target, candidates
from .variant import REGISTRY, Variant
from .whole_modules import WholeModules, same, standing

FORMAT_VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Write the attached adapter to `path`; `name` says which, where there are several.

    The file is replaced in one step: a crash leaves the earlier one. Where FSDP has sharded the adapter, call it on
    every process: the first writes one complete file, and all return when it is there.

    Warns by name about adapters that do nothing, about values that are not finite, and about parameters and buffers of
    the base that have trained or changed beside the adapter, which the file does not hold.

    Raises:
        AttachError: nothing is attached, or PEFT was put on the model after attach.
        CheckpointError: the path can't be written, a tensor has no values or not its shape, or a module that trains in
            full was replaced.
    """
    model, path = unwrap(model), Path(path)
    attachment = require_attachment(model, name)
    sharded = (
        any(each.sharded for each in (*attachment.adapters.values(), attachment.whole))
        and torch.distributed.is_initialized()
    )
    alone = standalone(attachment, "save")
    contents = _contents(model, attachment, named_tensors(alone) | attachment.whole.stored())
    warn_of_losses(model, attachment, "save", contents[0])
    if sharded and torch.distributed.get_rank() != 0:
        torch.distributed.barrier()  # until the first process has written
        return
    try:
        _write(path, contents)
    finally:
        if sharded:
            torch.distributed.barrier()


def save_gathered(model: nn.Module, path: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """`save` on one process, from a state dict of the model whose tensors another library has gathered."""
    attachment = require_attachment(model, name)
    names = {id(module): name for name, module in named_modules(model)}
    tensors = {plain_name(key): t for key, t in tensors.items()}
    of_layer = {target.name: names[id(target.layer)] for target in attachment.targets}
    found = {
        f"{layer}.{key}": f"{of_layer[layer]}.{SITE}.{name}.{key}"
        for layer, adapter in attachment.adapters.items()
        for key in adapter.state_dict()
    } | {whole: whole for whole in attachment.whole.entries}
    if lacking := [key for key in found.values() if key not in tensors]:
        raise CheckpointError(f"save: the state dict given to save lacks {first_of(lacking)}; call lora_lite.save")
    contents = _contents(model, attachment, {mine: tensors[key] for mine, key in found.items()})
    warn_of_losses(model, attachment, "save", contents[0])
    _write(path, contents)


def _contents(
    model: nn.Module, attachment: Attachment, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, from whole tensors under the names that they had at attach."""
    from . import __version__

    names = names_now(model, attachment, "save")
    shapes = {names[t.name]: _shape(t.layer) for t in attachment.targets}
    metadata = {
        "format": "lora-lite",
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "config": json.dumps(replace(attachment.cfg.renamed(names), dtype=_dtype(attachment)).to_dict()),
        "base_model": str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__),
        "targets": json.dumps(shapes),
        "fingerprint": _fingerprint(shapes),
        "heads": json.dumps(heads.marks_of(model, attachment.whole.entries)),
    }
    if attachment.whole.names:
        metadata["whole_modules"] = json.dumps(attachment.whole.names)
        metadata["whole_tensors"] = json.dumps(list(attachment.whole.entries))
        tied = attachment.whole.names_in(model).items()
        metadata["whole_aliases"] = json.dumps({name: first for first, each in tied for name in each if name != first})
    found = {
        f"{names[layer]}.{key}": tensors[f"{layer}.{key}"]
        for layer, adapter in attachment.adapters.items()
        for key in adapter.state_dict()
    } | {name: tensors[name] for name in attachment.whole.entries}
    return {name: t.detach().cpu().contiguous() for name, t in found.items()}, metadata


def _write(path: Path, contents: tuple[dict[str, Tensor], dict[str, str]]) -> None:
    tensors, metadata = contents
    with writing("save", path):
        replace_files({path: lambda temporary: save_file(apart(tensors), temporary, metadata=metadata)})


def _dtype(attachment: Attachment) -> torch.dtype:
    """The config's, or the one that `model.to` has given all matrices since."""
    dtypes = {
        adapter.dtypes[key]
        for adapter in attachment.adapters.values()
        for key, spec in adapter.specs.items()
        if spec.dtype is None and len(spec.shape) > 1
    }
    return dtypes.pop() if len(dtypes) == 1 else attachment.cfg.dtype


def names_now(model: nn.Module, attachment: Attachment, what: str) -> dict[str, str]:
    """Under which name a file holds each layer: the one that it has in the model now, where blocks have moved.

    Raises:
        AttachError: PEFT was put on the model.
        CheckpointError: that is another layer's, or what trained in full is not what has its name now.
    """
    require_no_peft(model, what)
    names = current_names(model, attachment.targets)
    if len(set(names.values())) < len(names):
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        raise CheckpointError(
            f"{what}: another layer now has the name of one that has left the model: {first_of(twice)}; detach, and "
            "attach again"
        )
    if elsewhere := astray(model, attachment.whole):
        raise CheckpointError(
            f"{what}: what trained in full (modules_to_save) is not what the model has under its name now: "
            f"{first_of(elsewhere)}; replace, resize or move modules before attach: detach, and attach again"
        )
    return names


def standalone(attachment: Attachment, what: str) -> dict[str, Adapter]:
    """The adapters with whole tensors that have values; a CheckpointError of `what` where one is not as its spec says.
    Every process that has a part of a sharded one must call it."""
    found = {}
    for target in attachment.targets:
        layer, adapter = target.name, attachment.adapters[target.name]
        try:
            with naming(layer):
                require_size(adapter, target.layer)
                found[layer] = adapter.alone()
        except AttachError as error:
            raise CheckpointError(f"{what}: {error}") from error
    return found


def warn_of_losses(model: nn.Module, attachment: Attachment, what: str, tensors: Mapping[str, Tensor]) -> None:
    """One warning of what a file with these tensors, the adapter alone, leaves behind, such as a strength, of adapters
    that do nothing, and of what is not finite."""
    held = {name for each in attachments(model) for name in each.whole.entries}
    texts = [attachment.beside.lost(model, held), describe(attachment.watch.idle(model))]
    if attachment.strength != 1:
        acting = {each.name: each.strength for each in attachments(model) if each.acts}
        texts.append(f"a file holds no strength; where it is read, call use(model, {acting}) again")
    if shared := _trained_together(attachment):
        texts.append(f"these are one tensor each, and after load one a layer, which train apart: {first_of(shared)}")
    if broken := not_finite(tensors):
        texts.append(f"there is NaN or infinity in {first_of(broken)}; an earlier file may be whole")
    if found := ". ".join(text for text in texts if text):
        warnings.warn(f"{what}: {found}", stacklevel=3)


def _trained_together(attachment: Attachment) -> list[str]:
    """Which of its parameters that train several layers share, as a user's method may have it."""
    names: dict[int, list[str]] = {}
    for layer, adapter in attachment.adapters.items():
        for key, p in adapter.named_parameters():
            if p.requires_grad:
                names.setdefault(id(p), []).append(f"{layer}.{key}")
    return [" = ".join(each) for each in names.values() if len(each) > 1]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that have NaN or infinity."""
    return [name for name, t in tensors.items() if not (t.is_meta or widened(t).isfinite().all())]


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    backend: str = "auto",
    prefix_map: Mapping[str, str] | None = None,
) -> Attachment:
    """Attach the adapter in `path` under `name`: no calibration data, no SVD.

    Also reads the original lora-lite's files.

    Args:
        prefix_map: beginnings of layers' names in the file → in this model, where they differ: {"model.layers":
            "model.language_model.layers"}.

    Raises:
        AttachError: an adapter is attached already.
        CheckpointError: the file is unreadable or newer, its variant unknown, a tensor missing, unexpected or of the
            wrong shape, or the model is not the one that it was trained on; a `prefix_map` that helps is proposed. The
            model is untouched.
    """
    model, path, moved = unwrap(model), Path(path), Renaming(prefix_map)
    check_backend(backend)
    check_free(model, name)
    try:
        metadata, tensors = read_tensors(path)
        cfg, variant = _config(metadata)
        moved.check(tensors)
        cfg = cfg.renamed({old: moved.new(old) for old in _described(metadata, tensors)})
        tensors, metadata = moved.keys(tensors), _moved(metadata, moved)
        whole = _whole_modules(model, metadata, tensors)
        targets = named_targets(model, metadata, tensors)
        adapters = {t.name: build(t, variant, cfg, backend) for t in targets}
        fill(adapters, tensors)
        derive(targets, adapters)
        drawn_anew = heads.others(model, metadata, moved, whole.entries)
    except LoraLiteError as error:
        raise CheckpointError(f"load: {path}: {error}") from error
    if drawn_anew:
        warnings.warn(f"load: {heads.describe(drawn_anew)}", stacklevel=2)
    return install(model, name, cfg, backend, targets, adapters, not_in_file(model, adapters), whole)


def load_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], *, name: str | None = None) -> None:
    """Overwrite the attached adapter's tensors by those of `state_dict`, as checkpoints of other libraries hold them.

    Raises:
        AttachError: nothing is attached, nothing of that name, or several adapters are and none is named.
        CheckpointError: `tensors` is no dict, or one is missing, unexpected, of another shape, or no tensor with
            values. The adapter is as it was.
    """
    mine = state_dict(model, name)
    if away := [key for key, t in mine.items() if t.is_meta]:
        raise CheckpointError(
            f"load_state_dict: {first_of(away)} holds no memory here to write to (on the meta device, or offloaded by "
            "accelerate); detach, and load the adapter's file"
        )
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"load_state_dict: tensors must be a dict by name; got {type(tensors).__name__}")
    if unlike := [key for key, t in mine.items() if is_sharded(t) != is_sharded(tensors.get(key, t))]:
        raise CheckpointError(
            f"load_state_dict: {first_of(unlike)} is sharded here or there, and not in both; "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict takes whole tensors with full_state_dict=True"
        )
    if problems := mismatches(mine, tensors):
        raise CheckpointError(f"load_state_dict: the tensors are not those of what is attached: {first_of(problems)}")
    for key, t in mine.items():
        t.copy_(tensors[key])
    for adapter in require_attachment(unwrap(model), name).adapters.values():
        adapter.has_values()


def _whole_modules(model: nn.Module, metadata: dict[str, str], tensors: dict[str, Tensor]) -> WholeModules:
    """The modules that the file holds in full, filled; their tensors are taken out of `tensors`."""
    try:
        found = {name: tensors.pop(name) for name in _listed(metadata, "whole_tensors")}
    except KeyError as error:
        raise CheckpointError(f"{error} is missing, of a module that trains in full") from error
    return filled(model, _listed(metadata, "whole_modules"), found, _aliases(metadata))


def _listed(metadata: dict[str, str], field: str) -> list[str]:
    """A list of names in a file's metadata; empty where there is none."""
    found = read_json(metadata.get(field, "[]"), list, f"{field} are")
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"its {field} must be a list of names; they are {found!r}")
    return found


def _aliases(metadata: dict[str, str]) -> dict[str, str] | None:
    """The other names of the whole tensors that were tied, with those in `whole_tensors`; None: the file is of an
    earlier version, which didn't write them."""
    if "whole_aliases" not in metadata:
        return None
    found = read_json(metadata["whole_aliases"], dict, "whole_aliases are")
    if not set(map(str, found.values())) <= set(_listed(metadata, "whole_tensors")):
        raise CheckpointError(f"its whole_aliases must be names of whole_tensors by others; they are {found!r}")
    return found


def _moved(metadata: dict[str, str], moved: Renaming) -> dict[str, str]:
    """The metadata with the names that the layers and modules have in the model."""
    if not moved.prefixes or "format" not in metadata:
        return metadata
    shapes = {moved.new(name): each for name, each in _shapes(metadata).items()}
    lists = {
        field: json.dumps([moved.new(name) for name in _listed(metadata, field)])
        for field in ("whole_modules", "whole_tensors")
    }
    if (aliases := _aliases(metadata)) is not None:
        lists["whole_aliases"] = json.dumps({moved.new(name): moved.new(first) for name, first in aliases.items()})
    return {**metadata, **lists, "targets": json.dumps(shapes), "fingerprint": _fingerprint(shapes)}


def _shapes(metadata: dict[str, str]) -> dict[str, list[int]]:
    """The file's target layers and their shapes."""
    shapes = read_json(metadata.get("targets", ""), dict, "list of target layers is")
    if metadata.get("fingerprint") != _fingerprint(shapes):
        raise CheckpointError("its list of target layers does not match its fingerprint; the file is damaged")
    if not all(isinstance(each, list) for each in shapes.values()):
        raise CheckpointError("its list of target layers must give each one's shape; the file is damaged")
    return shapes


def _described(metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> Mapping[str, list[int] | None]:
    """The file's target layers, with their shapes. PEFT's files and the original's name them in their tensors alone."""
    if "format" in metadata:
        return _shapes(metadata)
    return dict.fromkeys(name.rpartition(".")[0] for name in tensors)


def filled(
    model: nn.Module, names: list[str], tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None
) -> WholeModules:
    """Modules that train in full, with these tensors; a CheckpointError where they are not the model's, or are tied in
    one of the two alone. `aliases`: further names of the tensors; None: it is not known what was tied."""
    modules = [name for name, _ in named_modules(model)]
    if strange := [name for name in names if name not in modules]:
        raise CheckpointError(
            f"the model has no module {first_of(strange)}, which the file holds in full{proposal(names, modules)}"
        )
    whole = whole_modules(model, names)
    if aliases is not None:
        tensors = _tied_alike(model, whole, tensors, aliases)
    if problems := mismatches(whole.tensors(), tensors):
        raise CheckpointError(f"its modules that train in full are not this model's: {first_of(problems)}")
    whole.fill(tensors)
    return whole


def _tied_alike(
    model: nn.Module, whole: WholeModules, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors by the first names that they have in the model. A CheckpointError where two are one in the file and
    apart in the model, or the other way: one place would not get what was trained in it."""
    here, in_model = whole.names_in(model), {place.name for place, _ in standing(model)}
    first_of_each = {name: first for first, names in here.items() for name in names}
    for alias, name in aliases.items():
        if alias in in_model and first_of_each.get(alias) != first_of_each.get(name):
            raise CheckpointError(
                f"it trains {name} and {alias} as one, and this model has them apart; tie them first, as "
                "tie_word_embeddings=True in its config does"
            )
    by_name = {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}
    found = {name: t for name, t in tensors.items() if name not in first_of_each}
    for first, names in here.items():
        its = {name: by_name[name] for name in names if name in by_name}
        if not its:
            continue  # missing, as the caller says
        found[first] = next(iter(its.values()))
        if len(its) < len(names) or not all(same(t, found[first]) for t in its.values()):
            raise CheckpointError(
                f"this model ties {' and '.join(names)}, and it trains {' and '.join(its)} apart; give one of them a "
                "tensor of its own first: module.weight = nn.Parameter(module.weight.detach().clone()), and "
                "config.tie_word_embeddings = False (to load the model with that draws a new head)"
            )
    return found


def mismatches(mine: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unexpected, of another shape or kind of number, or no tensor with values in `tensors`."""
    if strange := [f"{name} is {_kind(t)}" for name, t in tensors.items() if not isinstance(t, Tensor) or t.is_meta]:
        return strange
    problems = [f"{name} is missing" for name in mine if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in mine]
    both = [(name, t, tensors[name]) for name, t in mine.items() if name in tensors]
    problems += [
        f"{n} has shape {tuple(its.shape)}, not {tuple(t.shape)}" for n, t, its in both if its.shape != t.shape
    ]
    return problems + [problem for n, t, its in both if (problem := _another_kind(n, t, its))]


def _another_kind(name: str, mine: Tensor, its: Tensor) -> str:
    """How the second's kind of numbers differs; empty: it doesn't."""
    if widened(its).is_floating_point() == mine.is_floating_point():
        return ""
    return f"{name} is of {its.dtype}, which is not as {mine.dtype} is"


def _kind(t: Any) -> str:
    return "on the meta device" if isinstance(t, Tensor) else f"a {type(t).__name__}, and no tensor"


def not_in_file(model: nn.Module, adapters: Container[str]) -> dict[str, str]:
    """Why the other linear layers are left out."""
    return {t.name: "not in the adapter's file" for t in candidates(model) if t.name not in adapters}


def _config(metadata: dict[str, str]) -> tuple[AdapterConfig, type[Variant]]:
    is_original = "format" not in metadata and "cfg" in metadata
    if metadata.get("format") != "lora-lite" and not is_original:
        raise CheckpointError(
            "no lora-lite adapter: its metadata has neither format=lora-lite nor cfg. If PEFT wrote it, call "
            "import_peft(model, folder)"
        )
    found = metadata.get("format_version", "1")
    if not found.isdecimal() or int(found) > FORMAT_VERSION:
        raise CheckpointError(
            f"its format version is {found} and this lora-lite reads up to {FORMAT_VERSION}; upgrade lora-lite"
        )
    values = read_json(metadata.get("cfg" if is_original else "config", ""), dict, "config is")
    name = str(values.get("variant"))
    if name not in REGISTRY:
        raise CheckpointError(
            f"its variant {name!r} is not registered ({', '.join(REGISTRY)}); import the module that registers it"
        )
    if is_original and name in ("pissa", "antipasto"):
        raise CheckpointError(
            f"the original lora-lite's {name} changed the base weights and its file is no use without them"
        )
    try:
        return REGISTRY[name].config.from_dict(values), REGISTRY[name]
    except TypeError as error:
        raise CheckpointError(f"its config is not readable ({error})") from error


def require_alike(model: nn.Module, attachment: Attachment, path: Path) -> None:
    """Raise a CheckpointError where the adapter in `path`, whose tensors are to go into this one's, makes something
    else of them: it is another method's, of other layers, or its config has it so. Warn where it was trained with
    another head."""
    metadata, tensors = read_tensors(path)
    cfg, _ = _config(metadata)
    if cfg.variant != attachment.cfg.variant:
        raise CheckpointError(f"{path}: it is of {cfg.variant}, and {attachment.cfg.variant} is attached")
    there, names = set(_described(metadata, tensors)), current_names(model, attachment.targets)
    for layers, where in ((there - set(names.values()), "there alone"), (set(names.values()) - there, "here alone")):
        if layers:
            raise CheckpointError(
                f"{path}: {first_of(sorted(layers))} is adapted {where}; attach with the config that it was trained "
                "with, or load it by lora_lite.load"
            )
    for target in attachment.targets:
        name, adapter = names[target.name], attachment.adapters[target.name]
        its, keys = cfg.for_layer(name), {key: f"{name}.{key}" for key in adapter.state_dict()}
        held = {key: tensors[in_file] for key, in_file in keys.items() if in_file in tensors}
        if others := adapter.computed_otherwise(target.layer, its, held):
            raise CheckpointError(
                f"{path}: {target.name} has {_fields(its, others)} there, and {_fields(adapter.cfg, others)} here; "
                "attach with the config that it was trained with, or load it by lora_lite.load"
            )
    if found := heads.others(model, metadata, Renaming(None), attachment.whole.entries):
        warnings.warn(f"{path}: {heads.describe(found)}", stacklevel=2)


def _fields(cfg: AdapterConfig, names: Iterable[str]) -> str:
    return ", ".join(f"{name}={getattr(cfg, name)!r}" for name in names)


def named_targets(model: nn.Module, metadata: dict[str, str], tensors: dict[str, Tensor]) -> list[Target]:
    """The layers that the file names, checked against the model."""
    layers = {target.name: target for target in candidates(model)}
    described, problems = _described(metadata, tensors), []
    require_layers(model, described, layers)
    for name, shape_in_file in described.items():
        target = layers.get(name)
        if target is None:
            problems.append(f"the model has no linear layer {name}")
        elif shape_in_file not in (None, _shape(target.layer)):
            kind = "(in, out)" if copies(target.layer) is None else "(in, out, experts)"
            problems.append(f"{name} is {shape_in_file} {kind} in the file and {_shape(target.layer)} in the model")
    if problems:
        raise CheckpointError(
            f"it was trained on another base model ({metadata.get('base_model', 'unnamed')}): {first_of(problems)}"
            f"{proposal(list(described), layers)}"
        )
    for target in (targets := [layers[name] for name in described]):
        with naming(target.label):
            if why := unfit(model, target):
                raise CheckpointError(f"{target.name}: {why}")
    return targets


def require_layers(model: nn.Module, names: Iterable[str], layers: Container[str]) -> None:
    """Raise a CheckpointError where the model has modules of these names that are none of its `layers`, on which alone
    an adapter can stand."""
    modules = dict(named_modules(model))
    strange = [name for name in dict.fromkeys(names) if name in modules and name not in layers]
    if others := [f"{name} ({type(modules[name]).__name__})" for name in strange]:
        raise CheckpointError(
            f"it adapts {first_of(others)}, and lora-lite adapts linear layers, embeddings and stacked experts alone"
        )


def fill(adapters: dict[str, Adapter], tensors: dict[str, Tensor]) -> None:
    """Copy "<layer>.<tensor>" into the adapters; a CheckpointError where one is missing, unexpected, misshapen or of
    another kind of number."""
    wanted = named_tensors(adapters)
    single = {name: t.shape for name, t in wanted.items() if t.numel() == 1}  # λ, of shape () in older files
    tensors = {n: t.view(single[n]) if n in single and t.numel() == 1 else t for n, t in tensors.items()}
    if problems := mismatches(wanted, tensors):
        raise CheckpointError(f"its tensors do not fit its config: {first_of(problems)}")
    for name, t in wanted.items():
        t.copy_(tensors[name])


def _shape(layer: Any) -> list[int]:
    experts = copies(layer)
    return [*shape(layer), *([] if experts is None else [experts])]


def _fingerprint(shapes: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
