"""AdapterCallback: a transformers Trainer's checkpoints hold the adapter alone. And what TRL's trainers need beside."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from .attachment import attachments, chosen, own_tensors, parameters, unwrap
from .beside import require_no_peft
from .calls import callers
from .checkpoint import mismatches, require_alike, save, save_gathered
from .errors import AttachError, CheckpointError, first_of
from .files import apart, replace_files, write_weights, writing
from .merging import merged_parameters
from .params import SITE
from .selection import disabled


class AdapterCallback(TrainerCallback):
    """`Trainer(..., callbacks=[AdapterCallback()])`, for trainers of transformers, TRL and sentence-transformers.

    A checkpoint has `adapter.safetensors` for `lora_lite.load` (of several adapters a file each, by name, in which `/`
    is `%2F`, and their order in `adapters.json`), and as the model's weights those that train, to which the Trainer
    goes back by itself when it resumes or loads the best model. The base weights, which no method changes, are not
    written: `from_pretrained` of such a folder would draw them. Load the base, and the adapter's file.

    From the Trainer's start on, and after training, `model.save_pretrained` and so `trainer.save_model` write the
    adapter in the base's stead, until it is detached.

    What TRL's trainers send to vLLM are merged weights.

    Args:
        model: on a base that bitsandbytes has quantised, for TRL's trainers: they round all that trains to bfloat16
            before they start, and this takes it back. PiSSA's start, DoRA's magnitudes and IA³'s vectors are wrong
            otherwise.

    Raises:
        AttachError: when training starts and nothing is attached, PEFT was put on the model, as by `peft_config`, or
            TRL is to move a `Reference` (`sync_ref_model`).
        CheckpointError: when the Trainer loads a checkpoint whose names are not the model's, or resumes that of an
            adapter of another method, of other layers, or with a config by which it computes something else.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._before = [] if model is None else [(p, p.data) for p in parameters(model)]

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for p, data in self._before:
            if p.dtype != data.dtype:
                p.data = data.to(p.device)
        self._before = []
        trainer: Any = _calling_trainer()
        trainer._load_from_checkpoint = partial(_load_alike, trainer)
        if attachments(unwrap(model)):  # what is attached later is seen when training starts
            self.on_train_begin(args, state, control, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = unwrap(model)
        chosen(model, None)
        require_no_peft(model, "AdapterCallback")
        trainer: Any = _calling_trainer()
        if getattr(args, "sync_ref_model", False) and isinstance(getattr(trainer, "ref_model", None), Reference):
            raise AttachError(
                "sync_ref_model=True moves a reference's weights, and Reference(model) has none but the base's, which "
                "stay as they are; set it to False, or give the trainer a second model as ref_model"
            )
        # Not closures: a copy of the model saves the copy.
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[method-assign]
            model.load_state_dict = partial(_load_state_dict, model)  # type: ignore[method-assign]
        elif hasattr(model, "save_pretrained"):  # sentence-transformers
            model.save_pretrained = partial(_save_tensors, model)
            trainer._load_from_checkpoint = partial(_load_tensors, model)
        else:  # a module that is no library's: the trainer's own file has all of it
            trainer._save = partial(_save_beside, trainer, model)
        if hasattr(trainer, "vllm_generation"):
            trainer.vllm_generation.model = Merged(model)


class _View(nn.Module):
    """Another look at a model. No submodule of it: nothing is for a trainer to move, to average or to train here."""

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", unwrap(model))
        chosen(self.model, None)


class Reference(_View):
    """The model as it computes without its adapters: the reference of preference training, and no second base.

    `DPOTrainer(model, ref_model=Reference(model), ...)`, and KTO likewise; see `set_reference` for the others. Whatever
    forward a trainer puts in the place of this module's, a call is a call of the model, whose forward it has changed
    alike.

    Args:
        name: of the adapter that it computes without, where others are part of the reference: one of supervised
            training, frozen, beneath one of preference training.

    Raises:
        AttachError: nothing is attached, or nothing of that name, here or at a call.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        super().__init__(model)
        chosen(self.model, name)
        self.name = name

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's: TRL keeps precomputed log-probabilities under its hash."""
        return self.model.state_dict(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with disabled(self.model, self.name):
            return self.model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


def set_reference(trainer: Any, beta: float, name: str | None = None) -> None:
    """`Reference(trainer.model, name)` as the reference of a TRL trainer that takes none (GRPO, RLOO), with `beta` for
    the KL divergence from it. Make the trainer with `beta=0`, so that it loads no second base, and call this before
    `train()`.

    Raises:
        AttachError: nothing is attached.
        ValueError: beta is not above 0, or the trainer was not made with beta=0 or knows neither.
    """
    if not beta > 0:
        raise ValueError(f"set_reference: beta must be above 0; got {beta}")
    if getattr(trainer, "beta", None) != 0 or getattr(trainer, "ref_model", trainer) is not None:
        raise ValueError(
            f"set_reference: {type(trainer).__name__} must be made with beta=0 and have no reference of its own; a "
            "trainer with the argument ref_model takes Reference(model) there"
        )
    trainer.ref_model = Reference(trainer.model, name)
    trainer.beta = trainer.args.beta = beta


class Merged(_View):
    """The model as an inference engine knows it: parameters under the base's names, of merged weights."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Made one layer at a time, tied ones once. Every process that has a part of a sharded one must call it."""
        return merged_parameters(self.model)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _save_pretrained(
    model: Any, folder: str | os.PathLike[str], *args: Any, state_dict: Any = None, **kwargs: Any
) -> None:
    """In the place of a transformers model's."""
    if not attachments(model):  # detached since
        vars(model).pop("save_pretrained", None)
        model.save_pretrained(folder, *args, state_dict=state_dict, **kwargs)
        return
    own = own_tensors(model, state_dict)
    quantizer = vars(model).pop("hf_quantizer", None)  # it would write the whole base instead
    try:
        # It empties the dict; and the Trainer, which goes back to the file, knows no names but the model's own.
        as_named = {**kwargs, "save_original_format": False}
        type(model).save_pretrained(model, folder, *args, state_dict=apart(own), **as_named)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
    _save_each(model, Path(folder), None if state_dict is None else own)


def _strange(model: nn.Module, tensors: Mapping[str, Any]) -> list[str]:
    """Names that the model does not have."""
    known = model.state_dict()
    return sorted(tensors.keys() - known.keys() - own_tensors(model, known).keys())


def _adapters_in(tensors: Iterable[str]) -> set[str]:
    """The names of the adapters whose tensors these are."""
    parts = (name.split(".") for name in tensors)
    return {each[each.index(SITE) + 1] for each in parts if SITE in each[:-2]}


def _load_state_dict(model: Any, tensors: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of a transformers model's: of a checkpoint whose names are others, a Trainer drops the adapter."""
    if not attachments(model):
        vars(model).pop("load_state_dict", None)
    elif any(SITE in name.split(".") for name in tensors) and (strange := _strange(model, tensors)):
        here, there = {each.name for each in attachments(model)}, _adapters_in(tensors)
        if lacking := sorted(there - here):
            raise CheckpointError(
                f"the checkpoint is of adapters named {', '.join(sorted(there))}, and {', '.join(sorted(here))} is "
                f"attached here; detach, and attach under the names of the checkpoint first: name={lacking[0]!r}"
            )
        raise CheckpointError(
            f"the checkpoint has tensors of which the model has none: {first_of(strange)}. Is its adapter another's? "
            "Weights that an earlier lora-lite or a Trainer without AdapterCallback wrote can have the names of older "
            "models: then detach, lora_lite.load(model, its adapter.safetensors), and trainer.save_model(the "
            "checkpoint's folder) writes them anew, and it resumes"
        )
    return type(model).load_state_dict(model, tensors, *args, **kwargs)


def _save_tensors(model: Any, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """In the place of a sentence-transformers model's."""
    if not attachments(model):
        vars(model).pop("save_pretrained", None)
        model.save_pretrained(folder, *args, **kwargs)
        return
    folder = Path(folder)
    write_weights("AdapterCallback", folder, {name: t.cpu() for name, t in own_tensors(model).items()})
    _save_each(model, folder)


def _save_beside(trainer: Any, model: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
    """In the place of a trainer's: what it writes, and the adapters' files."""
    type(trainer)._save(trainer, output_dir, state_dict)
    if attachments(model):
        _save_each(model, Path(output_dir or trainer.args.output_dir), state_dict)


def _load_alike(trainer: Any, folder: Any, model: Any = None) -> Any:
    """In the place of a trainer's, when it resumes: weights alone don't tell what was made of them."""
    own = unwrap(trainer.model if model is None else model)
    if attachments(own) or any(isinstance(each, AdapterCallback) for each in trainer.callback_handler.callbacks):
        chosen(own, None)
        _require_alike(own, folder)
    return type(trainer)._load_from_checkpoint(trainer, folder, model)


def _require_alike(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    found, folder = attachments(model), Path(folder)
    here = [each.name for each in found]
    if (listed := folder / _LIST).is_file():
        if (there := json.loads(listed.read_text())) != here:
            raise CheckpointError(
                f"{folder} is of the adapters {', '.join(there)}, and {', '.join(here)} are attached here; attach "
                "those, in this order, by which an optimiser's state is kept"
            )
    elif len(found) > 1 and (folder / _file_of("", 1)).is_file():
        raise CheckpointError(f"{folder} is of one adapter, and {', '.join(here)} are attached here; detach the others")
    for each in found:
        if (path := folder / _file_of(each.name, len(found))).is_file():
            require_alike(model, each, path)


def _load_tensors(model: Any, folder: str | os.PathLike[str]) -> None:
    """In the place of a trainer's, which would load a whole model from a checkpoint."""
    _require_alike(model, folder)
    tensors = load_file(Path(folder) / "model.safetensors")
    if problems := mismatches(own_tensors(model), tensors):
        raise CheckpointError(f"{folder} is no checkpoint of what is attached here: {first_of(problems)}")
    model.load_state_dict(tensors, strict=False)


def _save_each(model: nn.Module, folder: Path, gathered: dict[str, Tensor] | None = None) -> None:
    """A file for each adapter. `gathered`: what one process has of a sharded model while the others don't save."""
    found = attachments(model)
    listed = folder / _LIST
    with writing("AdapterCallback", listed):
        if len(found) > 1:
            text = json.dumps([each.name for each in found])
            replace_files({listed: lambda file: file.write_text(text)})
        else:
            listed.unlink(missing_ok=True)
    for each in found:
        path = folder / _file_of(each.name, len(found))
        if gathered is None:
            save(model, path, name=each.name)
        else:
            save_gathered(model, path, each.name, gathered)


_LIST = "adapters.json"  # their names, in their order, where there are several
_LONGEST = 200  # bytes; systems take 255, of which a temporary file beside it needs some


def _file_of(name: str, count: int) -> str:
    """One adapter's file has a name that is known. Several have their own, in which what leads out of a folder is
    escaped as in a URL, and a name too long for a file is its beginning and digest; that of the model's weights is
    taken."""
    if count == 1:
        return "adapter.safetensors"
    stem = re.sub(r"[/\\\0%]", lambda found: quote(found[0], safe=""), name)
    if len(stem.encode()) > _LONGEST:
        stem = f"{stem[:32]}-{hashlib.sha256(name.encode()).hexdigest()}"
    return f"{'adapter_' if re.fullmatch('(adapter_)*model', stem) else ''}{stem}.safetensors"


def _calling_trainer() -> Trainer:
    """The trainer that calls a callback, to which it does not give itself."""
    for frame in callers():
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
    raise AttachError("AdapterCallback is called by no Trainer; pass it to one as a callback")
