"""The token-space primitives: the only things that touch a tensor with as many rows as there are tokens.

A variant reduces its own tensors to one of these; the runtime calls `on_input` before the base layer and `on_output`
after it. `ops` is a backend: `lora_lite.reference`, or the Triton kernels with the same functions.
M tokens, K in_features, N out_features, R rank; on a stack, each tensor of the method with a leading G.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import embedding, pad

from .errors import AttachError
from .operators import autocast_dtype, memory, version, watched
from .recomputation import in_checkpoint
from .segments import Segments, once


@dataclass
class Primitive:
    """A change to a layer's input, its output, or both. The default changes nothing.

    With `segments`, which the runtime sets, its tensors are stacks with a leading G, and each row takes its own.
    """

    takes_segments: ClassVar[bool] = True  # not in a subclass with its own on_input or on_output, unless it says so
    of_a_user = False  # what it gives is looked at
    segments: Segments | None = field(default=None, kw_only=True)
    made: dict[Any, Any] | None = field(default=None, kw_only=True)  # of weights alone, which don't change meanwhile

    def __init_subclass__(cls) -> None:
        cls.of_a_user = cls.__module__.partition(".")[0] != __name__.partition(".")[0]
        says_so = next(each for each in cls.__mro__ if "takes_segments" in vars(each))
        before = cls.__mro__[: cls.__mro__.index(says_so)]
        if not all({"on_input", "on_output"}.isdisjoint(vars(each)) for each in before):
            cls.takes_segments = False

    def of(self, matrix: int) -> Self:
        """Of a stack the primitive of one matrix."""
        own = copy.copy(self)
        own.segments = own.made = None
        for name, value in _held(own).items():
            setattr(own, name, _of(value, matrix))
        return own

    def on(self, segments: Segments | None) -> "Primitive":
        """This primitive, whose tensors are stacks, on these segments; one that knows none on each run by itself."""
        primitive = self if self.takes_segments or segments is None else OfRuns(self)
        if primitive.made is not None:
            primitive = copy.copy(primitive)  # it is kept for other calls, in other threads too
        primitive.segments = segments
        return primitive

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        """The x that the base layer gets, and whatever `on_output` will need of it."""
        return x, None

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        """The layer's new output."""
        return y


def _held(primitive: Primitive) -> dict[str, Any]:
    """What it holds, by name; also what stands in slots."""
    names = {*vars(primitive), *(each.name for each in fields(primitive))}
    return {name: getattr(primitive, name) for name in names if hasattr(primitive, name)}


def _of(value: Any, matrix: int) -> Any:
    """Of what a stack's primitive holds that of one matrix."""
    if isinstance(value, Tensor):
        return value[matrix]
    if isinstance(value, Primitive):
        return value.of(matrix)
    if isinstance(value, Mapping):
        return {key: _of(each, matrix) for key, each in value.items()}
    return type(value)(_of(each, matrix) for each in value) if type(value) in (list, tuple) else value


def same(a: Any, b: Any) -> bool:
    """Whether two primitives, or what they hold, are the same to the bit. Of what is neither tensor nor number, as a
    quantised weight is, the kind counts."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Primitive):
        return same(_held(a), _held(b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b if isinstance(a, int | float | str) else True


def require_stacks(primitive: Primitive, matrices: int) -> None:
    """Raise an AttachError where a tensor of a stack's primitive has no leading dimension of as many: a kernel would
    read beside it."""

    def look(value: Any, name: str) -> None:
        if isinstance(value, Tensor) and (not value.ndim or len(value) != matrices):
            raise AttachError(
                f"{type(primitive).__name__}: its {name} is of shape {tuple(value.shape)}, and a stack of {matrices} "
                f"needs a leading {matrices}: write the method's algebra so that one changes nothing (t.mT, "
                f"t[..., None]), or expand what is one for all (t.expand({matrices}, *t.shape))"
            )
        if isinstance(value, Primitive):
            look(_held(value), name)
        elif isinstance(value, Mapping):
            for key, each in value.items():
                look(each, str(key))
        elif type(value) in (list, tuple):
            for each in value:
                look(each, name)

    look(_held(primitive), "")


def enter(primitive: Primitive, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
    """`on_input`; an AttachError where a user's own gives something else than an input like x, and what to carry."""
    before = version(x) if primitive.of_a_user else None
    found = primitive.on_input(x, ops)
    if before is not None and version(x) != before:
        raise AttachError(
            f"{type(primitive).__name__}.on_input has written to x, which is the caller's and which other layers read; "
            "return a tensor of its own: x = x * g, not x *= g"
        )
    if primitive.of_a_user and not (isinstance(found, tuple) and len(found) == 2 and _alike(found[0], x)):
        raise AttachError(
            f"{type(primitive).__name__}.on_input must return (x, carry), that x being of shape {tuple(x.shape)} and "
            f"dtype {x.dtype}; got {_described(found)}"
        )
    return found


