"""A model of an adapter's time on a GPU, without one: `just device-model`, with which `just bench-kernels` begins.

Modelled, not measured. The launchers run on tensors without storage and their launches are recorded, so grids and parts
are the real ones; what a program needs comes from the compiled kernels (kernels_report.json). A launch takes
the longest of

    bytes / bandwidth
    bytes of the busiest multiprocessor / its share of the bandwidth
    bytes / (bytes in flight on a multiprocessor × multiprocessors / latency)
    bytes that multiprocessors read and write, from cache or memory / the cache's bandwidth
    products / the tensor cores' rate
    2 µs

On an H200 kernels took 1.3 to 4.1 times as long (docs/measurements.md, "On a GPU"). Assumptions, all of them:
- Every tensor argument of a launch moves once through memory (tests/kernels/test_passes.py counts it): its tiles are
  read or written once, and what is read again comes from cache. But DoRA's W moves once for every 128 ranks.
- What is read again are tensors with R columns or rows, a tile of them for each token-sized tile. The cache has CACHE
  times the memory's bandwidth (an H100's L2, by public measurements: 1.7 to 2.7).
- Tensor cores reach REACHED of the data sheet's dense rate. Blocks of ranks are powers of two, of at least 16;
  the row norm of bf16 weights takes three products.
- Programs have equal work and go to multiprocessors in turn; a multiprocessor can't use another's bandwidth.
- A launch costs at least LAUNCH seconds on the device; memory answers after LATENCY seconds under load.
- In flight are, of every resident program, the tiles of token-sized tensors that it reads: one in a kernel without a
  loop; in a loop whose loads feed a product as many as it has stages, and one where nothing is pipelined.
- PyTorch's own small operators (casts, DoRA's Gram matrix) cost as many bytes as they have, at least LAUNCH each;
  only casts are counted.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # launches are recorded, so the kernels are to be the compiler's

import math

import kernels_report
import machine
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lora_lite.kernels import (
    common,
    expand,
    expand_backward,
    rotate,
    row_norm,
    scale,
    shrink,
    shrink_backward,
    shrink_expand,
    tuning,
)
from lora_lite.kernels.expand_backward import launch_expand_backward
from lora_lite.kernels.shrink_backward import launch_shrink_backward
from lora_lite.kernels.tuning import cdiv

LAUNCH = 2e-6
LATENCY = 0.9e-6
CACHE = 2.0
REACHED = 0.5
SCALE = 2.0


@dataclass(frozen=True)
class GPU:
    """From data sheets: bytes a second, multiprocessors (AMD: compute units), products in bf16 a second (two operations
    each, dense)."""

    architecture: str
    bandwidth: float
    processors: int
    products: float


GPUS = {
    "H100": GPU("sm_90", kernels_report.H100_BANDWIDTH, 132, 989.4e12 / 2),
    "H200": GPU("sm_90", 4.8e12, 132, 989.4e12 / 2),
    "A100": GPU("sm_80", 2.039e12, 108, 312e12 / 2),
    "B200": GPU("sm_100", 8.0e12, 148, 2250e12 / 2),
    "MI300X": GPU("gfx942", 5.3e12, 304, 1307.4e12 / 2),
}
RANKS = (8, 16, 32, 64, 128, 256)
TOKENS = (512, 2048, 8192, 16384)
WIDTHS = (1024, 2048, 4096, 8192, 14336)
BOUND = {"lora": 7, "dora": 9, "hra": 5, "ia3": 5, "road": 5}

# Token-sized tensors (for the row norm, W) that a program of each kernel reads at a time.
READS = {
    "shrink": 1, "shrink_across": 1, "expand": 1, "expand_backward": 1, "expand_backward_rescale": 2,
    "shrink_backward": 2, "shrink_expand_backward": 2, "row_norm": 1, "scale": 1, "scale_backward": 2,
    "rotate": 1, "rotate_backward": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """A kernel goes through the tiles of a token-sized tensor (or W). With each it reads R numbers of every row, and of
    every column, and multiplies to add to its results; what a launch does not have is None."""

    tensor: str
    of_rows: tuple[str, ...]
    of_cols: tuple[str, ...]
    results: tuple[str, ...]


TILES = {
    "shrink": Tiles("x", (), ("A",), ("h",)),
    "shrink_across": Tiles("x", (), ("A",), ("h",)),
    "expand": Tiles("y", ("h",), ("B",), ("out",)),
    "expand_backward": Tiles("dy", ("h",), (), ("dh", "dB")),
    "expand_backward_rescale": Tiles("dy", ("h",), (), ("dh", "dB")),
    "shrink_backward": Tiles("x", ("dh",), (), ("dx", "dA")),
    "shrink_expand_backward": Tiles("x", ("dh", "h"), (), ("dx", "dA", "dB")),
    "row_norm": Tiles("W", (), ("A",), ("norm",)),
}
# How many times as long as in bf16 a product takes in this precision.
TIMES_BF16 = {"ieee": 1, "bf16x3": 3}
OF_PARTS = ("_sum_parts_kernel", "_root_kernel")  # they put parts together
NO_PIPELINE = (
    "expand",
    "scale",
    "scale_backward",
    "rotate",
    "rotate_backward",
)  # no loop, or one whose loads feed no product


@dataclass(frozen=True)
class Modelled:
    """One launch: its bytes, how far the busiest multiprocessor is above its share, bytes in flight, seconds and what
    takes them."""

    kernel: str
    bytes: int
    parts: int
    busiest: float
    in_flight: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Recorded:
    """A launch of ours, with the table's name and row for it."""

    kernel: str
    config: tuning.Config | None
    launch: kernels_report.Launch


