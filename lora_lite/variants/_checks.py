"""Checks of a config against a layer's shape that several variants share."""

from ..errors import UnfitError


def check_rank(r: int, *sizes: int) -> None:
    """Raise an UnfitError where r exceeds the smallest of `sizes`."""
    if r > min(sizes):
        raise UnfitError(
            f"r={r} is larger than the layer allows; use r ≤ {min(sizes)}, or leave this layer out",
            f"narrower than r={r}",
        )