def leave(primitive: Primitive, y: Tensor, carry: Any, ops: Any) -> Tensor:
    """`on_output`; an AttachError where a user's own gives something else than an output like y."""
    found = primitive.on_output(y, carry, ops)
    if primitive.of_a_user and not _alike(found, y):
        raise AttachError(
            f"{type(primitive).__name__}.on_output must return an output of shape {tuple(y.shape)} and dtype "
            f"{y.dtype}, as the layer gave it; got {_described(found)}"
        )
    return found


def _alike(found: Any, t: Tensor) -> bool:
    """Autocast has dtypes of its own, and casts what comes next."""
    if not isinstance(found, Tensor) or found.shape != t.shape:
        return False
    return found.dtype == t.dtype or (found.is_floating_point() and autocast_dtype(t.device) is not None)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return f"({', '.join(map(_described, value))})" if type(value) is tuple else str(type(value).__name__)


def require_width(t: Tensor, width: int) -> None:
    """Raise an AttachError where what meets the rows of t is not as wide: a kernel would read and write beside it."""
    if t.shape[-1] != width:
        raise AttachError(
            f"its adapter is for rows of {width} numbers, and got {t.shape[-1]}. Was the layer resized after attach? "
            "Detach, resize, and attach anew. Or does a method of your own make a tensor of another width?"
        )


class Shrinks(Primitive):
    """One that takes x Aᵀ from the layer's input, and uses it on the output. Layers that read the same x may take
    theirs together."""

    takes_segments = True
    A: Tensor
    dropout: float

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        require_width(x, self.A.shape[-1])
        return ops.shrink(x, self.A, self.dropout, self.segments)


def only_shrinks(primitive: Primitive) -> bool:
    """Whether all that its `on_input` does is x Aᵀ: x is handed on as it came, or an alias of it."""
    return isinstance(primitive, Shrinks) and type(primitive).on_input in (Shrinks.on_input, LowRankAdd.on_input)


@dataclass
class LowRankAdd(Shrinks):
    """y + scale · (dropout(x) Aᵀ) Bᵀ

    An x of integers, M×1, holds ids: the places of the ones of one-hot rows, so that x Aᵀ looks up columns of A. Those
    of `padding_idx` get no gradient.
    """

    takes_segments = True

    A: Float[Tensor, "*G R K"]
    B: Float[Tensor, "*G N R"]
    scale: float = 1.0
    dropout: float = 0.0
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        if isinstance(s := self.scale, Tensor):  # one that trains, say: a backend takes numbers
            if self.B.ndim > 2 and 0 < s.ndim < self.B.ndim:  # each matrix of a stack has its own
                s = s.reshape(len(s), *[1] * (self.B.ndim - s.ndim), *s.shape[1:])
            self.B, self.scale = s * self.B, 1.0

    @classmethod
    def side_by_side(cls, sums: "Sequence[LowRankAdd]") -> "LowRankAdd":
        """One sum that is all of these, which have no dropout: one look at x and y."""
        A, B = torch.cat([each.A for each in sums], -2), torch.cat([each.scale * each.B for each in sums], -1)
        return cls(A, B, padding_idx=sums[0].padding_idx, segments=sums[0].segments)

    @classmethod
    def stacked(cls, sums: "Sequence[LowRankAdd]", segments: Segments) -> "LowRankAdd":
        """One sum of which each row takes its own of these, which have the same dropout and may differ in rank: the
        lower get zeros. Of sums that are stacks themselves, those of the first come first."""
        R = max(each.A.shape[-2] for each in sums)
        A = [pad(each.A, (0, 0, 0, R - each.A.shape[-2])) for each in sums]
        B = [pad(each.scale * each.B, (0, R - each.A.shape[-2])) for each in sums]
        put = torch.stack if A[0].ndim == 2 else torch.cat
        return cls(put(A), put(B), 1.0, sums[0].dropout, sums[0].padding_idx, segments=segments)

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        if not x.is_floating_point():
            return x, self._looked_up(x.flatten())
        return super().on_input(x, ops)

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        require_width(y, self.B.shape[-2])
        require_width(carry, self.B.shape[-1])
        return ops.expand_add(y, carry, self.B, self.scale, self.segments)

    def _looked_up(self, ids: Int[Tensor, " M"]) -> Float[Tensor, "M R"]:
        if self.segments is None:
            return embedding(ids, self.A.mT, self.padding_idx)
        own = self.segments.matrix_of_rows(len(ids)).clamp_min(0)  # where there is none, `on_output` adds nothing
        h = self.A.mT[own, ids]
        return h if self.padding_idx is None else torch.where((ids == self.padding_idx)[:, None], h.detach(), h)


