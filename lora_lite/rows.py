"""Rows: which adapter each entry of a batch takes, as `use` was told, and what that means for a layer's rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from .calls import callers
from .segments import Segments, once_for_training

T = TypeVar("T")


class Tokens(NamedTuple):
    """Of rows that have been sent to experts: the token of each, and how many tokens there are."""

    of_rows: Int[Tensor, " M"]
    total: int


@dataclass(frozen=True)
class Rows:
    """The adapter of each entry of a batch, by name; None: none.

    Args:
        names: of the adapters.
        lengths: how many tokens each entry has, where sequences of several lengths are packed into one row.
        batch_dim: which dimension of a layer's input counts the entries.
    """

    names: tuple[str | None, ...]
    lengths: tuple[int, ...] | None = None
    batch_dim: int = 0
    _made: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    def segments(self, x: Tensor, by_row: Sequence[str], layer: str) -> Segments:
        """The runs of x's rows; the i-th of `by_row` has matrix i."""
        which = self._which(by_row, x.device)
        if self.lengths is not None:
            self._check_tokens(x.numel() // x.shape[-1], layer)
            return self._once(("packed", *by_row, x.device), lambda: Segments(self._ends(x.device), which))
        each = self._times(x, layer) * (x[0].numel() // x.shape[-1])
        return self._once(("equal", each, *by_row, x.device), lambda: Segments(self._equal(each, x.device), which))

    def of_experts(self, segments: Segments, tokens: Tokens, by_row: Sequence[str], layer: str) -> Segments:
        """The runs of rows that are sorted by expert, then by token: one for each expert and entry. Expert e of the
        i-th of `by_row` has matrix i·E + e."""
        device, E = tokens.of_rows.device, len(segments.ends)
        if self.lengths is not None:
            self._check_tokens(tokens.total, layer)
            ends = self._ends(device).long()
        else:
            each, over = tokens.total // len(self.names), tokens.total % len(self.names)  # of symbols too
            if over or self.batch_dim:
                raise ValueError(
                    f"use(model, [...]) named the adapters of {len(self.names)} entries on dimension {self.batch_dim}, "
                    f"and {layer} got {tokens.total} tokens; name one for each entry of the batch, on dimension 0"
                )
            ends = self._equal(each, device).long()
        experts = torch.arange(E, device=device)
        places = segments.matrix_of_rows(len(tokens.of_rows)) * tokens.total + tokens.of_rows  # ascending
        wanted = experts[:, None] * tokens.total + ends
        which = self._which(by_row, device)
        matrices = torch.where(which < 0, which, which * E + experts[:, None])
        return Segments(torch.searchsorted(places, wanted.flatten(), out_int32=True), matrices.flatten())

    def entries(self, x: Tensor, name: str, layer: str) -> Int[Tensor, " some"]:
        """The entries that take an adapter, as indices into x's batch dimension or, of packed sequences, its rows."""
        lengths = self.lengths or (self._times(x, layer),) * len(self.names)
        if self.lengths is not None:
            self._check_tokens(x.numel() // x.shape[-1], layer)

        def make() -> Tensor:
            own = torch.tensor([each == name for each in self.names], device=x.device)
            return own.repeat_interleave(torch.tensor(lengths, device=x.device)).nonzero().flatten()

        return self._once((name, lengths[0], x.device), make)

    # ---- checks ----

    def _times(self, x: Tensor, layer: str) -> int:
        """How many neighbouring entries of x each name stands for: one, or as many as `generate` has made of it.

        Where the number is as expected, nothing tells whether x counts entries, or as many images.
        """
        if x.ndim <= self.batch_dim + 1:
            raise ValueError(
                f"use(model, [...]): {layer} got an input of shape {tuple(x.shape)}, whose dimension {self.batch_dim} "
                "counts no entries of a batch; call use(model, name) with one adapter for such inputs"
            )
        entries, named = x.shape[self.batch_dim], len(self.names)
        generates, reorders = _callers()
        times = _times_in_generate(generates)
        if reorders and len(set(self.names)) > 1:
            raise ValueError(
                f"use(model, [...]): {reorders} sorts or splits what it is given, and {layer} gets entries in another "
                "order than the names'; call the model itself, or use(model, name)"
            )
        if entries != named * times:
            beams = f", of each of which generate makes {times}" if times > 1 else ""
            if torch.compiler.is_compiling() and entries % named == 0:
                beams = " (a graph that is compiled is not told what generate makes of each: name them as often)"
            raise ValueError(
                f"use(model, [...]) named the adapters of {named} entries{beams}, and a layer got {entries} ({layer}); "
                "name one for each entry of the batch, in layers whose input keeps the batch as its first dimension "
                "(batch_dim=1: its second; lengths=[...]: packed sequences)"
            )
        return times

    def _check_tokens(self, tokens: int, layer: str) -> None:
        if self.lengths is not None and tokens != sum(self.lengths):
            raise ValueError(
                f"use(model, [...], lengths=[...]): the lengths add up to {sum(self.lengths)} tokens, and {layer} got "
                f"{tokens}"
            )

    # ---- what is made once a device ----

    def _once(self, key: object, make: Callable[[], T]) -> T:
        return once_for_training(self._made, key, make)

    def _which(self, by_row: Sequence[str], device: torch.device) -> Int[Tensor, "entries"]:
        index = [by_row.index(name) if name in by_row else -1 for name in self.names]
        return self._once(("which", *by_row, device), lambda: torch.tensor(index, device=device))

    def _ends(self, device: torch.device) -> Int[Tensor, "entries"]:
        lengths = self.lengths or ()
        return self._once(("ends", device), lambda: torch.tensor(lengths, device=device).cumsum(0).int())

    def _equal(self, each: int, device: torch.device) -> Int[Tensor, "entries"]:
        """The ends of entries of as many rows each, which may be none."""
        return each * torch.arange(1, len(self.names) + 1, device=device, dtype=torch.int32)


def _times_in_generate(calls: list[dict[str, Any]]) -> int:
    """How many entries transformers' `generate`, if it is among this thread's callers, has made of each by now: it
    repeats them for beams and returned sequences, next to each other, once an encoder has run. Whisper's own repeats
    them for returned sequences before that, and then calls the common one."""
    if not calls:
        return 1
    config, repeated = (calls[0].get(name) for name in ("generation_config", "input_ids"))
    times = 1 if config is None or repeated is None else max(config.num_beams or 1, config.num_return_sequences or 1)
    whispers = next((each for each in calls if "batch_idx_map" in each), {})
    return times * (whispers.get("num_return_sequences") or 1)


_OF_CHUNKS = ("ChunkPipeline.run_single", "PipelinePackIterator.__next__")
_SORT = ("encode", "predict", "rank")
_LOOKED_AT = frozenset({"generate", *_SORT, *(name.rpartition(".")[2] for name in _OF_CHUNKS)})


def _callers() -> tuple[list[dict[str, Any]], str]:
    """Of this thread's callers the variables of each `generate` of transformers', the innermost first; and which, if
    any, gives a batch other entries than it got, or in another order."""
    generates: list[dict[str, Any]] = []
    reorders = ""
    for frame in () if torch.compiler.is_compiling() else callers():
        if (called := frame.f_code.co_name) in _LOOKED_AT:
            of = str(frame.f_globals.get("__name__"))
            if called == "generate" and of.startswith("transformers."):
                generates.append(frame.f_locals)
            chunks = of.startswith("transformers.pipelines.") and frame.f_code.co_qualname in _OF_CHUNKS
            if chunks or (called in _SORT and of.startswith("sentence_transformers.")):
                reorders = f"{of}.{frame.f_code.co_qualname}"
    return generates, reorders
