"""The reference operations around a layer whose output, and whose gradient of its input, are nobody else's: they are
written to. On a CPU fresh memory takes longer to get than a low-rank sum to compute.

That holds of PyTorch's own layers, whose results are new and not kept, where no hook looks on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.utils.hooks import RemovableHandle

from . import reference
from .operators import is_plain, watched
from .primitives import LowRankAdd, LowRankAddRescale, Primitive
from .segments import Segments
from .shapes import is_conv1d
from .stacks import Stack

_WORTH_A_LOOK = 1 << 20  # bytes of a token-sized tensor: of less, new memory takes no longer than to find out
_ONCE = (LowRankAdd, LowRankAddRescale)  # use x and y once; another primitive may do with them what it likes


def serves(primitive: Primitive, x: Tensor, layer: nn.Module, hooks: Sequence[RemovableHandle]) -> bool:
    """Whether these operations may stand in for the reference's, of the only primitive around a layer that gets x, and
    that is worth a look. `hooks`: the adapter's own."""
    if watched() or type(primitive) not in _ONCE or not _is_worth_a_look(primitive, x):
        return False
    own = {hook.id for hook in hooks}
    return (
        _is_plain(layer)
        and own.issuperset(layer._forward_hooks)  # one after the adapter's gets the input, whose gradient it may keep
        and next(reversed(layer._forward_pre_hooks), None) in own
        and not (layer._backward_hooks or of_all._global_forward_hooks or of_all._global_backward_hooks)
    )


def _is_worth_a_look(low_rank: Any, x: Tensor) -> bool:
    N, K = low_rank.B.shape[-2], low_rank.A.shape[-1]
    rows = x.numel() // K
    return rows * max(N, K) * x.element_size() >= _WORTH_A_LOOK


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a product of PyTorch's, of transformers' Conv1D, or of a stack, that nobody has put something
    around."""
    kind = type(layer)
    linear = kind is nn.Linear or (is_conv1d(layer) and kind.__module__ == "transformers.pytorch_utils")
    as_written = (
        getattr(kind.forward, "__globals__", {}).get("__name__") == kind.__module__
        and nn.functional.linear is torch._C._nn.linear  # type: ignore[attr-defined]
    )
    return (kind is Stack or (linear and as_written)) and "forward" not in vars(layer) and is_plain(layer.weight)


def backend(ops: Any) -> Any:
    """The operations that these, or others, are a kind of."""
    return reference if getattr(ops, "__name__", None) == __name__ else ops


def expand_add(
    y: Float[Tensor, "*M N"],
    h: Float[Tensor, "*M R"],
    B: Float[Tensor, "*G N R"],
    scale: float,
    segments: Segments | None = None,
) -> Float[Tensor, "*M N"]:
    """y + scale · h Bᵀ, into y."""
    return reference.expand_add(y, h, B, scale, segments, own=True)


def shrink(
    x: Float[Tensor, "*M K"],
    A: Float[Tensor, "*G R K"],
    dropout: float = 0.0,
    segments: Segments | None = None,
) -> tuple[Float[Tensor, "*M K"], Float[Tensor, "M R"]]:
    """(x, x Aᵀ); dh A is added into the gradient that the layer gives x."""
    return reference.shrink(x, A, dropout, segments, True)


shrink_together = reference._shrink_together_own


def __getattr__(name: str) -> Any:
    """The rest is the reference's."""
    return getattr(reference, name)
