"""The top-r singular triplets of a weight, without a full SVD where r is small."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

SVD = Literal["randomized", "exact"]


@torch.no_grad()
def top_svd(
    W: Float[Tensor, "N K"], r: int, method: SVD = "randomized", tolerance: float = 2e-4
) -> tuple[Float[Tensor, "N R"], Float[Tensor, "R"], Float[Tensor, "R K"]]:
    """U, S and Vᵀ of the r largest singular values, in W's dtype.

    "randomized" is the block Krylov method (Musco & Musco 2015, algorithm 2): it searches the span of
    WΩ, (WWᵀ)WΩ, (WWᵀ)²WΩ, … and so resolves the flat spectra of weights in far fewer products than subspace iteration.
    Blocks are added until no singular value moves by more than `tolerance` of itself; the exact SVD takes over where
    the space would grow past half of the matrix, and where W's rank is below r. The start Ω is the same on every call,
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
    newest = torch.linalg.qr(W @ torch.randn(W.shape[1], block, generator=generator).to(W)).Q
    basis, image = newest[:, :0], W[:0]  # Q and QᵀW
    # QᵀWWᵀQ: its eigenvalues are squares, hence float64; it is only as large as the basis.
    gram = torch.zeros(0, 0, dtype=torch.float64, device=W.device)
    previous: Tensor | None = None
    while basis.shape[1] + block <= limit:
        basis = torch.cat([basis, newest], dim=1)
        image = torch.cat([image, newest.t() @ W])
        rows = image[-block:].double() @ image.double().t()
        gram = torch.cat([torch.cat([gram, rows[:, :-block].t()], dim=1), rows])
        if basis.shape[1] >= 2 * r:
            S = torch.linalg.eigvalsh(gram)[-r:].flip(0).clamp_min(0).sqrt()
            if previous is not None and ((S - previous).abs() <= tolerance * S).all():
                if S[-1] <= 1e-5 * S[0]:
                    return None  # rank below r: right vectors of zero singular values need the exact SVD
                vectors = torch.linalg.eigh(gram).eigenvectors[:, -r:].flip(1).to(W)
                S = S.to(W)
                return basis @ vectors, S, (vectors.t() @ image) / S.unsqueeze(1)
            previous = S
        newest = W @ image[-block:].t()
        for _ in range(2):  # the first pass leaves rounding along the basis, or nothing but rounding
            newest = torch.linalg.qr(newest - basis @ (basis.t() @ newest)).Q
    return None
