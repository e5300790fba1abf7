"""The kernels' benchmark on a CPU: bytes counted at a small size, and a GPU run's code with a timer that only runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import block
import kernel_bench
import kernel_times
import operations
import pytest
import torch
from compiling import compiling
from torch import Tensor

from lora_lite.kernels import expand

SHAPE = kernel_times.Shape(70, 64, 128, 8, "tiny")
LIMITS = kernel_times.Limits(copy=1e12, matmul=1e14)


def fake_timer(run: Callable[[], Any]) -> tuple[float, float, float]:
    run()
    return 2.0, 1.0, 3.0


def test_shapes_are_real_projections() -> None:
    shapes = kernel_times.shapes()
    assert len(shapes) == 3 * 3 * 6 * 4
    assert kernel_times.Shape(8192, 4096, 14336, 16, "Llama-3.1-8B") in shapes


def test_kernel_rows() -> None:
    rows = kernel_times.kernels(SHAPE, fake_timer, LIMITS, "cpu")
    assert {row["kernel"] for row in rows} == set(kernel_bench.BY_KERNEL)
    for row in rows:
        assert row["right"], row
        assert 0 < row["error"] < 1e-2
        assert (row["ms"], row["ms_20"], row["ms_80"]) == (2.0, 1.0, 3.0)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / 2e-3 / 1e9)
        assert row["of_copy"] == pytest.approx(row["bytes"] / 2e-3 / 1e12)
    scale = next(row for row in rows if row["kernel"] == "scale")
    assert scale["bytes"] == 2 * 70 * 128 * 2


@pytest.mark.parametrize("variant", ["lora", "dora", "hra", "ia3", "road"])
def test_layer_rows(variant: str) -> None:
    rows = {row["contender"]: row for row in kernel_times.layers(variant, SHAPE, fake_timer, "cpu", compiler="eager")}
    assert set(rows) == {"base", "lora_lite", "eager", "compiled", "peft"} | ({"addmm"} if variant == "lora" else set())
    assert all(row["right"] for row in rows.values()), rows
    assert 0 < rows["lora_lite"]["error"] < 2e-2
    assert rows["lora_lite"]["both_ms"] == 2.0


def test_limits() -> None:
    found = kernel_times.limits(fake_timer, "cpu", size=64)
    assert found.copy == pytest.approx(2 * 64 * 64 * 2 / 2e-3)
    assert found.matmul == pytest.approx(2 * 64**3 / 2e-3)


def test_a_wrong_kernel_turns_the_exit_code() -> None:
    launch = expand.launch_expand
    settings = ((), (70,), (8,), False)
    shapes = mock.patch.object(kernel_times, "shapes", return_value=[SHAPE])
    cpu = {"limits": lambda timer, device: LIMITS, "gpu_timer": fake_timer, "layers": lambda *rest: []}
    kernels = kernel_times.kernels
    on_cpu = mock.patch.object(kernel_times, "kernels", lambda s, timer, limit, device: kernels(s, timer, limit, "cpu"))
    with shapes, on_cpu, mock.patch.multiple(kernel_times, **cpu):
        assert kernel_bench.timed(("tiny",), *settings[1:]) == 0
        with mock.patch.object(expand, "launch_expand", lambda *args: launch(*args) * 1.1):
            assert kernel_bench.timed(("tiny",), *settings[1:]) == 1


@pytest.mark.parametrize("variant", ["lora", "dora", "hra", "ia3", "road"])
def test_counted_bytes(variant: str) -> None:
    """Where one block holds all columns no sum has parts: what is left is the bound, and what is small."""
    N = 128 if variant == "hra" else 192
    shape = kernel_times.Shape(64, 128, N, 1 if variant in ("ia3", "road") else 8)
    row = kernel_bench.counted(variant, shape)
    large = {name: count for name, count in row["by_kernel"].items() if count >= 2 * 64 * 128 and name != "cast."}
    tokens = {"lora": 3 + 4, "dora": 3 + 6, "hra": 3 + 3, "ia3": 2 + 3, "road": 2 + 3}[variant]
    widths = {"shrink": 128, "shrink_backward": 128}
    assert len(large) == tokens + (variant == "dora")
    for name, count in large.items():
        kernel, tensor = name.split(".")
        looks = 2 if (variant, name) == ("hra", "shrink.x") else 1  # its backward shrinks dy
        assert count == (2 * N * 128 if tensor == "W" else looks * 2 * 64 * widths.get(kernel, N)), name
    assert row["lora_lite"] == sum(row["by_kernel"].values())
    assert row["eager"] > row["bound"]
    assert row["peft"] > row["bound"]
    assert sum(kernel["flops"] for kernel in row["kernels"].values()) == row["flops"]
    assert sum(kernel["bytes"] for kernel in row["kernels"].values()) <= row["lora_lite"]
    assert set(row["modelled_us"]) == set(kernel_bench.GPUS)


def test_counted_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block of small layers: what they share, they move once; the in-place form moves nothing for additions."""
    widths = {
        "self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (128, 128)),
        "mlp": {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)},
    }
    monkeypatch.setattr(block, "WIDTHS", widths)
    monkeypatch.setattr(block, "R", 2)
    monkeypatch.setattr(block, "LAYERS", {name: KN for of in widths.values() for name, KN in of.items()})
    M = 1024
    found = block.counted(M)
    moved = {name: total / (2 * M) for name, total in found["bytes"].items()}
    K, N = sum(k for k, _ in block.LAYERS.values()), sum(n for _, n in block.LAYERS.values())
    shared = 4 * (128 + 256) + (6 + 5) * 128 + 3 * N
    alone = 4 * K + 3 * N + 3 * 3 * 128
    assert shared <= moved["lora_lite"] <= 1.25 * shared
    assert alone <= moved["one by one"] <= 1.25 * alone
    assert 4 * (K + N) <= moved["addmm"] <= 1.25 * 4 * (K + N)
    assert moved["lora_lite"] == min(moved.values())


