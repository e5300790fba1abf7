"""What PEFT makes of a LoRA for a model whose checkpoints transformers converts on their way in.

By PEFT 0.21.2 (peft/utils/transformers_weight_conversion.py). Such a model's experts were linear layers once. Entries
of `target_modules` that end in those layers' names PEFT takes for the experts, even where they are a dense or a shared
feed-forward's; a layer of which `target_parameters` names the weight it leaves alone. And it renames the tensors of a
file as transformers does those of a checkpoint, though the file has the model's own names.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

WEIGHT = ".weight"  # after a layer's name: its parameter's
_ONCE_EXPERTS = {
    "mixtral": (".gate", ".w1", ".w2", ".w3"),
    "qwen2_moe": (".gate", ".gate_proj", ".up_proj", ".down_proj"),
}


def taken_for_experts(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of these linear layers that PEFT would take for experts."""
    kind = _model_type(model)
    alike = getattr(_mapping(), "_MODEL_TO_CONVERSION_PATTERN", {})
    names = _ONCE_EXPERTS.get(kind if kind == "mixtral" else alike.get(kind, ""), ())
    return [layer for layer in layers if layer.endswith(names)]


def renamed(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """By these layers' names the names under which PEFT would look for them, where those are others."""
    mapping = _mapping()
    if mapping is None or not hasattr(model, "base_model_prefix"):  # a module that has a model's config is no model
        return {}
    if mapping.get_checkpoint_conversion_mapping(_model_type(model)) is None:
        return {}
    steps = [each for each in mapping.get_model_conversion_mapping(model) if isinstance(each, mapping.WeightRenaming)]
    found = {}
    for layer in layers:
        name = layer
        for step in steps:
            name, _ = step.rename_source_key(name + WEIGHT)
            name = name.removesuffix(WEIGHT)
        if not layer.endswith(name):  # of a name that has only lost its beginning PEFT finds the layer
            found[layer] = name
    return found


def _model_type(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _mapping() -> Any:
    """transformers' module of conversions; None where it has none."""
    try:
        from transformers import conversion_mapping
    except ImportError:
        return None
    return conversion_mapping
