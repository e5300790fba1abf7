"""A layer's shape as a linear map, whatever it calls it: nn.Linear and all that has its attributes, transformers'
Conv1D (GPT-2's, whose weight is stored in × out), a mixture's stack, an embedding, which maps one-hot rows."""

from typing import Any

from torch import nn

from .stacks import Stack

SHAPELESS = "it has no shape before its first call; run one batch through the model before attach"


def features(layer: Any) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that acts on the last dimension, or on ids; None: it is no such layer."""
    names = ("in_features", "out_features")
    if is_conv1d(layer):
        names = ("nx", "nf")
    elif is_embedding(layer):
        names = ("num_embeddings", "embedding_dim")
    found = tuple(getattr(layer, name, None) for name in names)
    return found if all(isinstance(size, int) for size in found) else None  # type: ignore[return-value]


def shape(layer: Any) -> tuple[int, int]:
    """`features` of a layer that has them."""
    found = features(layer)
    assert found is not None  # it is a target
    return found


def is_conv1d(layer: Any) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is stored in × out."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "nx")


def is_conv1d_in_files(layer: Any) -> bool:
    """Whether plain checkpoints store its weight in × out: of a Conv1D, also where quantisation has put a layer of
    another class in its place, which transformers notes there."""
    return is_conv1d(layer) or getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D"


def is_embedding(layer: Any) -> bool:
    """Whether its input are ids: one-hot rows of a linear layer, by the number of their one."""
    return isinstance(layer, nn.Embedding)


def is_stored_transposed(layer: Any) -> bool:
    """Whether its weight is stored in × out."""
    return is_conv1d(layer) or is_embedding(layer)


def copies(layer: Any) -> int | None:
    """How many matrices of that shape a stack of experts has; None: it is no stack."""
    return layer.num_experts if isinstance(layer, Stack) else None


def described(layer: Any) -> str:
    """The shape for people; of a stack with the number of experts."""
    inner, outer = shape(layer)
    experts = copies(layer)
    return f"{inner} → {outer}" + ("" if experts is None else f", {experts} experts")
