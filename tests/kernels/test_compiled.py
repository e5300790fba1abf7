"""What the compilers make of the kernels: no spills, no overflow, tensor cores, wide accesses.

The whole of it, every row of the block tables on six architectures, is bench/results/kernels_report.json (`just
kernels-report`, minutes); here that file is held to be of this code and clean, and a part of it is compiled anew.
"""

import subprocess
from typing import Any

import machine
import pytest
from compiling import compiled_value, compiling

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return machine.read(machine.RESULTS / "kernels_report.json")


def of_report(code: str) -> Any:
    """The value that `code` prints as JSON; `k` is kernels_report."""
    return compiled_value(f"import json, kernels_report as k\n{code}")


def test_report_is_of_this_code(report: dict[str, Any]) -> None:
    assert report["fingerprint"] == of_report("print(json.dumps(k.fingerprint()))"), "run: just kernels-report"


def test_report_has_every_row_of_the_tables(report: dict[str, Any]) -> None:
    keys = ("architecture", "dtype", "kernel", "rank", "rows", "cols", "num_warps", "num_stages")
    wanted = of_report(
        "s = k.Settings()\n"
        "work = k.jobs(list(s.architectures), list(s.dtypes), list(s.kernels), list(s.ranks), False)\n"
        "print(json.dumps([[*job[:4], *k.asdict(job[4]).values()] for job in work]))"
    )
    assert [[row[key] for key in keys] for row in report["rows"]] == wanted
    assert {row["architecture"] for row in report["rows"]} == set(ARCHITECTURES)
    assert {row["rank"] for row in report["rows"]} == {16, 32, 64, 128, 256}


def test_nothing_spills_or_overflows(report: dict[str, Any]) -> None:
    bad = [row for row in report["rows"] if row["overflows"] or row["spills"] or row["scalar_spills"]]
    assert bad == []
    assert all(row["registers"] > 0 and row["occupancy"] > 0 for row in report["rows"])


def test_dots_run_on_tensor_cores(report: dict[str, Any]) -> None:
    """Hopper's HGMMA takes 64 rows an instruction; smaller tiles take HMMA. In float32 NVIDIA's take sums of many
    tiles, which one over few ranks is not."""
    for row in report["rows"]:
        amd, kernel = row["architecture"].startswith("gfx"), row["kernel"]
        over_ranks = kernel in ("expand", "expand_dropout", "expand_grouped") and row["rank"] <= 32
        if kernel.startswith(("scale", "rotate")):
            assert row["dots"] == 0
        elif row["dtype"] == "float32" and not amd and over_ranks:
            assert row["dot_kind"] == "none", row
        else:
            assert row["dots"] > 0, row
            kinds = {"MFMA"} if amd else {"HMMA", "HGMMA", "UTCHMMA"}
            assert row["dot_kind"] in kinds, row
    assert any(row["dot_kind"] == "HGMMA" for row in report["rows"])


def test_accesses_are_wide(report: dict[str, Any]) -> None:
    """128 bits a thread; of float32 tokens beside 16-bit products, whose tiles are narrow, on NVIDIA's alone."""
    stores = {
        "expand",
        "expand_dropout",
        "expand_grouped",
        "expand_backward_rescale",
        "shrink_backward",
        "shrink_backward_dropout",
        "shrink_backward_grouped",
        "shrink_expand_backward",
        "scale",
        "scale_backward",
        "rotate",
        "rotate_backward",
    }
    for row in report["rows"]:
        wide, amd = row["kernel"].endswith("_wide"), row["architecture"].startswith("gfx")
        if row["dtype"] == "bfloat16" and not (wide and amd):
            assert row["loads_128"] > 0, row
            assert row["stores_128"] > 0 or row["kernel"] not in stores, row


def test_hopper_rearranges_a_tile_in_two_steps() -> None:
    """With a barrier each; where a product lies across it is eight. And `expand` waits for memory once."""
    found = of_report("""
import re
found = {}
for name in ("expand", "shrink_backward"):
    for config in k.tuning.candidates(name, "sm_90", 2, 16):
        with k.tuning.force(config=config, architecture="sm_90"):
            launch, *_ = k.record(k.kernel_calls(k.torch.bfloat16, 8192, 4096, 4096, 16)[name])
        code = k.compiled(launch, k.ARCHITECTURES["sm_90"].target).asm["ptx"]
        before, *after = re.split(r"bar(?:rier)?[.]sync", code)
        found[f"{name} {config}"] = len(after), sum("ld.global" in each for each in after)
print(json.dumps(found))""")
    assert len(found) == 4
    for name, (barriers, that_loads_follow) in found.items():
        assert barriers <= 8, name
        assert that_loads_follow == 0 or not name.startswith("expand"), name


