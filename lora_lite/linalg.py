"""Linear algebra of weights and parameters: the top-r singular triplets of a weight without a full SVD where r is
small, rotations and products of reflections, and how far a map is from a linear one."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .operators import is_plain, transformed, watched
from .segments import once

SVD = Literal["randomized", "exact"]


@torch.no_grad()
def top_svd(
    W: Float[Tensor, "N K"], r: int, method: SVD = "randomized", tolerance: float = 1e-3
) -> tuple[Float[Tensor, "N R"], Float[Tensor, " R"], Float[Tensor, "R K"]]:
    """U, S and Vᵀ of the r largest singular values, in W's dtype.

    "randomized" is the block Krylov method (Musco & Musco 2015, algorithm 2): it searches the span of
    WΩ, (WWᵀ)WΩ, (WWᵀ)²WΩ, … and so resolves the flat spectra of weights in far fewer products than subspace iteration.
    Blocks are added until the last moves no singular value by more than `tolerance` of itself, and what is missing then
    is a fraction of that; the exact SVD takes over where the space would grow past half of the matrix, and where W's
    rank is below r. The start Ω is the same on every call,
    and the global random state is left alone.
    """
    if method == "randomized":
        result = _block_krylov(W, r, tolerance)
        if result is not None:
            return result
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    whole = torch.contiguous_format  # copies, so that the full U and Vᵀ are freed
    return U[:, :r].clone(memory_format=whole), S[:r].clone(), Vh[:r].clone(memory_format=whole)


def _block_krylov(W: Tensor, r: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    if W.shape[0] > W.shape[1]:  # keep the basis on the short side
        result = _block_krylov(W.t(), r, tolerance)
        return None if result is None else (result[2].t().contiguous(), result[1], result[0].t().contiguous())
    # A Krylov space holds at most `block` vectors of a repeated singular value, so a block is no smaller than r.
    block, limit = r + 8, W.shape[0] // 2
    generator = torch.Generator().manual_seed(0)
    newest = torch.linalg.qr(W @ torch.randn(W.shape[1], block, generator=generator, device="cpu").to(W)).Q
    basis, image = newest[:, :0], W[:0]  # Q and QᵀW
    # QᵀWWᵀQ: its eigenvalues are squares, hence float64; it is only as large as the basis.
    gram = torch.zeros(0, 0, dtype=torch.float64, device=W.device)
    previous: Tensor | None = None
    while basis.shape[1] + block <= limit:
        basis = torch.cat([basis, newest], dim=1)
        image = torch.cat([image, newest.t() @ W])
        near = image[-2 * block :]  # a Krylov basis makes the rest of these rows zero, up to rounding
        rows = torch.cat(
            [gram.new_zeros(block, len(image) - len(near)), near[-block:].double() @ near.double().t()], dim=1
        )
        gram = torch.cat([torch.cat([gram, rows[:, :-block].t()], dim=1), rows])
        if basis.shape[1] >= 2 * r:
            S = torch.linalg.eigvalsh(gram)[-r:].flip(0).clamp_min(0).sqrt()
            if previous is not None and ((S - previous).abs() <= tolerance * S).all():
                if S[-1] <= 1e-5 * S[0]:
                    return None  # rank below r: right vectors of zero singular values need the exact SVD
                vectors = torch.linalg.eigh(gram).eigenvectors[:, -r:]
                # Half a power step further, and orthonormal to the last bit; in float64 where rounding of the largest
                # direction could drown the smallest.
                dtype = torch.float64 if S[-1] < 0.01 * S[0] else W.dtype
                V = torch.linalg.qr(image.to(dtype).t() @ vectors.to(dtype)).Q
                U, S, rotation = torch.linalg.svd(torch.cat([rows.to(dtype) @ V for rows in W.split(1024)]), False)
                return U.to(W), S.to(W), (rotation @ V.t()).to(W)
            previous = S
        newest = W @ image[-block:].t()
        for _ in range(2):  # the first pass leaves rounding along the basis, or nothing but rounding
            newest = torch.linalg.qr(newest - basis @ (basis.t() @ newest)).Q
    return None


# ---- rotations and reflections ---------------------------------------------------------------------------------------


def rotations(
    rot_T: Float[Tensor, "*E blocks upper"], size: int, max_angle: float
) -> Float[Tensor, "*E blocks size size"]:
    """Cayley rotations (I − X)⁻¹(I + X) from the upper triangles of their generators, whose elements are bounded by
    tan(max_angle/2)·tanh(·). NaN in a generator gives NaN, and no error."""
    rot_T = rot_T.to(torch.promote_types(rot_T.dtype, torch.float32))  # model.to(bfloat16) reaches the adapter too
    places, eye = _corner(size, rot_T)
    upper = rot_T.new_zeros(*rot_T.shape[:-1], size * size).index_copy(-1, places, rot_T).unflatten(-1, (size, size))
    limit = math.tan(max_angle / 2)
    X = limit * torch.tanh((upper - upper.mT) * (1 / (4 * limit)))
    # X is skew, so that I − X is never singular: without the check, for which the host would wait for the device.
    return torch.linalg.solve_ex(eye - X, eye + X).result


def _corner(size: int, like: Tensor) -> tuple[Tensor, ...]:
    """The places above the diagonal, row after row; I."""

    def make() -> tuple[Tensor, ...]:
        rows, cols = torch.triu_indices(size, size, offset=1, device=like.device).unbind(0)
        return rows * size + cols, torch.eye(size, dtype=like.dtype, device=like.device)

    return _constants(("corner", size), like, make)


def blockwise(R: Float[Tensor, "*E blocks size size"], rows: Float[Tensor, "*E R D"]) -> Float[Tensor, "*E R D"]:
    """The block-diagonal matrix of these blocks times the rows, in the blocks' dtype."""
    return (R @ rows.unflatten(-2, R.shape[-3:-1]).to(R.dtype)).flatten(-3, -2)


