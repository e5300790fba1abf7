"""What the compilers make of every kernel, for every row of the block tables: `just kernels-report`. No GPU is needed.

The launchers run on tensors without storage, their launches are recorded instead of started, and each distinct one is
compiled for six architectures. Read from the machine code: registers, spills, shared memory, tensor-core instructions
and 128-bit accesses to global memory. Everything here is compiled, nothing is timed.
"""

import ast
import hashlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # decides, when kernels are defined, that they can't be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import machine
import torch
import triton
import tyro
from launch_path import compiling_for, jit_functions
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget

from lora_lite.kernels import common, expand, layers, rotate, row_norm, scale, shrink, tuning
from lora_lite.kernels.expand_backward import launch_expand_backward
from lora_lite.kernels.segments import Runs
from lora_lite.kernels.shrink_backward import launch_shrink_backward
from lora_lite.kernels.shrink_expand import MOST_RANKS_FUSED


@dataclass(frozen=True)
class Architecture:
    """What bounds a program: registers a multiprocessor (lanes × 32 bit), warps, and shared memory in bytes."""

    target: GPUTarget
    shared_of_program: int
    shared: int
    warps: int


# NVIDIA: CUDA C++ Programming Guide, table of technical specifications per compute capability. AMD: CDNA3 and CDNA4
# instruction set guides (a compute unit has 4 SIMDs of 8 waves, 512 registers a lane each).
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 64),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 64),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 64),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), 99 << 10, 100 << 10, 48),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32),
    "gfx950": Architecture(GPUTarget("hip", "gfx950", 64), 160 << 10, 160 << 10, 32),
}


Calls = dict[str, Callable[[], Any]]
Empty = Callable[..., torch.Tensor]


def kernel_calls(
    dtype: torch.dtype,
    M: int,
    K: int,
    N: int,
    R: int,
    tokens: torch.dtype | None = None,
    empty: Empty = partial(torch.empty, device="meta"),  # noqa: B008
) -> Calls:
    """For each kernel of the table a launch, on tensors without storage. `dtype` is that of the products, and of the
    tokens unless these have another."""
    return {
        **_calls_with_rank(dtype, M, K, N, R, tokens or dtype, empty),
        **_norm_calls(dtype, K, N, R, empty),
        **_calls_without_rank(M, N, tokens or dtype, empty),
    }


def _runs(empty: Empty) -> Runs:
    return Runs(*(empty(*shape, dtype=torch.int32) for shape in ((40, 3), (20, 3), (20,), (5,))))


