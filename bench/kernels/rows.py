"""Which blocks are the fastest: kernels timed with many more rows than their block table has: `just gpu-day rows`.

For whoever changes a table of kernels/tuning.py. The rows are compiled by all cores and then timed one by one, as
launchers run them: casts of the adapter's matrices and sums of parts included. Of the fastest and of the table's own
the profiler tells what each launch takes.

`--compile` does the first alone, for an H100 and without a GPU: what it leaves in Triton's cache can be carried to a
machine that has one. `--rehearse` runs everything on a CPU at a tiny size, in Triton's interpreter, and times nothing.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if "--rehearse" in sys.argv or "--compile" in sys.argv:  # decides, when kernels are defined, whether they are compiled
    os.environ["TRITON_INTERPRET"] = "1" if "--rehearse" in sys.argv else "0"

import machine
import torch
import tyro
from kernel_times import Shape, Timer, by_launch, kernel_timer, with_rank, without_rank
from launch_path import without_launching
from rich.console import Console
from rich.table import Table

from lora_lite.kernels import expand_backward, tuning
from lora_lite.kernels.shrink import launch_shrink
from lora_lite.kernels.shrink_expand import MOST_RANKS_FUSED
from lora_lite.kernels.tuning import Config

ACCUMULATORS = {"expand_backward": 1, "expand_backward_rescale": 1, "shrink_backward": 1, "shrink_expand_backward": 2}
OF_ROWS = ("shrink", "expand")  # they hold no tile of ranks beside their result
WITHOUT_RANK = ("scale", "scale_backward", "rotate", "rotate_backward")
# dh by another look at dy, instead of in parts.
AGAIN = {"expand_backward_again": "expand_backward", "expand_backward_rescale_again": "expand_backward_rescale"}
# Beyond them it is another kernel's work, or in turns of as many.
MOST_RANKS = {
    "shrink_expand_backward": MOST_RANKS_FUSED,
    "row_norm": 128,
    **{name: expand_backward.MOST_RANKS_IN_PARTS[plain] for name, plain in AGAIN.items()},
}
KERNELS = ("shrink", "expand", *ACCUMULATORS, *AGAIN, "row_norm", *WITHOUT_RANK)
Case = tuple[str, int, tuple[Config, ...]]  # a kernel, the rank, its rows


@dataclass
class Settings:
    """Time kernels with many rows; the table's own are among them."""

    kernels: tuple[str, ...] = KERNELS
    ranks: tuple[int, ...] = (16, 64, 256)
    sizes: tuple[tuple[int, int, int], ...] = ((8192, 4096, 4096), (2048, 4096, 4096))
    """M, K, N."""
    compile: bool = False
    """Only compile, without a GPU, for an H100."""
    rehearse: bool = False
    """Run it all on a CPU, tiny and untimed: does the command work?"""
    seconds: int = 120
    """After which no further row is timed."""
    out: Path = machine.RESULTS / "rows.json"

    @property
    def device(self) -> str:
        return "cpu" if self.compile or self.rehearse else "cuda"


def of_table(kernel: str, R: int) -> tuning.Rows:
    return tuning.candidates(AGAIN.get(kernel, kernel), "sm_90", 2, R)


def tried(kernel: str, R: int) -> tuning.Rows:
    """The rows of a launch: those of the table, and others whose tiles and accumulators registers may hold."""
    name = AGAIN.get(kernel, kernel)
    if name in WITHOUT_RANK:
        sizes = itertools.product((4, 8, 16, 32, 64), (128, 256, 512, 1024), (4, 8), (2,))
    elif name == "expand":  # whose loop is over ranks, 64 at a time
        sizes = itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2, 4) if R > 64 else (2,))
    elif name == "row_norm":
        sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (3, 4))
    elif name == "shrink":
        sizes = itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4))
    else:
        sizes = itertools.product((32, 64), (64, 128, 256, 512), (4, 8, 16), (1, 3))
    found = []
    for rows, cols, warps, stages in sizes:
        of_thread = rows * cols / (32 * warps)
        accumulated = (rows if name == "shrink" else ACCUMULATORS.get(name, 0) * cols) * R / (32 * warps)
        if 8 <= of_thread <= 64 and (rows * R <= 1 << 14 or name in OF_ROWS) and accumulated <= 128:
            found.append(Config(rows, cols, warps, stages))
    return tuple(dict.fromkeys([*of_table(kernel, R), *found]))