@dataclass
class InPart(Primitive):
    """x + strength · (x' − x) and y + strength · (y' − y), x' and y' being what another primitive makes of x and y"""

    inner: Primitive
    strength: float
    takes_segments = True

    def __post_init__(self) -> None:
        self.of_a_user = self.inner.of_a_user

    def on(self, segments: Segments | None) -> Primitive:
        return InPart(self.inner.on(segments), self.strength)

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        changed, carry = enter(self.inner, x, ops)
        return changed if changed is x or only_shrinks(self.inner) else self._between(x, changed), carry

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        return self._between(y, leave(self.inner, y.clone() if self.of_a_user else y, carry, ops))  # may write to its y

    def _between(self, t: Tensor, changed: Tensor) -> Tensor:
        """Rounded once. Not `torch.lerp`, of which a compiled graph holds one strength."""
        wide = torch.promote_types(torch.promote_types(t.dtype, changed.dtype), torch.float32)
        start = t.to(wide)
        return (start + self.strength * (changed.to(wide) - start)).to(changed.dtype)


def in_part(primitive: Primitive, strength: float) -> Primitive:
    """The primitive's change, that many times as large."""
    if strength == 1:
        return primitive
    if type(primitive) is not LowRankAdd:
        return InPart(primitive, strength)
    own = copy.copy(primitive)
    if torch.compiler.is_compiling():  # a graph takes the number that multiplies B, and holds a scale
        own.B = strength * own.B
    else:
        own.scale = strength * own.scale
    return own


