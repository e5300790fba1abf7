"""AdapterCallback: a transformers Trainer's checkpoints hold the adapter alone."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .attachment import attachments, chosen, unwrap
from .checkpoint import save
from .params import SITE


class AdapterCallback(TrainerCallback):
    """`Trainer(..., callbacks=[AdapterCallback()])`.

    A checkpoint has `adapter.safetensors` for `lora_lite.load` (of several adapters a file each, by name), and as the
    model's weights the adapter's tensors alone, to which the Trainer goes back by itself when it resumes or loads the
    best model. The base weights, which no method changes, are not written.

    From the Trainer's start on, and after training, `model.save_pretrained` and so `trainer.save_model` write the
    adapter in the base's stead, until it is detached.

    Raises:
        AttachError: when training starts and nothing is attached.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if attachments(unwrap(model)):  # what is attached later is seen when training starts
            self.on_train_begin(args, state, control, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = unwrap(model)
        chosen(model, None)
        # Not a closure: a copy of the model saves the copy.
        model.save_pretrained = partial(_save_pretrained, model)


def _save_pretrained(
    model: Any, folder: str | os.PathLike[str], *args: Any, state_dict: Any = None, **kwargs: Any
) -> None:
    found = attachments(model)
    if not found:  # detached since
        vars(model).pop("save_pretrained", None)
        model.save_pretrained(folder, *args, state_dict=state_dict, **kwargs)
        return
    tensors = model.state_dict() if state_dict is None else state_dict
    whole = {name for each in found for name in each.whole.entries}
    own = {name: t for name, t in tensors.items() if f".{SITE}." in name or name in whole}
    quantizer = vars(model).pop("hf_quantizer", None)  # it would write the whole base instead
    try:
        type(model).save_pretrained(model, folder, *args, state_dict=own, **kwargs)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
    for each in found:
        save(
            model,
            Path(folder) / _file_of(each.name, len(found)),
            name=each.name,
        )


def _file_of(name: str, count: int) -> str:
    """One adapter's file has a name that is known; several have their own, but that of the model's weights is taken."""
    return "adapter.safetensors" if count == 1 else f"{'adapter_' if name == 'model' else ''}{name}.safetensors"
