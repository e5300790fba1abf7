"""use, disabled: which of a model's adapters act, and on which rows. State of the model, as its training mode is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from torch import nn

from .attachment import attachments, chosen, require_attachment, settle_modules, sites_of, unwrap


def use(model: nn.Module, *names: str | Sequence[str | None]) -> None:
    """Let only the adapters of these names act, until the next `use`. The others stay attached, without gradients.

    With a list, `use(model, ["a", "b", None])`, each entry of the following batches has an adapter of its own, or none.
    Low-rank sums of several adapters then run as one: x and y are looked at once. An adapter that is attached later
    acts too, on all entries.

    Raises:
        AttachError: one of them is not attached.
        ValueError: no name is given, or an entry of a batch would need modules that train in full for itself.
    """
    by_row = len(names) == 1 and not isinstance(names[0], str)
    of_rows = tuple(names[0] if by_row else names)
    if not of_rows:
        raise ValueError("use: name at least one adapter; disabled(model) is a context without any")
    model = unwrap(model)
    wanted = {require_attachment(model, cast(str, name)).name for name in of_rows if not (by_row and name is None)}
    off = frozenset(each.name for each in attachments(model)) - wanted
    if by_row and (whole := [each.name for each in attachments(model) if each.whole.names and each.name in wanted]):
        raise ValueError(
            f"use: {', '.join(whole)} trains whole modules (modules_to_save), which no entry has for itself"
        )
    for site in sites_of(model):
        site.off, site.rows = off, cast("tuple[str | None, ...]", of_rows) if by_row else None
    settle_modules(model)


@contextmanager
def only(model: nn.Module, name: str) -> Iterator[None]:
    """Within this context the model computes with that adapter alone, on every entry of a batch."""
    with _restored(model):
        for site in sites_of(model):
            site.off, site.rows = frozenset(site) - {name}, None
        settle_modules(model)
        yield


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Within this context the model computes as without the adapter of that name, or as without any.

    Raises:
        AttachError: nothing is attached, or nothing of that name.
    """
    model = unwrap(model)
    off = frozenset(each.name for each in chosen(model, name))
    with _restored(model):
        for site in sites_of(model):
            site.off |= off
        settle_modules(model)
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """After this context the adapters act where they did before."""
    before = [(site, site.off, site.rows) for site in sites_of(model)]
    try:
        yield
    finally:
        for site, off, rows in before:
            site.off, site.rows = off, rows
        settle_modules(model)
