"""CPU time that an adapted layer adds to a training step, and its launches: `just bench-host`. No GPU is needed.

A step is a forward and a backward of one nn.Linear, small enough that computing takes next to nothing and what is left
is the host's work; the bare layer's step is taken off. Likewise a forward of one token without gradients, as in
generation, by itself and within `unchanged`. The kernels go all the way to the launch and not further (see
launch_path.py). Launches are counted at the size that is named, where sums of parts depend on it.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import block
import peft
import torch
from block import CostlessLinear
from launch_path import torch_launches, without_launching
from machine import RESULTS, write
from random_models import METHODS
from rivals import peft_config
from torch import nn

import lora_lite as ll

WIDTH, TOKENS, RANK = 64, 8, 16
COUNTED = {"M": 8192, "K": 4096, "N": 4096, "r": RANK}


def model(K: int, N: int, kind: type[nn.Linear] = nn.Linear, device: str = "cpu") -> nn.Module:
    layer = kind(K, N, bias=False, dtype=torch.bfloat16, device=device)
    return nn.ModuleDict({"layer": layer}).requires_grad_(False)


def config(method: str) -> Any:
    fields = {"r": RANK, "alpha": 32.0, "target_names": (r"layer",), "dtype": torch.float32}
    return ll.REGISTRY[method].config.from_common(**fields)


def ours(method: str, backend: str, base: nn.Module) -> nn.Module:
    ll.attach(base, config(method), backend=backend)
    return base


def rival(method: str, device: str = "cpu") -> nn.Module | None:
    cfg = peft_config(method, RANK, 32.0, ["layer"])
    base = model(WIDTH, WIDTH, device=device)
    return None if cfg is None else peft.get_peft_model(base, cfg).base_model.model  # type: ignore


def step_of(holder: Any, M: int, K: int) -> Callable[[], None]:
    """Of the layer that a model holds. Gradients are dropped after each, as `zero_grad` does."""
    device = next(holder.parameters()).device
    x = torch.randn(M, K, device=device).to(torch.bfloat16).requires_grad_()
    dy = torch.zeros(M, K, dtype=torch.bfloat16, device=device)
    own = [x, *(p for p in holder.parameters() if p.requires_grad)]

    def step() -> None:
        holder["layer"](x).backward(dy)  # held, as in training: an attachment is to see the end of its first steps
        for t in own:
            t.grad = None

    return step


def forward_of(holder: Any) -> Callable[[], None]:
    """Of one token, without gradients."""
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16, device=next(holder.parameters()).device)

    def forward() -> None:
        with torch.no_grad():
            holder["layer"](x)

    return forward


HOW = ("together", "one by one")
CALLS = 20  # steps of a round


def steps_of(method: str, backend: str, device: str = "cpu") -> dict[str, Callable[[], None]]:
    """Small steps of the bare layer, ours, and PEFT's where it has the method."""
    return {name: step_of(each, TOKENS, WIDTH) for name, each in models_of(method, backend, device).items()}


def models_of(method: str, backend: str, device: str = "cpu") -> dict[str, nn.Module]:
    """The bare layer's model, ours, and PEFT's where it has the method."""
    models = {
        "base": model(WIDTH, WIDTH, device=device),
        "ours": ours(method, backend, model(WIDTH, WIDTH, device=device)),
        "peft": rival(method, device),
    }
    return {name: each for name, each in models.items() if each is not None}


def medians(
    steps: dict[str, Callable[[], None]],
    rounds: int,
    calls: int = CALLS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """CPU µs of each step: of interleaved rounds."""
    for step in steps.values():
        for _ in range(3 * calls):
            step()
    took: dict[str, list[float]] = {name: [] for name in steps}
    gc.disable()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            for _ in range(calls):
                step()
            took[name].append(1e6 * (clock() - start) / calls)
    gc.enable()
    return {name: statistics.median(each) for name, each in took.items()}


def tokens(method: str, backend: str, rounds: int) -> dict[str, float]:
    """CPU µs that each adds to a forward of one token."""
    held = model(WIDTH, WIDTH)
    models = {**models_of(method, backend), "unchanged": ours(method, backend, held)}
    forwards = {name: forward_of(each) for name, each in models.items()}
    with ll.unchanged(held):  # of one model; the others are under no promise
        took = medians(forwards, rounds)
    return {name: took[name] - took["base"] for name in forwards if name != "base"}


def row(method: str, backend: str, rounds: int) -> dict[str, Any]:
    """A method's figures beside PEFT's."""
    context = without_launching() if backend == "triton" else nullcontext({})
    with context as counts:
        steps = steps_of(method, backend)
        took = medians(steps, rounds)
        added = {name: took[name] - took["base"] for name in steps if name != "base"}
        base_launches = torch_launches(steps["base"])
        result = {
            "method": method,
            "backend": backend,
            "base_us": took["base"],
            "added_us": added,
            "token_added_us": tokens(method, backend, rounds),
            "ratio": added["ours"] / added["peft"] if "peft" in added else None,
            "peft_launches": torch_launches(steps["peft"]) - base_launches if "peft" in steps else None,
        }
        if backend == "triton":
            result["launches"] = launches(method, counts)
        else:
            result["launches"] = {"ours": 0, "torch": torch_launches(steps["ours"]) - base_launches}
    return result


def launches(method: str, counts: Any) -> dict[str, Any]:
    """Of a layer and step at the size that is named, casts and sums among them."""
    with block.any_svd():
        adapted = ours(method, "triton", model(COUNTED["K"], COUNTED["N"], CostlessLinear))
    step = step_of(adapted, COUNTED["M"], COUNTED["K"])
    step()
    counts.clear()
    step()
    by_name = dict(counts)
    return {"ours": sum(by_name.values()), "torch": torch_launches(step), "kernels": by_name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="interleaved rounds of 20 steps")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "host.json", help="where the results go")
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(method, "triton", arguments.rounds) for method in arguments.methods]
    if "lora" in arguments.methods:
        rows.append(row("lora", "reference", arguments.rounds))
    for each in rows:
        added = "  ".join(f"{name} {us:7.1f} µs" for name, us in each["added_us"].items())
        ratio = "" if each["ratio"] is None else f"  ratio {each['ratio']:.2f}"
        token = "  ".join(f"{name} {us:.1f} µs" for name, us in each["token_added_us"].items())
        print(f"{each['method']:10} {each['backend']:10} {added}{ratio}  launches {each['launches']}", flush=True)
        print(f"{'':21} a token: {token}", flush=True)
    with without_launching() as counts:
        whole = {
            name: {how: block.launched(counts, COUNTED["M"], how == "together", variant.config) for how in HOW}
            for name, variant in ll.REGISTRY.items()
            if name in ("lora", "pissa", "dora")
        }
    print(f"launches of ours for a block of Llama-3-8B: {whole}")
    if not arguments.dry:
        settings = {"width": WIDTH, "tokens": TOKENS, "r": RANK, "rounds": arguments.rounds, "counted_at": COUNTED}
        write(arguments.out, {"settings": settings, "rows": rows, "block_launches": whole})


if __name__ == "__main__":
    main()
