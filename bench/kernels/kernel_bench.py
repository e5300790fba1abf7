"""How much each adapter's step moves, and on a GPU how long it takes, against what one would use instead: `just
bench-kernels`.

Without a GPU: bytes counted (see traffic.py) at M = 8192 tokens, K = N = 4096, in bf16, beside the lower bound, eager
PyTorch, PEFT's layer and the in-place addmm_ formulation, and the time that those bytes would take on public figures of
bandwidth: a model, not a measurement. The base layer's own products are left out everywhere: all have them alike.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined

import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import kernel_times
import machine
import peft
import tyro
from kernel_times import GROUP_SIZE, SCALE, Shape
from operations import partner
from rich.console import Console
from rich.table import Table
from rivals import peft_config
from torch import Tensor
from traffic import OperatorsCounted, Traffic, kernels_counted

from lora_lite.kernels import ops, tuning
from lora_lite.segments import Segments

# Bandwidth in TB/s and dense bf16 in TFLOP/s, without sparsity, from the vendors' data sheets.
GPUS = {
    "A100 SXM 80 GB": (2.039, 312.0, "NVIDIA A100 Tensor Core GPU datasheet, 2022"),
    "H100 SXM": (3.35, 989.4, "NVIDIA H100 Tensor Core GPU datasheet, 2023"),
    "H200 SXM": (4.8, 989.4, "NVIDIA H200 Tensor Core GPU datasheet, 2024"),
    "B200": (8.0, 2250.0, "NVIDIA DGX B200 datasheet, 2024 (an eighth of the system)"),
    "MI300X": (5.3, 1307.4, "AMD Instinct MI300X accelerator data sheet, 2023"),
}

BY_KERNEL = tuple(name for name in tuning.TABLE["nvidia", 2] if not name.endswith(("_dropout", "_grouped", "_float32")))

# Passes over a token-sized tensor that a post-hook adapter can't avoid; W once for DoRA's norm.
BOUND = {"lora": 7, "dora": 9, "hra": 5, "ia3": 5, "road": 5}
TARGETS = {
    ("lora", 16): 1.10, ("lora", 32): 1.10, ("lora", 64): 1.20, ("dora", 16): 1.15, ("hra", 8): 1.45, ("hra", 16): 1.45,
    ("ia3", 1): 1.05, ("road", 1): 1.05,
}  # fmt: skip


@dataclass
class Tensors:
    """One layer's tensors: x and y, the gradients that arrive, and the adapter's parameters in float32: g is a gain, or
    the cosines to the sines s."""

    x: Tensor
    y: Tensor
    dy: Tensor
    dx_base: Tensor
    A: Tensor
    B: Tensor
    g: Tensor
    s: Tensor
    W: Tensor

    @classmethod
    def make(cls, s: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> "Tensors":
        def t(*shape: int, dtype: torch.dtype = dtype, grad: bool = False) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device).requires_grad_(grad)

        f32 = torch.float32
        return cls(
            x=t(s.M, s.K, grad=True), y=t(s.M, s.N, grad=True), dy=t(s.M, s.N), dx_base=t(s.M, s.K),
            A=t(s.R, s.K, dtype=f32, grad=True), B=t(s.N, s.R, dtype=f32, grad=True), g=t(s.N, dtype=f32, grad=True),
            s=t(s.N, dtype=f32, grad=True), W=t(s.N, s.K),
        )  # fmt: skip


def lora_lite_step(variant: str, t: Tensors) -> None:
    """Forward and backward of the adapter's own operators, around a base layer that has run already."""
    if variant == "ia3":
        out = ops.scale(t.y, t.g)
        torch.autograd.grad(out, [t.y, t.g], t.dy)
        return
    if variant == "road":
        torch.autograd.grad(ops.rotate_pairs(t.y, t.g, t.s, GROUP_SIZE), [t.y, t.g, t.s], t.dy)
        return
    if variant == "hra":
        torch.autograd.grad(ops.shrink_expand(t.x, t.A, t.B), [t.x, t.A, t.B], t.dx_base)
        return
    x, h = ops.shrink(t.x, t.A)
    if variant == "dora":
        g = t.g / ops.row_norm(t.W, t.A, t.B, SCALE, t.g.detach())
        out = ops.expand_add_rescale(t.y, h, t.B, SCALE, g, None)
    else:
        out = ops.expand_add(t.y, h, t.B, SCALE)
    wanted = [t.x, t.y, t.A, t.B] + ([t.g] if variant == "dora" else [])
    torch.autograd.grad([out, x], wanted, [t.dy, t.dx_base])


