"""A base layer's weight, whatever it is stored as: as it is, or made dense. The weight itself is never changed."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn.utils.parametrize import is_parametrized

from . import shapes
from .errors import AttachError
from .operators import is_plain
from .placement import brought, whole
from .stacks import Stack


@dataclass(frozen=True)
class Int8Weight:
    """bitsandbytes' 8-bit weight: factor ∘ values, with a factor for each row."""

    kind: ClassVar[str] = "int8"
    values: Int8[Tensor, "N K"]
    factor: Float[Tensor, " N"]

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "N K"]:
        """In `dtype`; float32 where that is None."""
        return (self.values.float() * self.factor.unsqueeze(1)).to(dtype or torch.float32)


@dataclass(frozen=True)
class FourBitWeight:
    """bitsandbytes' 4-bit weight (NF4, FP4): two weights a byte, each code[half byte] · absmax of its block."""

    packed: UInt8[Tensor, "half 1"]
    state: Any
    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        """Whether the bytes are in the order of the weights, as the kernels read them."""
        return "inference" if getattr(self.state, "packing_format_for_cpu", False) else "4bit"

    @property
    def dtype(self) -> torch.dtype:
        """What a weight is rounded to."""
        return self.state.dtype

    @property
    def code(self) -> Float[Tensor, "16"]:
        return self.state.code

    @property
    def absmax(self) -> Tensor:
        """A block's largest size: float32, or where it is itself quantised a byte."""
        return self.state.absmax

    @property
    def nested(self) -> list[Tensor]:
        """Of a quantised absmax its code, its own absmax, and its offset; empty where it is not quantised."""
        state = self.state
        return [state.state2.code, state.state2.absmax, state.offset] if state.nested else []

    @property
    def blocks(self) -> list[int]:
        """How many weights share an absmax, and how many absmaxes share one of theirs."""
        return [self.state.blocksize, self.state.state2.blocksize if self.state.nested else 1]

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "N K"]:
        """In `dtype`; as it is dequantised where that is None."""
        from bitsandbytes.functional import dequantize_4bit

        if self.kind == "inference":
            return self._dense_of_inference_layout().to(dtype or self.dtype)
        dense = dequantize_4bit(self.packed, self.state)
        return dense.to(dtype or dense.dtype).view(self.shape)

    def _dense_of_inference_layout(self) -> Float[Tensor, "N K"]:
        """On some CPUs the first inference in evaluation mode moves the halves of bytes: 32 rows side by side, and the
        absmaxes transposed. bitsandbytes can't make dense what it has packed so."""
        (N, K), bytes_ = self.shape, self.packed.view(-1, 32).int()
        halves = torch.stack([bytes_ & 15, bytes_ >> 4], 1)  # the first 32 of every 64, then the rest
        weights = self.code[halves.view(N // 32, K // 2, 32, 2).transpose(1, 2).reshape(N, K)]
        return weights * self.absmax.t().float().repeat_interleave(self.state.blocksize, dim=1)


def weight_of(layer: Any) -> Tensor | None:
    """The tensor that holds a linear layer's weight, in whatever form; HQQ's layers call it W_q, GPTQ's and AWQ's
    qweight. None: it has none.

    Of a parametrised weight (weight_norm, spectral_norm) one of those that it is made from: to ask for the weight
    itself would run the parametrisation, which may change its state.
    """
    if is_parametrized(layer, "weight"):
        made_from = layer.parametrizations.weight
        return made_from.original if hasattr(made_from, "original") else made_from.original0
    for name in ("weight", "W_q", "qweight"):
        if isinstance(found := getattr(layer, name, None), Tensor):
            return found
    return None


def stored_tensor(layer: Any) -> Tensor | None:
    """`weight_of`; of a stack the parameter itself, of which `weight` is another view each time."""
    return getattr(layer.experts, layer.key) if isinstance(layer, Stack) else weight_of(layer)


def _of_parametrisation(layer: Any) -> Float[Tensor, "N K"]:
    """A parametrised weight as it is in evaluation."""
    made = layer.parametrizations.weight
    with evaluation_mode(made):
        return made().detach()


def is_dense(t: Tensor) -> bool:
    """Whether t holds plain floating-point values: not quantised, not in 8 bits, of no class of its own."""
    return is_plain(t) and t.is_floating_point() and t.dtype.itemsize > 1


def widened(t: Tensor) -> Tensor:
    """The values of 8-bit floats in float32: PyTorch compares few of them and looks for NaN in few. Pairs of 4-bit
    floats, which it can't convert, as bytes; any other tensor as it is."""
    if not t.is_floating_point() or t.dtype.itemsize > 1:
        return t
    return t.view(torch.uint8) if "float4" in str(t.dtype) else t.float()


def bias_of(layer: Any) -> Float[Tensor, " N"] | None:
    """A layer's bias with its values, also where accelerate offloads it; None: it has none."""
    return brought(layer, "bias")


def token_dtype(layer: Any) -> torch.dtype:
    """The dtype of the tokens that a layer expects: its weight's; where that is quantised its bias's, what the layer
    says that it computes in, or bfloat16."""
    weight = weight_of(layer)
    for t in (weight, getattr(layer, "bias", None)):
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype.itemsize > 1:
            return t.dtype
    declared = getattr(layer, "compute_dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.bfloat16


def _plain_weight(layer: Any) -> Float[Tensor, "N K"] | None:
    """What nearly all layers have, and each call of some methods asks for; None: it takes a closer look."""
    if type(layer) is not Linear:
        return None
    weight = layer.weight
    plain = is_dense(weight) and not weight.is_meta and weight.shape == (layer.out_features, layer.in_features)
    return weight if plain else None


def stored_weight(layer: Any) -> Float[Tensor, "N K"] | Int8Weight | FourBitWeight:
    """A layer's weight as it is stored, without a copy; torchao's, HQQ's and 8-bit floats, of which there are many
    kinds, made dense; FSDP2's and ZeRO-3's gathered, which all processes must do at once; what accelerate offloads
    brought onto the device on which the layer runs.

    Raises:
        AttachError: the weight is of a kind that can't be read.
    """
    if (plain := _plain_weight(layer)) is not None:
        return plain.detach()
    weight: Any = weight_of(layer)
    (K, N), experts = shapes.shape(layer), shapes.copies(layer)
    shape = (N, K) if experts is None else (experts, N, K)
    kind = type(weight).__name__
    if weight.device.type == "meta":
        weight = brought(layer, "weight")
    elif is_parametrized(layer, "weight"):
        weight = _of_parametrisation(layer)
    elif not is_plain(weight) and "torchao" in type(weight).__module__:
        weight = weight.dequantize()  # its tensors pass for dense ones, but multiply only as a layer's weight
    elif not isinstance(getattr(layer, "weight", None), Tensor) and hasattr(layer, "dequantize"):
        weight = layer.dequantize()  # HQQ
    weight = whole(weight) if kind not in ("Params4bit", "Int8Params") else weight
    weight = weight.t() if shapes.is_stored_transposed(layer) else weight
    if weight.is_floating_point() and weight.dtype.itemsize == 1:
        weight = _scaled_float8(layer, weight)
    if weight.is_floating_point() and tuple(weight.shape) == shape:
        return weight.detach()
    # After unpickling the layer has what belongs to the weight.
    if (state := getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)) is not None:
        return FourBitWeight(weight.data, state, (N, K))
    if (row_absmax := _row_absmax(layer, weight)) is not None:
        return Int8Weight(weight.data, row_absmax.float() / 127)
    raise AttachError(
        f"its weight is a {kind} of dtype {weight.dtype} and shape {tuple(weight.shape)}, which can't be read, as this "
        "needs it; use a floating-point weight, or bitsandbytes 4-bit or 8-bit. lora, ia3, ia3_ff, hra and road train "
        "and run without reading it"
    )


def _row_absmax(layer: Any, weight: Any) -> Float[Tensor, " N"] | None:
    """Of bitsandbytes' 8-bit weight each row's largest size; None: it is none."""
    found = getattr(weight, "SCB", None)
    return found if found is not None else getattr(getattr(layer, "state", None), "SCB", None)


def _scaled_float8(layer: Any, weight: Tensor) -> Float[Tensor, "N K"]:
    """An 8-bit float weight times the scales beside it, in float32: one for all, for each row, or for each block."""
    found = {name: brought(layer, name) for name in ("weight_scale_inv", "weight_scale", "scale_weight")}
    named = [(name, t) for name, t in found.items() if isinstance(t, Tensor)]
    if len(named) != 1 or weight.ndim != 2:
        raise AttachError(
            f"its weight is of dtype {weight.dtype}, whose values mean nothing without their scales, and it has no "
            "weight_scale_inv or weight_scale of a known kind; load the model dequantised, or use a variant that needs "
            "no weight (lora, ia3, ia3_ff, hra, road)"
        )
    (name, scale), (N, K) = named[0], weight.shape
    scale = scale.detach().float()
    if scale.ndim == 1 and scale.numel() == N:
        scale = scale[:, None]
    if scale.numel() == 1:
        scale = scale.view(1, 1)
    declared = getattr(layer, "block_size", None)
    fits, block = scale.ndim == 2, (N, K)
    if fits and isinstance(declared, tuple | list):
        block = tuple(declared)
        fits = all(s in (1, math.ceil(n / b)) for n, b, s in zip((N, K), block, scale.shape, strict=True))
    elif fits:  # an uneven last block would leave its size open
        block = (N // scale.shape[0], K // scale.shape[1])
        fits = all(n % s == 0 for n, s in zip((N, K), scale.shape, strict=True))
    if not fits:
        raise AttachError(f"its {name} of shape {tuple(scale.shape)} fits no rows or blocks of a {N}×{K} weight")
    for dim, size in enumerate((N, K)):
        if scale.shape[dim] > 1:
            scale = scale.repeat_interleave(block[dim], dim).narrow(dim, 0, size)
    return weight.detach().float() * scale


def dense_weight(layer: Any, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Float[Tensor, "N K"]:
    """A layer's weight as an N×K tensor, or some of its rows: as stored for nn.Linear, dequantised for the layers of
    bitsandbytes (4-bit, 8-bit), torchao and HQQ.

    Args:
        layer: a linear layer.
        dtype: of the result; None: as it is stored or dequantised. A floating-point weight that has this dtype is
            not copied: the result is a view of it.
        rows: which. A 4-bit weight is dequantised whole for them, since its blocks run over rows' ends.

    Raises:
        AttachError: the weight is on the meta device, or of a kind that can't be read.
    """
    weight = stored_weight(layer)
    if isinstance(weight, Tensor):
        if weight.is_meta:
            raise AttachError(
                "its weight is on the meta device and holds no values; load the model's weights before attach"
            )
        return weight[rows].to(dtype or weight.dtype)
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values[rows], weight.factor[rows]).dense(dtype)
    return weight.dense(dtype)[rows]


@contextmanager
def evaluation_mode(model: nn.Module) -> Any:
    """Each module's own training flag comes back afterwards, not one flag for all.

    4-bit linears stay in training mode: in evaluation bitsandbytes packs their weights anew on some CPUs, for good.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in flags:
        if type(getattr(module, "weight", None)).__name__ == "Params4bit":
            module.training = True
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
