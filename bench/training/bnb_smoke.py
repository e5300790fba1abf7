"""Every method on SmolLM2-135M with its linears in 4 and 8 bit: `just bnb-smoke`. Ends with 1 where a check fails."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pretrained
import random_models
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lora_lite as ll

LEARNING_RATES = {
    "ia3": 0.05,
    "ia3_ff": 0.05,
    "antipasto": 0.05,
    "road": 0.05,
    "hra": 1e-3,
    "pissa": 1e-3,
    "delora": 2e-3,
}


@dataclass
class Settings:
    """Attach, train, detach, save and load each method on a quantised base."""

    variants: tuple[str, ...] = random_models.VARIANTS
    kinds: tuple[str, ...] = ("4bit", "8bit")
    layers: int = 2
    """Of the model's 30; the rest is left off."""
    steps: int = 10
    r: int = 8
    seed: int = 0
    """Of the adapters' start."""
    model: str = pretrained.SMOLLM2


def base_bytes(model: nn.Module) -> list[Tensor]:
    """Every tensor of the base as it is stored, and bitsandbytes' scales."""
    found = [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            found.append(state.absmax.clone())
        if type(weight).__name__ == "Int8Params":
            found.append((weight.SCB if weight.SCB is not None else module.state.SCB).clone())  # type: ignore[union-attr]
    return found


def check(model: Any, variant: str, s: Settings) -> dict[str, str | bool]:
    """A row: what was seen, and whether each check passed."""
    torch.manual_seed(s.seed)
    ids = torch.randint(100, 40_000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = model(ids).logits.float()
    before = base_bytes(model)
    batches = [torch.randint(100, 40_000, (2, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    fields = {"block_size": 4} if variant == "antipasto" else {}
    config = ll.REGISTRY[variant].config.from_common(r=s.r, alpha=2 * s.r, **fields)
    attachment = ll.attach(model, config, calibration_data=batches if variant == "eva" else None)
    specs = [each.variant.param_specs(*each.shape, each.cfg) for each in attachment.adapters.values()]
    near = any(spec.near for of_layer in specs for spec in of_layer.values())
    with torch.no_grad():
        change = ((model(ids).logits.float() - base).abs().max() / base.abs().max()).item()

    optimizer = torch.optim.AdamW(ll.parameters(model), lr=LEARNING_RATES.get(variant, 3e-3))
    losses, live = [], True
    for step in range(s.steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in ll.parameters(model) if p.grad is not None]
        # At step 0 a zero factor may keep the other's gradient at zero.
        live &= all(g.isfinite().all() and (step == 0 or g.any()) for g in grads) and len(grads) > 0
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        trained = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(model, path)
        ll.detach(model)
        same = all(torch.equal(a, b) for a, b in zip(base_bytes(model), before, strict=True))
        ll.load(model, path)
    with torch.no_grad():
        reloaded = torch.equal(model(ids).logits, trained)
    ll.detach(model)
    return {
        "start": f"{change:.0e}", "start ok": change <= (1e-3 if near else 1e-5), "gradients": live,
        "loss": f"{losses[0]:.2f} → {losses[-1]:.2f}" if losses else "no step",
        "loss falls": bool(losses) and losses[-1] < losses[0],
        "base bytes": same, "reloaded": reloaded,
    }  # fmt: skip


def main(s: Settings) -> int:
    pretrained.settle_network(needs_hub=not pretrained.is_local(s.model))
    table, failed = Table(title=f"{s.model}, {s.layers} layers, r={s.r}"), 0
    for kind in s.kinds:
        model: Any = pretrained.load(s.model, torch.float32, "cpu")
        model.model.layers = model.model.layers[: s.layers]
        model = pretrained.quantized(model, kind)
        for variant in s.variants:
            row = check(model, variant, s)
            if not table.columns:
                for heading in ("method", "base", *row):
                    table.add_column(heading)
            failed += not all(value for value in row.values())
            table.add_row(variant, kind, *("yes" if v is True else "NO" if v is False else v for v in row.values()))
    Console(width=150).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
