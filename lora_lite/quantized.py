"""The dense weight of a base layer, whatever it is stored as. The weight itself is never changed."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import AttachError


def dense_weight(layer: Any, dtype: torch.dtype | None = None) -> Float[Tensor, "N K"]:
    """`layer.weight` as an N×K tensor: as stored for nn.Linear, dequantised for bitsandbytes' 4-bit and 8-bit layers.

    Args:
        layer: a linear layer.
        dtype: of the result; None: as it is stored or dequantised. A floating-point weight that has this dtype is
            returned itself, not a copy.

    Raises:
        AttachError: the weight is on the meta device, or of a kind that can't be read.
    """
    weight = layer.weight
    shape = (layer.out_features, layer.in_features)
    kind = type(weight).__name__
    if weight.device.type == "meta":
        raise AttachError(
            "its weight is on the meta device and holds no values; load the model's weights before attach"
        )
    if weight.is_floating_point() and tuple(weight.shape) == shape:
        return weight.detach().to(dtype or weight.dtype)
    if kind == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.data, weight.quant_state)
        return dense.to(dtype or dense.dtype).view(shape)
    if kind == "Int8Params":
        row_absmax = weight.SCB if weight.SCB is not None else layer.state.SCB
        return (weight.data.float() * (row_absmax.float().unsqueeze(1) / 127)).to(dtype or torch.float32)
    raise AttachError(
        f"its weight is a {kind} of dtype {weight.dtype} and shape {tuple(weight.shape)}, which this variant can't "
        "read; use a floating-point weight, bitsandbytes 4-bit or 8-bit, or a variant that needs no weight "
        "(lora, ia3, ia3_ff, hra)"
    )
