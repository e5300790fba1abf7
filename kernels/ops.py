"""The Triton backend: the functions of `lora_lite.reference`, by the same names and signatures."""

from .low_rank import expand_add, expand_add_rescale, shrink, shrink_together, worth_sharing
from .rotate import rotate_pairs
from .row_norm import row_norm
from .scale import scale
from .shrink_expand import shrink_expand

__all__ = [
    "expand_add",
    "expand_add_rescale",
    "rotate_pairs",
    "row_norm",
    "scale",
    "shrink",
    "shrink_expand",
    "shrink_together",
    "worth_sharing",
]