def eager_step(variant: str, t: Tensors) -> None:
    """The formula as one writes it in PyTorch, with autograd adding dx to the base layer's."""
    A, B, g = t.A.to(t.x.dtype), t.B.to(t.x.dtype), t.g.to(t.x.dtype)
    if variant == "ia3":
        torch.autograd.grad(t.y * g, [t.y, t.g], t.dy)
        return
    if variant == "road":
        out = t.y * g + partner(t.y, GROUP_SIZE) * t.s.to(t.y.dtype)
        torch.autograd.grad(out, [t.y, t.g, t.s], t.dy)
        return
    if variant == "hra":
        torch.autograd.grad(t.x + (t.x @ A.t()) @ B.t(), [t.x, t.A, t.B], t.dx_base)
        return
    update = SCALE * ((t.x @ A.t()) @ B.t())
    out, wanted = t.y + update, [t.x, t.y, t.A, t.B]
    if variant == "dora":
        norm = (t.W + SCALE * (B @ A)).norm(dim=1).detach()
        out, wanted = (g / norm) * out, [*wanted, t.g]
    torch.autograd.grad([out, t.x.view_as(t.x)], wanted, [t.dy, t.dx_base])


@torch.no_grad()
def addmm_step(variant: str, t: Tensors) -> None:
    """LoRA with both passes written out and addmm_ in place, the best that separate products can do."""
    A, B = t.A.to(t.x.dtype), t.B.to(t.x.dtype)
    h = t.x @ A.t()
    t.y.addmm_(h, B.t(), alpha=SCALE)
    dh = (t.dy @ B) * SCALE
    (t.dy.t() @ h) * SCALE
    dh.t() @ t.x
    t.dx_base.addmm_(dh, A)