def cases(s: Settings) -> list[Case]:
    return [
        (kernel, R, of_table(kernel, R) if s.rehearse else tried(kernel, R))
        for kernel in s.kernels
        for R in ((1,) if kernel in WITHOUT_RANK else s.ranks)
        if MOST_RANKS.get(kernel, R) >= R
    ]


def launch_of(kernel: str, size: tuple[int, int, int], R: int, device: str) -> Callable[[], Any]:
    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    of = without_rank if kernel in WITHOUT_RANK else with_rank
    launch = of(Shape(*size, R), draw)[AGAIN.get(kernel, kernel)][0]

    def with_its_own_row(*args: Any, **kwargs: Any) -> torch.Tensor:
        with tuning.force(config=of_table("shrink_across", R)[0]):
            return launch_shrink(*args, **kwargs)

    def run() -> Any:
        with (
            mock.patch.object(expand_backward, "launch_shrink", with_its_own_row),
            mock.patch.dict(expand_backward.MOST_RANKS_IN_PARTS, {AGAIN[kernel]: 0} if kernel in AGAIN else {}),
        ):
            return launch()

    return run


def compile_rows(case: Case, s: Settings) -> None:
    """Run each once; with `compile` up to the launch."""
    kernel, R, rows = case
    torch.set_num_threads(1)
    with without_launching() if s.compile else nullcontext():
        for size in s.sizes:
            launch = launch_of(kernel, size, R, s.device)
            for row in rows:
                try:
                    with tuning.force(config=row):
                        launch()
                except Exception as error:  # too large: said when it is timed
                    print(f"{kernel} R{R} {row}: {type(error).__name__}", file=sys.stderr)


def time_rows(case: Case, s: Settings, timer: Timer, profiler: Callable[[Any], Any], deadline: float) -> list[Any]:
    kernel, R, rows = case
    found: list[dict[str, Any]] = []
    for size in s.sizes:
        launch, of_size = launch_of(kernel, size, R, s.device), []
        for row in rows:
            if time.monotonic() > deadline:
                break
            result: dict[str, Any] = {"kernel": kernel, **dict(zip("MKN", size, strict=True)), "R": R}
            result |= {"row": astuple(row), "of_table": row in of_table(kernel, R)}
            try:
                with tuning.force(config=row):
                    launch()
                    result["us"] = round(1e3 * timer(launch)[0], 2)
            except Exception as error:
                result["failed"] = f"{type(error).__name__}: {error}"[:200]
            of_size.append(result)
        for result in told(of_size):
            with tuning.force(config=Config(*result["row"])):
                result["launches"] = {name: round(us, 2) for name, us in profiler(launch).items()}
        found += of_size
    return found


def by_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((row for row in rows if "us" in row), key=lambda row: row["us"])


def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest, and the fastest of the table's, which may be the same."""
    first, own = by_time(rows)[:1], by_time([row for row in rows if row["of_table"]])[:1]
    return first if first == own else first + own


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="The fastest of the table's rows, and the fastest of all, in µs")
    for heading in ("kernel", "M", "R", "table's", "µs", "fastest", "µs", "next", "µs"):
        made.add_column(heading)
    for of, group in itertools.groupby(rows, key=lambda row: [row[name] for name in ("kernel", "M", "R")]):
        mine = list(group)
        if own := by_time([row for row in mine if row["of_table"]]):
            three = (own[0], *by_time(mine)[:2])
            made.add_row(
                *map(str, of), *(cell for row in three for cell in (str(tuple(row["row"])), f"{row['us']:.1f}"))
            )
    return made


def main(s: Settings) -> None:
    if s.rehearse:
        s.sizes = ((40, 64, 64),)
    todo = cases(s)
    each = [(kernel, R, part) for kernel, R, rows in todo for part in (rows[i : i + 4] for i in range(0, len(rows), 4))]
    start = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(compile_rows, s=s), each))
    print(f"{sum(len(rows) for *_, rows in todo)} rows compiled in {time.monotonic() - start:.0f} s", flush=True)
    if s.compile:
        return
    timer: Timer = (lambda run: (run(), (1.0, 1.0, 1.0))[1]) if s.rehearse else partial(kernel_timer, times=9)
    profiler = (lambda run: {"none": 0.0}) if s.rehearse else by_launch
    found: list[dict[str, Any]] = []
    for case in todo:
        found += time_rows(case, s, timer, profiler, start + s.seconds)
        if not s.rehearse:  # after each case: the machine may be taken back
            machine.write(s.out, {"kind": "timed", "rows": found}, compact=True)
    Console(width=150).print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Settings))