@dataclass
class OfRuns(Primitive):
    """Another primitive, which knows no segments, on each run of rows with the tensors of its own. A host sync."""

    inner: Primitive
    takes_segments = True

    def __post_init__(self) -> None:
        self.of_a_user = self.inner.of_a_user

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        parts, carries = [], []
        for matrix, rows in self._runs(x):
            part = self.inner.of(matrix) if matrix is not None else Primitive()
            out, carry = enter(part, rows, ops)
            parts.append(out)
            carries.append((part, carry))
        return (torch.cat(parts) if parts else x), carries

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        rows = (rows for _, rows in self._runs(y))
        parts = [leave(part, each, kept, ops) for each, (part, kept) in zip(rows, carry, strict=True)]
        return torch.cat(parts) if parts else y

    def _runs(self, t: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        assert self.segments is not None
        return ((matrix, t[rows]) for matrix, rows in self.segments.runs(len(t)))


@dataclass
class OfRows(Primitive):
    """Another primitive on some entries of the batch, or some rows of all; the others pass."""

    inner: Primitive
    rows: Int[Tensor, " some"]
    batch_dim: int = 0
    packed: bool = False  # `rows` counts tokens, whatever the dimensions before the last

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        flat = self._flat(x)
        part, carry = enter(self.inner, flat.index_select(self.batch_dim, self.rows), ops)
        return flat.index_copy(self.batch_dim, self.rows, part.to(flat.dtype)).view(x.shape), carry

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        flat = self._flat(y)
        part = leave(self.inner, flat.index_select(self.batch_dim, self.rows), carry, ops)
        return flat.index_copy(self.batch_dim, self.rows, part.to(flat.dtype)).view(y.shape)

    def _flat(self, t: Tensor) -> Tensor:
        return t.reshape(-1, t.shape[-1]) if self.packed else t


@dataclass
class LowRankAddRescale(Shrinks):
    """g ∘ (y − bias + scale · (dropout(x) Aᵀ) Bᵀ) + bias, with g = m / ‖W + scale · B A‖ of each row"""

    takes_segments = True

    A: Float[Tensor, "*G R K"]
    B: Float[Tensor, "*G N R"]
    scale: float
    m: Float[Tensor, "*G N"]
    W: Any  # N×K, or G×N×K, as stored: a tensor, or a quantised weight of `lora_lite.quantized`
    w_sq: Float[Tensor, "*G N"]
    bias: Float[Tensor, "*G N"] | None
    dropout: float = 0.0

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        require_width(y, self.B.shape[-2])
        require_width(y, self.m.shape[-1])
        g = self.m / self._norm(ops)
        bias = None if self.bias is None else self.bias.detach()
        y = ops.expand_add_rescale(y, carry, self.B, self.scale, g, bias, self.segments)
        if self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled():
            y = y + self._share_of_bias(g.detach(), y)
        return y

    def _share_of_bias(self, g: Tensor, y: Tensor) -> Tensor:
        """Zeros, by which a bias that trains gets the gradient of its second place in the formula: (1 − g) ∘ bias."""
        assert self.bias is not None
        share = (1 - g) * (self.bias - self.bias.detach())
        if self.segments is not None:
            share = self.segments.vectors(share, y.numel() // y.shape[-1], 0.0).view(y.shape)
        return share.to(y.dtype)

    def _norm(self, ops: Any) -> Float[Tensor, "*G N"]:
        """The rows' norms: those of a checkpoint's forward where its backward computes them again, and A and B are as
        they were. Another forward takes them only where the user says that they are (`unchanged`): what is written to
        `p.data` leaves no trace in a version. Who watches operators expects the same in both."""
        operands = (self.W, self.A, self.B, self.scale, self.w_sq)
        if watched():
            return ops.row_norm(*operands)
        if self.made is not None:
            return once(self.made, (ops, torch.is_inference_mode_enabled()), lambda: ops.row_norm(*operands))
        if type(self.A) is not torch.nn.Parameter or self.A.is_inference() or torch.is_inference_mode_enabled():
            return ops.row_norm(*operands)
        again = torch._C._current_graph_task_id() != -1
        if not again and not in_checkpoint():
            return ops.row_norm(*operands)
        A, B, key = self.A, self.B, StorageWeakRef(self.m.untyped_storage())
        W = memory(self.W) if isinstance(self.W, Tensor) else None
        state = (ops, A.data_ptr(), A._version, B.data_ptr(), B._version, W, self.w_sq.data_ptr(), version(self.w_sq))
        if again:
            before, norm = _norms.get(key, (None, None))
            return norm if before == state and norm is not None else ops.row_norm(*operands)
        norm = ops.row_norm(*operands)
        if key not in _norms:
            for dead in [each for each in list(_norms) if each.expired()]:
                _norms.pop(dead, None)
        _norms[key] = (state, norm)
        return norm


# Of each m what the norm in its last checkpoint was made of, and it; by m's memory: PyTorch may not swap a tensor that
# has a weak reference.
_norms: dict[StorageWeakRef, tuple[Any, Any]] = {}


@dataclass
class InputLowRankAdd(Primitive):
    """x + (x Aᵀ) Bᵀ, before the base layer"""

    takes_segments = True

    A: Float[Tensor, "*G R K"]
    B: Float[Tensor, "*G K R"]

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        require_width(x, self.A.shape[-1])
        require_width(x, self.B.shape[-2])
        require_width(self.B, self.A.shape[-2])
        return ops.shrink_expand(x, self.A, self.B, self.segments), None


@dataclass
class ScaleOutput(Primitive):
    """y ∘ g"""

    takes_segments = True

    g: Float[Tensor, "*G N"]

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        require_width(y, self.g.shape[-1])
        return ops.scale(y, self.g, self.segments)


@dataclass
class ScaleInput(Primitive):
    """x ∘ g, before the base layer"""

    takes_segments = True

    g: Float[Tensor, "*G K"]

    def on_input(self, x: Tensor, ops: Any) -> tuple[Tensor, Any]:
        require_width(x, self.g.shape[-1])
        return ops.scale(x, self.g, self.segments), None


@dataclass
class RotatePairs(Primitive):
    """y ∘ c + partner(y) ∘ s, an output's partner being the one group_size/2 away in its group"""

    takes_segments = True

    c: Float[Tensor, "*G N"]
    s: Float[Tensor, "*G N"]
    group_size: int

    def on_output(self, y: Tensor, carry: Any, ops: Any) -> Tensor:
        require_width(y, self.c.shape[-1])
        require_width(y, self.s.shape[-1])
        if self.group_size < 2 or self.group_size % 2 or y.shape[-1] % self.group_size:
            raise AttachError(
                f"group_size must be even and divide {y.shape[-1]}, the layer's width; got {self.group_size}"
            )
        return ops.rotate_pairs(y, self.c, self.s, self.group_size, self.segments)
