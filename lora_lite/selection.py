"""use, disabled: which of a model's adapters act, and on which rows. State of the model, as its training mode is.

unchanged: that their weights stay as they are for a while.
"""

import math
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

from torch import nn

from .attachment import attachments, chosen, require_attachment, require_no_copies, settle_modules, sites_of, unwrap
from .promise import keeping
from .rows import Rows
from .site import Before
from .stacks import Stack
from .whole_modules import settle


def use(
    model: nn.Module,
    *names: str | Mapping[str, float] | Sequence[str | None],
    lengths: Sequence[int] | None = None,
    batch_dim: int = 0,
) -> None:
    """Let only the adapters of these names act, until the next `use`; within `disabled`, until that ends. The others
    stay attached, without gradients.

    With a dict, `use(model, {"a": 0.7, "b": -1})`, each changes its layers that many times as much: W + 0.7 (W' − W),
    W' being what the adapter makes of W. (A method of a user's own that changes input and output does each so.)

    With a list, `use(model, ["a", "b", None])`, each entry of the following batches has an adapter of its own, or none.
    Low-rank sums of several adapters then run as one: x and y are looked at once. While transformers' `generate` runs,
    an entry stands for all its beams and returned sequences. A layer whose input counts another number raises at the
    call, such as a vision tower that gets more images than there are entries; where it gets as many, they are taken for
    the entries' own, one each. An adapter that is attached later acts on all entries.
    Activation checkpointing computes again in the backward, with the adapters that act then: go backward before the
    next `use` or `disabled`.

    Args:
        model: with adapters attached.
        names: of adapters that act on everything, or one dict with the strength of each, or one list with a name for
            each entry of a batch.
        lengths: tokens of each entry, where sequences are packed into one row (padding-free training).
        batch_dim: which dimension of the layers' inputs counts the entries; 1 where a model puts the sequence first.

    Raises:
        AttachError: one of them is not attached, or a module that trains in full is sharded or was resized.
        ValueError: no name is given, a strength is no finite number, `lengths` or `batch_dim` do not fit, an entry of a
            batch would need modules that train in full for itself, such modules another strength than 1, or the
            adapters of entries stand on experts alone, which do not see the batch.
    """
    strengths: dict[str, float] = {}
    if len(names) == 1 and isinstance(names[0], Mapping):
        strengths = {name: _strength(name, its) for name, its in names[0].items()}
        names = tuple(strengths)
    by_row = len(names) == 1 and not isinstance(names[0], str)
    if by_row and not isinstance(names[0], Sequence):
        raise ValueError(f"use: name adapters, or give one list of names, or one dict of strengths; got {names[0]!r}")
    of_rows = tuple(names[0] if by_row else names)
    if not of_rows:
        raise ValueError("use: name at least one adapter; disabled(model) is a context without any")
    model = unwrap(model)
    if strange := [name for name in of_rows if not isinstance(name, str) and not (by_row and name is None)]:
        raise ValueError(f"use: a name is a string{', or None for no adapter' if by_row else ''}; got {strange[0]!r}")
    require_no_copies(model, "use")
    wanted = {require_attachment(model, cast(str, name)).name for name in of_rows if not (by_row and name is None)}
    off = frozenset(each.name for each in attachments(model)) - wanted
    rows = None
    if by_row:
        rows = Rows(cast("tuple[str | None, ...]", of_rows), _whole_numbers(lengths, len(of_rows)), batch_dim)
        _require_rows(model, rows, wanted)
    elif lengths is not None or batch_dim:
        raise ValueError("use: lengths and batch_dim belong to a list of names, one for each entry")
    for name, strength in strengths.items():
        if strength != 1 and require_attachment(model, name).whole.names:
            raise ValueError(
                f"use: {name} trains whole modules (modules_to_save), which act as they are; its strength can only be 1"
            )
    settle([(each.whole, each.name not in off) for each in attachments(model)])
    for site in sites_of(model):
        own = {name: its for name, its in strengths.items() if name in site}  # another of that name may come
        site.off, site.rows, site.strengths = off, rows, own


