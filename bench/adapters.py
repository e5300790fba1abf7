"""A training step with each variant beside PEFT's, as overhead over the frozen base: `just bench-adapters`.

One step is forward and backward of a Llama with an adapter on its seven linear layers. The base is the same frozen
model with gradients flowing to its input, so the overhead is what the adapter adds. The base, ours and PEFT's take
turns within one run and medians are compared, so that a noisy machine disturbs all three alike.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import machine
import peft
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Settings:
    """Measure training steps and attach times beside PEFT."""

    variants: tuple[str, ...] = ("lora", "pissa", "dora", "delora", "eva", "ia3", "ia3_ff", "hra", "antipasto")
    """Which to measure."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of the base model."""
    same_dtype: bool = False
    """Give the adapters of both libraries the base's dtype. Otherwise each keeps its default, float32 in both."""
    steps: int = 15
    """Timed steps of each model, after two that are not timed."""
    attaches: int = 3
    """Timed attaches of each library."""
    r: int = 16
    width: int = 768
    layers: int = 4
    tokens: tuple[int, int] = (4, 128)
    """Sequences and tokens in each."""
    save: bool = True
    """Write bench/results/adapters[-same-dtype].json."""


def build(s: Settings, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=s.width,
        intermediate_size=s.width * 8 // 3,
        num_hidden_layers=s.layers,
        num_attention_heads=s.width // 64,
        num_key_value_heads=s.width // 64,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def our_config(variant: str, s: Settings, dtype: torch.dtype) -> ll.AdapterConfig:
    return ll.REGISTRY[variant].config(
        r=s.r, alpha=2 * s.r, dtype=dtype, target_roles=(), target_names=tuple(f"{t}$" for t in TARGETS)
    )


def peft_config(variant: str, s: Settings) -> Any:
    """PEFT's config of the same method on the same layers; None where PEFT lacks it."""
    lora: dict[str, Any] = {"r": s.r, "lora_alpha": 2 * s.r, "target_modules": TARGETS}
    match variant:
        case "lora" | "eva":  # EVA's step is LoRA's
            return peft.LoraConfig(**lora)
        case "pissa":
            return peft.LoraConfig(**lora, init_lora_weights="pissa")
        case "dora":
            return peft.LoraConfig(**lora, use_dora=True)
        case "delora":
            return peft.DeloraConfig(r=s.r, target_modules=TARGETS)
        case "ia3":
            return peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
        case "ia3_ff":
            return peft.IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS)
        case "hra":
            return peft.HRAConfig(r=s.r, target_modules=TARGETS)
    return None


def step(model: nn.Module, x: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    x.grad = None
    model.zero_grad()
    start = time.perf_counter()
    model(inputs_embeds=x).logits.float().square().mean().backward()
    return time.perf_counter() - start


def timed(attach: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = attach()
    return time.perf_counter() - start, result


def measure(variant: str, s: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Medians in seconds: base, ours, PEFT's; attach times; overheads over the base and their ratio."""
    x = torch.randn(*s.tokens, s.width, dtype=dtype, requires_grad=True)
    calibration = [{"inputs_embeds": x.detach()}]
    config = our_config(variant, s, dtype if s.same_dtype else torch.float32)
    other = peft_config(variant, s)

    models = {"base": build(s, dtype)}
    ours = build(s, dtype)
    attaches: dict[str, list[float]] = {"ours": [], "peft": []}
    for _ in range(s.attaches):
        if attaches["ours"]:
            ll.detach(ours)
        data = calibration if variant == "eva" else None
        seconds, _ = timed(lambda data=data: ll.attach(ours, config, calibration_data=data))
        attaches["ours"].append(seconds)
        if other is not None:
            fresh = build(s, dtype)
            seconds, models["peft"] = timed(
                lambda fresh=fresh: peft.get_peft_model(fresh, other, autocast_adapter_dtype=not s.same_dtype)
            )
            attaches["peft"].append(seconds)
    models["ours"] = ours
    if "peft" in models:
        if s.same_dtype:  # some of PEFT's methods make float32 parameters whatever the base is
            models["peft"].to(dtype)
        count = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
        assert count["ours"] == count["peft"], f"{variant}: not the same adapter: {count}"

    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(s.steps + 2):
        for name, model in models.items():
            seconds = step(model, x)
            if i >= 2:
                times[name].append(seconds)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    # Each round gives one overhead from neighbouring steps; its median shrugs off slow rounds.
    over = {
        name: statistics.median(a - b for a, b in zip(times[name], times["base"], strict=True))
        for name in times
        if name != "base"
    }
    attach = {name: statistics.median(t) for name, t in attaches.items() if t}
    del models, ours
    gc.collect()
    return {
        "variant": variant,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "overhead": over,
        "overhead_ratio": over["ours"] / over["peft"] if "peft" in over else None,
        "step_ratio": seconds["ours"] / seconds["peft"] if "peft" in over else None,
        "attach_seconds": attach,
        "attach_speedup": attach["peft"] / attach["ours"] if "peft" in attach else None,
        "all_seconds": times,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="A training step beside PEFT's (medians)")
    headings = "variant,dtype,base ms,ours ms,PEFT ms,overhead ms,PEFT's,ratio,attach ms,PEFT's,speedup"
    for heading in headings.split(","):
        out.add_column(heading, justify="right")
    for row in rows:
        s, o, a = row["seconds"], row["overhead"], row["attach_seconds"]
        out.add_row(
            row["variant"],
            row["dtype"],
            *(_ms(s.get(name)) for name in ("base", "ours", "peft")),
            *(_ms(o.get(name)) for name in ("ours", "peft")),
            _ratio(row["overhead_ratio"]),
            *(_ms(a.get(name)) for name in ("ours", "peft")),
            _ratio(row["attach_speedup"]),
        )
    return out


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main(s: Settings) -> None:
    rows = []
    for dtype in s.dtypes:
        for variant in s.variants:
            rows.append(measure(variant, s, getattr(torch, dtype)))
            print(f"{variant} {dtype}: overhead ratio {_ratio(rows[-1]['overhead_ratio'])}", flush=True)
    Console(width=140).print(table(rows))
    if s.save:
        settings = {k: v for k, v in vars(s).items() if k != "save"}
        name = "adapters-same-dtype.json" if s.same_dtype else "adapters.json"
        machine.write(machine.RESULTS / name, {"kind": "timed", "settings": settings, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