def test_operators_are_counted() -> None:
    x, W = torch.empty(10, 8, device="meta"), torch.empty(6, 8, device="meta")
    with kernel_bench.OperatorsCounted(W) as mode:
        (x @ W.t()).add_(1)  # the product with W is the base layer's
        x * 2
    assert mode.traffic.bytes == {("add_", ""): 2 * 10 * 6 * 4, ("mul", ""): 2 * 10 * 8 * 4}


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "error": lambda t: t * 1.02,
    "dtype": lambda t: t.half(),
    "not finite": lambda t: t.index_fill(0, torch.tensor(3), torch.nan),
}


@pytest.mark.parametrize("how", [None, *WRONG])
def test_the_bar_tells_wrong_from_right(how: str | None) -> None:
    exact = torch.randn(200, dtype=torch.float64)
    near = exact.bfloat16()
    ours = WRONG[how](near) if how else near
    error, bar = operations.errors(lambda: ({"y": exact}, {"y": near}, {"y": ours}), torch.bfloat16)["y"]
    assert (error > bar) == bool(how)


def test_host_time(tmp_path: Path) -> None:
    """In a process whose kernels can be compiled: what it counts is of a layer whose launches are known."""
    out = tmp_path / "host.json"
    done = compiling("host.py", "--rounds", "1", "--methods", "lora", "ia3", "road", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = {(row["method"], row["backend"]): row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {("lora", "triton"), ("ia3", "triton"), ("road", "triton"), ("lora", "reference")}
    for row in rows.values():
        assert row["base_us"] > 0  # what is added to it is a difference, and of one round may be noise
        assert row["ratio"] == pytest.approx(row["added_us"]["ours"] / row["added_us"]["peft"])
        assert row["peft_launches"] > 0
    kernels = {name: row["launches"] for (name, backend), row in rows.items() if backend == "triton"}
    halves = ("_shrink_kernel", "_expand_kernel", "_expand_backward_kernel", "_shrink_backward_kernel")
    assert kernels["lora"]["kernels"] == {**dict.fromkeys(halves, 1), "_sum_parts_kernel": 2}
    assert kernels["lora"]["torch"] == 0
    of_gain = ("_scale_kernel", "_scale_backward_kernel", "_sum_parts_kernel")
    assert kernels["ia3"] == {"ours": 3, "torch": 0, "kernels": dict.fromkeys(of_gain, 1)}
    of_turn = ("_rotate_kernel", "_rotate_backward_kernel", "_sum_parts_kernel")
    assert (kernels["road"]["ours"], kernels["road"]["kernels"]) == (3, dict.fromkeys(of_turn, 1))