@contextmanager
def recorded(gpu: GPU) -> Iterator[tuple[list[Recorded], list[int]]]:
    """The launches that are made within, on that GPU, and the bytes of each cast of a parameter."""
    launches: list[Recorded] = []
    casts: list[int] = []
    current: list[tuple[str, tuning.Config]] = []

    def note(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        name, config = ("sum_parts", None) if self.fn.__name__ in OF_PARTS else current[-1]
        launches.append(Recorded(name, config, kernels_report.Launch(self, arguments, grid, {})))

    def tuned(kernel: str, run: Any, *rest: Any, **moves: Any) -> Any:
        def marked(config: tuning.Config) -> Any:
            current.append((kernel, config))
            try:
                return run(config)
            finally:
                current.pop()

        return tuning.tuned(kernel, marked, *rest, **moves)

    def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
        if t.dtype != dtype or not t.is_contiguous():
            casts.append(t.nbytes + t.numel() * dtype.itemsize)
        return common.small(t, dtype)

    with ExitStack() as stack:
        stack.enter_context(tuning.force(architecture=gpu.architecture, programs=gpu.processors))
        stack.enter_context(mock.patch.object(kernels_report.triton.JITFunction, "run", note))
        for module in (shrink, shrink_backward, expand, expand_backward, row_norm, scale, rotate):
            stack.enter_context(mock.patch.object(module, "tuned", tuned))
        for module in (shrink, expand, expand_backward):
            stack.enter_context(mock.patch.object(module, "small", cast))
        yield launches, casts


def step(variant: str, M: int, K: int, N: int, R: int) -> None:
    """The launches of one layer's forward and backward, adapters in float32 on a bf16 base."""

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    f32 = torch.float32
    N = K if variant == "hra" else N
    x, y, h, A, B, g = t(M, K), t(M, N), t(M, R), t(R, K, dtype=f32), t(N, R, dtype=f32), t(N, dtype=f32)
    if variant == "ia3":
        scale.launch_scale(y, g)
        scale.launch_scale_backward(y, y, g, True, True)
        return
    if variant == "road":
        rotate.launch_rotate(y, g, g, 64)
        rotate.launch_rotate_backward(y, y, g, g, 64, True, True)
        return
    shrink.launch_shrink(x, A, x.dtype)
    if variant == "hra":
        expand.launch_expand(x, h, B, 1.0)
        shrink_expand.launch_shrink_expand_backward(x, x, h, A, B, True)
        return
    of_dora = (y, g) if variant == "dora" else ()
    if of_dora:
        row_norm.launch_row_norm(t(N, K), None, A, B, B, SCALE, g)
    expand.launch_expand(y, h, B, SCALE, g if of_dora else None)
    launch_expand_backward(y, h, B, SCALE, True, True, *of_dora)
    launch_shrink_backward([x], [h], x, A, True, True)


Resources = dict[tuple[Any, ...], float]


def compiled_resources() -> Resources:
    """Resident programs a multiprocessor, by (kernel, architecture, rank, rows, cols, warps, stages), in bf16."""
    found = {}
    for row in machine.read(machine.RESULTS / "kernels_report.json")["rows"]:
        if row["dtype"] == "bfloat16":
            key = tuple(row[name] for name in ("kernel", "architecture", "rank", "rows", "cols", "num_warps"))
            warps = kernels_report.ARCHITECTURES[row["architecture"]].warps
            found[*key, row["num_stages"]] = max(1, round(row["occupancy"] * warps / row["num_warps"]))
    return found


def modelled(of: Recorded, gpu: GPU, rank: int, resident: Resources) -> Modelled:
    """What one launch takes."""
    tensors = {name: t for name, t in of.launch.arguments.items() if isinstance(t, Tensor)}
    moved = sum(t.nbytes for t in tensors.values())
    if of.kernel == "row_norm":  # which reads W again for every block of ranks
        moved += tensors["W"].nbytes * (-(-rank // of.launch.arguments["BLOCK_R"]) - 1)
    programs = math.prod(of.launch.grid)
    busiest = -(-programs // gpu.processors) * gpu.processors / programs
    in_flight = math.inf
    parts = max((t.nbytes for name, t in tensors.items() if name.startswith("parts")), default=0)
    takes = {"launch": LAUNCH, "memory": moved * busiest / gpu.bandwidth}
    if of.config is not None:
        c = of.config
        of_rank = 16 if of.kernel.startswith(kernels_report.RANKLESS) else max(rank, 16)
        most = resident[of.kernel, gpu.architecture, of_rank, c.rows, c.cols, c.num_warps, c.num_stages]
        stages = 1 if of.kernel in NO_PIPELINE else c.num_stages
        here = min(most, -(-programs // gpu.processors))
        in_flight = here * stages * READS[of.kernel] * c.rows * c.cols * 2
        takes["latency"] = moved / (in_flight * min(gpu.processors, programs) / LATENCY)
        if of.kernel in TILES:
            again, products = with_tiles(of, rank)
            takes["cache"] = (moved + again) * busiest / (CACHE * gpu.bandwidth)
            products *= TIMES_BF16[of.launch.arguments["PRECISION"]]
            takes["products"] = products * busiest / (REACHED * gpu.products)
    bound = max(takes, key=takes.__getitem__)
    return Modelled(of.kernel, moved, parts, busiest, in_flight, takes[bound], bound)


def with_tiles(of: Recorded, rank: int) -> tuple[int, int]:
    """(bytes that come from cache with the tiles of a launch, its products)."""
    arguments, tiles, c = of.launch.arguments, TILES[of.kernel], of.config
    assert c is not None
    height, width = arguments[tiles.tensor].shape
    of_rows = rank * height * sum(arguments[name].element_size() for name in tiles.of_rows)
    of_cols = rank * width * sum(arguments[name].element_size() for name in tiles.of_cols)
    again = cdiv(width, c.cols) * of_rows + cdiv(height, c.rows) * of_cols
    products = sum(arguments[name] is not None for name in tiles.results)
    return again, products * height * width * common.block_of(rank)


def row(name: str, variant: str, M: int, K: int, R: int, resident: Resources) -> dict[str, Any]:
    """One layer's step on one GPU."""
    gpu = GPUS[name]
    with recorded(gpu) as (launches, casts):
        step(variant, M, K, K, R)
    found = [modelled(launch, gpu, R, resident) for launch in launches]
    least = 2 * K * (BOUND[variant] * M + (K if variant == "dora" else 0))
    seconds = sum(launch.seconds for launch in found) + sum(max(b / gpu.bandwidth, LAUNCH) for b in casts)
    own = [launch for launch in found if launch.kernel != "sum_parts"]
    return {
        "gpu": name, "variant": variant, "M": M, "K": K, "N": K, "R": R, "launches": len(found), "casts": len(casts),
        "us": round(1e6 * seconds, 2), "bound_us": round(1e6 * least / gpu.bandwidth, 2),
        "busiest": round(max(launch.busiest for launch in own), 3),
        # written by the kernel, read by the sum; beside one token-sized tensor
        "parts": round(2 * max(launch.parts for launch in found) / (2 * M * K), 3),
        "parts_mib": round(max(launch.parts for launch in found) / 2**20, 1),
        "in_flight_kib": round(min(launch.in_flight for launch in own) / 2**10, 1),
        "by_kernel": {
            one.kernel: {
                "bytes": one.bytes, "busiest": round(one.busiest, 3), "in_flight_kib": one.in_flight / 2**10,
                "us": round(1e6 * one.seconds, 2), "bound": one.bound,
            }
            for one in own
        },
    }  # fmt: skip


def targets(rows: list[dict[str, Any]]) -> dict[str, str]:
    """How many of the H100's shapes of at least 2,048 tokens are within each target."""
    at = [r for r in rows if r["gpu"] == "H100" and r["M"] >= 2048]
    few = [r for r in at if r["R"] <= 64 and r["variant"] != "hra"]
    many = [r for r in at if r["R"] > 64 and r["variant"] != "hra"]
    within = {
        "busiest multiprocessor at most 1.15 times its share": (at, lambda r: r["busiest"] <= 1.15),
        "parts at most 0.35 of a token-sized tensor's traffic": (at, lambda r: r["parts"] <= 0.35),
        "parts at most 96 MiB": (at, lambda r: r["parts_mib"] <= 96),
        "at least 24 KiB in flight": (at, lambda r: r["in_flight_kib"] >= 24),
        "at most 1.3 times the bound, r ≤ 64, HRA aside": (few, lambda r: r["us"] <= 1.3 * r["bound_us"]),
        "at most 2 times the bound, r > 64, HRA aside": (many, lambda r: r["us"] <= 2 * r["bound_us"]),
    }
    return {name: f"{sum(map(holds, of))} of {len(of)}" for name, (of, holds) in within.items()}


@dataclass
class Settings:
    """Model the device time of every adapter's step of one layer, K = N."""

    gpus: tuple[str, ...] = tuple(GPUS)
    ranks: tuple[int, ...] = RANKS
    tokens: tuple[int, ...] = TOKENS
    widths: tuple[int, ...] = WIDTHS
    save: bool = True
    """Write bench/results/device_model.json: of layers; of their launches `row` tells."""


def main(s: Settings) -> int:
    resident = compiled_resources()
    rows = [
        row(gpu, variant, M, K, R, resident)
        for gpu in s.gpus
        for variant in BOUND
        for R in (s.ranks if variant not in ("ia3", "road") else (1,))
        for M in s.tokens
        for K in s.widths
    ]
    table = Table(title="Modelled device time of one layer's step (K = N = 4096, M = 8192), not measured")
    headings = ("gpu", "variant", "R", "launches", "us", "bound_us", "busiest", "parts", "in_flight_kib")
    for heading in headings:
        table.add_column(heading, justify="right")
    for r in rows:
        if (r["M"], r["K"]) == (8192, 4096):
            table.add_row(*(str(r[heading]) for heading in headings))
    Console(width=120).print(table)
    found = targets(rows)
    for name, share in found.items():
        print(f"H100, M ≥ 2048: {name}: {share}")
    if s.save:
        layers = [{name: value for name, value in r.items() if name != "by_kernel"} for r in rows]
        machine.write(
            machine.RESULTS / "device_model.json", {"kind": "modelled", "targets": found, "rows": layers}, compact=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
