"""AdapterCallback: a transformers Trainer's checkpoints hold the adapter alone."""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from .adapter import ADAPTERS, attachments, chosen, unwrap
from .checkpoint import save


class AdapterCallback(TrainerCallback):
    """`Trainer(..., callbacks=[AdapterCallback()])`.

    A checkpoint has `adapter.safetensors` for `lora_lite.load` (of several adapters a file each, by name), and as the
    model's weights the adapter's tensors alone, to which the Trainer goes back by itself when it resumes or loads the
    best model. The base weights, which no method changes, are not written.

    While the Trainer runs, `model.save_pretrained` writes the adapter in the base's stead.

    Raises:
        AttachError: when training starts and nothing is attached.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = unwrap(model)
        chosen(model, None)

        def save_pretrained(folder: str | os.PathLike[str], *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
            tensors = model.state_dict() if state_dict is None else state_dict
            own = {name: t for name, t in tensors.items() if f".{ADAPTERS}." in name}
            type(model).save_pretrained(model, folder, *args, state_dict=own, **kwargs)
            for each in attachments(model):
                file = "adapter.safetensors" if len(attachments(model)) == 1 else f"{each.name}.safetensors"
                save(model, Path(folder) / file, name=each.name)

        model.save_pretrained = save_pretrained

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is not None:
            vars(unwrap(model)).pop("save_pretrained", None)
