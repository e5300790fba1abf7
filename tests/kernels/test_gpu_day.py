"""`just gpu-day` without a GPU: each part on a CPU with a timer that only runs; processes that fail, crash and hang."""

import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_day
import gpu_parts
import launches
import pytest
import random_models
import rows as bench_rows
import torch
from gpu_day import Found, Settings
from gpu_parts import PARTS
from rich.console import Console

from lora_lite.kernels import launching, low_rank, scale

BENCH = dataclasses.replace(
    gpu_day.REHEARSAL,
    timer=lambda run: (run(), (2.0, 1.0, 3.0))[1],
    kernel_timer=lambda run: (run(), (2.0, 1.0, 3.0))[1],
    step_timer=lambda run: (run(), (20.0, 10.0, 30.0))[1],
    device_timer=lambda run: (run(), 1.5)[1],
    profiler=lambda run: (run(), {"gemm": 1400.0, "_expand_kernel": 100.0})[1],
)


def rows(part: str, *cases: str) -> list[dict[str, Any]]:
    found = PARTS[part].cases(BENCH)
    return [row for case in cases for row in found[case]()]


def first_of_each_operation() -> list[str]:
    names = list(PARTS["kernels"].cases(BENCH))
    return list({name.split()[0]: name for name in reversed(names) if name.endswith("row 0")}.values())


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    """Some cases of each part, here; the model of a GPU, which takes no interpreter, in the process of its own."""
    modelled = gpu_day.run_part("modelled", time.monotonic() + 60, Settings(rehearse=True))
    assert modelled.fine, modelled
    return {
        "kernels": Found(rows("kernels", *first_of_each_operation())),
        "verify": Found(rows("verify", "lora bfloat16")),
        "uses": Found(
            rows("uses", "compiled ia3", "deterministic ia3", "without waits road", "autocast lora", "mixture lora")
            + rows("uses", "an adapter for each row")
        ),
        "modelled": modelled,
        "layers": Found(
            rows("layers", "mixture", "limits", "kernels M40 K64 N64 R16", "host lora", "layer pissa M40 K64 N64 R16")
            + rows("layers", "layer lora M40 K64 N64 R16", "layer antipasto M40 K64 N64 R16")
        ),
        "model": Found(rows("model", *PARTS["model"].cases(BENCH))),
    }


