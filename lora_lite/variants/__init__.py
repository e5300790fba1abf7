"""The ten methods, one file each; IA³ and IA³-FF share one. Importing this package registers them."""

from . import antipasto, delora, dora, eva, hra, ia3, lora, pissa, road  # noqa: F401
