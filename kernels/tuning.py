"""Block shapes: one table a vendor, with an architecture's exceptions, and the choice among a table's rows by timing.

A launch is written as `run(config)`; `tuned` calls it with a row of the table. On a GPU the rows are timed once for
each (kernel, dtypes, widths, rank, bucket of M) and the fastest is kept for the process: a shape keeps its row, and so
its bits, for as long as the process lives. Untimed, under LORA_LITE_AUTOTUNE=0, under
`torch.use_deterministic_algorithms`, in the interpreter, and where a CUDA graph is captured, it is the row that moves
least: short batches want square blocks, since few rows a program make many parts of a sum over tokens, and long ones
with many ranks large blocks, since what has R columns is read again for each.

Every row compiles without spilling for every architecture of its vendor (`just kernels-report` shows it, a test asks
for it); where 16 does not divide the widths or the rank some spill, and the report says how much. What bounds them: 255
registers a thread, 99 KiB of shared memory on sm_120, 64 KiB on gfx942.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

T = TypeVar("T")


# Triton's own are meant for kernels too, and take a hundred times as long.
def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


@dataclass(frozen=True)
class Config:
    """rows × cols is the tile of the token-sized tensors; of W, in its own elements or bytes, for the row norms."""

    rows: int
    cols: int
    num_warps: int = 4
    num_stages: int = 2

    @property
    def launch(self) -> dict[str, int]:
        """Options of a Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


Rows = tuple[Config, ...]

# Of any NVIDIA device, products in 16 bits.
_NVIDIA: dict[str, dict[int, Rows]] = {
    # Bound by the read of x: long rows of it in flight. A is read again for each block of rows. A batch too short for a
    # block of 32 on each multiprocessor takes blocks of 16 rather than parts of the columns.
    "shrink": {
        32: (Config(32, 128, 4, 3), Config(16, 256, 4, 3), Config(64, 128, 4, 3)),
        64: (Config(32, 128, 4, 3), Config(64, 128, 4, 3), Config(128, 64, 8, 3)),
        128: (Config(32, 128, 8, 3), Config(128, 64, 8, 3)),
        256: (Config(64, 64, 8, 2),),
    },
    # No loop over tokens, so nothing to pipeline: warps hide the latency. h and B are read again for each block.
    "expand": {
        64: (Config(64, 128, 8), Config(64, 128, 4)),
        256: (Config(64, 128, 8), Config(64, 64, 4)),
    },
    # Parts of dh cost 4·R/cols passes over dy, parts of dB 4·R/(rows of a program): columns as wide as the
    # accumulator of dB allows, unless the batch is short.
    "expand_backward": {
        16: (Config(32, 512, 16), Config(64, 128, 8)),
        32: (Config(32, 512, 8), Config(32, 256, 8), Config(64, 128, 8)),
        64: (Config(32, 256, 8), Config(64, 128, 8)),
        128: (Config(32, 128, 8),),
        256: (Config(32, 64, 8),),
    },
    # As above with a second token-sized read and a write in flight.
    "expand_backward_rescale": {
        32: (Config(32, 256, 8),),
        64: (Config(32, 128, 8), Config(16, 256, 8)),
        128: (Config(32, 64, 8),),
        256: (Config(32, 64, 8, 1),),
    },
    "shrink_backward": {
        64: (Config(64, 64, 8), Config(64, 128, 8)),
        256: (Config(32, 64, 8, 1),),
    },
    # The mask takes registers too.
    "shrink_dropout": {32: (Config(32, 128, 8, 2),), 128: (Config(32, 128, 8, 3),), 256: (Config(64, 64, 8, 2),)},
    "shrink_backward_dropout": {
        64: (Config(64, 64, 8),),
        128: (Config(32, 64, 8, 1),),
        256: (Config(32, 32, 8, 1),),
    },
    # A table of shares takes a few registers more.
    "shrink_grouped": {128: (Config(32, 128, 4, 3),), 256: (Config(64, 64, 8, 2),)},
    "expand_backward_grouped": {
        32: (Config(32, 512, 8),),
        64: (Config(32, 256, 8), Config(32, 128, 8)),
        128: (Config(32, 128, 8),),
        256: (Config(32, 64, 8),),
    },
    "shrink_backward_grouped": {64: (Config(64, 64, 8), Config(64, 128, 8)), 256: (Config(32, 32, 8, 1),)},
    # Of layers that read the same x: up to three dx_bases in flight.
    "shrink_together_dropout": {16: (Config(32, 64, 8, 1),), 64: (Config(32, 64, 8, 2),)},
    "shrink_backward_together_dropout": {64: (Config(32, 32, 4, 1),)},
    "shrink_backward_together": {
        128: (Config(32, 64, 8),),
        256: (Config(32, 64, 8, 1),),
    },
    # As "shrink_backward" with a second accumulator of K × R.
    "shrink_expand_backward": {
        16: (Config(64, 64, 8), Config(64, 128, 8)),
        64: (Config(32, 64, 8),),
        128: (Config(32, 64, 8),),
    },
    # A is in float32, and read again for every block of rows: as many as registers allow. Beside W in float16 its parts
    # are in TF32, of twice the size.
    "row_norm": {128: (Config(64, 32, 8, 3),)},
    "row_norm_float32": {32: (Config(64, 64, 8, 3),), 64: (Config(32, 64, 8, 3),), 128: (Config(64, 32, 8, 3),)},
    "scale": {256: (Config(32, 256, 4), Config(16, 256, 4))},
    "scale_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
    "rotate": {256: (Config(32, 256, 4), Config(16, 256, 4))},
    "rotate_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
}

