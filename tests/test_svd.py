"""top_svd against the exact SVD: values, vectors, reconstruction, and that it stays cheap and silent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import attach, llama
from torch import Tensor

import lora_lite as ll
from lora_lite.linalg import top_svd


def spectrum(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with these singular values between random orthonormal bases."""
    U, V = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q for n in (rows, columns))
    return (U * values.double() @ V.t()).float()


MATRICES: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: torch.randn(180, 150),
    "gaussian, tall": lambda: torch.randn(400, 90),
    "gaussian, wide": lambda: torch.randn(90, 400),
    "trained-like": lambda: torch.randn(180, 150) / 12 + spectrum(4 * 0.8 ** torch.arange(12), 180, 150),
    "power law": lambda: spectrum(torch.arange(1, 151) ** -0.7, 180, 150),
    "exponential": lambda: spectrum(0.8 ** torch.arange(150), 180, 150),
    "clustered": lambda: spectrum(torch.tensor([5.0, 2.0, 1.0, 0.5, 0.25]).repeat_interleave(30), 180, 150),
    "clustered, larger": lambda: spectrum(torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2]).repeat_interleave(60), 320, 300),
    "one outlier": lambda: spectrum(torch.tensor([1e4] + [1.0] * 299), 320, 300),
    "outlier over noise": lambda: torch.randn(320, 300) + spectrum(torch.tensor([1e4]), 320, 300),
    "orthogonal": lambda: torch.linalg.qr(torch.randn(150, 150)).Q,
    "identity": lambda: torch.eye(150),
    "rank 5": lambda: torch.randn(180, 5) @ torch.randn(5, 150),
    "tiny values": lambda: torch.randn(180, 150) * 1e-12,
    "huge values": lambda: torch.randn(180, 150) * 1e12,
    "bfloat16 origin": lambda: torch.randn(180, 150).bfloat16().float(),
    "transposed view": lambda: torch.randn(150, 180).t(),
    "small": lambda: torch.randn(6, 9),
    "one row": lambda: torch.randn(1, 40),
}


def check(W: Tensor, r: int, U: Tensor, S: Tensor, Vh: Tensor) -> None:
    exact = torch.linalg.svdvals(W.double())
    assert U.shape == (W.shape[0], r)
    assert S.shape == (r,)
    assert Vh.shape == (r, W.shape[1])
    assert U.dtype == S.dtype == Vh.dtype == W.dtype
    # A float32 SVD knows values to some 3e-7 of the largest and no better.
    torch.testing.assert_close(S.double(), exact[:r], rtol=1e-3, atol=5e-7 * exact[0].item())
    assert (S[:-1] >= S[1:]).all()
    # Where W maps its Krylov space onto itself (the identity), the basis can only grow by rounding errors.
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(U.double().t() @ U.double(), eye, rtol=0, atol=5e-4)
    torch.testing.assert_close(Vh.double() @ Vh.double().t(), eye, rtol=0, atol=5e-4)
    left = (W.double() - U.double() * S.double() @ Vh.double()).norm()
    assert left <= 1.003 * exact[r:].norm() + 1e-5 * exact.norm()


@pytest.mark.parametrize("kind", MATRICES)
def test_against_exact(kind: str) -> None:
    W = MATRICES[kind]()
    for r in sorted({1, 2, 4, 5, 6, 16, 33, min(W.shape) // 2, min(W.shape) - 1, min(W.shape)}):
        if 1 <= r <= min(W.shape):
            check(W, r, *top_svd(W, r))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(256, 256), (192, 768)])
def test_strong_directions_do_not_drown_the_others(shape: tuple[int, int], seed: int) -> None:
    """Squares of 1e4 and 1 lie 1e8 apart: a Gram matrix in float32 loses the small ones."""
    torch.manual_seed(seed)
    W = spectrum(torch.tensor([1e4] * 4 + [1.0] * (min(shape) - 4)), *shape)
    U, S, Vh = top_svd(W, 8)
    torch.testing.assert_close(S.double(), torch.linalg.svdvals(W.double())[:8], rtol=5e-4, atol=0)
    torch.testing.assert_close(U.t() @ U, torch.eye(8), rtol=0, atol=5e-4)
    torch.testing.assert_close(Vh @ Vh.t(), torch.eye(8), rtol=0, atol=5e-4)