def reflections(U: Float[Tensor, "*G R K"]) -> Float[Tensor, "*G R K"]:
    """Z with x + (x Uᵀ) Z = x H_R … H₂ H₁ for a row x and the reflections Hᵢ = I − 2 uᵢuᵢᵀ / ‖uᵢ‖² along U's rows.

    The compact WY form (Schreiber & Van Loan 1989) of rows of any length: Z = −T U, T⁻¹ = stril(U Uᵀ) + ½ diag(U Uᵀ). A
    row of zeros reflects nothing.
    """
    if transformed():
        return _reflected(U)[1]
    return _Reflections.apply(U)[1]  # type: ignore[index]


def _reflected(U: Tensor) -> tuple[Tensor, Tensor]:
    """(−T, Z)."""
    lower, least, minus = _triangles(U)
    T = torch.linalg.solve_triangular(torch.addcmul(least, U @ U.mT, lower), minus, upper=False)
    return T, T @ U


class _Reflections(torch.autograd.Function):
    """−T, and Z = −T U. By hand, since autograd takes several times as many small operations."""

    @staticmethod
    def forward(ctx: Any, U: Tensor) -> tuple[Tensor, Tensor]:
        T, Z = _reflected(U)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(U, T, Z)
        return T, Z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        dT, dZ = grads
        U, T, Z = ctx.saved_tensors
        dU, dS = None, 0  # S = −T⁻¹, and T dS T = dT
        if dZ is not None:
            dU = T.mT @ dZ
            dS = dU @ Z.mT
        if dT is not None:  # a second derivative's
            dS = dS + T.mT @ dT @ T.mT
        dP = dS * _triangles(U)[0]
        return (dP + dP.mT) @ U if dU is None else dU + (dP + dP.mT) @ U


def _triangles(U: Tensor) -> tuple[Tensor, ...]:
    """Of as many rows as U has: stril(1) + ½I; what keeps a row of zeros from dividing by zero; −I."""

    def make() -> tuple[Tensor, ...]:
        eye = torch.eye(U.shape[-2], dtype=U.dtype, device=U.device)
        return torch.ones_like(eye).tril(-1) + eye / 2, eye * 1e-30, -eye

    return _constants(("triangles", U.shape[-2]), U, make)


_made: dict[Any, tuple[Tensor, ...]] = {}


def _constants(key: tuple[str, int], like: Tensor, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `make` makes, of the dtype and on the device of `like`: `once`, but for who looks at operators (a trace, a
    recomputation that expects those of its forward), or for a tensor of a class of its own."""

    def outside() -> tuple[Tensor, ...]:
        with torch.inference_mode(False):
            return make()

    if watched() or not is_plain(like):
        return outside()
    return once(_made, (*key, like.dtype, like.device), outside)


def departure(
    run: Callable[[Tensor], Tensor], W: Float[Tensor, "N K"], bias: Tensor
) -> tuple[Float[Tensor, "2 K"], Float[Tensor, "2 N"], Float[Tensor, ""]]:
    """How far a map is from x Wᵀ + bias: (x, what it gives, the norm of the difference) on two random rows."""
    x = torch.randn(2, W.shape[1], dtype=W.dtype, generator=torch.Generator().manual_seed(0)).to(W.device)
    y = run(x)
    return x, y, (x @ W.t() + bias - y).norm()