def _calls_with_rank(dtype: torch.dtype, M: int, K: int, N: int, R: int, tokens: torch.dtype, empty: Empty) -> Calls:
    def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return empty(*shape, dtype=dtype)

    x, y, h = t(M, K, dtype=tokens), t(M, N, dtype=tokens), t(M, R, dtype=dtype)
    A, B, g, bias, runs = t(R, K), t(N, R), t(N), t(N, dtype=dtype), _runs(empty)
    As, Bs, gs, biases = t(4, R, K), t(4, N, R), t(4, N), t(4, N, dtype=dtype)
    seed, seeds = t(1, dtype=torch.int64), t(3, dtype=torch.int64)
    thirds = R - 2 * (R // 3), R - R // 3, R  # of three layers' ranks the ends
    dhs = [t(M, each, dtype=dtype) for each in (thirds[0], R // 3, R // 3)]
    return {
        "shrink": lambda: shrink.launch_shrink(x, A, dtype),
        "shrink_dropout": lambda: shrink.launch_shrink(x, A, dtype, None, seed),
        "shrink_grouped": lambda: shrink.launch_shrink(x, As, dtype, runs),
        "shrink_across": lambda: shrink.launch_shrink(y, B.mT, dtype, scale=0.5),
        "shrink_across_grouped": lambda: shrink.launch_shrink(y, Bs.mT, dtype, runs, scale=0.5),
        "expand": lambda: expand.launch_expand(y, h, B, 0.5),
        "expand_dropout": lambda: expand.launch_expand(y, h, B, 0.5, None, None, None, seed),
        "expand_grouped": lambda: expand.launch_expand(y, h, Bs, 0.5, gs, biases, runs),
        "expand_backward": lambda: launch_expand_backward(y, h, B, 0.5, True, True),
        "expand_backward_grouped": lambda: launch_expand_backward(y, h, Bs, 0.5, True, True, runs=runs),
        "expand_backward_rescale": lambda: launch_expand_backward(y, h, B, 0.5, True, True, y, g, bias),
        "expand_backward_rescale_grouped": lambda: launch_expand_backward(
            y, h, Bs, 0.5, True, True, y, gs, biases, runs
        ),
        "shrink_backward": lambda: launch_shrink_backward([x], [h], x, A, True, True),
        "shrink_backward_dropout": lambda: launch_shrink_backward(
            [x], [h], x, A, True, True, None, None, seed
        ),
        "shrink_backward_grouped": lambda: launch_shrink_backward([x], [h], x, As, True, True, None, runs),
        "shrink_together_dropout": lambda: shrink.launch_shrink(x, A, dtype, None, seeds, thirds),
        "shrink_backward_together_dropout": lambda: launch_shrink_backward(
            [x] * 3, dhs, x, A, True, True, None, None, seeds
        ),
        "shrink_backward_together": lambda: launch_shrink_backward([x] * 3, dhs, x, A, True, True),
        "shrink_expand_backward": lambda: launch_shrink_backward([x], [h], x, A, True, True, h),
        "shrink_expand_backward_grouped": lambda: launch_shrink_backward([x], [h], x, As, True, True, h, runs),
    }  # fmt: skip


def _norm_calls(dtype: torch.dtype, K: int, N: int, R: int, empty: Empty) -> Calls:
    """Of weights in bfloat16, and for what takes products in float32, of 16 bits those in float16."""
    f32 = torch.float32
    A, B, g = (empty(*shape, dtype=f32) for shape in ((R, K), (N, R), (N,)))
    W, W_int8 = empty(N, K, dtype=torch.bfloat16), empty(N, K, dtype=torch.int8)
    W_float32 = empty(N, K, dtype=f32 if dtype == f32 else torch.float16)
    packed, code8 = empty(N * K // 2, dtype=torch.uint8), empty(N * K // 64, dtype=torch.uint8)
    code = empty(256, dtype=f32)

    def of_4bit(weights: torch.dtype) -> Any:
        nested = (code, code, g[:1])
        return row_norm.launch_row_norm_4bit(packed, code, code8, nested, (64, 256), weights, A, B, B, 0.5, g)

    return {
        "row_norm": lambda: row_norm.launch_row_norm(W, None, A, B, B, 0.5, g),
        "row_norm_float32": lambda: row_norm.launch_row_norm(W_float32, None, A, B, B, 0.5, g),
        "row_norm_int8": lambda: row_norm.launch_row_norm(W_int8, g, A, B, B, 0.5, g),
        "row_norm_4bit": lambda: of_4bit(torch.bfloat16),
        "row_norm_4bit_float32": lambda: of_4bit(f32),
    }


def _calls_without_rank(M: int, N: int, tokens: torch.dtype, empty: Empty) -> Calls:
    f32, runs = torch.float32, _runs(empty)
    y, g, gs = empty(M, N, dtype=tokens), empty(N, dtype=f32), empty(4, N, dtype=f32)
    even, group_size = N + N % 2, 64 if N % 64 == 0 else 2  # RoAd's outputs come in pairs
    paired, c, cs = empty(M, even, dtype=tokens), empty(even, dtype=f32), empty(4, even, dtype=f32)
    return {
        "scale": lambda: scale.launch_scale(y, g),
        "scale_grouped": lambda: scale.launch_scale(y, gs, runs),
        "scale_backward": lambda: scale.launch_scale_backward(y, y, g, True, True),
        "scale_backward_grouped": lambda: scale.launch_scale_backward(y, y, gs, True, True, runs),
        "rotate": lambda: rotate.launch_rotate(paired, c, c, group_size),
        "rotate_grouped": lambda: rotate.launch_rotate(paired, cs, cs, group_size, runs),
        "rotate_backward": lambda: rotate.launch_rotate_backward(paired, paired, c, c, group_size, True, True),
        "rotate_backward_grouped": lambda: rotate.launch_rotate_backward(
            paired, paired, cs, cs, group_size, True, True, runs
        ),
    }  # fmt: skip


# They know no dtype but float32, that of A.
QUANTISED = ("row_norm_int8", "row_norm_4bit", "row_norm_4bit_float32")
RANKLESS = ("scale", "rotate")  # they multiply no matrices: no rank, and one dtype
KERNELS = tuple(kernel_calls(torch.float32, 16, 16, 16, 16))
WIDE = "_wide"  # the suffix of a kernel whose tokens are in float32 and whose products are in 16 bits
WIDE_KERNELS = tuple(kernel + WIDE for kernel in KERNELS if not kernel.startswith(("row_norm", *RANKLESS)))
MOST = common.MAX_RANK


@dataclass(frozen=True)
class Launch:
    """A launch as recorded: the kernel, its arguments by name, its grid and its options."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, int]


def record(run: Callable[[], Any]) -> list[Launch]:
    """The launches that `run` would start."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(self, {name: arguments[name] for name in self.arg_names}, grid, options))

    start = triton.JITFunction.run
    triton.JITFunction.run = note
    try:
        run()
    finally:
        triton.JITFunction.run = start
    return launches


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The launch's kernel, bound, specialised and compiled by Triton as a real launch on that target would be."""
    with compiling_for(target):
        return launch.kernel.run(*launch.arguments.values(), grid=launch.grid, warmup=True, **launch.options)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def usage(program: Any, architecture: Architecture, num_warps: int) -> dict[str, Any]:
    """Registers, spills, shared memory, occupancy and the instructions that matter, read from the machine code."""
    shared = program.metadata.shared
    if architecture.target.backend == "cuda":
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(program.asm["cubin"])
            file.flush()
            resources, sass = (
                subprocess.run(
                    [tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
                ).stdout
                for flag in ("-res-usage", "-sass")
            )
        registers = int(re.search(r"REG:(\d+)", resources)[1])  # type: ignore[index]
        spills, scalar_spills = _count(r"\b(LDL|STL)\b", sass), 0
        loads = _count(r"LDG\.E\.(\w+\.)*(128|ENL2)|LDGSTS\.E\.(\w+\.)*128", sass)
        stores = _count(r"STG\.E\.(\w+\.)*(128|ENL2)", sass)
        dots = _count(r"\b(HMMA|HGMMA|UTCHMMA)\b", sass)
        kind = next((name for name in ("UTCHMMA", "HGMMA", "HMMA") if re.search(rf"\b{name}\b", sass)), "FMA")
        fmas = _count(r"\bFFMA2?\b", sass)
        reserved = 1024
        by_registers = 65536 // (32 * ((registers + 7) // 8 * 8)) // num_warps
    else:
        text = program.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spills, scalar_spills = (int(re.search(rf"\.{kind}gpr_spill_count:\s+(\d+)", text)[1]) for kind in "vs")  # type: ignore[index]
        loads = _count(r"(global|buffer)_load_(lds_)?dwordx4", text)
        stores = _count(r"(global|buffer)_store_dwordx4", text)
        dots, kind, fmas = _count("v_mfma", text), "MFMA", _count("v_(pk_)?fma", text)
        reserved = 0
        by_registers = 4 * min(8, 512 // ((registers + 7) // 8 * 8)) // num_warps
    programs = min(by_registers, architecture.warps // num_warps, architecture.shared // max(shared + reserved, 1))
    return {
        "registers": registers,
        "spills": spills,
        "scalar_spills": scalar_spills,
        "shared": shared,
        "overflows": shared > architecture.shared_of_program,
        "occupancy": round(programs * num_warps / architecture.warps, 3),
        "dots": dots,
        "dot_kind": kind if dots else "none",
        "fmas": fmas,
        "loads_128": loads,
        "stores_128": stores,
    }


def rows_of(kernel: str, architecture: str, dtype: str, rank: int) -> tuning.Rows:
    """A kernel's rows in the tables."""
    itemsize = getattr(torch, dtype).itemsize
    return tuning.candidates(kernel.removesuffix(WIDE), architecture, itemsize, rank, kernel.endswith(WIDE))


def jobs(architectures: list[str], dtypes: list[str], kernels: list[str], ranks: list[int], first_only: bool) -> Any:
    """(architecture, dtype, kernel, rank, config) for every row that the tables can choose."""
    for name, dtype, rank in itertools.product(architectures, dtypes, ranks):
        for kernel in kernels:
            if (kernel.startswith(RANKLESS) and rank != ranks[0]) or (kernel in QUANTISED and dtype != "float32"):
                continue
            if kernel == "row_norm" and dtype == "float32":
                continue
            if kernel.endswith(WIDE) and dtype == "float32":
                continue
            if kernel.startswith("shrink_expand_backward") and rank > MOST_RANKS_FUSED:
                continue
            if "together_dropout" in kernel and rank > layers.MOST_RANKS_MASKED[getattr(torch, dtype).itemsize]:
                continue
            rows = rows_of(kernel, name, dtype, rank)
            for config in rows[:1] if first_only else rows:
                yield name, dtype, kernel, rank, config


Job = tuple[str, str, str, int, tuning.Config]


def compiled_for(job: Job, M: int, K: int, N: int, R: int) -> tuple[Launch, dict[str, Any]]:
    """The launch of a row at a size, and what the compiler makes of it."""
    name, dtype, kernel, _, config = job
    tokens = torch.float32 if kernel.endswith(WIDE) else None
    calls = kernel_calls(getattr(torch, dtype), M, K, N, R, tokens)
    with tuning.force(config=config, architecture=name):
        launch, *_ = record(calls[kernel.removesuffix(WIDE)])
    architecture = ARCHITECTURES[name]
    return launch, usage(compiled(launch, architecture.target), architecture, config.num_warps)


def examine(job: Job, unaligned: bool = False) -> dict[str, Any]:
    """One row of the report."""
    name, dtype, kernel, rank, config = job
    launch, found = compiled_for(job, 8192, 4096, 4096, rank)
    row = {"kernel": kernel, "architecture": name, "dtype": dtype, "rank": rank, **asdict(config)}
    return {**row, "grid": list(launch.grid), **found, **(examine_unaligned(job) if unaligned else {})}


# Of float32 tokens, 8,192 of 4,096: products with R ranks, and passes over the tokens.
PRODUCTS = {"shrink": (1, 1), "expand": (1, 2), "expand_backward": (2, 1)}
# An H100's, from its data sheet (SXM5, dense): float32 products a second, by its own instructions and as three in TF32.
RATES, H100_BANDWIDTH = {"ieee": 66.9e12, "tf32x3": 494.7e12 / 3}, 3.35e12


def compared(job: tuple[str, int, str]) -> dict[str, Any]:
    """A float32 kernel with products of that precision for an H100: what the compiler makes of it, and by the data
    sheet the seconds that its products and that its bytes take at the least."""
    kernel, rank, how = job
    products, passes = PRODUCTS[kernel]
    config = rows_of(kernel, "sm_90", "float32", rank)[0]
    with mock.patch.object(common, "full_precision", return_value=how):
        _, found = compiled_for(("sm_90", "float32", kernel, rank, config), 8192, 4096, 4096, rank)
    return {
        "kernel": kernel, "rank": rank, "precision": how, **found,
        "product_seconds": products * 2 * 8192 * 4096 * rank / RATES[how],
        "byte_seconds": passes * 4 * 8192 * 4096 / H100_BANDWIDTH,
    }  # fmt: skip


def comparison() -> Iterator[dict[str, Any]]:
    """Both precisions of each kernel that has a choice."""
    of_kernels = list(itertools.product(PRODUCTS, (64, 128)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(compared, [(*of, how) for of in of_kernels for how in RATES])


def examine_unaligned(job: Job) -> dict[str, int]:
    """Spills where 16 divides no width and no stride, and where it divides all but the rank; at the most ranks that a
    row is for."""
    name, dtype, kernel, rank, config = job
    if rank < MOST and config in rows_of(kernel, name, dtype, 2 * rank):
        return {}
    sizes = (8190, 4090, 4090, rank), (8192, 4096, 4096, rank - 4)
    found = [compiled_for(job, *size)[1] for size in sizes]
    return {f"unaligned_{what}": max(each[what] for each in found) for what in ("spills", "scalar_spills")}


def is_bad(row: dict[str, Any]) -> bool:
    """Whether it overflows or spills. Spills at sizes that 16 does not divide are shown beside."""
    return bool(row["overflows"] or row["spills"] or row["scalar_spills"])


def fingerprint() -> str:
    """Of the kernels' code, in whichever file it stands, and the block table: what makes a report stale. Comments and
    docstrings do not."""
    text = "\n".join([repr(tuning.TABLE), *sorted(map(code, jit_functions()))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code(function: Any) -> str:
    """Of a kernel, or of what kernels call."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    return ast.unparse(tree)


def report(work: list[Any], show: bool, unaligned: bool = False) -> Iterator[dict[str, Any]]:
    """Rows in the order of `work`, compiled on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(partial(examine, unaligned=unaligned), work)
        yield from track(rows, "compiling", total=len(work)) if show else rows


@dataclass
class Settings:
    """Compile every kernel for every architecture and read what came of it."""

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """float16 takes bfloat16's rows and the same instructions."""
    kernels: tuple[str, ...] = (*KERNELS, *WIDE_KERNELS)
    ranks: tuple[int, ...] = (16, 32, 64, 128, MOST)
    first_only: bool = False
    """Only the row of the table that is taken untimed."""
    in_turn: bool = False
    """Each kernel for one of the architectures alone, in their order."""
    unaligned: bool = False
    """Also at sizes that 16 does not divide, which takes twice as long: spills there are shown, and no row is bad."""
    save: bool = True
    """Write bench/results/kernels_report.json."""


def main(s: Settings) -> int:
    work = list(jobs(list(s.architectures), list(s.dtypes), list(s.kernels), list(s.ranks), s.first_only))
    if s.in_turn:
        turn = {kernel: s.architectures[i % len(s.architectures)] for i, kernel in enumerate(s.kernels)}
        work = [job for job in work if turn[job[2]] == job[0]]
    rows = list(report(work, sys.stdout.isatty(), s.unaligned))
    table = Table(title=f"{len(rows)} kernels, compiled")
    headings = ("kernel", "architecture", "dtype", "rank", "rows", "cols", "num_warps", "num_stages", "registers")
    headings += (
        "spills",
        "scalar_spills",
        "unaligned_spills",
        "unaligned_scalar_spills",
        "shared",
        "occupancy",
        "dots",
        "dot_kind",
        "loads_128",
        "stores_128",
    )
    for heading in headings:
        table.add_column(heading.replace("num_", ""))
    bad = [row for row in rows if is_bad(row)]
    for row in rows:
        table.add_row(*(str(row.get(heading, "")) for heading in headings), style="red" if row in bad else "")
    Console(width=220).print(table)
    if s.save:
        machine.write(
            machine.RESULTS / "kernels_report.json",
            {"kind": "compiled", "fingerprint": fingerprint(), "rows": rows, "float32": list(comparison())},
            compact=True,
        )
    if bad:
        print(f"{len(bad)} kernels spill or overflow", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