def compiled_anew(*options: str) -> "subprocess.CompletedProcess[str]":
    return compiling("kernels_report.py", "--no-save", "--first-only", "--dtypes", "bfloat16", *options)


@pytest.mark.parametrize("vendor", ["sm", "gfx"])
def test_compiles_here(vendor: str) -> None:
    """Every kernel at r=32 with the row that is taken untimed, each for one of the vendor's architectures."""
    architectures = [name for name in ARCHITECTURES if name.startswith(vendor)]
    done = compiled_anew("--ranks", "32", "--in-turn", "--architectures", *architectures)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 kernels, compiled" in done.stdout


@pytest.mark.parametrize(
    ("job", "spills", "overflows"),
    [
        ("'shrink_backward', 256, k.tuning.Config(64, 128, 8)", True, False),
        ("'shrink', 256, k.tuning.Config(64, 128, 4, 3)", False, True),
    ],
)
def test_a_bad_row_is_noticed(job: str, spills: bool, overflows: bool) -> None:
    """Tiles that no thread's registers, or no multiprocessor's shared memory, hold."""
    found, is_bad = of_report(
        f"found = k.examine(('sm_90', 'bfloat16', {job}))\nprint(json.dumps([found, k.is_bad(found)]))"
    )
    assert is_bad
    assert (found["spills"] > 0, found["overflows"]) == (spills, overflows)


@pytest.mark.parametrize("architecture", ["gfx942", "gfx950"])
def test_a_rank_that_16_does_not_divide(architecture: str) -> None:
    """AMD's masks of a rank of 100 take registers that a rank of 128 leaves free; taller tiles have none for them."""
    spills = of_report(f"""
of = '{architecture}', 'float16', 'shrink_expand_backward'
rows = k.rows_of(of[2], *of[:2], 100)[0], k.tuning.Config(128, 64, 8, 1)
sizes = (70, 150, 150, 100), (8192, 4096, 4096, 100)
print(json.dumps([[k.compiled_for((*of, 100, row), *size)[1]['spills'] for size in sizes] for row in rows]))""")
    assert max(spills[0]) == 0 < max(spills[1])


# ---- any launch ----


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 1, 1, 1), "bfloat16"),
        ((1, 61, 67, 4), "float32"),
        ((7, 150, 1, 100), "bfloat16"),
        ((333, 1, 130, 1), "float32"),
    ],
)
def test_odd_launches_compile(sizes: tuple[int, ...], dtype: str) -> None:
    """For an H100, as Triton binds them: sizes of one, which become constants, sizes and strides that 16 does not
    divide, addresses that it does not divide."""
    grids = of_report(
        f"""
def empty(*shape, dtype):
    size = k.torch.Size(shape)
    return k.torch.empty(3 * size.numel() + 1, dtype=dtype)[1::3].view(size)

launches = [
    launch
    for name, call in k.kernel_calls(k.torch.{dtype}, *{sizes}, empty=empty).items()
    if name not in k.QUANTISED or "{dtype}" == "float32"
    for launch in k.record(call)
]
for launch in launches:
    assert k.compiled(launch, k.ARCHITECTURES["sm_90"].target).asm["cubin"]
print(json.dumps([launch.grid for launch in launches]))"""
    )
    assert len(grids) >= 20
    assert all(type(size) is int and size >= 1 for grid in grids for size in grid)


def test_grids_are_within_cudas() -> None:
    """2³¹ − 1 programs on the first axis, 65,535 on the others."""
    grids = of_report("""
sizes = (2**24, 256, 4096, 16), (2**20, 8192, 262144, 256), (1, 53248, 16384, 128)
calls = [call for size in sizes for call in k.kernel_calls(k.torch.bfloat16, *size).values()]
print(json.dumps([launch.grid for call in calls for launch in k.record(call)]))""")
    assert len(grids) >= 60
    for first, *others in grids:
        assert 1 <= first < 2**31
        assert all(1 <= size < 2**16 for size in others)
