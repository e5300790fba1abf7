"""The kernels' operations beside their formulas: results of both, and how far each is from the formula in float64.

An operation here takes a case, draws inputs for it, and gives the results in float64, those of the plain formula in the
case's dtype, and the kernels'. Ours may be 1.5 times as far off as the plain formula, or as far as that dtype's unit
roundoff where the plain formula is luckier than one rounding.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from philox import dropout_mask, seed_of
from torch import Tensor
from torch.nn.functional import linear

from lora_lite.kernels import low_rank, ops
from lora_lite.quantized import FourBitWeight, Int8Weight
from lora_lite.segments import Segments

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "3-D", "4-D")
SEED = 0x123456789ABCDEF
G = 3  # matrices of a stack

Results = dict[str, Tensor]
Draw = tuple[Results, Results, Results]
Matrix = int | EllipsisType


@dataclass(frozen=True)
class Runs:
    """Rows of each run, its matrix (below 0: none; by default its place), and how many rows follow the last run."""

    lengths: tuple[int, ...]
    which: tuple[int, ...] | None = None
    rest: int = 0

    @property
    def rows(self) -> int:
        return sum(self.lengths) + self.rest

    def segments(self, device: str = "cpu") -> Segments:
        ends = torch.tensor(self.lengths, device=device).cumsum(0).int()
        return Segments(ends, None if self.which is None else torch.tensor(self.which, device=device))


# Runs, K, N, R
SEGMENTED = (
    (Runs((1,) * 7, (1, 0, -1, 2, 2, 0, 1)), 61, 67, 4),  # generation: a token an entry
    (Runs((33, 33), (0, 1)), 50, 130, 16),  # equal entries
    (Runs((70, 1, 3, 70), (2, -1, 2, 0), 2), 144, 101, 100),
    (Runs((0, 130, 0)), 61, 67, 20),  # all in one: the others get nothing
    (Runs((5, 64, 200)), 64, 48, 16),
    (Runs((9, 0, 150), None, 7), 64, 48, 300),
    (Runs((0, 0, 0), None, 5), 64, 48, 16),
    (Runs((0, 0, 0)), 64, 48, 16),
)


@dataclass(frozen=True)
class Case:
    """M tokens, K in, N out, rank R; how the tokens lie in memory, and the dtype of the parameters. With runs the
    parameters are stacks of G."""

    dtype: torch.dtype
    M: int
    K: int
    N: int
    R: int
    layout: str = "contiguous"
    bias: bool = False
    wide: torch.dtype = torch.float32
    dropout: float = 0.0
    runs: Runs | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), *(f"{letter}{getattr(self, letter)}" for letter in "MKNR")]
        parts += [self.layout] if self.runs is None else [f"runs{list(self.runs.lengths)}"]
        parts += ["bias"] * self.bias + ["float32"] * (self.wide != self.dtype)
        return "-".join(parts + [f"dropout{self.dropout}"] * bool(self.dropout))

    @property
    def stack(self) -> tuple[int, ...]:
        return () if self.runs is None else (G,)

    @property
    def segments(self) -> Segments | None:
        return None if self.runs is None else self.runs.segments(self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def parameter(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (self.normal(*self.stack, *shape, dtype=torch.float32) * scale).to(self.wide).requires_grad_()

    def tokens(self, width: int) -> Tensor:
        return laid_out(self.normal(self.M, width), self.layout).detach().requires_grad_()

    def by_run(self, unchanged: Callable[[slice], Tensor], changed: Callable[[Matrix, slice], Tensor]) -> Tensor:
        """Put together what becomes of the rows of each run, those without a matrix being unchanged; without runs, of
        all rows with the one matrix there is."""
        if self.runs is None:
            return changed(..., slice(None))
        parts, start = [], 0
        for i, length in enumerate((*self.runs.lengths, self.runs.rest)):
            matrix = -1 if i == len(self.runs.lengths) else i if self.runs.which is None else self.runs.which[i]
            rows = slice(start, start := start + length)
            parts.append(unchanged(rows) if matrix < 0 else changed(matrix, rows))
        return torch.cat(parts)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values (M × N), with other strides or more dimensions."""
    M, N = t.shape
    match layout:
        case "transposed":
            return t.t().contiguous().t()
        case "sliced":
            wide = t.new_full((M, N + 5), 1e4)
            wide[:, 3 : N + 3] = t
            return wide[:, 3 : N + 3]
        case "strided":
            wide = t.new_full((2 * M, 3 * N), 1e4)
            wide[::2, ::3] = t
            return wide[::2, ::3]
        case "3-D":
            return t.reshape(M // 9, 9, N) if M % 9 == 0 else t[None]
        case "4-D":
            return t.reshape(M // 32, 2, 16, N) if M % 32 == 0 else t[:, None, None]
    return t


def with_seed(bits: int, device: str = "cpu") -> "mock._patch[Any]":
    """Seeds are drawn of these bits, of the next, and so on."""
    following = itertools.count(bits)

    def drawn(like: Tensor, dropout: float) -> Tensor:
        return torch.tensor([seed_of(next(following), dropout)], device=device)

    return mock.patch.object(low_rank, "new_seed", drawn)


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that is allocated without values starts as NaN. On a GPU some operators of PyTorch's then warn."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        if not torch.empty(3).isnan().all():
            raise RuntimeError("this torch does not fill memory that it allocates")
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ---- operations ------------------------------------------------------------------------------------------------------


def lowrank_add(c: Case) -> Draw:
    """The two halves around a base layer: x's gradient is the base's plus the adapter's; with dropout, the base gets
    all of x."""
    mask = dropout_mask(seed_of(SEED, c.dropout), c.M, c.K).to(c.device) if c.dropout else None

    def plain(x: Tensor, A: Tensor, B: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        kept = x if mask is None else x * mask.to(x.dtype).view(x.shape)

        def changed(i: Matrix, rows: slice) -> Tensor:
            return linear(x[rows], W, b) + 0.7 * (kept[rows] @ A[i].to(x.dtype).mT) @ B[i].to(x.dtype).mT

        return c.by_run(lambda rows: linear(x[rows], W, b), changed) + 0 * (A.sum() + B.sum())

    def ours(x: Tensor, A: Tensor, B: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        with with_seed(SEED, c.device):
            x, h = ops.shrink(x, A, c.dropout, c.segments)
        return ops.expand_add(linear(x, W, b), h, B, 0.7, c.segments)

    inputs = {
        "x": c.tokens(c.K),
        "A": c.parameter(c.R, c.K, scale=c.K**-0.5),
        "B": c.parameter(c.N, c.R, scale=c.R**-0.5),
        "W": (c.normal(c.N, c.K, dtype=torch.float32) * c.K**-0.5).to(c.dtype),
        "b": c.normal(c.N) if c.bias else None,
    }
    return results(ours, plain, inputs, c.dtype)


def lowrank_add_together(c: Case) -> Draw:
    """Three layers that read the same x, side by side; with dropout, the last has a higher, and each its own mask."""
    dropouts = [c.dropout, c.dropout, c.dropout * 1.5]
    seeds = [seed_of(SEED + i, dropout) for i, dropout in enumerate(dropouts)]
    masks = [dropout_mask(seed, c.M, c.K).to(c.device) for seed in seeds]

    def plain(x: Tensor, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        kept = [x * mask.to(x.dtype).view(x.shape) for mask in masks]
        of = [
            linear(x, w) + 0.7 * (own @ a.to(x.dtype).mT) @ b.to(x.dtype).mT
            for own, w, a, b in zip(kept, W, A, B, strict=True)
        ]
        return torch.cat(of, -1)

    def ours(x: Tensor, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        with with_seed(SEED, c.device):
            xs, hs = ops.shrink_together(x, A.unbind(), dropouts)
        pieces = zip(xs, hs, W, B, strict=True)
        return torch.cat([ops.expand_add(linear(x, w), h, b, 0.7) for x, h, w, b in pieces], -1)

    inputs = {
        "x": c.tokens(c.K),
        "A": (c.normal(3, c.R, c.K, dtype=torch.float32) * c.K**-0.5).to(c.wide).requires_grad_(),
        "B": (c.normal(3, c.N, c.R, dtype=torch.float32) * c.R**-0.5).to(c.wide).requires_grad_(),
        "W": (c.normal(3, c.N, c.K, dtype=torch.float32) * c.K**-0.5).to(c.dtype),
    }
    return results(ours, plain, inputs, c.dtype)


def shrink_expand(c: Case) -> Draw:
    """HRA's: both halves with no layer between, so that x's gradient is that of the sum."""

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        def changed(i: Matrix, rows: slice) -> Tensor:
            return x[rows] + (x[rows] @ A[i].to(x.dtype).mT) @ B[i].to(x.dtype).mT

        return c.by_run(lambda rows: x[rows], changed) + 0 * (A.sum() + B.sum())

    inputs = {
        "x": c.tokens(c.K),
        "A": c.parameter(c.R, c.K, scale=c.K**-0.5),
        "B": c.parameter(c.K, c.R, scale=c.R**-0.5),
    }
    return results(lambda x, A, B: ops.shrink_expand(x, A, B, c.segments), plain, inputs, c.dtype)


def lowrank_add_rescale(c: Case) -> Draw:
    """DoRA's composition, with the base's output and h as inputs of their own."""

    def plain(y: Tensor, h: Tensor, B: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        def changed(i: Matrix, rows: slice) -> Tensor:
            gain, of = g[i].to(y.dtype), 0.0 if b is None else b[i]
            update = (h[rows].to(y.dtype) @ B[i].to(y.dtype).mT).view(y[rows].shape)
            return gain * (y[rows] - of + 0.7 * update) + of

        return c.by_run(lambda rows: y[rows], changed) + 0 * (h.sum() + B.sum() + g.sum())

    def ours(y: Tensor, h: Tensor, B: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        return ops.expand_add_rescale(y, h, B, 0.7, g, b, c.segments)

    inputs = {
        "y": c.tokens(c.N),
        "h": c.normal(c.M, c.R).requires_grad_(),
        "B": c.parameter(c.N, c.R, scale=c.R**-0.5),
        "g": c.parameter(c.N),
        "b": c.normal(*c.stack, c.N) if c.bias else None,
    }
    return results(ours, plain, inputs, c.dtype)


def scale(c: Case) -> Draw:
    def plain(t: Tensor, g: Tensor) -> Tensor:
        return c.by_run(lambda rows: t[rows], lambda i, rows: t[rows] * g[i].to(t.dtype)) + 0 * g.sum()

    inputs = {"t": c.tokens(c.N * 3), "g": c.parameter(c.N * 3)}
    return results(lambda t, g: ops.scale(t, g, c.segments), plain, inputs, c.dtype)


def partner(t: Tensor, group_size: int) -> Tensor:
    """The halves of each group swapped."""
    return t.unflatten(-1, (-1, 2, group_size // 2)).roll(1, -2).flatten(-3)


def rotate_pairs(c: Case) -> Draw:
    """Groups of 64 as a rule; of 2, neighbours; or of a width that no power of two divides."""
    width = 4 * c.N
    group_size = 2 if c.R == 1 else 64 if width % 64 == 0 else 2 * c.N

    def plain(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def changed(i: Matrix, rows: slice) -> Tensor:
            return y[rows] * cos[i].to(y.dtype) + partner(y[rows], group_size) * sin[i].to(y.dtype)

        return c.by_run(lambda rows: y[rows], changed) + 0 * (cos.sum() + sin.sum())

    inputs = {"y": c.tokens(width), "cos": c.parameter(width), "sin": c.parameter(width)}
    return results(lambda y, cos, sin: ops.rotate_pairs(y, cos, sin, group_size, c.segments), plain, inputs, c.dtype)


def row_norm(c: Case) -> Draw:
    """Of W in c.dtype, or of a stack of them; A, B and the norm are in float32."""
    W = c.normal(*c.stack, c.N, c.K)
    return _norms(c, W if c.runs else laid_out(W, c.layout), W)


def row_norm_int8(c: Case) -> Draw:
    values = torch.randint(-127, 128, (c.N, c.K), device=c.device, dtype=torch.int8)
    factor = torch.rand(c.N, device=c.device) / 127
    return _norms(c, Int8Weight(values, factor), values.double() * factor.double()[:, None])


def row_norm_4bit(c: Case) -> Draw:
    """Of weights in c.dtype; their blocks of 64 run over rows' ends where 64 does not divide K, which must be even."""
    count = c.N * c.K
    packed = torch.randint(256, (count // 2, 1), device=c.device, dtype=torch.uint8)
    code = torch.linspace(-1, 1, 16, device=c.device)
    absmax = torch.rand(-(-count // 64), device=c.device)
    halves = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()
    W = (code[halves] * absmax.repeat_interleave(64)[:count]).to(c.dtype).view(c.N, c.K)
    state = SimpleNamespace(dtype=c.dtype, code=code, absmax=absmax, nested=False, blocksize=64)
    return _norms(c, FourBitWeight(packed, state, (c.N, c.K)), W)


def _norms(c: Case, stored: Any, W: Tensor) -> Draw:
    A, B = (c.normal(*c.stack, *shape, dtype=torch.float32) for shape in ((c.R, c.K), (c.N, c.R)))
    want = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=-1)
    eager = (W.float() + 0.7 * B @ A).norm(dim=-1)
    got = ops.row_norm(stored, A, B, 0.7, W.double().square().sum(-1).float())
    return {"norm": want}, {"norm": eager}, {"norm": got}


# ---- comparing -------------------------------------------------------------------------------------------------------


def results(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Mapping[str, Tensor | None], dtype: torch.dtype
) -> Draw:
    """Outputs, and gradients of all inputs that want them."""
    grad_output = None
    found = []
    for run, to in ((plain, torch.float64), (plain, None), (ours, None)):
        leaves = {
            name: t if t is None else (t if to is None else t.to(to)).detach().requires_grad_(t.requires_grad)
            for name, t in inputs.items()
        }
        y = run(**leaves)
        if grad_output is None:
            grad_output = torch.randn_like(y).to(dtype)
        wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), _as_an_expand_leaves_it(grad_output.to(y.dtype)))
        found.append({"output": y.detach(), **dict(zip(wanted, grads, strict=True))})
    return found[0], found[1], found[2]


def _as_an_expand_leaves_it(t: Tensor) -> Tensor:
    """Transposed in memory, as an output's gradient may be after a reduction or an expand upstream."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-300)).item()


def errors(
    draw: Callable[[], Draw], dtype: torch.dtype, enough: int = 100, through: int = 0
) -> dict[str, tuple[float, float]]:
    """By result the error of ours and what is allowed. Results of a few elements, or that come through a few, such as
    the one element of h that a token has at rank 1, are drawn until there are enough of them to compare two errors by.

    `through`: how many elements an intermediate has through which all results come; half as many of those are enough.
    The error is infinite where a result has the wrong shape or dtype or a value that is not finite, or where the right
    one is zero and ours is not.
    """
    draws = [draw()]
    fewest = min((n for n in (2 * through, *(t.numel() for t in draws[0][0].values())) if n), default=enough)
    draws += [draw() for _ in range((enough - 1) // fewest)]
    found = {}
    for name in draws[0][0]:
        want, eager, got = (torch.stack([results[i][name] for results in draws]) for i in range(3))
        sound = got.dtype == eager.dtype and got.shape == want.shape and got.isfinite().all().item()
        roundoff = torch.finfo(dtype).eps / 2
        if want.any():
            found[name] = (error(got, want) if sound else float("inf"), max(1.5 * error(eager, want), roundoff))
        else:  # no tokens
            found[name] = (0.0 if sound and not got.any() else float("inf"), roundoff)
    return found


def errors_of(operation: Callable[[Case], Draw], c: Case) -> dict[str, tuple[float, float]]:
    """The same of an operation on a case."""
    if operation in NORMS:
        return errors(lambda: operation(c), torch.float32, enough=300)
    return errors(lambda: operation(c), c.dtype, through=0 if operation in OF_NO_RANK else c.M * c.R)


NORMS = (row_norm, row_norm_int8, row_norm_4bit)
OF_NO_RANK = (scale, rotate_pairs)
