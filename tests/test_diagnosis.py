"""`diagnose`: its figures against dense formulas, and that it changes nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VARIANTS, assert_same, attach, calibration_batches, llama, randomize, snapshot, token_ids
from torch import nn

import lora_lite as ll


@pytest.mark.parametrize("variant", VARIANTS)
def test_figures(variant: str) -> None:
    model = llama()
    fields = {"block_size": 2} if variant == "antipasto" else {}
    attachment = attach(model, variant, calibration_batches(), **fields)
    randomize(model)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    before = snapshot(model)
    diagnosis = ll.diagnose(model)
    assert_same(model, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert ll.diagnose(model).rows == diagnosis.rows
    assert [row.layer for row in diagnosis.rows] == list(attachment.adapters)
    for row, target in zip(diagnosis.rows, attachment.targets, strict=True):
        layer: Any = target.layer
        eye = torch.eye(layer.in_features)
        with torch.no_grad():
            adapted = layer(eye) - layer(torch.zeros_like(eye))
            change = (adapted.t() - layer.weight).double()
        assert row.relative_change == pytest.approx((change.norm() / layer.weight.norm()).item(), rel=1e-3)
        S = torch.linalg.svdvals(change)
        shares = S / S.sum()
        want = torch.exp(-(shares * shares.clamp_min(1e-30).log()).sum()).item()
        assert row.effective_rank == pytest.approx(want, rel=1e-2)
        grads = [p.grad.norm() for p in attachment.adapters[target.name].parameters() if p.requires_grad]
        assert row.grad_norm == pytest.approx(torch.stack(grads).norm().item(), rel=1e-4)
        assert row.dead == ()


def test_at_the_start(tmp_path: Path) -> None:
    model = llama()
    attach(model, "lora")
    row = ll.diagnose(model).rows[0]
    assert (row.grad_norm, row.dead, row.relative_change, row.effective_rank) == (None, (), 0.0, 0.0)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    diagnosis = ll.diagnose(model)
    assert all(row.dead == ("lora_A",) for row in diagnosis.rows)  # B is zero
    text = diagnosis.summary()
    assert "model.layers.0.self_attn.q_proj" in text
    assert "lora_A" in text
    diagnosis.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("where", ["the adapter", "the weight"])
def test_not_finite(where: str, variant: str) -> None:
    """Such a layer is reported, and so are the others."""
    model = llama()
    attachment = attach(model, variant, target_names=("up_proj", "down_proj"))
    target, adapter = attachment.targets[1], next(iter(attachment.adapters.values()))
    name, p = next(iter(adapter.named_parameters()))
    if where == "the adapter":
        p.data.view(-1)[0] = torch.inf
    else:
        attachment.targets[0].layer.weight.data[0, 0] = torch.nan  # type: ignore[union-attr,operator]
    first, second, *_ = (diagnosis := ll.diagnose(model)).rows
    assert math.isnan(first.relative_change)
    assert first.not_finite == ((name,) if where == "the adapter" else ())
    assert (second.layer, math.isfinite(second.relative_change), second.not_finite) == (target.name, True, ())
    assert "NaN or ∞" in diagnosis.summary()


def test_nothing_attached() -> None:
    with pytest.raises(ll.AttachError, match="no adapter is attached"):
        ll.diagnose(nn.Linear(3, 3))
