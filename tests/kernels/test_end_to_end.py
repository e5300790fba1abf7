"""Training on the kernels beside training on the reference, and `verify` on a real model."""

from typing import Any
from unittest import mock

import launches
import pytest
import torch
from models import VARIANTS, attach, calibration_batches, config, llama, load_tests, randomize, rel_error, token_ids
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.kernels import launching, low_rank

against_peft = load_tests("test_peft")
STEPS = 5
# What five steps may differ by: in float32 the order of sums; in bf16 its unit roundoff, 2⁻⁸, a few layers deep.
TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (2e-2, 0.1)}


def train(variant: str, dtype: torch.dtype, backend: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of five steps, and the first step's gradients."""
    model: Any = llama(seed=3, num_hidden_layers=1).to(dtype)
    torch.manual_seed(1)  # the adapter's start, the same for both backends
    data = calibration_batches() if variant == "eva" else None
    fields = {"lambda0": 4.0} if variant == "delora" else {}
    attachment = ll.attach(model, config(variant, **fields), backend=backend, calibration_data=data)
    assert {name for name, _ in attachment.backends().values()} == {backend}
    optimizer = torch.optim.AdamW(
        ll.parameters(model), lr=0.2 if variant in ("ia3", "ia3_ff", "antipasto", "road") else 2e-2
    )
    losses, first = [], {}
    for step in range(STEPS):
        ids = token_ids(2, 24)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


# In float32 those that PEFT has too follow PEFT, below; and what test_convergence trains for longer does so there.
CONVERGE = ("lora", "dora", "hra")
FOLLOWED = [
    (variant, dtype)
    for variant in VARIANTS
    for dtype in TOLERANCE
    if variant not in (CONVERGE if dtype is torch.bfloat16 else against_peft.NAMES)
]


@pytest.mark.parametrize(("variant", "dtype"), FOLLOWED, ids=str)
def test_training_follows_the_reference(variant: str, dtype: torch.dtype) -> None:
    with launches.counted() as launched:
        got, grads = train(variant, dtype, "triton")
    assert launched
    with launches.counted() as launched:
        want, want_grads = train(variant, dtype, "reference")
    assert not launched
    of_losses, of_grads = TOLERANCE[dtype]
    assert want[0] - want[-1] > 2 * of_losses * want[0], "too little happened in five steps to compare"
    assert got == pytest.approx(want, rel=of_losses)
    assert grads.keys() == want_grads.keys() != set()
    for name, want_grad in want_grads.items():
        assert rel_error(grads[name], want_grad) < of_grads, name


@pytest.mark.parametrize("variant", [name for name in against_peft.NAMES if name not in CONVERGE])
def test_training_follows_peft(variant: str) -> None:
    """From the same weights, five steps of the same optimiser in float32."""
    ours, theirs, attachment = against_peft.both("llama", variant)
    randomize(ours, by=0.2)
    against_peft.copy_to_peft(theirs, attachment)
    losses: list[list[float]] = []
    with launches.counted() as launched:
        for model in (ours, theirs):
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.05)
            losses.append([])
            for _ in range(STEPS):
                loss = model(input_ids=token_ids(), labels=token_ids()).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    assert launched
    assert losses[0][0] - losses[0][-1] > 1e-3 * losses[0][0], "too little happened in five steps to compare"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- verify ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_on_a_pretrained_model(variant: str, pretrained: nn.Module) -> None:
    """Layers of SmolLM2-135M in bf16, away from the adapter's start; DoRA's norm is slow in the interpreter."""
    model: Any = pretrained.to(torch.bfloat16)
    model.model.layers = model.model.layers[: 1 if variant == "dora" else 2]
    ids = token_ids(1, 24, vocab=model.config.vocab_size)
    batches = [{"input_ids": token_ids(2, 64, seed=i, vocab=model.config.vocab_size)} for i in range(2)]
    attachment = attach(model, variant, batches if variant == "eva" else None, r=8)
    randomize(model, by=0.1)
    rows = ll.verify(model, {"input_ids": ids, "labels": ids})
    assert sorted(row.layer for row in rows) == sorted(attachment.adapters)
    assert {row.backend for row in rows} == {"triton"}
    for row in rows:
        assert {"output", "grad_input"} < set(row.errors)
        assert max(row.errors.values()) > 0, "bf16 without a rounding error: what was compared?"


@pytest.fixture
def trained() -> Any:
    model: Any = llama().bfloat16()
    attach(model, "lora")
    with torch.no_grad():
        for p in ll.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    return model


def wrong_for(width: int, kernel: Any, spoil: Any) -> Any:
    """A launcher that gives a wrong result for layers with this many outputs, and the right one otherwise."""

    launching.forget()  # what replays a right one

    def launch(*args: Any, **kwargs: Any) -> Any:
        result = kernel(*args, **kwargs)
        return spoil(result) if args[0].shape[-1] == width else result

    return launch


@pytest.mark.parametrize(
    ("kernel", "spoil", "what"),
    [
        ("launch_expand", lambda out: out * 1.05, "output"),
        ("launch_expand_backward", lambda r: (r[0], r[1].roll(1, 0), *r[2:]), "lora_B"),
        ("launch_expand_backward", lambda r: (r[0] * 0, *r[1:]), "lora_A"),
    ],
)
def test_a_wrong_kernel_is_caught_and_named(trained: Any, kernel: str, spoil: Any, what: str) -> None:
    """Only gate_proj and up_proj have 56 outputs, and layer 1's are the last to go wrong."""
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    assert len(ll.verify(trained, batch)) == 14
    with (
        mock.patch.object(low_rank, kernel, wrong_for(56, getattr(low_rank, kernel), spoil)),
        pytest.raises(ll.KernelMismatchError, match=rf"4 of 14 layers .*(gate|up)_proj \(triton\): {what}"),
    ):
        ll.verify(trained, batch)
    assert len(ll.verify(trained, batch)) == 14


def test_what_layers_do_together_is_compared_too(trained: Any) -> None:
    """The kernels for q, k and v as one, which each layer by itself does not run."""
    launch = low_rank.launch_shrink_backward
    launching.forget()  # what replays a right one

    def wrong(dx_bases: list[Tensor], *args: Any) -> Any:
        dx, *rest = launch(dx_bases, *args)
        return (1.05 * dx if len(dx_bases) > 1 else dx, *rest)

    with (
        mock.patch.object(low_rank, "launch_shrink_backward", wrong),
        pytest.raises(ll.KernelMismatchError, match=r"10 of 14 layers .*\(triton\): grad_input together"),
    ):
        ll.verify(trained, {"input_ids": token_ids(), "labels": token_ids()})


def test_nan_is_no_match(trained: Any) -> None:
    """It spreads to the layers behind, so that more than the four differ."""
    wrong = wrong_for(56, low_rank.launch_expand, lambda out: out + torch.nan)
    with (
        mock.patch.object(low_rank, "launch_expand", wrong),
        pytest.raises(ll.KernelMismatchError, match=r"of 14 layers .* output nan"),
    ):
        ll.verify(trained, token_ids())


def test_rtol(trained: Any) -> None:
    with pytest.raises(ll.KernelMismatchError, match="14 of 14 layers"):
        ll.verify(trained, token_ids(), rtol=1e-6)
    assert all(set(row.allowed.values()) == {0.5} for row in ll.verify(trained, token_ids(), rtol=0.5))
