"""Embeddings: linear layers on one-hot rows, of which they get the number of the one. E (V×D) stands for W = Eᵀ.

Of an adapter's product x Aᵀ there remains a look-up, of A's columns. So a method acts here if it is a low-rank sum on
the output. V num_embeddings, D embedding_dim, R rank.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

from .errors import AttachError
from .placement import brought, execution_device, is_sharded
from .primitives import LowRankAdd, Primitive
from .quantized import dense_weight, is_dense, weight_of
from .shapes import is_embedding

if TYPE_CHECKING:
    from .adapter import Adapter

_REMEDY = (
    "give the embedding a config of its own, such as LoRAConfig(target_names=…) attached under another name, and leave "
    "it out here by exclude_names"
)


def unfit_embedding(layer: Any) -> str:
    """Why no adapter could act on it; empty: nothing is known against it."""
    weight: Any = weight_of(layer)
    if not is_dense(weight) and not is_sharded(weight):
        return f"its weight is quantised ({type(weight).__name__} of {weight.dtype}), and its rows can't be told"
    if layer.max_norm is not None:
        return f"its max_norm={layer.max_norm} changes the weight at each call, and an adapter leaves the base alone"
    if layer.scale_grad_by_freq:
        return "its scale_grad_by_freq divides gradients by how often an id occurs, which an adapter's would not be"
    plain = type(layer).forward is nn.Embedding.forward and not hasattr(layer, "embed_scale")
    if plain or _looks_up(layer):
        return ""
    where = " (on the meta device it can't be tried)" if weight.is_meta else ""
    return f"its {type(layer).__name__} does more than look rows up and multiply them by its embed_scale{where}"


@torch.no_grad()
def _looks_up(layer: Any) -> bool:
    """Whether its own forward gives E[ids] · embed_scale for each id, tried on rows of one random number."""
    device = execution_device(layer) or layer.weight.device
    rows = torch.rand(layer.num_embeddings, 1, generator=torch.Generator().manual_seed(0), device="cpu")
    rows = rows.to("cpu" if device.type == "meta" else device, layer.weight.dtype)
    twin = copy.copy(layer)
    twin._parameters = {**layer._parameters, "weight": nn.Parameter(rows)}
    try:
        ids = torch.arange(len(rows), device=rows.device).flip(0)[None]  # in an order that positions don't have
        return torch.equal(type(layer).forward(twin, ids).view_as(rows[ids]), rows[ids] * scale_of(twin))
    except Exception:  # it wants other arguments, or gives another shape
        return False


def scale_of(layer: Any) -> Tensor | float:
    """What an embedding multiplies its rows by, as Gemma's and BART's do: its embed_scale, rounded as it is there."""
    scale: Any = brought(layer, "embed_scale")
    return scale.to(layer.weight.dtype) if isinstance(scale, Tensor) else 1.0 if scale is None else scale


def looked_up(layer: Any, ids: Int[Tensor, "*M"], dtype: torch.dtype) -> Float[Tensor, "*M D"]:
    """The base's output, in `dtype`."""
    return embedding(ids, dense_weight(layer).mT).to(dtype) * scale_of(layer)


def on_ids(primitive: Primitive, layer: Any) -> LowRankAdd:
    """The sum around an embedding: multiplied as the layer's rows are, and without a gradient for the padding's id."""
    assert type(primitive) is LowRankAdd  # require_sum
    B = primitive.B * scale_of(layer) if hasattr(layer, "embed_scale") else primitive.B
    return LowRankAdd(primitive.A, B, primitive.scale, padding_idx=layer.padding_idx)


# ---- what an adapter must be, to stand on one ------------------------------------------------------------------------


def require_sum(adapter: "Adapter", layer: nn.Module) -> None:
    """Raise an AttachError where the layer is an embedding and the adapter no low-rank sum without dropout."""
    if not is_embedding(layer):
        return
    method = adapter.variant.name
    if adapter.cfg.dropout:
        raise AttachError(
            f"dropout={adapter.cfg.dropout} leaves elements of a layer's input out, and an id has none; use dropout=0, "
            f"or {_REMEDY}"
        )
    if not adapter.variant.on_embeddings or type(adapter.at_rest(layer)) is not LowRankAdd:
        raise AttachError(f"{method} can't stand on an embedding, where only low-rank sums on the output do; {_REMEDY}")


def require_inputs(variant: str, layer: nn.Module) -> None:
    """Raise an AttachError where the layer is an embedding: its inputs teach a method nothing."""
    if is_embedding(layer):
        raise AttachError(f"{variant} starts from a layer's inputs, and an embedding's are ids; {_REMEDY}")
