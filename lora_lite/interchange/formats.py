"""What PEFT calls things in its files."""

PREFIX = "base_model.model."  # PEFT's wrapper around the model
LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}  # our tensors' names to PEFT's
EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

# Methods that PEFT has under another name than LoRA: its type, and its tensors by ours.
TENSORS: dict[str, tuple[str, dict[str, str]]] = {
    "dora": ("LORA", {**LORA, "lora_m": "lora_magnitude_vector"}),
    "delora": (
        "DELORA",
        {"lora_A": "delora_A", "lora_B": "delora_B", "lora_lambda": "delora_lambda", "lora_wnorm": "delora_w_norm"},
    ),
    "ia3": ("IA3", {"lora_g": "ia3_l"}),
    "ia3_ff": ("IA3", {"lora_g": "ia3_l"}),
    "hra": ("HRA", {"lora_U": "hra_u"}),
    "road": ("ROAD", {"lora_theta": "road_theta", "lora_alpha": "road_alpha"}),
}
ROAD = {1: "road_1", 2: "road_2", 4: "road_4"}  # RoAd's kinds, in PEFT's config
DROPOUT = {"LORA": "lora_dropout", "DELORA": "module_dropout"}
