"""What PEFT has of the methods, to run beside ours."""

from typing import Any

import peft
import torch
from random_models import qwen_moe
from torch import nn

import lora_lite as ll


def peft_config(variant: str, r: int, alpha: float, targets: list[str], group_size: int = 64) -> Any:
    """PEFT's config of the same method on the same layers; None where PEFT lacks it. `group_size` is RoAd's."""
    lora: dict[str, Any] = {"r": r, "lora_alpha": alpha, "target_modules": targets}
    match variant:
        case "lora" | "eva":  # EVA's step is LoRA's
            return peft.LoraConfig(**lora)
        case "pissa":
            return peft.LoraConfig(**lora, init_lora_weights="pissa")
        case "dora":
            return peft.LoraConfig(**lora, use_dora=True)
        case "delora":
            return peft.DeloraConfig(r=r, target_modules=targets)
        case "ia3":
            return peft.IA3Config(target_modules=targets, feedforward_modules=[])
        case "ia3_ff":
            return peft.IA3Config(target_modules=targets, feedforward_modules=targets)
        case "hra":
            return peft.HRAConfig(r=r, target_modules=targets)
        case "road":
            return peft.RoadConfig(target_modules=targets, group_size=group_size)
    return None


def mixtures(experts: int, dtype: torch.dtype, r: int, width: int = 256, device: str = "cpu") -> dict[str, nn.Module]:
    """A mixture of experts: the bare base, and with LoRA on its stacks ours and PEFT's."""
    models = {name: qwen_moe(experts, dtype, width).to(device) for name in ("base", "ours", "peft")}
    stacks = ("gate_up_proj", "down_proj")
    ours = ll.LoRAConfig(r=r, alpha=2 * r, target_names=tuple(rf"experts\.{each}$" for each in stacks))
    theirs = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=[], target_parameters=[f"experts.{each}" for each in stacks]
    )
    ll.attach(models["ours"], ours).watch.stop()  # as by itself, after 20 steps
    return {**models, "peft": peft.get_peft_model(models["peft"], theirs)}  # type: ignore[arg-type]
