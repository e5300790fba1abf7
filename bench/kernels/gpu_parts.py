"""What each part of `just gpu-day` runs: by part its cases, by case a function that gives rows of results.

Timers, sizes and the device are arguments, so that all of it runs on a CPU too. What only some parts need is imported
in them: a part is a process of its own, and several of the first are started at once.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import operations
import random_models
import torch
from kernel_times import (
    Limits,
    Quantiles,
    Shape,
    Timer,
    by_launch,
    device_timer,
    gpu_timer,
    kernel_timer,
    layers,
    limits,
    move,
)
from kernel_times import kernels as kernel_rows
from operations import DTYPES, SEGMENTED, Case
from torch import nn

import lora_lite as ll
from lora_lite.kernels import tuning

Rows = list[dict[str, Any]]
Cases = dict[str, Callable[[], Rows]]

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


def step_profiler(run: Callable[[], Any]) -> dict[str, float]:
    """Of thousands of launches, which take seconds to sort."""
    return by_launch(run, calls=2)


@dataclass(frozen=True)
class Bench:
    """Where to run, how to time, and at which sizes; by default as on a GPU."""

    device: str = "cuda"
    timer: Timer = gpu_timer
    kernel_timer: Timer = kernel_timer
    step_timer: Timer = long_timer
    device_timer: Callable[[Callable[[], Any]], float] = device_timer
    profiler: Callable[[Callable[[], Any]], dict[str, float]] = step_profiler
    cpu_clock: Callable[[], float] = time.process_time
    clock: Callable[[], float] = time.perf_counter
    rounds: int = 15
    """Of twenty small steps, whose CPU time is taken."""
    compiler: str = "inductor"
    """torch.compile's backend; empty: nothing is compiled by it."""
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


def _ids(b: Bench, seed: int = 0) -> torch.Tensor:
    return torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(seed)).to(b.device)


def verified(b: Bench) -> Cases:
    """`ll.verify` of every method on a small Llama with random weights, in 16 bit: float32 is what it compares with."""
    return {
        f"{variant} {str(dtype).removeprefix('torch.')}": partial(_verify, b, variant, dtype)
        for variant, dtype in product(random_models.VARIANTS, b.dtypes)
        if dtype != torch.float32
    }


def _verify(b: Bench, variant: str, dtype: torch.dtype) -> Rows:
    model = random_models.llama(*b.small_llama, dtype).to(b.device)
    ids = _ids(b)
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


# Of losses and gradients of a whole model, whose own layers round too.
ALLOWED = {torch.bfloat16: 5e-2, torch.float32: 1e-3}


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def uses(b: Bench) -> Cases:
    """Training as people run it: a step of a small model each way, beside the plain step, or the reference's."""
    found: Cases = {}
    for variant in ("lora", "dora", "ia3", "hra", "road"):
        for how in ("compiled", "captured", "on a stream", "deterministic"):
            if b.compiler if how == "compiled" else b.device == "cuda" or how == "deterministic":
                found[f"{how} {variant}"] = partial(_use, b, how, variant)
        found[f"without waits {variant}"] = partial(_without_waits, b, variant)
        for how in ("autocast", "tf32"):
            found[f"{how} {variant}"] = partial(_beside_reference, b, how, variant)
        found[f"mixture {variant}"] = partial(_mixture, b, variant)
    found["an adapter for each row"] = partial(_beside_reference, b, "an adapter for each row", "lora")
    return found


def _adapted(b: Bench, variant: str, dtype: torch.dtype, backend: str = "triton") -> nn.Module:
    model = random_models.llama(*b.small_llama, dtype).to(b.device)
    ll.attach(model, random_models.our_config(variant, 8), backend=backend)
    torch.manual_seed(1)
    move(ll.parameters(model))
    return model


def _step(model: Any, call: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the adapter's gradients."""
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, ll.parameters(model))]


def _compared(got: list[torch.Tensor], want: list[torch.Tensor], allowed: float, **of_case: Any) -> dict[str, Any]:
    errors = [operations.error(a, b) for a, b in zip(got, want, strict=True)]
    worst = max(errors, key=lambda e: float("inf") if e != e else e)
    return {**of_case, "error": worst, "allowed": allowed, "right": worst <= allowed}