def of(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def test_rows() -> None:
    """Each row of the table and others, a row that fails beside them; of the fastest and the table's the launches."""
    s = bench_rows.Settings(
        rehearse=True, kernels=("shrink", "expand_backward_again"), ranks=(16,), sizes=((9, 24, 20),)
    )
    shrink, _ = bench_rows.cases(s)
    rows = (*shrink[2], bench_rows.Config(8, 24, 4))  # which are no powers of two
    times = iter([3.0, 2.0, 1.0])

    def timer(run: Any) -> Any:
        return next(times), 0, 0

    found = bench_rows.time_rows(("shrink", 16, rows), s, timer, lambda run: {"a": 1.5}, time.monotonic() + 60)
    assert [row.get("us") for row in found] == [3000.0, 2000.0, 1000.0, None]
    assert "failed" in found[3]
    assert [row["of_table"] for row in found] == [True] * 3 + [False]
    assert ["launches" in row for row in found] == [False, False, True, False]
    launch = bench_rows.launch_of("expand_backward_again", s.sizes[0], 16, "cpu")
    with launches.counted() as launched:
        launch()
    assert "_shrink_kernel" in launched
    assert bench_rows.table(found).row_count == 1
    assert set(bench_rows.tried("expand", 16)) > set(bench_rows.of_table("expand", 16))


def test_nine_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= 9 * 60 - 15


def test_every_operation_and_method_is_there() -> None:
    names = {part: list(PARTS[part].cases(gpu_parts.Bench())) for part in PARTS}
    wanted = (
        "lowrank_add lowrank_add_together lowrank_add_rescale shrink_expand scale rotate_pairs row_norm "
        "row_norm_int8 row_norm_4bit"
    )
    assert {name.split()[0] for name in names["kernels"]} == set(wanted.split())
    for dtype in ("bfloat16", "float16", "float32"):
        for detail in ("-dropout0.3", "-runs[", "row 1", "-M2048-", "-R300-"):
            assert [name for name in names["kernels"] if dtype in name and detail in name], (dtype, detail)
    for part, methods in (("verify", random_models.VARIANTS), ("layers", random_models.METHODS)):
        for method in methods:
            assert [name for name in names[part] if method in name.split()], (part, method)
    for contender in ("lora_lite", "peft", "eager", "eager compiled", "lora_lite captured", "peft captured"):
        assert {f"{contender} 800 tokens", f"{contender} 8192 tokens"} <= set(names["model"])


def test_kernels_are_right(found: dict[str, Found]) -> None:
    assert len(found["kernels"].rows) == 9
    for row in found["kernels"].rows:
        assert row["right"], row
        assert 0 < row["error"] <= row["allowed"] < 1e-2, row


def test_a_wrong_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = low_rank.launch_expand
    launching.forget()  # what replays the right one
    monkeypatch.setattr(low_rank, "launch_expand", lambda *args, **kwargs: launch(*args, **kwargs) * 1.02)
    (name,) = [name for name in first_of_each_operation() if name.startswith("lowrank_add ")]
    wrong = Found(rows("kernels", name))
    assert not wrong.fine
    with pytest.raises(Exception, match="layers differ from the reference"):
        rows("verify", "lora bfloat16")


def test_the_second_row_of_a_table_is_taken() -> None:
    seen = []
    for row in (0, 1):
        with gpu_parts.only_row(row):
            scale.tuned("scale", seen.append, torch.randn(2, 2).bfloat16(), torch.bfloat16, 2, 2, 1)
    assert seen == list(gpu_parts.tuning.candidates("scale", "sm_90", 2, 1))


def test_every_row_of_every_table_is_checked() -> None:
    """The kernels of `lowrank_add` and `shrink_expand` with three, the others with two."""
    for table in gpu_parts.tuning.TABLE.values():
        for kernel, of_ranks in table.items():
            most = max(len(rows) for rows in of_ranks.values())
            assert most <= (gpu_parts.MOST_ROWS if kernel in ("shrink", "expand_backward") else 2), kernel


def test_verify(found: dict[str, Found]) -> None:
    (row,) = found["verify"].rows
    assert row["layers"] == 7
    assert 0 < row["excess"] <= 1


def test_uses(found: dict[str, Found]) -> None:
    uses = found["uses"].rows
    assert [(row["use"], row["variant"], row["dtype"]) for row in uses] == [
        ("compiled", "ia3", "bfloat16"),
        ("compiled", "ia3", "float32"),
        ("deterministic", "ia3", "bfloat16"),
        ("deterministic", "ia3", "float32"),
        ("without waits", "road", "bfloat16"),
        ("autocast", "lora", "float32"),
        ("mixture", "lora", "bfloat16"),
        ("an adapter for each row", "lora", "float32"),
    ]
    assert all(row["right"] for row in uses)
    assert uses[5]["error"] > 0, "the kernels and the reference round alike: what was compared?"


def test_a_wrong_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = low_rank.launch_expand
    launching.forget()
    monkeypatch.setattr(low_rank, "launch_expand", lambda *args, **kwargs: launch(*args, **kwargs) * 1.3)
    (row,) = rows("uses", "autocast lora")
    assert not row["right"]


def test_layers(found: dict[str, Found]) -> None:
    measured = found["layers"].rows
    kernels = {row["kernel"] for row in of(measured, kind="kernel")}
    assert kernels == gpu_parts.MODELLED.keys() | {"shrink_backward_together"}  # no single layer's step has that
    assert all(row["ms"] == 2.0 and row["right"] for row in of(measured, kind="kernel"))
    for method, peft in (("lora", True), ("pissa", True), ("antipasto", False)):
        mine = {row["contender"]: row for row in of(measured, kind="layer", variant=method)}
        assert {"base", "lora_lite", "eager", "compiled"} <= mine.keys()
        assert ("peft" in mine) == peft
        assert all(row["device_ms"] == 1.5 and row["both_ms"] == 2.0 and row["right"] for row in mine.values())
    (host,) = of(measured, kind="host")
    assert host["us"].keys() == {"base", "ours", "peft", "eager", "compiled"}


def test_model(found: dict[str, Found]) -> None:
    steps = {row["contender"]: row for row in found["model"].rows}
    assert list(steps) == ["base", "lora_lite", "peft", "eager", "eager compiled", "lora_lite compiled"]
    assert steps["base"]["trainable"] == 0
    assert len({steps[name]["trainable"] for name in list(steps)[1:]}) == 1
    assert all(row["us_of_kernels"] == {"gemm": 1400.0, "_expand_kernel": 100.0} for row in steps.values())
    assert all(row["step_ms"] == 20.0 and row["device_ms"] == 1.5 for row in steps.values())


def test_modelled_beside_measured(found: dict[str, Found]) -> None:
    both = gpu_day.beside(found["modelled"].rows, found["layers"].rows)
    kernels = [row for row in both if not row["what"].endswith("layer")]
    assert {row["what"] for row in kernels} == gpu_parts.MODELLED.keys()
    assert all(row["measured_us"] == 2000.0 and row["modelled_us"] >= 2.0 for row in kernels)
    measured = {row["what"]: row["measured_us"] for row in both if row["what"].endswith("layer")}
    assert measured == {"lora layer": 0.0, "dora layer": None, "hra layer": None, "ia3 layer": None, "road layer": None}


def page(found: dict[str, Found]) -> str:
    console = Console(file=io.StringIO(), width=150)
    gpu_day.page(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_page(found: dict[str, Found]) -> None:
    text = page(found)
    for part in (
        "Kernels against",
        "ll.verify",
        "Uses:",
        "A step of a mixture",
        "Host:",
        "Layers:",
        "A training step",
        "device_model of H100",
        "Parts",
    ):
        assert part in text
    assert "wrong:" not in text
    bad = Found([{**found["kernels"].rows[0], "right": False}], {"a case": "why it failed"}, ["late"])
    text = page({"kernels": bad})
    for said in ("kernels: wrong: ", "kernels: failed: a case: why it failed", "kernels: no time left: late"):
        assert said in text


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Found([{"right": True}]), 0),
        (Found([{"right": False}]), 1),
        (Found(failed={"a": "b"}), 1),
        (Found(left_out=["a"]), 1),
    ],
)
def test_exit_status_and_file(outcome: Found, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails does not stop the next; each is in the file."""
    parts = iter([outcome, Found([{"kind": "limits", "copy": 1e12, "matmul": 1e14}])])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_day.machine, "describe", lambda: {"commit": "abc"})
    monkeypatch.setattr(gpu_day, "run_part", lambda *_: next(parts))
    monkeypatch.setattr(gpu_day, "page", lambda *_: None)
    out = tmp_path / "gpu_day.json"
    assert gpu_day.main(Settings(parts=("verify", "layers"), out=out)) == status
    written = json.loads(out.read_text())
    assert written["commit"] == "abc"
    assert written["parts"]["verify"]["fine"] == (status == 0)
    assert written["parts"]["layers"]["rows"]


def test_refuses_without_a_gpu() -> None:
    with pytest.raises(SystemExit, match="--rehearse"):
        gpu_day.main(Settings())


def test_refuses_a_part_that_is_none() -> None:
    with pytest.raises(SystemExit, match="no part kernel; its parts are kernels, verify"):
        gpu_day.main(Settings(parts=("kernel",), rehearse=True))


# ---- processes -------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
names, said = json.loads(sys.argv[1]), open(sys.argv[2], "a")
for name in names:
    print(json.dumps({"begun": name}), file=said, flush=True)
    if name == "crash":
        sys.exit("no such luck")
    if name == "hang":
        time.sleep(60)
    what = {"failed": "wrong"} if name == "error" else {"rows": [{"of": name, "process": os.getpid()}]}
    print(json.dumps({"case": name, **what}), file=said, flush=True)
    if name == "lost":
        sys.exit(1)  # after it has said so, as when an error has cost the GPU's context
"""


def share(*names: str, code: str = WORKER, seconds: float = 20.0) -> Found:
    return gpu_day.share([sys.executable, "-c", code], list(names), time.monotonic() + seconds, {})


def test_a_crash_costs_one_case() -> None:
    found = share("a", "crash", "b", "error", "lost", "c")
    assert [row["of"] for row in found.rows] == ["a", "b", "lost", "c"]
    assert len({row["process"] for row in found.rows}) == 3
    assert found.failed["error"] == "wrong"
    assert "status 1: no such luck" in found.failed["crash"]
    assert found.failed.keys() == {"error", "crash"}
    assert not found.left_out


def test_a_hang_costs_the_time_that_is_left() -> None:
    start = time.monotonic()
    found = share("a", "hang", "b", seconds=1.5)
    assert time.monotonic() - start < 10
    assert [row["of"] for row in found.rows] == ["a"]
    assert found.left_out == ["hang", "b"]


def test_what_cannot_start_fails_once() -> None:
    found = share("a", "b", code="raise SystemExit('no torch here')")
    assert found.failed.keys() == {"a", "b"}
    assert "no torch here" in found.failed["a"]
    assert gpu_day.shortened("a" * 300 + "b" * 300).count("b") == 200


def test_work_names_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad() -> Any:
        raise ValueError("a reason")

    part = gpu_parts.Part(1, 1, lambda bench: {"bad": bad, "good": lambda: [{"n": 1}]})
    monkeypatch.setitem(PARTS, "tried", part)
    said = tmp_path / "said"
    gpu_day.work("tried", ["bad", "good"], said, BENCH)
    assert [json.loads(line) for line in said.read_text().splitlines()] == [
        {"begun": "bad"},
        {"case": "bad", "failed": "ValueError: a reason"},
        {"begun": "good"},
        {"case": "good", "rows": [{"n": 1}]},
    ]


def test_the_document_has_the_parts_times() -> None:
    text = (Path(__file__).parents[2] / "docs" / "measurements.md").read_text()
    for name, part in PARTS.items():
        assert f"| {name} | {part.seconds} |" in text
