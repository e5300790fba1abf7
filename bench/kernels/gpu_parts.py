"""What each part of `just gpu-day` runs: by part its cases, by case a function that gives rows of results.

Timers, sizes and the device are arguments, so that all of it runs on a CPU too. What only some parts need is imported
in them: a part is a process of its own, and several of the first are started at once.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import operations
import random_models
import torch
from kernel_times import Limits, Quantiles, Shape, Timer, device_timer, gpu_timer, layers, limits, move
from kernel_times import kernels as kernel_rows
from operations import DTYPES, SEGMENTED, Case
from torch import nn

import lora_lite as ll
from lora_lite.kernels import tuning

Rows = list[dict[str, Any]]
Cases = dict[str, Callable[[], Rows]]

VARIANTS = ("lora", "pissa", "dora", "delora", "eva", "ia3", "ia3_ff", "hra", "antipasto", "road")
METHODS = ("lora", "pissa", "dora", "hra", "ia3", "road", "antipasto")
DECOMPOSING = ("pissa", "antipasto")
# The kernel's name in kernel_times, and whose step in device_model has it.
MODELLED = {
    "shrink": "lora", "expand": "lora", "expand_backward": "lora", "shrink_backward": "lora",
    "row_norm": "dora", "expand_backward_rescale": "dora", "shrink_expand_backward": "hra",
    "scale": "ia3", "scale_backward": "ia3", "rotate": "road", "rotate_backward": "road",
}  # fmt: skip


def long_timer(run: Callable[[], Any]) -> Quantiles:
    """For what takes up to a tenth of a second itself."""
    return gpu_timer(run, ms=1500)


@dataclass(frozen=True)
class Bench:
    """Where to run, how to time, and at which sizes; by default as on a GPU."""

    device: str = "cuda"
    timer: Timer = gpu_timer
    step_timer: Timer = long_timer
    device_timer: Callable[[Callable[[], Any]], float] = device_timer
    cpu_clock: Callable[[], float] = time.process_time
    clock: Callable[[], float] = time.perf_counter
    rounds: int = 30
    """Of twenty small steps, whose CPU time is taken."""
    compiler: str = "inductor"
    shapes: tuple[tuple[int, int, int, int, str, bool], ...] = (
        # M, K, N, R, layout, bias: real ones, then primes, other strides, and ranks beyond one launch
        (1, 1024, 3072, 16, "contiguous", False),
        (800, 1024, 2048, 16, "contiguous", True),
        (2048, 4096, 4096, 16, "contiguous", False),
        (2048, 3072, 1024, 64, "contiguous", False),
        (0, 64, 48, 8, "contiguous", False),
        (7, 61, 67, 1, "strided", True),
        (64, 50, 130, 4, "transposed", False),
        (333, 257, 96, 100, "3-D", False),
        (333, 144, 101, 32, "sliced", True),
        (515, 1000, 1000, 256, "contiguous", False),
        (70, 96, 80, 300, "sliced", True),
    )
    segmented: tuple[tuple[operations.Runs, int, int, int], ...] = SEGMENTED
    dtypes: tuple[torch.dtype, ...] = DTYPES
    small_llama: tuple[int, int] = (256, 2)
    """Width and layers."""
    layer_shapes: tuple[Shape, ...] = (
        Shape(8192, 4096, 4096, 16, "Llama-3.1-8B"),
        Shape(800, 1024, 1024, 16, "Qwen3-0.6B"),
    )
    copied: int = 8192
    """Rows and columns of the matrix by which bandwidth is measured."""
    model_layers: int = 24
    model_sizes: tuple[tuple[str, int], ...] = ()
    tokens: tuple[tuple[int, int], ...] = ((1, 800), (4, 2048))
    """Sequences and tokens in each."""
    modelled_gpu: str | None = None
    """A name of device_model's; None: this machine's."""


# ---- right -----------------------------------------------------------------------------------------------------------


# Of the operations whose kernels have more than two in the block tables, how many.
ROWS = {operations.lowrank_add: 3, operations.shrink_expand: 3}
MOST_ROWS = max(ROWS.values())


def checks(b: Bench) -> Cases:
    """Every operation in every dtype at every shape, with each row of the block tables."""
    found: Cases = {}
    for row, dtype in product(range(MOST_ROWS), b.dtypes):
        of_shapes = [Case(dtype, *shape, device=b.device) for shape in b.shapes]
        of_runs = [Case(dtype, r.rows, K, N, R, runs=r, device=b.device) for r, K, N, R in b.segmented]
        with_dropout = [replace(c, dropout=0.3) for c in (*of_shapes, *of_runs[:4]) if c.M < 1000]
        of_rank = [*of_shapes, *of_runs]
        even = [c for c in of_shapes if c.K % 2 == 0]
        # int8 and 4-bit weights have no dtype of tokens; the latter are rounded to one.
        for operation, cases in {
            operations.lowrank_add: [*of_rank, *with_dropout],
            operations.lowrank_add_together: of_shapes,
            operations.lowrank_add_rescale: of_rank,
            operations.shrink_expand: of_rank,
            operations.scale: of_rank,
            operations.rotate_pairs: of_rank,
            operations.row_norm: [*of_shapes, *of_runs[:1]],
            operations.row_norm_int8: of_shapes if dtype == b.dtypes[0] else [],
            operations.row_norm_4bit: even,
        }.items():
            if row >= ROWS.get(operation, 2):
                continue
            for case in cases:
                name = f"{operation.__name__} {case} row {row}"
                found[name] = partial(_check, operation, case, row)
    return found


def _check(operation: Callable[[Case], operations.Draw], c: Case, row: int) -> Rows:
    torch.manual_seed(0)
    with operations.poisoned(), only_row(row):
        found = operations.errors_of(operation, c)
    worst = max(found, key=lambda name: found[name][0] / found[name][1])
    error, allowed = found[worst]
    of_case = {"operation": operation.__name__, "case": str(c), "dtype": str(c.dtype).removeprefix("torch.")}
    return [{**of_case, "row": row, "worst": worst, "error": error, "allowed": allowed, "right": error <= allowed}]


@contextmanager
def only_row(row: int) -> Iterator[None]:
    """Launches take that row of their block table, or the last, untimed."""
    candidates = tuning.candidates

    def one(*arguments: Any) -> tuning.Rows:
        rows = candidates(*arguments)
        return (rows[min(row, len(rows) - 1)],)

    with mock.patch.object(tuning, "candidates", one):
        yield


def verified(b: Bench) -> Cases:
    """`ll.verify` of every method on a small Llama with random weights, in 16 bit: float32 is what it compares with."""
    return {
        f"{variant} {str(dtype).removeprefix('torch.')}": partial(_verify, b, variant, dtype)
        for variant, dtype in product(VARIANTS, b.dtypes)
        if dtype != torch.float32
    }


def _verify(b: Bench, variant: str, dtype: torch.dtype) -> Rows:
    model = random_models.llama(*b.small_llama, dtype).to(b.device)
    ids = torch.randint(1, 1024, (2, 33), generator=torch.Generator().manual_seed(0)).to(b.device)
    batches = [{"input_ids": ids}] if variant == "eva" else None
    attachment = ll.attach(model, random_models.our_config(variant, 8), calibration_data=batches)
    move(ll.parameters(model))
    backends = {name for name, _ in attachment.backends().values()}
    if backends != {"triton"}:
        raise RuntimeError(f"{variant} runs on {backends}, not on the kernels: {attachment.backends()}")
    rows = ll.verify(model, {"input_ids": ids, "labels": ids})  # raises where a layer is wrong
    worst = max(rows, key=lambda row: row.excess)
    of_case = {"variant": variant, "dtype": str(dtype).removeprefix("torch."), "layers": len(rows)}
    return [{**of_case, "worst": str(worst), "excess": worst.excess}]


# ---- fast ------------------------------------------------------------------------------------------------------------


def layer_times(b: Bench) -> Cases:
    """Times of kernels, of layers beside PEFT's, eager PyTorch and torch.compile's of it, and of the host."""
    found: Cases = {"limits": partial(_limits, b)}
    for s in b.layer_shapes:
        found[f"kernels {_size(s)}"] = partial(_kernels, b, s)
    for method in METHODS:
        found[f"host {method}"] = partial(_host, b, method)
    # What takes a singular value decomposition of a large matrix comes last.
    in_order = sorted(product(b.layer_shapes, METHODS), key=lambda each: each[1] in DECOMPOSING and each[0].K > 1024)
    for s, method in in_order:
        found[f"layer {method} {_size(s)}"] = partial(_layer, b, method, s)
    return found


def _size(s: Shape) -> str:
    return f"M{s.M} K{s.K} N{s.N} R{s.R}"


def _limits(b: Bench) -> Rows:
    return [{"kind": "limits", **asdict(limits(b.timer, b.device, b.copied))}]


def _kernels(b: Bench, s: Shape) -> Rows:
    rows = kernel_rows(s, b.timer, Limits(copy=float("nan"), matmul=float("nan")), b.device)
    return [{"kind": "kernel", **{k: v for k, v in row.items() if not k.startswith("of_")}} for row in rows]


def _host(b: Bench, method: str) -> Rows:
    import host

    steps = host.steps_of(method, "triton", b.device)
    for name in ("eager", "compiled"):
        layer = host.ours(method, "reference", host.model(host.WIDTH, host.WIDTH, device=b.device))
        layer = torch.compile(layer, backend=b.compiler) if name == "compiled" else layer
        steps[name] = host.step_of(layer, host.TOKENS, host.WIDTH)  # type: ignore[arg-type]
    took = host.medians(steps, b.rounds, clock=b.cpu_clock)
    torch._dynamo.reset()
    return [{"kind": "host", "method": method, "us": took}]


def _layer(b: Bench, method: str, s: Shape) -> Rows:
    rows = layers(method, s, b.timer, b.device, b.compiler, b.device_timer)
    torch._dynamo.reset()
    return [{"kind": "layer", **row} for row in rows]


def model_steps(b: Bench) -> Cases:
    """A training step of a language model with LoRA; what has to be compiled comes last."""
    return {
        f"{name} {rows * length} tokens": partial(_model_step, b, name, rows, length)
        for names in (("base", "lora_lite", "peft", "eager"), ("compiled",))
        for rows, length in b.tokens
        for name in names
    }


def _model_step(b: Bench, name: str, rows: int, length: int) -> Rows:
    """Forward, backward and AdamW; the base alone, whose weights are frozen, has gradients of its input only."""
    _free()
    row = _timed_step(b, name, rows, length)  # whose tensors end with it
    _free()
    return [row]


def _timed_step(b: Bench, name: str, rows: int, length: int) -> dict[str, Any]:
    import machine

    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model, trainable = _language_model(b, name)
    x = torch.randn(rows, length, model.config.hidden_size, device=b.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(model.config.vocab_size, (rows, length), device=b.device)
    optimizer = torch.optim.AdamW(trainable or [torch.zeros(1, requires_grad=True)], lr=1e-4)
    call = torch.compile(model, backend=b.compiler, dynamic=False) if name == "compiled" else model

    def step() -> None:
        x.grad = None
        optimizer.zero_grad()
        call(inputs_embeds=x, labels=labels, use_cache=False).loss.backward()
        optimizer.step()

    start = b.clock()
    step()
    first = b.clock() - start
    machine.reset_peak_memory()
    step()
    peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
    median, low, high = b.step_timer(step)
    return {
        "contender": name, "tokens": rows * length, "layers": b.model_layers, "r": 16,
        "trainable": sum(p.numel() for p in trainable), "step_ms": median, "step_ms_20": low, "step_ms_80": high,
        "device_ms": b.device_timer(step), "peak_bytes": peak, "first_step_s": first,
    }  # fmt: skip


def _language_model(b: Bench, name: str) -> tuple[Any, list[Any]]:
    """The model with its adapter on all linears of each block, and what trains."""
    from peft import get_peft_model
    from rivals import peft_config

    with torch.device(b.device):
        model: nn.Module = random_models.qwen(b.model_layers, **dict(b.model_sizes)).to(torch.bfloat16)
    model.requires_grad_(False).train()
    if name == "peft":
        model = get_peft_model(model, peft_config("lora", 16, 32.0, random_models.TARGETS))  # type: ignore[arg-type]
    elif name != "base":
        ll.attach(model, random_models.our_config("lora", 16), backend="triton" if name == "lora_lite" else "reference")
    trainable = [p for p in model.parameters() if p.requires_grad]
    move(trainable)
    return model, trainable


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- as modelled -----------------------------------------------------------------------------------------------------


def modelled(b: Bench) -> Cases:
    """What device_model says of the launches and layers that `layer_times` times."""
    return {
        f"{variant} {_size(s)}": partial(_modelled, b, variant, s)
        for s in b.layer_shapes
        for variant in ("lora", "dora", "hra", "ia3", "road")
    }


def _modelled(b: Bench, variant: str, s: Shape) -> Rows:
    import device_model  # which takes the interpreter away

    here = b.modelled_gpu or torch.cuda.get_device_name()
    gpu = next((name for name in device_model.GPUS if name in here), None)
    if gpu is None:
        known = ", ".join(device_model.GPUS)
        raise RuntimeError(f"device_model.GPUS lacks {here!r}; it has {known}. Add what its data sheet says")
    row = device_model.row(gpu, variant, s.M, s.K, s.R, device_model.compiled_resources())
    us = {kernel: found["us"] for kernel, found in row["by_kernel"].items() if MODELLED.get(kernel) == variant}
    return [{"variant": variant, "M": s.M, "K": s.K, "N": s.N, "R": s.R, "gpu": gpu, "us": row["us"], "kernels": us}]


@dataclass(frozen=True)
class Part:
    """Seconds that it may take, processes that share its cases (more than one where nothing is timed), its cases."""

    seconds: int
    workers: int
    cases: Callable[[Bench], Cases]


PARTS = {
    "kernels": Part(110, 16, checks),
    "verify": Part(45, 3, verified),
    "modelled": Part(20, 1, modelled),
    "layers": Part(185, 1, layer_times),
    "model": Part(160, 1, model_steps),
}
