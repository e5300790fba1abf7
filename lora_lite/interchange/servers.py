"""What PEFT and servers take of PEFT's files, as their sources have it, and what they would refuse or get wrong.

PEFT: peft/tuners (version 0.21.2), and conversions.py here.
vLLM: vllm/lora/peft_helper.py and lora_model.py (commit 0306474). It scales each layer by the config's lora_alpha / r.
llama.cpp: convert_lora_to_gguf.py (commit 0b03ada). It scales every layer by lora_alpha / the rank of the tensor.
Neither reads patterns of ranks and alphas, so both get files of one rank and one alpha. Neither takes what PEFT has
beside LoRA: DoRA, DeLoRA, IA3, HRA, RoAd.
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

from ..attachment import Attachment
from ..errors import AttachError
from ..idle import current_names
from ..shapes import is_conv1d_in_files, is_embedding
from ..stacks import Stack
from ..targets import Target, stacks_among
from .conversions import WEIGHT, renamed

Reader = Literal["peft", "vllm", "llama.cpp"]
_LARGEST_RANK = 512  # of vLLM's max_lora_rank
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # model types of which PEFT takes no out_proj


def check_reader(reader: str) -> None:
    """Raise a ValueError where there is no such reader."""
    if reader not in get_args(Reader):
        raise ValueError(f"for_ must be one of {', '.join(map(repr, get_args(Reader)))}; got {reader!r}")


def check_served(reader: Reader, model: nn.Module, attachments: Iterable[Attachment], config: dict[str, Any]) -> None:
    """Raise where the reader would not take this file.

    Raises:
        AttachError: the message names what it would not take, and the remedy.
    """
    for attachment in attachments:
        if reader == "peft":
            if why := _unread_by_peft(model, attachment, config):
                raise AttachError(f"export_peft: {why}; leave it out by exclude_names, or use save(model, path)")
        elif why := _why_not(reader, model, attachment, config):
            raise AttachError(
                f"export_peft(for_={reader!r}): {why}; write merged weights, which it serves as any model: "
                "save_merged(model, folder)"
            )


def _why_not(reader: Reader, model: nn.Module, attachment: Attachment, config: dict[str, Any]) -> str:
    method, in_full = attachment.cfg.variant, attachment.whole.entries
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        return f"{reader} takes LoRA, and {method} is none"
    if reader == "vllm":
        if in_full:
            return f"vLLM takes no modules that train in full, such as {next(iter(in_full))}"
        if config["r"] > _LARGEST_RANK:
            return f"its rank is {config['r']}, and vLLM's largest is {_LARGEST_RANK}"
        return _first(attachment.targets, lambda t: _is_alone(t, attachment.targets))
    if others := [name for name in in_full if "_layernorm" not in name and ".norm" not in name]:
        return f"llama.cpp takes norms beside a LoRA and no other modules that train in full, such as {others[0]}"
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return _first(attachment.targets, lambda t: _unconvertible(t, bool(tied)))


def _unread_by_peft(model: nn.Module, attachment: Attachment, config: dict[str, Any]) -> str:
    """PEFT has LoRA and IA3 on more than nn.Linear and what is derived from it, and LoRA alone on parameters."""
    kind, method, names = config["peft_type"], attachment.cfg.variant, current_names(model, attachment.targets)
    moved = renamed(model, names.values()) if kind == "LORA" else {}
    mamba = kind == "LORA" and getattr(getattr(model, "config", None), "model_type", None) in _MAMBAS

    def why(target: Target) -> str:
        name = names[target.name]
        if not (name.rpartition(".")[0] if isinstance(target.layer, Stack) else name):
            return "PEFT adapts what is in a model, and not the model itself"
        if kind not in ("LORA", "IA3") and not isinstance(target.layer, nn.Linear):
            return f"PEFT has no {method} on a {type(target.layer).__name__}"
        if mamba and name.endswith("out_proj"):
            return f"PEFT takes no out_proj of a {type(model).__name__}"
        if name in moved:
            return f"transformers renames what it reads of such a layer, and PEFT would look for {moved[name]}"
        if config.get("use_dora") and name + WEIGHT in config.get("target_parameters", ()):
            return "PEFT would take it for experts unless it is listed as a parameter, and has no DoRA on parameters"
        return ""

    return _first(attachment.targets, why)


def _first(targets: Iterable[Target], why: Any) -> str:
    return next((f"{target.name}: {text}" for target in targets if (text := why(target))), "")


def _is_alone(target: Target, targets: Iterable[Target]) -> str:
    """vLLM takes the innermost of an experts module's stacks for its down_proj."""
    layer = target.layer
    if not isinstance(layer, Stack) or layer.key == "down_proj":
        return ""
    mates = {other.key for other in stacks_among(targets) if other.experts is layer.experts}
    return "" if "down_proj" in mates else "vLLM takes stacked experts with their down_proj only"


def _unconvertible(target: Target, tied: bool) -> str:
    if isinstance(target.layer, Stack):
        return "llama.cpp's converter knows no adapter of stacked experts"
    if is_embedding(target.layer):
        return (
            "llama.cpp's converter takes mergekit's adapters of embeddings, and PEFT's have A and B the other way round"
        )
    if is_conv1d_in_files(target.layer):
        return "llama.cpp's converter transposes Conv1D's weights, and would an adapter that is not"
    return "llama.cpp keeps no head that is tied to the embedding" if target.is_head and tied else ""
