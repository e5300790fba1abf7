"""transformers' Conv1D, whose weight is stored in × out: every method, as on the nn.Linear of the transposed weight."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    VARIANTS,
    assert_close,
    assert_same,
    attach,
    calibration_batches,
    gpt2,
    logits,
    randomize,
    rel_error,
    snapshot,
    start_tolerance,
    token_ids,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll

NAMES = {"target_names": ("c_attn$", r"mlp\.c_proj$", "c_fc$")}


def as_linear(model: Any) -> Any:
    """The same model with an nn.Linear for each Conv1D."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight.data.copy_(module.weight.t())
            linear.bias.data.copy_(module.bias)
            twin.set_submodule(name, linear)
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_on_the_linear_of_the_transposed_weight(variant: str, tmp_path: Path) -> None:
    """Start, outputs, gradients; files, merged weights, verify, detach."""
    model = gpt2()
    linears, before, start = as_linear(model), snapshot(model), logits(model)
    models, grads = (model, linears), []
    for each in models:
        torch.manual_seed(0)
        attach(each, variant, calibration_batches(), **NAMES)
        if each is model:
            assert_close(logits(model), start, start_tolerance(variant, 1e-5))
            assert len(ll.attachment.require_attachment(model).targets) == 6
        randomize(each)
        for p in each.parameters():
            p.grad = None
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
        grads.append([p.grad for p in ll.parameters(each)])
    want = logits(linears)
    assert rel_error(want, start) > 1e-3
    assert_close(logits(model), want, 1e-4)
    for mine, theirs in zip(*grads, strict=True):
        assert_close(mine, theirs, 1e-3)
    ll.verify(model, {"input_ids": token_ids()})
    assert not any(row.idle for row in ll.diagnose(model).rows)
    got = logits(model)
    merged = ll.merged_state_dict(model)
    plain = gpt2(seed=1)
    plain.load_state_dict(merged)
    assert_close(logits(plain), got, 1e-5)
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    assert_same(model, before)
    ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(logits(model), got)


def test_defaults_and_roles() -> None:
    attachment = ll.attach(gpt2(), ll.LoRAConfig(r=4))
    roles = {t.name.partition("h.0.")[2]: t.role for t in attachment.targets if ".0." in t.name}
    assert roles == {"attn.c_attn": "reader", "attn.c_proj": "writer", "mlp.c_fc": "reader", "mlp.c_proj": "writer"}


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
def test_peft_s_files_both_ways(variant: str, tmp_path: Path) -> None:
    model = gpt2()
    attach(model, variant, **NAMES)
    randomize(model)
    want = logits(model)
    ll.export_peft(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT corrects a wrong fan_in_fan_out, and says so
        for unrelated in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", unrelated)
        warnings.filterwarnings(
            "ignore", r"Unexpected keyword arguments \['lora_alpha', 'r'\]"
        )  # other readers' fields
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    assert_close(logits(theirs), want, 1e-5)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ll.detach(model)
    ll.import_peft(model, tmp_path / "theirs")
    assert_close(logits(model), logits(theirs), 1e-5)
