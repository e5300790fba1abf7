"""PEFT's configs of the methods, to run beside ours."""

from typing import Any

import peft


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