def _whole_numbers(lengths: Any, count: int) -> tuple[int, ...] | None:
    """The lengths as Python's numbers; a tensor's too."""
    if lengths is None:
        return None
    try:
        found = tuple(operator.index(n) for n in lengths)
    except TypeError:
        found = ()
    if len(found) != count or any(n < 0 for n in found):
        raise ValueError(f"use: lengths must hold a number of tokens for each of {count} names; got {lengths!r}")
    return found


def _strength(name: str, value: Any) -> float:
    """As Python's number."""
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"use: the strength of {name!r} must be a finite number; got {value!r}")
    return found


def _require_rows(model: nn.Module, rows: Rows, wanted: set[str]) -> None:
    if whole := [each.name for each in attachments(model) if each.whole.names and each.name in wanted]:
        raise ValueError(
            f"use: {', '.join(whole)} trains whole modules (modules_to_save), which no entry has for itself"
        )
    if rows.batch_dim not in (0, 1):
        raise ValueError(f"use: batch_dim must be 0 or 1; got {rows.batch_dim}")
    if rows.lengths is not None:
        if rows.batch_dim:
            raise ValueError("use: lengths are of sequences that are packed in order; leave batch_dim out")
        return
    adapted = [target.layer for each in attachments(model) if each.name in wanted for target in each.targets]
    if adapted and all(isinstance(layer, Stack) for layer in adapted):
        raise ValueError(
            f"use: {', '.join(sorted(wanted))} stand on experts alone, which get tokens and do not see the batch; give "
            "lengths=[...], the number of tokens of each entry"
        )


@contextmanager
def only(model: nn.Module, name: str) -> Iterator[None]:
    """Within this context the model computes with that adapter alone, on every entry of a batch."""
    with _restored(model):
        for site in sites_of(model):
            site.off, site.rows, site.strengths = frozenset(site) - {name}, None, {}
        settle_modules(model)
        yield


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Within this context the model computes as without the adapter of that name, or as without any.

    Raises:
        AttachError: nothing is attached, nothing of that name, or a module that trains in full is sharded or resized.
    """
    model = unwrap(model)
    off = frozenset(each.name for each in chosen(model, name))
    require_no_copies(model, "disabled")
    with _restored(model):
        for site in sites_of(model):
            site.off |= off
        settle_modules(model)
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within this context the model's weights stay as they are, and so what a method makes of them alone is made once:
    DoRA's norm, for which each forward reads W; without gradients also rotations, solutions and whatever else stands
    before tokens come in.

        with ll.unchanged(model):                       # gradient accumulation
            for batch in batches:
                model(**batch).loss.backward()
        optimizer.step()

        with torch.no_grad(), ll.unchanged(model):      # generation, evaluation
            model.generate(**inputs)

    An optimiser's step and a write to an adapter's tensor within it raise. One past PyTorch's sight (to `p.data`), or
    to a base weight, would go unnoticed: it breaks the promise. Adapters that are sharded or offloaded, and compiled
    calls, compute as always.

    Raises:
        AttachError: nothing is attached; or later, at a call or an optimiser's step that does not keep the promise.
    """
    model = unwrap(model)
    chosen(model, None)
    with keeping({each.adapters[t.name]: t for each in attachments(model) for t in each.targets}):
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """After this context the adapters act where they did before. Of contexts that overlap, as two threads' may, the one
    that is left first hands what was before it on to the next."""
    with _changing:
        sites = [(site, Before(site.off, site.rows, site.strengths)) for site in sites_of(model)]
        for site, before in sites:
            site.contexts.append(before)
    try:
        yield
    finally:
        with _changing:
            for site, before in sites:
                place = next(i for i, each in enumerate(site.contexts) if each is before)
                later = site if place == len(site.contexts) - 1 else site.contexts[place + 1]
                later.off, later.rows, later.strengths = before.off, before.rows, before.strengths
                del site.contexts[place]
            settle_modules(model)


_changing = threading.Lock()  # contexts come and go one at a time
