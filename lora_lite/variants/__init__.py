"""The ten methods, one file each. Importing this package registers them."""

from . import antipasto, delora, dora, eva, hra, ia3, lora, pissa, road  # noqa: F401