# Of NVIDIA's data-centre devices, whose shared memory has stages enough to keep in flight what a multiprocessor's share
# of the bandwidth takes: 24 KiB on Hopper.
_DEEP: dict[str, dict[int, Rows]] = {
    "shrink": {
        **_NVIDIA["shrink"],
        128: (Config(32, 128, 8, 3), Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
        256: (Config(64, 64, 8, 3), Config(128, 32, 8, 4)),
    },
    # Above r = 64 without dh, which `shrink` computes.
    "expand_backward": {
        **_NVIDIA["expand_backward"],
        128: (Config(32, 128, 8, 3), Config(64, 64, 8, 3)),
        256: (Config(64, 64, 8, 3), Config(64, 128, 16, 3)),
    },
    "expand_backward_rescale": {
        32: (Config(32, 256, 8),),
        64: (Config(32, 128, 8), Config(16, 256, 8)),
        256: (Config(32, 64, 8, 3),),
    },
    "shrink_backward": {**_NVIDIA["shrink_backward"], 256: (Config(32, 64, 8, 3),)},
    "shrink_expand_backward": {
        16: (Config(64, 64, 8), Config(64, 128, 8)),
        128: (Config(32, 64, 8, 3),),
    },
    "row_norm": {32: (Config(64, 64, 8, 3),), 64: (Config(128, 64, 8, 3),), 128: (Config(64, 32, 8, 6),)},
    "row_norm_float32": {**_NVIDIA["row_norm_float32"], 128: (Config(64, 32, 8, 6),)},
    "scale_backward": {256: (Config(32, 256, 8), Config(16, 256, 4))},
    "rotate_backward": {256: (Config(32, 256, 8), Config(16, 256, 4))},
}

# Hopper's: first the row that was the fastest on an H200 (bench/results/rows.json, `just gpu-day rows`), or within 5 %
# (`expand` at r = 64: 13 %), at r = 16, 64 and 256, and what lies between them. Tiles of 64 rows, and three stages:
# with two a loop waits for each tile. At r = 256 what is read again, from cache, takes most of the time: beside those
# rows stand some, not timed yet, with tiles of twice the size, which read half as much again.
_HOPPER: dict[str, dict[int, Rows]] = {
    **_DEEP,
    "shrink": {
        32: (Config(32, 256, 4, 4), Config(64, 256, 8, 3), Config(16, 256, 4, 3)),
        64: (Config(64, 128, 4, 4), Config(64, 256, 8, 3), Config(32, 128, 4, 3)),
        128: (Config(64, 128, 8, 3), Config(32, 128, 8, 3), Config(128, 64, 8, 3)),
        256: (Config(64, 64, 8, 4), Config(64, 64, 4, 4), Config(128, 64, 8, 3)),
    },
    "expand": {64: (Config(64, 128, 8), Config(64, 64, 4)), 256: (Config(64, 64, 4), Config(128, 128, 8, 4))},
    # 512 columns move least: half the parts of dh. For memory that is slower than an H200's.
    "expand_backward": {
        16: (Config(64, 256, 8, 3), Config(64, 512, 16, 3), Config(64, 128, 8, 3)),
        64: (Config(64, 256, 8, 3), Config(64, 512, 16, 2), Config(64, 128, 8, 3)),
        128: (Config(64, 128, 8, 3), Config(64, 64, 8, 3)),
        256: (Config(64, 64, 8, 3), Config(64, 64, 4, 3), Config(64, 128, 8, 3)),
    },
    "expand_backward_grouped": {
        64: (Config(64, 256, 8, 3), Config(64, 128, 8, 3)),
        256: (Config(64, 64, 8, 3),),
    },
    "expand_backward_rescale": {
        16: (Config(64, 256, 8, 3), Config(64, 128, 4, 3)),
        64: (Config(64, 128, 8, 3), Config(64, 256, 8, 3)),
        128: (Config(64, 128, 8, 3), Config(64, 64, 8, 3)),
        256: (Config(64, 64, 8, 3),),
    },
    "shrink_backward": {
        16: (Config(64, 256, 16, 1), Config(64, 128, 8, 3)),
        64: (Config(64, 256, 8, 3), Config(64, 128, 8, 3)),
        128: (Config(64, 128, 8, 3), Config(64, 64, 8, 3)),
        256: (Config(64, 64, 8, 3),),
    },
    "shrink_backward_grouped": {
        128: (Config(64, 128, 8, 3), Config(64, 64, 8, 3)),
        256: (Config(64, 64, 16, 3), Config(64, 64, 8, 3)),
    },
    "shrink_backward_together": {
        128: (Config(64, 64, 16, 3), Config(64, 128, 16, 3)),
        256: (Config(64, 64, 8, 3),),
    },
    "shrink_backward_dropout": {
        64: (Config(64, 64, 8),),
        256: (Config(64, 64, 8, 1),),
    },
    "shrink_backward_together_dropout": {
        32: (Config(32, 128, 8, 1),),
        64: (Config(16, 128, 8, 1), Config(32, 64, 8, 1)),
    },
    "shrink_expand_backward": {
        64: (Config(64, 128, 8, 3), Config(64, 128, 16, 3)),
        128: (Config(64, 64, 8, 3), Config(32, 64, 8, 3)),
    },
    "row_norm": {**_DEEP["row_norm"], 32: (Config(128, 128, 8, 3),)},
    "row_norm_float32": {**_DEEP["row_norm_float32"], 64: (Config(64, 64, 8, 3),)},
    "scale_backward": {256: (Config(64, 256, 8), Config(16, 256, 4))},
    "rotate_backward": {256: (Config(64, 128, 8), Config(32, 256, 8))},
}

# (vendor or architecture, bytes an element) → kernel → most ranks in a block → rows, of which the first goes before
# others that move as little. With dropout, groups, several layers or a matrix that lies across (`…_dropout`,
# `…_grouped`, `…_together`, `…_across`) a kernel takes its plain rows where it has none of its own.
TABLE: dict[tuple[str, int], dict[str, dict[int, Rows]]] = {
    ("nvidia", 2): _NVIDIA,
    ("sm_100", 2): _DEEP,
    ("sm_80", 2): {
        **_DEEP,
        "expand_grouped": {64: _NVIDIA["expand"][64], 256: (Config(64, 64, 4),)},
        "row_norm": {32: (Config(64, 64, 8, 3),), 128: (Config(64, 32, 8, 3),)},
        "row_norm_float32": _NVIDIA["row_norm_float32"],
    },
    ("sm_90", 2): _HOPPER,
    # A float32 product's operands lie in registers, whole or as large and small parts: short inner dimensions.
    ("nvidia", 4): {
        "shrink": {64: (Config(32, 32, 8),), 256: (Config(16, 32, 8),)},
        "shrink_across_grouped": {64: (Config(32, 32, 8),), 256: (Config(16, 32, 8, 1),)},
        "expand": {256: (Config(32, 64, 8), Config(32, 32, 4))},
        "expand_backward": {256: (Config(16, 32, 8, 1),)},
        "expand_backward_rescale": {256: (Config(16, 32, 8, 1),)},
        "shrink_backward": {64: (Config(32, 32, 8, 1),), 256: (Config(16, 16, 8),)},
        "shrink_backward_dropout": {
            64: (Config(32, 32, 8),),
            128: (Config(16, 16, 8, 1),),
            256: (Config(16, 16, 16, 1),),
        },
        "expand_grouped": {256: (Config(32, 32, 4),)},
        "expand_backward_grouped": {128: (Config(16, 32, 8, 1),), 256: (Config(16, 16, 8, 1),)},
        "shrink_expand_backward": {64: (Config(16, 32, 8),), 128: (Config(16, 16, 8, 1),)},
        "row_norm_float32": {32: (Config(16, 64, 8),), 64: (Config(16, 64, 4),), 128: (Config(16, 64, 8, 1),)},
        "row_norm_int8": {32: (Config(128, 32, 8, 3),), 128: (Config(64, 32, 8, 3),)},
        "row_norm_4bit": {32: (Config(64, 32, 8, 1),), 128: (Config(32, 32, 8, 1),)},
        "row_norm_4bit_float32": {64: (Config(16, 32, 4, 1),), 128: (Config(16, 32, 8, 1),)},
        "scale": {256: (Config(16, 256, 4), Config(32, 128, 4))},
        "scale_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
        "rotate": {256: (Config(16, 256, 4), Config(32, 128, 4))},
        "rotate_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
    },
    # 64 lanes a warp and 64 KiB of shared memory: small tiles, and no pipelining through shared memory.
    ("amd", 2): {
        "shrink": {128: (Config(64, 64, 8), Config(128, 64, 8)), 256: (Config(64, 64, 8), Config(128, 32, 8))},
        "expand": {64: (Config(64, 128, 8), Config(64, 128, 4)), 256: (Config(64, 128, 8), Config(128, 128, 8))},
        "expand_backward": {
            32: (Config(64, 64, 8, 1), Config(64, 128, 8, 1), Config(64, 256, 8, 1)),
            256: (Config(64, 64, 8, 1), Config(64, 128, 8, 1)),
        },
        "expand_backward_rescale": {32: (Config(32, 64, 8, 1),), 256: (Config(64, 64, 8, 1),)},
        "shrink_backward_together": {
            64: (Config(32, 128, 8, 1),),
            128: (Config(64, 64, 8, 1),),
            256: (Config(32, 64, 4, 1),),
        },
        "shrink_together_dropout": {64: (Config(32, 64, 4),)},
        "shrink_backward_together_dropout": {32: (Config(32, 32, 8, 1),), 64: (Config(32, 32, 4, 1),)},
        "shrink_backward": {
            64: (Config(64, 64, 8, 1), Config(64, 128, 8, 1)),
            128: (Config(64, 64, 8, 1),),
            256: (Config(32, 64, 4, 1),),
        },
        "shrink_expand_backward": {
            64: (Config(64, 64, 8, 1),),
            128: (Config(32, 64, 8, 1),),  # with 64 rows ranks that 16 does not divide spill
        },
        "row_norm": {16: (Config(64, 64, 8, 1),), 128: (Config(64, 32, 8, 1),)},
        "row_norm_float32": {128: (Config(64, 64, 8, 1),)},
        "scale": {256: (Config(32, 256, 4), Config(16, 256, 4))},
        "scale_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
        "rotate": {256: (Config(32, 256, 4), Config(16, 256, 4))},
        "rotate_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
    },
    ("amd", 4): {
        "shrink": {256: (Config(32, 32, 8),)},
        "expand": {256: (Config(32, 64, 8), Config(32, 32, 4))},
        "expand_backward": {256: (Config(16, 32, 8, 1),)},
        "expand_backward_rescale": {256: (Config(16, 32, 8, 1),)},
        "shrink_backward": {256: (Config(16, 16, 8, 1),)},
        "shrink_backward_dropout": {128: (Config(16, 16, 8, 1),), 256: (Config(16, 16, 4, 1),)},
        "shrink_expand_backward": {128: (Config(16, 16, 8, 1),)},
        "row_norm_float32": {128: (Config(64, 64, 8, 1),)},
        "row_norm_int8": {16: (Config(64, 64, 8, 1),), 128: (Config(64, 32, 8, 1),)},
        "row_norm_4bit": {32: (Config(64, 32, 8, 1),), 128: (Config(64, 16, 8, 1),)},
        "row_norm_4bit_float32": {128: (Config(16, 32, 8, 1),)},
        "scale": {256: (Config(16, 256, 4), Config(32, 128, 4))},
        "scale_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
        "rotate": {256: (Config(16, 256, 4), Config(32, 128, 4))},
        "rotate_backward": {256: (Config(16, 256, 4), Config(32, 128, 4))},
    },
}

# Of float32 tokens beside 16-bit products, up to these ranks: with eight warps NVIDIA's compiler spills some registers,
# rather than take more than half of what there are, or a thread has less than 128 bits of a tile.
FOUR_WARPS = {
    "shrink_across": 128,
    "shrink_together_dropout": 64,
    "shrink_backward_together": 128,
    "shrink_backward_grouped": 256,
    "shrink_expand_backward": 64,
    "expand_backward": 64,
    "expand_backward_rescale": 64,
}

_forced: dict[str, Any] = {}
_chosen: dict[tuple[Any, ...], Config] = {}
_left_out: set[tuple[str, Config]] = set()


@contextmanager
def force(**choices: Any) -> Iterator[None]:
    """For tests and reports: fix `config` (a Config), `architecture` ("gfx942") or `programs` (a number)."""
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(t: Tensor) -> str:
    """Of the device that holds t, such as "sm_90". The interpreter stands for that one."""
    return _forced.get("architecture") or (_architecture(t.device.index) if t.is_cuda else "sm_90")


# Of PyTorch's two settings the newer (torch 2.9) knows what either was told; the older raises once the newer is used.
# Through `torch.backends` the newer takes as long to read as a launch's binding.
_new_setting = getattr(torch._C, "_get_fp32_precision_getter", None)


def allows_tf32() -> bool:
    """Whether PyTorch may round the operands of its own float32 products."""
    if _new_setting is not None:
        return _new_setting("cuda", "matmul") == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def has_tf32(t: Tensor) -> bool:
    """Whether the device that holds t multiplies in TF32: NVIDIA's do, and of AMD's gfx942."""
    return not architecture(t).startswith("gfx") or architecture(t) == "gfx942"


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(t: Tensor) -> int:
    """Programs that fill the device: one a multiprocessor. The interpreter stands for an H100."""
    return _forced.get("programs") or (_processors(t.device.index) if t.is_cuda else 132)


def candidates(kernel: str, architecture: str, itemsize: int, rank: int, wide: bool = False) -> Rows:
    """The table's rows for a launch.

    `wide`: its tokens are in float32 and its products, of `itemsize` bytes an element, are not, as under autocast. The
    first row then, with half the columns or fewer, so that a tile has as many bytes, and one stage.
    """
    vendor = "amd" if architecture.startswith("gfx") else "nvidia"
    tables = (TABLE.get((architecture, itemsize), {}), TABLE[vendor, itemsize])
    alone = kernel.replace("_together", "").replace("_across", "")
    plain = alone.removesuffix("_dropout").removesuffix("_grouped")
    names = (kernel, alone, plain)
    table = next(table[name] for name in names for table in tables if name in table)
    rows = table[min((most for most in table if rank <= most), default=max(table))]
    if not wide:
        return rows
    first, backward = rows[0], "backward" in kernel
    less = 4 if kernel.startswith("expand_backward") or "dropout" in kernel else 2
    less *= 2 if backward and vendor == "amd" else 1
    most = FOUR_WARPS.get(kernel, FOUR_WARPS.get(plain, 0))
    warps = 4 if vendor == "nvidia" and first.num_warps == 8 and rank <= most else first.num_warps
    return (replace(first, cols=max(first.cols // less, 16), num_warps=warps, num_stages=1),)


# Estimates: caches' bandwidth as a multiple of the memory's, and the bytes that memory moves while a launch starts.
_CACHE, LAUNCH = 2.5, 6 << 20


def of_parts(count: int, size: int) -> float:
    """Bytes that a sum of `size` numbers in `count` parts moves: they are written, and read by another launch."""
    return 8 * count * size + LAUNCH if count > 1 else 0


def of_reads(times: int, t: Tensor) -> float:
    """Bytes that a matrix moves (one of a stack of them) that is read so often, from cache."""
    return times * t.shape[-2] * t.shape[-1] * t.element_size() / _CACHE


def of_idle(count: int, processors: int, t: Tensor) -> float:
    """Bytes of a tensor that could have moved while processors wait for the last of `count` programs."""
    return t.nbytes * (cdiv(count, processors) * processors / max(count, 1) - 1)


def _nothing(config: Config) -> float:
    return 0


def tuned(
    kernel: str,
    run: Callable[[Config], T],
    x: Tensor,
    dtype: torch.dtype,
    M: int,
    *shape: int,
    moves: Callable[[Config], float] = _nothing,
) -> T:
    """run(config) with the fastest row of the table for this kernel, for x (M × …), and for its launch's shape.

    `dtype` is that of the products; `shape` is the widths, then the rank (1 where there is none). `moves` gives the
    bytes by which rows differ, of which untimed the least are taken. Operators are functional, so that timing one by
    running it is safe. A row that does not compile or fit the device is left out with a warning; where no row is left,
    its error is raised.
    """
    if "config" in _forced:
        return run(_forced["config"])
    rows = candidates(kernel, architecture(x), dtype.itemsize, shape[-1], x.dtype.itemsize > dtype.itemsize)
    if len(rows) == 1:
        return run(rows[0])
    by_time = x.is_cuda and not torch.are_deterministic_algorithms_enabled()
    if not by_time or os.environ.get("LORA_LITE_AUTOTUNE") == "0":
        fit = [row for row in rows if (kernel, row) not in _left_out] or rows
        return _first_fit(kernel, sorted(fit, key=moves), run)[1]
    key = (kernel, architecture(x), x.device.index, x.dtype, dtype, *shape, power_of_2(M))
    if key in _chosen:
        return run(_chosen[key])
    capturing = torch.cuda.is_current_stream_capturing()  # which can't be timed, and keeps its row
    rows = sorted(rows, key=moves if capturing else lambda config: _time(kernel, config, run))
    _chosen[key], result = _first_fit(kernel, rows, run)
    return result


# What Triton raises where a kernel does not compile or load.
_UNFIT = (TritonError, RuntimeError)


def _time(kernel: str, config: Config, run: Callable[[Config], Any]) -> float:
    """Milliseconds; infinite where the row can't be timed."""
    try:
        return float(triton.testing.do_bench(lambda: run(config), warmup=5, rep=20))  # type: ignore[arg-type]
    except torch.OutOfMemoryError:  # by what timing takes; the row itself may fit
        return math.inf
    except _UNFIT as error:
        _leave_out(kernel, config, error)
        return math.inf


def _first_fit(kernel: str, rows: Sequence[Config], run: Callable[[Config], T]) -> tuple[Config, T]:
    """The first row that runs, and what it gives."""
    config, *others = rows
    try:
        return config, run(config)
    except _UNFIT as error:
        if not others or isinstance(error, torch.OutOfMemoryError):
            raise
        _leave_out(kernel, config, error)
    return _first_fit(kernel, others, run)


def _leave_out(kernel: str, config: Config, error: Exception) -> None:
    if (kernel, config) not in _left_out:
        _left_out.add((kernel, config))
        warnings.warn(f"the kernel {kernel} does without a row of its block table, {config}: {error}", stacklevel=3)
