"""Which blocks are the fastest: kernels timed with many more rows than their block table has: `just gpu-rows`.

For whoever changes a table of kernels/tuning.py. On a GPU the rows are compiled by all cores and then timed one by one,
as launchers run them: casts of the adapter's matrices and sums of parts included. `--compile` does the first alone and
needs no GPU: what it leaves in Triton's cache can be carried to a machine with an H100.
"""

import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import machine
import torch
import tyro
from kernel_times import Shape, _with_rank, _without_rank, by_launch, kernel_timer
from launch_path import without_launching
from rich.console import Console
from rich.table import Table

from lora_lite.kernels import tuning
from lora_lite.kernels.expand_backward import MOST_RANKS_IN_PARTS
from lora_lite.kernels.tuning import Config

SHAPES = ((8192, 4096, 4096), (2048, 4096, 4096))  # M, K, N
RANKS = (16, 32, 64, 128, 256)
ACCUMULATORS = {"expand_backward": 1, "expand_backward_rescale": 1, "shrink_backward": 1, "shrink_expand_backward": 2}
WITHOUT_RANK = ("scale", "scale_backward", "rotate", "rotate_backward")
# dh by another look at dy, instead of in parts.
AGAIN = {"expand_backward_again": "expand_backward", "expand_backward_rescale_again": "expand_backward_rescale"}
KERNELS = ("shrink", "expand", *ACCUMULATORS, *AGAIN, "row_norm", *WITHOUT_RANK)


@dataclass
class Settings:
    """Time kernels with many rows; the table's own are among them."""

    kernels: tuple[str, ...] = KERNELS
    ranks: tuple[int, ...] = RANKS
    compile: bool = False
    """Only compile, without a GPU, for an H100."""
    seconds: int = 120
    """After which no further row is timed."""
    out: Path = machine.RESULTS / "rows.json"


def tried(kernel: str, R: int) -> list[Config]:
    """The rows of a launch: those of the table, and others whose tiles and accumulators registers may hold."""
    kernel = AGAIN.get(kernel, kernel)
    if kernel in WITHOUT_RANK:
        sizes = itertools.product((4, 8, 16, 32, 64), (128, 256, 512, 1024), (4, 8), (2,))
    elif kernel == "expand":
        sizes = itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2,))
    elif kernel == "row_norm":
        sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (3, 4))
    elif kernel == "shrink":
        sizes = itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4))
    else:
        sizes = itertools.product((32, 64), (64, 128, 256, 512), (4, 8, 16), (1, 3))
    found = []
    for rows, cols, warps, stages in sizes:
        of_thread = rows * cols / (32 * warps)
        accumulated = cols * R * ACCUMULATORS.get(kernel, 0) / (32 * warps)
        if 8 <= of_thread <= 64 and rows * R <= 1 << 14 and accumulated <= 128:
            found.append(Config(rows, cols, warps, stages))
    of_table = tuning.candidates(kernel, "sm_90", 2, R)
    return list(dict.fromkeys([*of_table, *found]))


def cases(s: Settings) -> list[tuple[str, int, list[Config]]]:
    return [
        (kernel, R, tried(kernel, R))
        for kernel in s.kernels
        for R in ((1,) if kernel in WITHOUT_RANK else s.ranks)
        if not (R > 128 and kernel in ("shrink_expand_backward", "row_norm")) and not (R > 64 and kernel in AGAIN)
    ]


def launches(kernel: str, shape: tuple[int, int, int], R: int, draw: Any) -> Any:
    of = _without_rank if kernel in WITHOUT_RANK else _with_rank
    launch = of(Shape(*shape, R), draw)[AGAIN.get(kernel, kernel)][0]
    if kernel not in AGAIN:
        return launch

    def again() -> Any:
        with mock.patch.dict(MOST_RANKS_IN_PARTS, {AGAIN[kernel]: 0}):
            return launch()

    return again


def compile_rows(case: tuple[str, int, list[Config]], here: bool) -> None:
    """Run each once; without a GPU up to the launch."""
    kernel, R, rows = case
    torch.set_num_threads(1)

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.ones(*size, dtype=dtype, device="cuda" if here else "cpu")

    with nullcontext() if here else without_launching():
        for shape in SHAPES:
            with torch.no_grad():
                launch = launches(kernel, shape, R, draw)
            for row in rows:
                try:
                    with tuning.force(config=row):
                        launch()
                except Exception as error:  # too large: said again when it is timed
                    print(f"{kernel} R{R} {row}: {type(error).__name__}", file=sys.stderr)


def time_rows(case: tuple[str, int, list[Config]], deadline: float) -> list[dict[str, Any]]:
    kernel, R, rows = case

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device="cuda")

    found = []
    for shape in SHAPES:
        launch = launches(kernel, shape, R, draw)
        for row in rows:
            if time.monotonic() > deadline:
                return found
            result: dict[str, Any] = {"kernel": kernel, **dict(zip("MKN", shape, strict=True)), "R": R}
            result |= {"row": astuple(row), "of_table": row in tuning.candidates(kernel, "sm_90", 2, R)}
            try:
                with tuning.force(config=row):
                    launch()
                    result["us"] = 1e3 * kernel_timer(launch, times=9)[0]
            except Exception as error:
                result["failed"] = f"{type(error).__name__}: {error}"[:200]
            found.append(result)
        timed = sorted((row for row in found if "us" in row and row["M"] == shape[0]), key=lambda row: row["us"])
        for result in {id(row): row for row in [*timed[:1], *(row for row in timed if row["of_table"])]}.values():
            with tuning.force(config=Config(*result["row"])):
                result["launches"] = by_launch(launch)
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="The fastest rows beside the table's first, in µs")
    for heading in ("kernel", "M", "R", "table's", "µs", "fastest", "µs", "next", "µs"):
        made.add_column(heading)
    key = ("kernel", "M", "R")
    for of, group in itertools.groupby(rows, key=lambda row: [row[name] for name in key]):
        timed = sorted((row for row in group if "us" in row), key=lambda row: row["us"])
        if mine := [row for row in timed if row["of_table"]]:
            cells = [cell for row in (mine[0], *timed[:2]) for cell in (str(tuple(row["row"])), f"{row['us']:.1f}")]
            made.add_row(*map(str, of), *cells)
    return made


def main(s: Settings) -> None:
    todo = cases(s)
    each = [(kernel, R, part) for kernel, R, rows in todo for part in map(list, itertools.batched(rows, 4))]
    start = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(compile_rows, here=not s.compile), each))
    print(f"{sum(len(rows) for *_, rows in todo)} rows compiled in {time.monotonic() - start:.0f} s", flush=True)
    if s.compile:
        return
    found = [row for case in todo for row in time_rows(case, start + s.seconds)]
    s.out.write_text(json.dumps(found))
    Console(width=150).print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Settings))