@pytest.mark.parametrize("kind", ["gaussian", "rank 5", "small"])
def test_exact_method(kind: str) -> None:
    W = MATRICES[kind]()
    for r in (1, min(W.shape)):
        U, S, Vh = top_svd(W, r, "exact")
        want = torch.linalg.svd(W, full_matrices=False)
        for got, full in zip((U, S, Vh), (want.U[:, :r], want.S[:r], want.Vh[:r]), strict=True):
            assert torch.equal(got, full)


@pytest.mark.parametrize("shape", [(180, 150), (3, 5)])
@pytest.mark.parametrize("r", [1, 3])
def test_zero_matrix(shape: tuple[int, int], r: int) -> None:
    U, S, Vh = top_svd(torch.zeros(shape), r)
    assert torch.equal(S, torch.zeros(r))
    assert torch.isfinite(U).all()
    assert torch.isfinite(Vh).all()
    torch.testing.assert_close(U.t() @ U, torch.eye(r))
    torch.testing.assert_close(Vh @ Vh.t(), torch.eye(r))


@pytest.mark.parametrize("r", [4, 100])
def test_repeatable_and_silent(r: int) -> None:
    W = torch.randn(180, 150)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = top_svd(W, r)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    kept = W.clone()
    assert all(torch.equal(a, b) for a, b in zip(first, top_svd(W, r), strict=True))
    assert torch.equal(W, kept)


def test_no_gradient() -> None:
    W = torch.randn(60, 50, requires_grad=True)
    assert not any(t.requires_grad for t in top_svd(W, 3))


def test_result_keeps_no_larger_tensor_alive() -> None:
    """A slice of a full SVD would hold the whole of it for as long as the adapter lives."""
    for method, r in (("randomized", 4), ("randomized", 140), ("exact", 4)):
        for t in top_svd(torch.randn(180, 150), r, method):  # type: ignore[arg-type]
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


@pytest.mark.parametrize("kind", ["gaussian", "trained-like"])
def test_no_full_svd_where_r_is_small(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 768×768 and r=16 no factorisation sees a matrix with more than half of the short side."""
    W = torch.randn(768, 768)
    if kind == "trained-like":
        W = W / 28 + spectrum(4 * 0.8 ** torch.arange(12), 768, 768)
    exact = torch.linalg.svdvals(W.double())
    sizes: list[int] = []

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a full SVD")

    def counted(name: str) -> None:
        original = getattr(torch.linalg, name)

        def call(M: Tensor, *args: object, **kwargs: object) -> object:
            sizes.append(min(M.shape))
            return original(M, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, call)

    monkeypatch.setattr(torch.linalg, "svdvals", forbidden)
    for name in ("qr", "eigh", "eigvalsh", "svd"):
        counted(name)
    monkeypatch.setattr(torch, "svd", forbidden)
    U, S, Vh = top_svd(W, 16)
    assert sizes
    assert max(sizes) <= 768 // 2
    torch.testing.assert_close(S.double(), exact[:16], rtol=1e-3, atol=0)
    left = (W.double() - U.double() * S.double() @ Vh.double()).norm()
    assert left <= 1.001 * exact[16:].norm()


@pytest.mark.parametrize("variant", ["pissa", "antipasto"])
def test_variants_attach_without_a_full_svd(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1)

    svd = torch.linalg.svd

    def thin(M: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert min(M.shape) <= 4, "a full SVD"
        return svd(M, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", thin)
    attach(model, variant, target_names=("q_proj", "gate_proj", "down_proj"))
    ll.detach(model)
    with pytest.raises(AssertionError, match="a full SVD"):
        attach(model, variant, target_names=("q_proj",), svd="exact")


@pytest.mark.parametrize("variant", ["pissa", "antipasto"])
def test_layers_side_by_side_start_as_one_after_another(variant: str) -> None:
    before, starts = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = llama()
            torch.manual_seed(0)
            attach(model, variant)
            assert torch.get_num_threads() == threads
            starts.append(ll.state_dict(model))
            unloaded = llama()
            unloaded.get_submodule("model.layers.1.mlp.up_proj").to("meta")
            with pytest.raises(ll.AttachError, match=r"up_proj.*meta device"):
                attach(unloaded, variant)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, t in starts[0].items():
        torch.testing.assert_close(t.abs(), starts[1][name].abs(), rtol=1e-3, atol=1e-5, msg=name)  # signs are free
