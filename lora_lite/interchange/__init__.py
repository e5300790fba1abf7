"""Adapters in other libraries' files: PEFT's, which vLLM and llama.cpp's converter read too, and diffusers'.

Whatever is y + scale · (x Aᵀ) Bᵀ leaves as a LoRA: PiSSA of rank 2r, AntiPaSTO of rank r, and methods of one's own.
"""

from .diffusers import export_diffusers, import_diffusers
from .exporting import export_peft
from .importing import import_peft

__all__ = ["export_diffusers", "export_peft", "import_diffusers", "import_peft"]