def _use(b: Bench, how: str, variant: str) -> Rows:
    rows = []
    for dtype, allowed in ALLOWED.items():
        model = _adapted(b, variant, dtype)
        first, second = _ids(b), _ids(b, 1)
        for _ in range(3):  # the first are recorded
            plain = _step(model, model, first)
        want = _step(model, model, second)
        if how == "compiled":
            got = _step(model, torch.compile(model, backend=b.compiler), second)
        elif how == "captured":
            got = _captured(model, first, second)
        elif how == "on a stream":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = [_step(model, model, ids) for ids in (first, second)][1]
            torch.cuda.current_stream().wait_stream(stream)
        else:
            fixed = torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
            with setting(*fixed, True):
                got, again = _step(model, model, second), _step(model, model, second)
            if not all(map(torch.equal, got, again)):
                raise RuntimeError("two steps under use_deterministic_algorithms differ")
        if all(map(torch.equal, plain, want)):
            raise RuntimeError("two batches gave the same: what was compared?")
        name = str(dtype).removeprefix("torch.")
        rows.append(_compared(got, want, allowed, use=how, variant=variant, dtype=name))
        torch._dynamo.reset()
    return rows


def _captured(model: Any, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """A step as a CUDA graph, captured with one batch and replayed with another."""
    ids, got = first.clone(), []

    def step() -> None:
        got[:] = _step(model, model, ids)

    replay = as_graph(step)
    ids.copy_(second)
    replay()
    torch.cuda.synchronize()
    return got


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """The same as a CUDA graph, captured after what a first run chooses has been chosen."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _without_waits(b: Bench, variant: str) -> Rows:
    """Each adapted layer's step, while whatever waits for the GPU raises."""
    model = _adapted(b, variant, torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features != 1024]
    inputs = [torch.randn(66, layer.in_features, device=b.device, dtype=torch.bfloat16) for layer in layers]

    def step() -> None:
        outputs = [layer(x.requires_grad_()) for layer, x in zip(layers, inputs, strict=True)]
        torch.stack([y.sum() for y in outputs]).sum().backward()

    step(), step(), step()
    if b.device == "cuda":
        with setting(torch.cuda.get_sync_debug_mode, torch.cuda.set_sync_debug_mode, "error"):
            step()
    return [{"use": "without waits", "variant": variant, "dtype": "bfloat16", "layers": len(layers), "right": True}]


def _beside_reference(b: Bench, how: str, variant: str) -> Rows:
    """Of a float32 model: under autocast, with TF32 allowed; or with an adapter for each row of a batch."""
    found = []
    for backend in ("triton", "reference"):
        model = _adapted(b, variant, torch.float32, backend)
        if how == "an adapter for each row":
            ll.attach(model, random_models.our_config(variant, 4), backend=backend, name="other")
            torch.manual_seed(2)
            move(ll.parameters(model))
            ll.use(model, ["other", "default"])
        with (
            torch.autocast(b.device, torch.bfloat16, enabled=how == "autocast"),
            setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high")
            if how == "tf32" and backend == "triton"
            else nullcontext(),
        ):
            found.append([_step(model, model, _ids(b)) for _ in range(3)][-1])
    allowed = {"autocast": 5e-2, "tf32": 1e-2}.get(how, 1e-3)
    return [_compared(*found, allowed, use=how, variant=variant, dtype="float32")]


def _mixture(b: Bench, variant: str) -> Rows:
    """`ll.verify` of the method on a mixture's stacks of weights."""
    model = random_models.qwen_moe(8, torch.bfloat16, width=64).to(b.device)
    config = ll.REGISTRY[variant].config.from_common(r=8, target_roles=(), target_names=(r"experts\.",))
    attachment = ll.attach(model, config, backend="triton")
    move(ll.parameters(model))
    rows = ll.verify(model, {"input_ids": _ids(b), "labels": _ids(b)})
    if len(rows) != len(attachment.adapters):
        raise RuntimeError(f"{len(rows)} of {len(attachment.adapters)} layers were verified")
    worst = max(row.excess for row in rows)
    return [{"use": "mixture", "variant": variant, "dtype": "bfloat16", "excess": worst, "right": worst <= 1}]


# ---- fast ------------------------------------------------------------------------------------------------------------


def layer_times(b: Bench) -> Cases:
    """Times of kernels, of layers beside PEFT's, eager PyTorch and torch.compile's of it, and of the host."""
    found: Cases = {"limits": partial(_limits, b)}
    for s in b.layer_shapes:
        found[f"kernels {_size(s)}"] = partial(_kernels, b, s)
    found["mixture"] = partial(_mixture_times, b)
    for method in random_models.METHODS:
        for s in b.layer_shapes:
            found[f"layer {method} {_size(s)}"] = partial(_layer, b, method, s)
    for method in random_models.METHODS:
        found[f"host {method}"] = partial(_host, b, method)
    # What takes a singular value decomposition of a large matrix comes last.
    late = [f"layer {method} {_size(s)}" for s in b.layer_shapes if s.K > 1024 for method in DECOMPOSING]
    found |= {name: found.pop(name) for name in late}
    return found


def _size(s: Shape) -> str:
    return f"M{s.M} K{s.K} N{s.N} R{s.R}"


def _limits(b: Bench) -> Rows:
    return [{"kind": "limits", **asdict(limits(b.timer, b.device, b.copied))}]


def _kernels(b: Bench, s: Shape) -> Rows:
    rows = kernel_rows(s, b.kernel_timer, Limits(copy=float("nan"), matmul=float("nan")), b.device)
    return [{"kind": "kernel", **{k: v for k, v in row.items() if not k.startswith("of_")}} for row in rows]


def _host(b: Bench, method: str) -> Rows:
    import host

    steps = host.steps_of(method, "triton", b.device)
    for name in ("eager", "compiled") if b.compiler else ("eager",):
        model = host.ours(method, "reference", host.model(host.WIDTH, host.WIDTH, device=b.device))
        if name == "compiled":
            model["layer"].compile(backend=b.compiler)  # type: ignore[index]
        steps[name] = host.step_of(model, host.TOKENS, host.WIDTH)
    took = host.medians(steps, b.rounds, clock=b.cpu_clock)
    torch._dynamo.reset()
    return [{"kind": "host", "method": method, "us": took}]


def _layer(b: Bench, method: str, s: Shape) -> Rows:
    rows = layers(method, s, b.timer, b.device, b.compiler, b.device_timer)
    torch._dynamo.reset()
    return [{"kind": "layer", **row} for row in rows]


def _mixture_times(b: Bench) -> Rows:
    """A step of a mixture with LoRA on its stacks, beside PEFT's of the same parameters."""
    from rivals import mixtures

    experts, width, tokens = (32, 1024, 2048) if b.device == "cuda" else (4, 64, 16)
    x = torch.randn(4, tokens // 4, width, device=b.device, dtype=torch.bfloat16, requires_grad=True)
    rows = []
    for name, model in mixtures(experts, torch.bfloat16, 16, width, b.device).items():

        def step(model: Any = model) -> None:
            x.grad = None
            model.zero_grad()
            model(inputs_embeds=x).logits.float().square().mean().backward()

        step()
        row = {"kind": "mixture", "contender": name, "experts": experts, "width": width, "tokens": tokens, "r": 16}
        rows.append({**row, "step_ms": b.timer(step)[0], "device_ms": b.device_timer(step)})
    return rows


STEPS = (
    ("base", "lora_lite", "peft", "eager"),
    ("base captured", "lora_lite captured", "peft captured"),
    ("eager compiled", "lora_lite compiled"),
)
MOST_KERNELS = 20  # of a step, whose times are kept


def model_steps(b: Bench) -> Cases:
    """A training step of a language model with LoRA, by itself, as a CUDA graph, and compiled."""
    return {
        f"{name} {rows * length} tokens": partial(_model_step, b, name, rows, length)
        for names in STEPS
        for rows, length in b.tokens
        for name in names
        if (b.device == "cuda" or "captured" not in name) and (b.compiler or "compiled" not in name)
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
    model, trainable = _language_model(b, name.split()[0])
    x = torch.randn(rows, length, model.config.hidden_size, device=b.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(model.config.vocab_size, (rows, length), device=b.device)
    captured = name.endswith("captured")
    trains = trainable or [torch.zeros(1, requires_grad=True, device=b.device)]
    optimizer = torch.optim.AdamW(trains, lr=1e-4, capturable=captured)
    call = torch.compile(model, backend=b.compiler, dynamic=False) if name.endswith("compiled") else model

    def step() -> None:
        x.grad = None
        optimizer.zero_grad()
        call(inputs_embeds=x, labels=labels, use_cache=False).loss.backward()
        optimizer.step()

    start = b.clock()
    if captured:
        step = as_graph(step)
    step()
    first = b.clock() - start
    machine.reset_peak_memory()
    step()
    peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
    median, low, high = b.step_timer(step)
    of_kernels = b.profiler(step)
    most = sorted(of_kernels.items(), key=lambda item: -item[1])[:MOST_KERNELS]
    return {
        "contender": name, "tokens": rows * length, "layers": b.model_layers, "r": 16,
        "trainable": sum(p.numel() for p in trainable), "step_ms": median, "step_ms_20": low, "step_ms_80": high,
        "device_ms": sum(of_kernels.values()) / 1e3, "peak_bytes": peak, "first_step_s": first,
        "us_of_kernels": {name: round(us, 1) for name, us in most},
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
    "kernels": Part(140, 16, checks),
    "verify": Part(35, 8, verified),
    "uses": Part(70, 8, uses),
    "modelled": Part(15, 1, modelled),
    "layers": Part(125, 1, layer_times),
    "model": Part(140, 1, model_steps),
}
