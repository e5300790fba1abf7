"""Layers outside of a model's blocks that no file of an adapter holds: a task's head, which `from_pretrained` draws
anew where the base has none. A few numbers in the file tell it from another of its shape."""

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from .errors import first_of
from .files import read_json
from .placement import is_sharded
from .quantized import is_dense, weight_of
from .renaming import Renaming
from .targets import candidates

_LARGEST = 1 << 20  # elements of a weight that is worth the look
_NEAR = 0.05  # of the norm, which rounding to 16 bits stays below


def marks_of(model: nn.Module, saved: Container[str]) -> dict[str, list[float]]:
    """Of each such layer but those whose weight is `saved`: the weight's norm and some of its projections."""
    targets = candidates(model)
    if all(t.block is None for t in targets):
        return {}
    apart = [t for t in targets if t.block is None and not t.is_head and t.role != "embedding"]
    weights = {t.name: weight_of(t.layer) for t in apart if f"{t.name}.weight" not in saved}
    return {name: mark for name, W in weights.items() if W is not None and (mark := _mark(W))}


def others(model: nn.Module, metadata: dict[str, str], moved: Renaming, saved: Container[str]) -> list[str]:
    """Names of those that are not what the file's adapter was trained with."""
    then = read_json(metadata.get("heads", "{}"), dict, "heads are")
    now = marks_of(model, saved) if then else {}
    return [name for old, mark in then.items() if (name := moved.new(old)) in now and not _alike(mark, now[name])]


def describe(found: list[str]) -> str:
    """What is wrong, and what to do."""
    return (
        f"{first_of(found)}: of another weight than the adapter was trained with. A task's head that from_pretrained "
        "has drawn anew? Train it with the adapter (modules_to_save), or load its weights too"
    )


def _mark(W: Any) -> list[float]:
    if not is_dense(W) or is_sharded(W) or W.is_meta or not 0 < W.numel() <= _LARGEST:
        return []
    flat = W.detach().flatten().float().cpu()
    along = torch.arange(len(flat), dtype=torch.float32)
    return [round(v.item(), 6) for v in (flat.norm(), *(flat @ torch.cos(along * k) for k in (0.5, 1.5, 2.5)))]


def _alike(a: Any, b: list[float]) -> bool:
    readable = isinstance(a, list) and len(a) == len(b) and all(isinstance(v, int | float) for v in a)
    return not readable or not any(abs(v - w) > _NEAR * max(b[0], 1e-6) for v, w in zip(a, b, strict=True))
