"""Check each variant's wiring on Qwen3-0.6B: `just qwen-probe`. The exit status is 1 where a check fails."""

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import pretrained
import random_models
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lora_lite as ll

CHECKS = {
    "adapter_only": "only the adapter trains",
    "perturbed": "a perturbed adapter changes the logits",
    "moved": "five steps move it",
    "no_leak": "no base gradient",
    "reloaded": "saved and reloaded, the same logits",
}


@dataclass
class Settings:
    """Check each variant's wiring on Qwen3-0.6B from the Hub, or on random weights of its widths where none is reached.

    Five checks: only the adapter's parameters train; a perturbed adapter changes the logits; five steps of AdamW move
    it; the base gets no gradient; the saved adapter, loaded into a fresh model, gives the same logits.
    """

    variants: tuple[str, ...] = random_models.VARIANTS
    """Which to check."""
    model: str = "Qwen/Qwen3-0.6B"
    """A name on the Hub or a folder."""
    random: bool = False
    """Random weights at once, without asking the Hub."""
    dtype: str | None = None
    """Default: bfloat16; float32 on a CPU without instructions for it."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    r: int = 8
    save: bool = True
    """Write bench/results/qwen_probe.json."""

    def __post_init__(self) -> None:
        if self.dtype is None:
            self.dtype = pretrained.default_dtype(self.device)


def build(s: Settings) -> tuple[nn.Module, str]:
    """The model, and which one it is, in words."""
    dtype = getattr(torch, s.dtype)
    reason = "as asked for"
    if not s.random:
        try:
            return pretrained.load(s.model, dtype, s.device), f"{s.model}, pretrained"
        except pretrained.NotReachedError as error:
            reason = str(error).splitlines()[0]
    return (
        random_models.qwen().to(s.device, dtype),
        f"random weights of Qwen3-0.6B's widths, 2 layers of 28 and 4,096 tokens of 151,936 ({reason})",
    )


def probe(variant: str, model: nn.Module, batch: dict[str, Tensor], s: Settings) -> dict[str, Any]:
    """One variant's checks, each with what was measured."""
    config = ll.REGISTRY[variant].config
    calibrated = ll.REGISTRY[variant].calibration != "none"
    base = {name for name, _ in model.named_parameters()}
    ll.attach(model, config(r=s.r), calibration_data=[inputs(batch)] if calibrated else None)
    try:
        parameters = ll.parameters(model)
        training = {id(p) for p in model.parameters() if p.requires_grad}
        start = logits(model, batch)
        initial = [p.detach().clone() for p in parameters]

        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 * torch.randn_like(p))
        perturbed = (logits(model, batch) - start).abs().max().item()
        with torch.no_grad():
            for p, value in zip(parameters, initial, strict=True):
                p.copy_(value)

        losses = train(model, parameters, batch)
        moved = min(
            max((p - value).abs().max().item() for p, value in zip(parameters, initial, strict=True)),
            (trained := logits(model, batch)).sub(start).abs().max().item(),
        )
        leaks = sum(p.grad is not None for name, p in model.named_parameters() if name in base)

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            ll.save(model, path)
            ll.detach(model)
            fresh, _ = build(s)
            ll.load(fresh, path)
            difference = (logits(fresh, batch) - trained).abs().max().item()
    finally:
        if any(hasattr(m, "lora_lite") for m in model.modules()):
            ll.detach(model)
    return {
        "variant": variant,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "checks": {
            "adapter_only": training == {id(p) for p in parameters},
            "perturbed": perturbed > 0,
            "moved": moved > 0 and losses[-1] < losses[0],
            "no_leak": leaks == 0,
            "reloaded": difference <= 1e-3,
        },
        "perturbed_max_abs_logit_difference": perturbed,
        "losses": losses,
        "base_gradients": leaks,
        "reloaded_max_abs_logit_difference": difference,
    }


def train(model: Any, parameters: list[nn.Parameter], batch: dict[str, Tensor], steps: int = 5) -> list[float]:
    """Each step's loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in batch.items() if name != "labels"}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**inputs(batch)).logits.float().cpu()


def main(s: Settings) -> None:
    console = Console(width=140, highlight=False)
    pretrained.settle_network(needs_hub=not s.random and not pretrained.is_local(s.model))
    model, which = build(s)
    console.print(f"Model: {which}; {s.dtype} on {s.device}")
    torch.manual_seed(1)
    vocabulary: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(0, vocabulary.num_embeddings, (2, 32), device=s.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    rows = [probe(variant, model, batch, s) for variant in s.variants]
    table = Table(title=which.partition(" (")[0])
    table.add_column("variant")
    table.add_column("parameters", justify="right")
    for heading in (*CHECKS.values(), "loss, step 1 → 5", "largest logit difference"):
        table.add_column(heading, justify="center")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['trainable_parameters']:,}",
            *("[green]yes[/]" if row["checks"][name] else "[red]NO[/]" for name in CHECKS),
            f"{row['losses'][0]:.3f} → {row['losses'][-1]:.3f}",
            f"{row['reloaded_max_abs_logit_difference']:.1e}",
        )
    console.print(table)
    if s.save:
        settings = {k: v for k, v in dataclasses.asdict(s).items() if k != "save"}
        result = {"kind": "checked", "model": which, "settings": settings, "rows": rows}
        machine.write(machine.RESULTS / "qwen_probe.json", result)
    if not all(all(row["checks"].values()) for row in rows):
        sys.exit("At least one check failed.")


if __name__ == "__main__":
    main(tyro.cli(Settings))
