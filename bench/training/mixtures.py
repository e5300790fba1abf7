"""A training step of a mixture of experts with LoRA on its stacks, beside PEFT's on the same parameters.

`just bench-adapters --models qwen3_moe`. A random Qwen3-MoE. CPU seconds of the process on one thread, which hold still
where wall time does not: the base, ours and PEFT's take turns, each round gives an overhead from neighbouring steps,
and the median counts. Memory: bytes that autograd holds for the backward beyond the base's, each storage once.
"""

import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table
from rivals import mixtures
from torch import Tensor, nn

NAME = "qwen3_moe"


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, so that the process's CPU time is that of the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step(model: nn.Module, x: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    x.grad = None
    model.zero_grad()
    start = time.process_time()
    model(inputs_embeds=x).logits.float().square().mean().backward()
    return time.process_time() - start


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd holds for the backward, the model's own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(inputs_embeds=x).logits.float().square().mean()
        total = sum(held.values())
        del loss
    return total


def measure(experts: int, dtype: torch.dtype, r: int, tokens: tuple[int, int], steps: int) -> dict[str, Any]:
    """A row: CPU seconds of each model's step, and what ours and PEFT's add to the base, bytes saved too."""
    with one_thread():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models = mixtures(experts, dtype, r)
        width = models["base"].config.hidden_size  # type: ignore[union-attr]
        x = torch.randn(*tokens, width, dtype=dtype, requires_grad=True)
        saved = {side: saved_bytes(model, x) for side, model in models.items()}
        times: dict[str, list[float]] = {side: [] for side in models}
        for i in range(steps + 2):  # two that do not count
            for side, model in models.items():
                seconds = step(model, x)
                if i >= 2:
                    times[side].append(seconds)
    over = {
        side: statistics.median(a - b for a, b in zip(times[side], times["base"], strict=True))
        for side in ("ours", "peft")
    }
    more = {side: saved[side] - saved["base"] for side in over}
    return {
        "model": NAME, "experts": experts, "dtype": str(dtype).removeprefix("torch."), "r": r,
        "tokens": tokens[0] * tokens[1],
        "cpu_seconds": {side: statistics.median(each) for side, each in times.items()},
        "overhead": over, "overhead_ratio": over["ours"] / over["peft"],
        "saved_bytes": more, "saved_ratio": more["ours"] / more["peft"], "all_cpu_seconds": times,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(
        title="LoRA on a mixture's experts, ours / PEFT's: CPU ms a step beside the base's, bytes saved beside it"
    )
    for heading in ("experts", "dtype", "base ms", "overhead ms", "ratio", "saved MiB", "ratio"):
        out.add_column(heading, justify="right")
    for row in rows:
        over, saved = row["overhead"], row["saved_bytes"]
        out.add_row(
            str(row["experts"]), row["dtype"], f"{1e3 * row['cpu_seconds']['base']:.0f}",
            f"{1e3 * over['ours']:.1f} / {1e3 * over['peft']:.1f}", f"{row['overhead_ratio']:.2f}",
            f"{saved['ours'] / 2**20:.1f} / {saved['peft'] / 2**20:.1f}", f"{row['saved_ratio']:.2f}",
        )  # fmt: skip
    return out
