"""Checks of a config against a layer's shape, and of its weight, that several variants share."""

from torch import Tensor

from ..errors import AttachError, NarrowError


def check_rank(r: int, *sizes: int) -> None:
    """Raise a NarrowError where r exceeds the smallest of `sizes`."""
    if r > min(sizes):
        raise NarrowError(
            f"r={r} is larger than the layer allows; use r ≤ {min(sizes)}, or leave this layer out",
            f"narrower than r={r}",
            min(sizes),
        )


def finite(t: Tensor) -> Tensor:
    """A layer's weight, or norms of it; an AttachError where they are not finite."""
    if not t.isfinite().all():
        raise AttachError(
            "its weight has NaN or infinity, and the method starts from it; load the model in a dtype in which its "
            "weights stay finite, or leave this layer out by exclude_names"
        )
    return t
