"""Step 0 is the base model (to 1e-3 where it starts near), what can be live is live, and detach leaves no trace."""

from typing import Any

import pytest
import torch
from models import (
    VARIANTS,
    assert_same,
    attach,
    calibration_batches,
    llama,
    randomize,
    snapshot,
    start_tolerance,
    token_ids,
)
from torch import Tensor, nn

import lora_lite as ll

# Zero by construction at step 0: B = 0 stands between them and the output.
ASLEEP = {
    "lora": {"lora_A"},
    "dora": {"lora_A"},
    "eva": {"lora_A"},
    "delora": {"lora_A", "lora_lambda"},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def relative_change(logits: Tensor, base: Tensor) -> float:
    return ((logits.float() - base.float()).abs().max() / base.float().abs().max()).item()


def backward(model: Any, ids: Tensor) -> dict[str, Tensor | None]:
    """The gradient of each trainable parameter for a random linear function of the logits."""
    model.zero_grad()
    logits = model(ids).logits.float()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def asleep(grads: dict[str, Tensor | None]) -> set[str]:
    """Names of tensors (without their layer) whose gradient is missing or zero somewhere in the model."""
    for name, grad in grads.items():
        assert grad is None or grad.isfinite().all(), f"{name}: gradient is not finite"
    return {name.rpartition(".")[2] for name, grad in grads.items() if grad is None or not grad.any()}


def check_start(model: Any, variant: str, ids: Tensor, tolerance: float, batches: Any = None, **fields: Any) -> None:
    with torch.no_grad():
        base = model(ids).logits
    attach(model, variant, batches, **fields)
    with torch.no_grad():
        assert relative_change(model(ids).logits, base) <= start_tolerance(variant, tolerance)
    grads = backward(model, ids)
    assert len(grads) == len(ll.parameters(model)) > 0
    assert asleep(grads) == ASLEEP.get(variant, set())
    torch.optim.AdamW(ll.parameters(model), lr=1e-2).step()
    assert asleep(backward(model, ids)) == set()
    with torch.no_grad():
        assert relative_change(model(ids).logits, base) > 0


@DTYPES
@EACH_VARIANT
def test_start(model: nn.Module, variant: str, dtype: torch.dtype) -> None:
    check_start(model.to(dtype), variant, token_ids(), TOLERANCE[dtype])


@DTYPES
@EACH_VARIANT
def test_start_of_a_pretrained_model(pretrained: Any, variant: str, dtype: torch.dtype) -> None:
    vocab = pretrained.config.vocab_size
    r = 16 if variant == "antipasto" else 8
    ids, batches = token_ids(1, 24, vocab=vocab), calibration_batches(vocab=vocab) if variant == "eva" else None
    check_start(pretrained.to(dtype), variant, ids, TOLERANCE[dtype], batches, r=r, alpha=16.0)


def test_which_starts_are_near() -> None:
    assert {variant for variant in VARIANTS if start_tolerance(variant)} == {"ia3", "ia3_ff", "antipasto", "road"}


@EACH_VARIANT
def test_start_with_bfloat16_parameters(variant: str) -> None:
    """Matrices in bfloat16: PiSSA's A and A₀ are rounded alike. Vectors, and what starts near a value, are float32."""
    model = llama().bfloat16()
    check_start(model, variant, token_ids(), TOLERANCE[torch.bfloat16], dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_wide = p.ndim == 1 or name.endswith("lora_rot_T")
            assert p.dtype == (torch.float32 if is_wide else torch.bfloat16), name


def train(model: Any, ids: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(ll.parameters(model), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids).logits.float().square().mean().backward()
        optimizer.step()


@DTYPES
@EACH_VARIANT
def test_detach_leaves_no_trace(model: Any, variant: str, dtype: torch.dtype) -> None:
    model.to(dtype).train()
    ids = token_ids()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)  # flags and modes that are not all alike
    for module in list(model.modules())[3:6]:
        module.training = False
    before = snapshot(model)
    attach(model, variant)
    assert {p for p in model.parameters() if p.requires_grad} == set(ll.parameters(model))
    train(model, ids)
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad), "the base got a gradient"
    ll.detach(model)
    assert_same(model, before)
    assert second.requires_grad
    assert not first.requires_grad
    attach(model, variant)  # and again
    ll.detach(model)
    assert_same(model, before)


@torch.no_grad()
@EACH_VARIANT
def test_disabled_is_the_base_model(model: Any, variant: str) -> None:
    ids = token_ids()
    base = model(ids).logits
    attach(model, variant)
    randomize(model)
    tuned = model(ids).logits
    assert relative_change(tuned, base) > 1e-2
    with ll.disabled(model):
        assert torch.equal(model(ids).logits, base)
        with ll.disabled(model):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base), "the inner context switched the adapter on"
    assert torch.equal(model(ids).logits, tuned)
    with pytest.raises(KeyboardInterrupt), ll.disabled(model):
        raise KeyboardInterrupt
    assert torch.equal(model(ids).logits, tuned)


def test_disabled_gives_parameters_no_gradient(model: Any) -> None:
    attach(model, "lora")
    randomize(model)
    with ll.disabled(model):
        assert not model(token_ids()).logits.requires_grad


@EACH_VARIANT
def test_one_seed_one_start(variant: str) -> None:
    """Nothing random beside torch's global generator, and PiSSA's SVD not even that."""
    starts = []
    for seed in (0, 0, 1):
        model = llama()
        torch.manual_seed(seed)
        attach(model, variant)
        starts.append(ll.state_dict(model))
    equal = [all(torch.equal(a, b) for a, b in zip(starts[0].values(), s.values(), strict=True)) for s in starts]
    assert equal == [True, True, variant in ("pissa", "eva")]
