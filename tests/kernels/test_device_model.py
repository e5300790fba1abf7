"""The model of device time, at one small shape, in a process whose kernels can be compiled; and its arithmetic."""

from typing import Any

import pytest
from compiling import compiled_value

from lora_lite.kernels.common import full_waves, split


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    code = (
        "import json, device_model as d\n"
        "resident = d.compiled_resources()\n"
        "row = lambda v, R, gpu='H100': d.row(gpu, v, 8192, 4096, R, resident)\n"
        "cases = (('lora', 16), ('lora', 128), ('lora', 256), ('dora', 64), ('dora', 128), ('ia3', 1), ('road', 1))\n"
        "found = {f'{v}:{R}': row(v, R) for v, R in cases}\n"
        "print(json.dumps(found | {'dora:32 on AMD': row('dora', 32, 'MI300X')}))"
    )
    return compiled_value(code)


def test_never_below_the_bound(rows: dict[str, Any]) -> None:
    for row in rows.values():
        assert row["us"] >= row["bound_us"], row


def test_bytes_are_of_the_tensors(rows: dict[str, Any]) -> None:
    found = rows["ia3:1"]["by_kernel"]["scale"]
    assert found["bytes"] == 2 * 2 * 8192 * 4096 + 4 * 4096
    assert rows["road:1"]["by_kernel"]["rotate"]["bytes"] == found["bytes"] + 4 * 4096
    assert found["us"] == pytest.approx(1e6 * found["bytes"] * found["busiest"] / 3.35e12, rel=1e-3)
    assert found["bound"] == "memory"


def test_many_ranks_come_from_cache_and_take_products(rows: dict[str, Any]) -> None:
    """expand: h for each block of 128 columns, B for each of 128 rows. The norm: three products."""
    found = rows["lora:256"]["by_kernel"]["expand"]
    again = (4096 // 128 * 8192 + 8192 // 128 * 4096) * 256 * 2
    us = 1e6 * (found["bytes"] + again) * found["busiest"] / 2 / 3.35e12
    assert (found["bound"], found["us"]) == ("cache", pytest.approx(us, rel=1e-3))
    found = rows["dora:128"]["by_kernel"]["row_norm"]
    us = 1e6 * 3 * 4096 * 4096 * 128 * found["busiest"] / (989.4e12 / 4)
    assert (found["bound"], found["us"]) == ("products", pytest.approx(us, rel=1e-3))
    assert rows["lora:16"]["by_kernel"]["expand"]["bound"] == "memory"


def test_parts_of_dh_stay_small(rows: dict[str, Any]) -> None:
    """At r = 128 they would be four times dy's traffic."""
    kernels = {"shrink", "shrink_across", "expand", "expand_backward", "shrink_backward"}
    assert set(rows["lora:128"]["by_kernel"]) == kernels
    for name in ("lora:16", "lora:128", "dora:64"):
        assert rows[name]["parts"] <= 0.35, rows[name]
        assert rows[name]["busiest"] <= 1.15, rows[name]
    assert rows["dora:32 on AMD"]["parts"] <= 1, "where columns are narrow, no more than another look at dy"


@pytest.mark.parametrize("blocks", [1, 7, 8, 32, 100, 500])
@pytest.mark.parametrize("size", [2048, 8190, 16384])
def test_waves_are_full(blocks: int, size: int) -> None:
    """No worse than one program a multiprocessor, and within 15 % of an even share where blocks of 32 rows allow it."""

    def busiest(wanted: int) -> float:
        count, each = split(size, 32, wanted)
        return -(-blocks * count // 132) * each * 132 / (blocks * size)

    chosen = busiest(full_waves(132, blocks, size, 32))
    assert chosen <= busiest(-(-132 // blocks))
    assert chosen <= 1.15 or all(busiest(wanted) >= chosen for wanted in range(1, 4 * -(-132 // blocks) + 1))