def peft_step(variant: str, t: Tensors) -> Callable[[], None]:
    """PEFT's layer around an nn.Linear. Its base products are recognised by W's shape and left out."""
    (N, K), r = t.W.shape, t.A.shape[0]
    base = torch.nn.Linear(K, N, bias=False, device=t.W.device, dtype=t.W.dtype)
    model = torch.nn.ModuleDict({"k_proj": base})
    config = peft_config(variant, r, SCALE * r, ["k_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = peft.inject_adapter_in_model(config, model)["k_proj"]
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def run() -> None:
        torch.autograd.grad(layer(t.x), [t.x, *parameters], t.dy)

    return run


def flops(variant: str, s: Shape) -> int:
    """Multiplications and additions of the adapter's products in a step."""
    per_token = {"ia3": 3 * s.N, "road": 10 * s.N, "hra": 6 * s.R * (s.K + s.K)}.get(variant, 6 * s.R * (s.K + s.N))
    return s.M * per_token + (2 * s.N * s.K * s.R if variant == "dora" else 0)


def kernel_flops(kernel: str, variant: str, s: Shape) -> int:
    """Of one launch; 0 for the sums of parts, which only move bytes."""
    return {
        "shrink": 2 * s.M * s.K * s.R,
        "expand": 2 * s.M * s.N * s.R,
        "expand_backward": 4 * s.M * s.N * s.R,
        "shrink_backward": (6 if variant == "hra" else 4) * s.M * s.K * s.R,
        "row_norm": 2 * s.N * s.K * s.R,
        "scale": s.M * s.N,
        "scale_backward": 2 * s.M * s.N,
        "rotate": 3 * s.M * s.N,
        "rotate_backward": 7 * s.M * s.N,
    }.get(kernel, 0)


def bound(variant: str, s: Shape) -> int:
    """Bytes that must move once, in bf16."""
    width = {"hra": s.K, "ia3": s.N, "road": s.N}.get(variant, s.K)
    return 2 * (BOUND[variant] * s.M * width + (s.N * s.K if variant == "dora" else 0))


def counted(variant: str, s: Shape) -> dict[str, Any]:
    """One row: bytes of each contender for one step."""
    torch.manual_seed(0)
    t = Tensors.make(s, "cpu")
    with kernels_counted(large=s.M * min(s.K, s.N) // 2 if variant != "dora" else s.N * s.K // 2) as traffic:
        lora_lite_step(variant, t)
    rivals: dict[str, Traffic | None] = {"addmm": None}
    for name in ("eager", "peft", *(["addmm"] if variant == "lora" else [])):
        t = Tensors.make(s, "meta")
        run = {"eager": lambda t=t: eager_step(variant, t), "addmm": lambda t=t: addmm_step(variant, t)}.get(name)
        run = run or peft_step(variant, t)
        with OperatorsCounted(t.W) as mode:
            run()
        rivals[name] = mode.traffic
    least = bound(variant, s)
    target = TARGETS.get((variant, s.R))
    kernels: dict[str, dict[str, int]] = {}
    for kernel, launches in traffic.launches.items():
        if operations := launches * kernel_flops(kernel, variant, s):
            moved = sum(count for (name, _), count in traffic.bytes.items() if name == kernel)
            kernels[kernel] = {"bytes": moved, "flops": operations}
    return {
        "variant": variant,
        **{letter: getattr(s, letter) for letter in "MKNR"},
        "bound": least,
        "lora_lite": traffic.total,
        **{name: found and found.total for name, found in rivals.items()},
        "target": target,
        "meets_target": target is None or traffic.total <= target * least,
        "again_from_cache": traffic.again,
        "fewest_programs": traffic.fewest_programs,
        "flops": flops(variant, s),
        "kernels": kernels,
        "by_kernel": {f"{kernel}.{tensor}": count for (kernel, tensor), count in traffic.bytes.items()},
        "modelled_us": {
            gpu: round(1e6 * max(traffic.total / (bandwidth * 1e12), flops(variant, s) / (rate * 1e12)), 1)
            for gpu, (bandwidth, rate, _) in GPUS.items()
        },
    }


@dataclass(frozen=True)
class Mixture:
    """A mixture's layer: stacks of `experts` matrices, each token visiting `visited` of them."""

    experts: int = 128
    visited: int = 8
    tokens: int = 4096
    stacks: tuple[tuple[int, int], ...] = ((2048, 1536), (768, 2048))
    """(K, N) of gate_up and down."""
    R: int = 16


def counted_mixture(m: Mixture) -> dict[str, Any]:
    """Bytes of LoRA on a mixture layer's stacks: by segments of rows; eager, expert by expert; and as PEFT does, who
    builds W + B A for each expert, forward and backward (what the base product then does for its gradient left out)."""
    torch.manual_seed(0)
    M, f32, bf16 = m.tokens * m.visited, torch.float32, torch.bfloat16
    ends = torch.sort(torch.randint(m.experts, (M,))).values.bincount(minlength=m.experts).cumsum(0).int()
    totals: Counter[str] = Counter()
    for K, N in m.stacks:

        def t(*shape: int, device: str, dtype: torch.dtype = bf16) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()

        def tensors(device: str, K: int = K, N: int = N) -> tuple[Tensor, ...]:
            A, B = t(m.experts, m.R, K, device=device, dtype=f32), t(m.experts, N, m.R, device=device, dtype=f32)
            return t(M, K, device=device), t(M, N, device=device), A, B

        x, y, A, B = tensors("cpu")
        with kernels_counted(large=M * min(K, N) // 2) as traffic:
            segments = Segments(ends, whole=True)
            tap, h = ops.shrink(x, A, 0.0, segments)
            out = ops.expand_add(y, h, B, SCALE, segments)
            torch.autograd.grad([out, tap], [x, y, A, B], [torch.randn_like(y), torch.randn_like(x)])
        totals["lora_lite"] += traffic.total
        totals["bound"] += 2 * M * (4 * K + 3 * N)

        x, y, A, B = tensors("meta")
        W = torch.empty(m.experts, N, K, dtype=bf16, device="meta")
        with OperatorsCounted(W[0]) as mode:
            parts = zip(x.split(M // m.experts), y.split(M // m.experts), A.to(bf16), B.to(bf16), strict=True)
            out = torch.cat([ys + SCALE * ((xs @ a.t()) @ b.t()) for xs, ys, a, b in parts])
            torch.autograd.grad([out, x.view_as(x)], [x, y, A, B], [torch.empty_like(y), torch.empty_like(x)])
        totals["eager"] += mode.traffic.total
        with OperatorsCounted(torch.empty(1, 1, device="meta")) as mode:
            built = W + (SCALE * torch.bmm(B, A)).to(bf16)
            torch.autograd.grad(built, [A, B], torch.empty_like(built))
        totals["peft"] += mode.traffic.total
    return {**vars(m), **totals}


@dataclass
class Settings:
    """Without a GPU, count the bytes of every adapter's training step; on one, time kernels and layers."""

    tokens: int = 8192
    width: int = 4096
    """K and N."""
    cases: tuple[str, ...] = (
        "lora:16",
        "lora:32",
        "lora:64",
        "lora:128",
        "lora:256",
        "dora:16",
        "hra:8",
        "hra:16",
        "ia3:1",
        "road:1",
    )
    """variant:rank; lora stands for PiSSA, DeLoRA, EVA and AntiPaSTO too, at their number of columns."""
    models: tuple[str, ...] = tuple(kernel_times.PROJECTIONS)
    """On a GPU, whose projections."""
    gpu_tokens: tuple[int, ...] = kernel_times.TOKENS
    gpu_ranks: tuple[int, ...] = kernel_times.RANKS
    save: bool = True
    """Write bench/results/kernel_traffic.json, or kernel_times.json on a GPU."""


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Bytes of one training step of one layer, counted, as multiples of the lower bound")
    headings = ["variant", "r", "bound MB", "lora-lite", "target", "addmm_", "eager", "PEFT", "again from cache"]
    for heading in [*headings, "programs", "GFLOP", "FLOP/byte", *(f"{gpu} (model)" for gpu in GPUS)]:
        table.add_column(heading, justify="right")
    for row in rows:
        ratios = [f"{row[name] / row['bound']:.2f}" if row[name] else "–" for name in ("addmm", "eager", "peft")]
        table.add_row(
            row["variant"], str(row["R"]), f"{row['bound'] / 1e6:.0f}", f"{row['lora_lite'] / row['bound']:.3f}",
            f"{row['target']}" if row["target"] else "–", *ratios, f"{row['again_from_cache'] / row['bound']:.2f}",
            str(row["fewest_programs"]), f"{row['flops'] / 1e9:.2f}", f"{row['flops'] / row['lora_lite']:.1f}",
            *(f"{us} µs" for us in row["modelled_us"].values()),
            style="" if row["meets_target"] else "red",
        )  # fmt: skip
    Console(width=220).print(table)


def show_compiled(rank: int = 16) -> None:
    """What `just kernels-report` read from the machine code of the rows that are taken untimed, in bf16."""
    result = machine.read(machine.RESULTS / "kernels_report.json")
    architectures = dict.fromkeys(row["architecture"] for row in result["rows"])
    table = Table(title=f"Compiled for r={rank}, bf16: registers a thread / KiB of shared memory / occupancy, and dots")
    for heading in ("kernel", *architectures):
        table.add_column(heading)
    for kernel in BY_KERNEL:
        cells = {}
        for row in result["rows"]:
            if (row["kernel"], row["rank"], row["dtype"]) == (kernel, rank, "bfloat16"):
                used = f"{row['registers']} / {row['shared'] / 1024:.0f} / {row['occupancy']:.0%}, {row['dot_kind']}"
                cells.setdefault(row["architecture"], used)
        table.add_row(kernel, *(cells.get(name, "–") for name in architectures))
    Console(width=220).print(table)


def timed(models: tuple[str, ...], tokens: tuple[int, ...], ranks: tuple[int, ...], save: bool) -> int:
    """On a GPU: every kernel and every layer at every shape; not 0 where a result is wrong."""
    limit = kernel_times.limits(kernel_times.gpu_timer, "cuda")
    rows: dict[str, list[dict[str, Any]]] = {"kernels": [], "layers": []}
    for shape in kernel_times.shapes(tokens, ranks):
        if shape.model in models:
            rows["kernels"] += kernel_times.kernels(shape, kernel_times.gpu_timer, limit, "cuda")
            for variant in ("lora", "dora", "hra", "ia3", "road"):
                rows["layers"] += kernel_times.layers(variant, shape, kernel_times.gpu_timer, "cuda")
            show_times(rows)
            if save:  # after each shape: a run of hours may be cut short
                result = {"kind": "timed", "limits": vars(limit), **rows}
                machine.write(machine.RESULTS / "kernel_times.json", result, compact=True)
    return 0 if all(row["right"] for table in rows.values() for row in table) else 1


def show_times(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The last shape's rows; a wrong result in red."""
    shown = {
        "kernels": ("kernel", "M", "K", "N", "R", "ms", "gb_per_s", "of_copy", "of_roofline", "error"),
        "layers": ("contender", "variant", "M", "K", "N", "R", "forward_ms", "backward_ms", "both_ms", "peak_bytes"),
    }
    for name, headings in shown.items():
        last = [row for row in rows[name] if all(row[k] == rows[name][-1][k] for k in ("model", "M", "K", "N", "R"))]
        table = Table(title=f"{name}: {last[-1]['model']}" if last else name)
        for heading in headings:
            table.add_column(heading)
        for row in last:
            cells = (f"{row[h]:.3g}" if isinstance(row[h], float) else str(row[h]) for h in headings)
            table.add_row(*cells, style="" if row["right"] else "red")
        Console(width=150).print(table)


def main(s: Settings) -> int:
    if torch.cuda.is_available():
        return timed(s.models, s.gpu_tokens, s.gpu_ranks, s.save)
    cases = [(name, int(rank)) for name, rank in (case.split(":") for case in s.cases)]
    shapes = [(name, Shape(s.tokens, s.width, s.width, rank)) for name, rank in cases]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(counted, *zip(*shapes, strict=True)))
    show(rows)
    mixture = counted_mixture(Mixture())
    ratios = ", ".join(f"{name} {mixture[name] / mixture['bound']:.2f}" for name in ("lora_lite", "eager", "peft"))
    print(f"A mixture's layer ({mixture['experts']} experts): bound {mixture['bound'] / 1e6:.0f} MB; {ratios}")
    show_compiled()
    if s.save:
        sources = {gpu: {"TB/s": b, "TFLOP/s": f, "source": source} for gpu, (b, f, source) in GPUS.items()}
        machine.write(
            machine.RESULTS / "kernel_traffic.json",
            {"kind": "counted", "gpus": sources, "rows": rows, "mixture": mixture},
            compact=True,
        )
    return 0 if all(row["meets_target"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
