"""Sixty training steps on the kernels, on the reference and in PEFT, from one start: the losses agree step by step."""

from pathlib import Path
from typing import Any

import launches
import peft
import pytest
import torch
from models import VOCAB, llama, token_ids
from torch import Tensor
from torch.nn.functional import cross_entropy

import lora_lite as ll

STEPS = 60
# Each run is compared with one in float64 (but for the norms, which transformers computes in float32) from the same
# weights. Its losses may be off, relative to themselves, by so many unit roundoffs of the base's dtype, 2⁻²⁴ and 2⁻⁸:
# rounding is all that may differ. In bfloat16 the base's layers round what passes them, alike for all, and sixty steps
# of that come to under one roundoff in each runner, PEFT's too; a learning rate wrong by 2 % comes to more than two. In
# float32 they come to four, through the float32 norms alike.
ROUNDOFFS = {torch.float32: (2.0**-24, 8), torch.bfloat16: (2.0**-8, 2)}
AGAINST_PEFT = 3  # times PEFT's distance: of two worst steps, each the luck of some roundings


def batch(step: int) -> Tensor:
    """Sequences in which a token determines the next, by a fixed random permutation."""
    following = torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(0)) + 1
    columns = [token_ids(2, 1, seed=step)]
    for _ in range(11):
        columns.append(following[columns[-1] - 1])
    return torch.cat(columns, dim=1)


def losses(runner: str, variant: str, dtype: torch.dtype, folder: Path) -> Tensor:
    """Of each step, with the same base, the same start of the adapter, and the same batches."""
    model: Any = llama(seed=3, num_hidden_layers=1).to(dtype)
    torch.manual_seed(1)
    config = ll.REGISTRY[variant].config(r=8, alpha=16.0, target_roles=(), target_names=(r"(up|down)_proj$",))
    ll.attach(model, config, backend="triton" if runner == "kernels" else "reference")
    if runner == "float64":
        model.double()
    elif runner == "PEFT":
        ll.export_peft(model, folder)
        ll.detach(model)
        peft.PeftModel.from_pretrained(model, folder, is_trainable=True)  # puts its layers into the model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    found = []
    for step in range(STEPS):
        ids = batch(step)
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("dtype", ROUNDOFFS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["lora", "dora", "hra"])
def test_the_losses_agree_step_by_step(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact = losses("float64", variant, dtype, tmp_path)
    assert exact[-10:].mean() < 0.8 * exact[:10].mean(), "too little was learned to compare"
    off = {}
    for runner in ("reference", "kernels", "PEFT"):
        with launches.counted() as launched:
            found = losses(runner, variant, dtype, tmp_path)
        assert bool(launched) is (runner == "kernels")
        off[runner] = (found - exact).abs() / exact
    roundoff, allowed = ROUNDOFFS[dtype]
    for runner, each in off.items():
        assert each.max() <= allowed * roundoff, f"{runner}, step {each.argmax()}"
    for runner in ("reference", "kernels"):
        assert off[runner].max() <= AGAINST_PEFT * off["PEFT"].max(), runner
