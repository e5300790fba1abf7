"""export_diffusers and import_diffusers: the file that diffusers' `load_lora_weights` and `save_lora_weights` use.

One `pytorch_lora_weights.safetensors` has PEFT's tensors of several models of a pipeline, each under its name there
("unet", "transformer", "text_encoder"), and PEFT's config of each as metadata (diffusers/loaders/lora_base.py). Without
the metadata a reader takes alpha for the rank.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..attachment import DEFAULT, Attachment, require_attachment, unwrap
from ..checkpoint import warn_of_losses
from ..errors import AttachError, CheckpointError, first_of
from ..files import is_folder, read_json, read_tensors, replace_files, writing_folder
from ..renaming import Renaming
from .exporting import as_lora, as_they_are, patterns
from .formats import PREFIX
from .importing import attach_stored
from .matching import listed, modules_of

_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
# What a file without metadata says of a layer beside its tensors: alpha under the layer's name.
_ALPHA = ".alpha"


def export_diffusers(
    model: nn.Module | Mapping[str, nn.Module],
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    uniform: bool = False,
) -> None:
    """Write the attached adapter as `pytorch_lora_weights.safetensors`; `pipeline.load_lora_weights(folder)` then
    computes the same.

    What `export_peft` writes as LoRA, and DoRA. Ranks and alphas of each layer are kept in the metadata.

    Args:
        model: a UNet or a transformer of diffusers, or a text encoder of transformers; or several that are adapted, by
            their names in the pipeline: {"unet": unet, "text_encoder": text_encoder}.
        name: which adapter, where several are attached.
        uniform: one rank, and scales in B, for readers that know no metadata (diffusers before 0.35).

    Raises:
        AttachError: nothing is attached, the method is no LoRA or DoRA, or modules train in full beside it.
        CheckpointError: the folder can't be written, or a tensor has no values or not its shape.
    """
    folder = Path(folder)
    models = dict(model) if isinstance(model, Mapping) else {place_of(unwrap(model)): model}
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for place, part in models.items():
        part = unwrap(part)
        attachment = require_attachment(part, name)
        config, its_tensors = _of_model(part, attachment, uniform)
        warn_of_losses(part, attachment, "export_diffusers", its_tensors)
        configs |= {f"{place}.{field}": value for field, value in config.items()}
        tensors |= {f"{place}.{key}": t for key, t in its_tensors.items()}
    metadata = {"format": "pt", _METADATA: json.dumps(configs, indent=2, sort_keys=True)}
    with writing_folder("export_diffusers", folder):
        replace_files({folder / _FILE: lambda path: save_file(tensors, path, metadata=metadata)})


def import_diffusers(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    backend: str = "auto",
    place: str | None = None,
    prefix_map: Mapping[str, str] | None = None,
) -> Attachment:
    """Attach, under `name`, the LoRA or DoRA that diffusers saved for this model.

    Args:
        path: the file, or the folder that has a `pytorch_lora_weights.safetensors`.
        place: the model's name in the pipeline: "unet", "transformer", "text_encoder"; "" for a file of one model
            alone, as `model.save_lora_adapter` writes it. By default its class's, or "" where the file's names are the
            model's.
        prefix_map: beginnings of layers' names in the file → in this model, where they differ.

    Raises:
        AttachError: an adapter is attached already.
        CheckpointError: the file is unreadable, has nothing of this place, is in another program's format, or does not
            fit the model. The model is untouched.
    """
    path = Path(path)
    file = path / _FILE if is_folder(path) else path

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        metadata, tensors = read_tensors(file)
        firsts = {key.partition(".")[0] for key in tensors}
        alone = bool(firsts) and firsts <= unwrap(model)._modules.keys()
        its_place = place if place is not None else "" if alone else place_of(unwrap(model))
        return _in_pefts_terms(its_place, metadata, tensors)

    found = attach_stored(model, read, f"import_diffusers: {file}", name, backend, Renaming(prefix_map))
    assert isinstance(found, Attachment)  # only an IA3 becomes two
    return found


def place_of(model: nn.Module) -> str:
    """What diffusers' pipelines call a model of this class."""
    kind = type(model)
    if kind.__module__.startswith("transformers."):
        return "text_encoder"
    return "unet" if "UNet" in kind.__name__ else "transformer"


def _of_model(model: nn.Module, attachment: Attachment, uniform: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if attachment.whole.names:
        raise AttachError(
            f"export_diffusers: diffusers takes no modules that train in full ({', '.join(attachment.whole.names)}); "
            "use save(model, path)"
        )
    names, adapters = as_they_are(model, attachment, "export_diffusers")
    config, tensors = as_lora(attachment, adapters, names, uniform, "export_diffusers")
    return {
        **config,
        "bias": "none",
        "lora_dropout": attachment.cfg.dropout,
        "target_modules": listed(list(names.values()), modules_of(model).keys() - set(names.values())),
    }, tensors


def _in_pefts_terms(
    place: str, metadata: dict[str, str], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one model of the pipeline as PEFT's files have them."""
    start = f"{place}." if place else ""
    mine = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
    if not mine:
        places = ", ".join(sorted({key.partition(".")[0] for key in tensors})[:5])
        raise CheckpointError(
            f"it has nothing for {place!r}; its names begin with {places}. Say which by place=; a file of another "
            "program is rewritten by pipeline.load_lora_weights(path) and pipeline.save_lora_weights(folder, ...)"
        )
    found = {key.removesuffix(_ALPHA): mine.pop(key) for key in list(mine) if key.endswith(_ALPHA)}
    if strange := [f"{layer}{_ALPHA}" for layer, t in found.items() if t.numel() != 1 or t.is_complex()]:
        raise CheckpointError(f"{first_of(strange)} must be one number")
    alphas = {layer: t.item() for layer, t in found.items()}
    if strange := [key for key in mine if ".lora_A." not in key and ".lora_B." not in key and "lora_mag" not in key]:
        raise CheckpointError(
            f"it holds {first_of(strange)}, which are not in diffusers' present format; rewrite it by "
            "pipeline.load_lora_weights(path) and pipeline.save_lora_weights(folder, ...)"
        )
    configs = read_json(metadata.get(_METADATA, "{}"), dict, f"{_METADATA} are")
    config = {key.removeprefix(start): value for key, value in configs.items() if key.startswith(start)}
    config = config or _from_tensors(mine, alphas)
    return {**config, "peft_type": "LORA"}, {PREFIX + key: t for key, t in mine.items()}


def _from_tensors(tensors: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Any]:
    """The config of a file without metadata: alpha is the rank where the file does not say it."""
    end = ".lora_A.weight"
    ranks = {key.removesuffix(end): len(t) for key, t in tensors.items() if key.endswith(end) and t.ndim}
    if not ranks:
        raise CheckpointError(f"it has no tensor of a layer's name and {end} that is a matrix")
    return {
        **patterns(ranks, {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}),
        "target_modules": list(ranks),
        "use_dora": any("lora_magnitude_vector" in key for key in tensors),
    }
