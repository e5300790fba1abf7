"""Layers that read the same x, on the kernels: passes counted exactly, results against float64, programs shuffled."""

import random
from typing import Any

import launches
import pytest
import torch
from models import attach, llama, randomize, rel_error, token_ids
from operations import poisoned
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.kernels import ops, tuning
from lora_lite.siblings import SIBLINGS

K = 260


class Parent(nn.Module):
    """q, k and v, or gate and up, of widths of their own."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        for name, N in widths.items():
            self.add_module(name, nn.Linear(K, N, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


QKV, GATE_UP = {"q_proj": 300, "k_proj": 140, "v_proj": 140}, {"gate_proj": 500, "up_proj": 500}


@pytest.mark.parametrize(("widths", "together", "alone"), [(QKV, 15, 27), (GATE_UP, 11, 17)])
@pytest.mark.parametrize(
    ("variant", "fields"),
    [("lora", {}), ("lora", {"dropout": 0.1}), ("pissa", {}), ("delora", {}), ("antipasto", {"block_size": 4})],
)
def test_passes(variant: str, fields: dict[str, Any], widths: dict[str, int], together: int, alone: int) -> None:
    """Of a group and of its layers one by one, autograd's own additions of what comes back counted with them."""
    M = 200
    sizes = {M * K, *(M * N for N in widths.values())}

    def step(grouped: bool) -> float:
        model = nn.ModuleDict({"parent": Parent(widths)})
        attach(model, variant, r=20, target_roles=(), target_names=("_proj$",), **fields)
        randomize(model)
        siblings = vars(model["parent"])[SIBLINGS]
        assert siblings.groups == [list(widths)]
        if not grouped:
            siblings.remove(model["parent"])
        x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
        with tuning.force(config=tuning.Config(32, 64), programs=20), launches.watch() as seen:
            ys = model["parent"](x)
            torch.autograd.grad(ys, [x, *ll.parameters(model)], [torch.randn_like(y) for y in ys])
        found = sum(
            sum(launch.passes()[name])
            for launch in seen
            for name, t in launch.tensors.items()
            if t.numel() in sizes and t.dtype == torch.bfloat16
        )
        return found + (0 if grouped else 3 * (len(widths) - 1))  # autograd reads two and writes one

    assert step(True) == together
    assert step(False) == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("M", "ranks", "present"),
    [
        (1, (3, 1, 7), (1, 1, 1)), (70, (16, 4, 100), (1, 0, 1)), (333, (64, 64, 64), (1, 1, 1)),
        (64, (256, 256), (1, 1)), (41, (1, 2, 3, 4, 5), (0, 1, 1, 1, 1)), (0, (4, 4), (1, 1)), (50, (8, 8), (0, 0)),
    ],
)  # fmt: skip
def test_against_float64(dtype: torch.dtype, M: int, ranks: tuple[int, ...], present: tuple[int, ...]) -> None:
    """All results and gradients of `shrink_together`, of odd sizes and many ranks; of layers not `present` none of the
    two gradients comes back. Of one row, many draws are one tensor: the error of a single number is luck."""
    torch.manual_seed(random.Random(str(ranks)).randrange(1000))
    draws = [results(dtype, M, ranks, present) for _ in range(16 if M == 1 else 1)]
    for i in draws[0]:
        got, eager, want = (torch.cat([t.flatten() for t in side]) for side in zip(*(d[i] for d in draws), strict=True))
        assert got.isfinite().all()
        assert rel_error(got, want) <= max(1.5 * rel_error(eager, want), torch.finfo(dtype).eps)


def results(
    dtype: torch.dtype, M: int, ranks: tuple[int, ...], present: tuple[int, ...]
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Each result and gradient that is not zero: ours, eager PyTorch's, and in float64."""
    x = torch.randn(2, M, 61).to(dtype) if M > 1 else torch.randn(M, 61).to(dtype)
    As = [torch.randn(R, 61) for R in ranks]
    grads = [(torch.randn_like(x), torch.randn(x.numel() // 61, R).to(dtype)) for R in ranks]

    def run(how: Any, wide: torch.dtype | None) -> list[Tensor | None]:
        leaf = x.to(wide or dtype, copy=True).requires_grad_()
        mine = [A.to(wide or torch.float32, copy=True).requires_grad_() for A in As]
        xs, hs = how(leaf, mine)
        back = [g for side in zip(*grads, strict=True) for g in side]
        used = [(t, g.to(t.dtype)) for t, g, p in zip((*xs, *hs), back, 2 * present, strict=True) if p]
        if used:
            torch.autograd.backward([t for t, _ in used], [g for _, g in used])
        return [*[h.detach() for h in hs], leaf.grad, *[A.grad for A in mine]]

    def plain(x: Tensor, As: list[Tensor]) -> Any:
        h = x.reshape(-1, 61) @ torch.cat(As).to(x.dtype).t()
        return [x * 1 for _ in As], h.split([len(A) for A in As], 1)

    with poisoned(), launches.watch():
        ours = run(ops.shrink_together, None)
    found = {}
    for i, (got, eager, want) in enumerate(zip(ours, run(plain, None), run(plain, torch.float64), strict=True)):
        if got is None:  # nothing came back; autograd of the plain formula has zeros there
            assert want is None or not want.any()
        elif want is not None and want.any():
            assert eager is not None
            found[i] = got, eager, want
    return found


def test_a_model() -> None:
    """Through attach, with kernels: what the reference gives."""
    grads = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model: Any = llama()
        ll.attach(model, ll.LoRAConfig(r=4), backend=backend)
        randomize(model, by=0.3)
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        grads[backend] = [p.grad for p in ll.parameters(model)]
    for got, want in zip(grads["triton"], grads["reference"], strict=True):
        assert rel_error(got, want) < 1e-5
