"""All that a GPU has to say about the kernels, in nine minutes: `just gpu-day`. Without a network.

Six parts (gpu_parts.py), each with a time of its own, which is longer where the parts before it leave some. A part is
a process, so that a crash or a hang costs no more than the case that it is in: the others go on in a new process, and
the case is named. So is every case for which no time was left. The exit status is 0 where all ran and all was right.

A run of some parts replaces these in the file, and leaves the others with what they were measured on.

`--rehearse` runs everything on a CPU at tiny sizes, the kernels in Triton's interpreter, and times nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import operations
import random_models
import torch
import tyro
from gpu_parts import PARTS, Bench
from kernel_times import Shape
from rich.console import Console
from rich.table import Table

NAN = float("nan")
SHOWN = 12  # of a part's complaints, on the page
REHEARSAL = Bench(
    device="cpu",
    timer=lambda run: (run(), (NAN, NAN, NAN))[1],
    kernel_timer=lambda run: (run(), (NAN, NAN, NAN))[1],
    step_timer=lambda run: (run(), (NAN, NAN, NAN))[1],
    device_timer=lambda run: (run(), NAN)[1],
    profiler=lambda run: (run(), {"none": NAN})[1],
    cpu_clock=lambda: NAN,
    clock=lambda: NAN,
    rounds=1,
    compiler="eager",
    shapes=((7, 20, 12, 4, "strided", True),),
    segmented=((operations.Runs((3, 0, 2), (1, -1, 0), 1), 20, 12, 4),),
    dtypes=(torch.bfloat16,),
    small_llama=(64, 1),
    layer_shapes=(Shape(40, 64, 64, 16),),
    copied=64,
    model_layers=1,
    model_sizes=(("hidden_size", 64), ("intermediate_size", 64), ("num_attention_heads", 2),
                 ("num_key_value_heads", 1), ("head_dim", 32), ("vocab_size", 64)),
    tokens=((1, 8),),
    modelled_gpu="H100",
)  # fmt: skip


@dataclass
class Settings:
    """Check every kernel and time layers and a model on this machine's GPU, in nine minutes."""

    parts: tuple[str, ...] = tuple(PARTS)
    """Which to run."""
    rehearse: bool = False
    """Run it all on a CPU, tiny and untimed, and write nothing: does the command work?"""
    compiler: str = "inductor"
    """torch.compile's backend for what it compiles, which takes most of the time; "": leave that out."""
    seconds: int = 0
    """For all of them; 0: nine minutes for all parts that there are, and of that each its own share."""
    out: Path = machine.RESULTS / "gpu_day.json"


@dataclass
class Found:
    """What has come of a part's cases."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """By case, why."""
    left_out: list[str] = field(default_factory=list)
    """Cases for which no time was left."""
    seconds: float = 0.0

    @property
    def wrong(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if not row.get("right", True)]

    @property
    def fine(self) -> bool:
        return not (self.failed or self.left_out or self.wrong)


# ---- a part's processes ----------------------------------------------------------------------------------------------


def work(part: str, names: list[str], said: Path, bench: Bench) -> None:
    """What a process does: the cases in turn. Says in a file, a line of JSON each, which it begins and what came."""
    with said.open("a") as file:

        def say(**what: Any) -> None:
            print(json.dumps(what), file=file, flush=True)

        cases = PARTS[part].cases(bench)
        for name in names:
            say(begun=name)
            try:
                rows = cases[name]()
            except Exception as error:
                say(case=name, failed=f"{type(error).__name__}: {error}"[:2000])
                if bench.device == "cuda":
                    torch.cuda.synchronize()  # raises where the GPU's context is lost: a new process goes on then
            else:
                say(case=name, rows=rows)


def share(command: list[str], names: list[str], deadline: float, environment: dict[str, str]) -> Found:
    """Run the cases in a process of `command`, given their names and the file to say in; after it has died in one, the
    others in a new one."""
    found, left = Found(), list(names)
    while left and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            said, log = Path(folder) / "said", Path(folder) / "log"
            said.touch()
            with log.open("w") as output:
                process = subprocess.Popen(
                    [*command, json.dumps(left), str(said)], stdout=output, stderr=output,
                    env={**os.environ, **environment},
                )  # fmt: skip
                try:
                    why = f"the process ended with status {process.wait(max(deadline - time.monotonic(), 0))}"
                except subprocess.TimeoutExpired:
                    process.kill()  # the compiler's processes notice and end
                    process.wait()
                    why = ""
            before = len(left)
            begun = _hear(said, found, left)
            if not why:
                break
            why += f": {log.read_text(errors='replace')[-1500:]}"
            dead = [begun] if begun else left if len(left) == before else []
            found.failed |= dict.fromkeys(dead, why)
            left = [name for name in left if name not in dead]
    found.left_out = left
    return found


def _hear(said: Path, found: Found, left: list[str]) -> str | None:
    """Take what a process has said; the case that it had begun last and not ended."""
    begun = None
    for line in said.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # killed while it said so
            break
        what = json.loads(line)
        begun = what.get("begun")
        if begun is None:
            left.remove(what["case"])
            found.rows += what.get("rows", [])
            if "failed" in what:
                found.failed[what["case"]] = what["failed"]
    return begun


def run_part(name: str, deadline: float, s: Settings) -> Found:
    start = time.monotonic()
    names = list(PARTS[name].cases(bench_of(s)))
    workers = min(PARTS[name].workers, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--work", name, s.compiler, *["--rehearse"] * s.rehearse]
    environment = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # see torch.use_deterministic_algorithms
        "OMP_NUM_THREADS": "1" if workers > 1 or s.rehearse else "8",
        # The model of a GPU records launches of kernels as the compiler takes them.
        "TRITON_INTERPRET": "1" if s.rehearse and name != "modelled" else "0",
    }
    with ThreadPoolExecutor(workers) as pool:
        shares = [pool.submit(share, command, names[i::workers], deadline, environment) for i in range(workers)]
    whole = Found(seconds=time.monotonic() - start)
    for each in (future.result() for future in shares):
        whole.rows += each.rows
        whole.failed |= each.failed
        whole.left_out += each.left_out
    return whole


def bench_of(s: Settings) -> Bench:
    return REHEARSAL if s.rehearse else Bench(compiler=s.compiler)


# ---- the page --------------------------------------------------------------------------------------------------------


def table(title: str, *headings: str) -> Table:
    made = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i else "left")
    return made


def number(value: float | None, digits: int = 3) -> str:
    """To so many digits; – where there is none."""
    return "–" if value is None or value != value else f"{value:.{digits}g}"


def shortened(text: str, to: int = 400) -> str:
    """Its beginning and its end."""
    return text if len(text) <= to else f"{text[: to // 2]} … {text[-to // 2 :]}"


def parts_table(found: dict[str, Found]) -> Table:
    made = table("Parts", "part", "rows", "wrong", "failed", "left out", "seconds")
    for name, part in found.items():
        counts = (len(part.rows), len(part.wrong), len(part.failed), len(part.left_out))
        made.add_row(name, *map(str, counts), f"{part.seconds:.0f}", style="" if part.fine else "red")
    return made


def kernels_table(rows: list[dict[str, Any]]) -> Table:
    title = "Kernels against float64: the worst of each"
    made = table(title, "operation", "dtype", "checked", "error", "allowed", "of")
    for key in dict.fromkeys((row["operation"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["operation"], row["dtype"]) == key]
        worst = max(mine, key=lambda row: row["error"] / row["allowed"])
        errors = (f"{worst['error']:.1e}", f"{worst['allowed']:.1e}")
        of = f"{worst['worst']}, {worst['case']}, row {worst['row']}"
        made.add_row(*key, str(len(mine)), *errors, of, style="" if all(row["right"] for row in mine) else "red")
    return made


def verify_table(rows: list[dict[str, Any]]) -> Table:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    made = table("ll.verify on a small Llama: the worst error, of what is allowed", "method", *dtypes)
    for variant in random_models.VARIANTS:
        of = {row["dtype"]: number(row["excess"], 2) for row in rows if row["variant"] == variant}
        made.add_row(variant, *(of.get(dtype, "–") for dtype in dtypes))
    return made


CONTENDERS = ("ours", "peft", "eager", "compiled")


def uses_table(rows: list[dict[str, Any]]) -> Table:
    made = table("Uses: a small model's step each way, its error of what is allowed", "use", "method", "dtype", "of it")
    for row in rows:
        of = row["excess"] if "excess" in row else row["error"] / row["allowed"] if "error" in row else NAN
        made.add_row(row["use"], row["variant"], row["dtype"], number(of, 2), style="" if row["right"] else "red")
    return made


def mixture_table(rows: list[dict[str, Any]]) -> Table:
    title = "A step of a mixture of experts with LoRA on its stacks"
    made = table(title, "contender", "experts", "width", "tokens", "ms", "ms of the GPU's work")
    for row in rows:
        sizes = (str(row[name]) for name in ("experts", "width", "tokens"))
        made.add_row(row["contender"], *sizes, number(row["step_ms"], 4), number(row["device_ms"], 4))
    return made


def host_table(rows: list[dict[str, Any]]) -> Table:
    title = "Host: CPU µs that a layer adds to a small step over the bare layer's"
    made = table(title, "method", *CONTENDERS)
    for row in rows:
        us = row["us"]
        made.add_row(row["method"], *(number(us[c] - us["base"]) if c in us else "–" for c in CONTENDERS))
    return made


def layers_table(rows: list[dict[str, Any]]) -> Table:
    title = "Layers: ms of the GPU's work that an adapter adds to forward and backward / of the whole step, as it runs"
    made = table(title, "method", "size", "base", *CONTENDERS)
    for key in dict.fromkeys(map(_layer_key, rows)):
        of = {row["contender"].replace("lora_lite", "ours"): row for row in rows if _layer_key(row) == key}
        base = of["base"]
        cells = [f"{number(base['device_ms'])} / {number(base['both_ms'])}"]
        for name in CONTENDERS:
            row = of.get(name)
            added = row and f"{number(row['device_ms'] - base['device_ms'])} / {number(row['both_ms'])}"
            cells.append(added or "–")
        made.add_row(key[0], f"M{key[1]} K{key[2]} r{key[3]}", *cells)
    return made


def _layer_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["M"], row["K"], row["R"]


def model_table(rows: list[dict[str, Any]]) -> Table:
    title = "A training step with LoRA r=16: layers of Qwen3-0.6B's widths, random weights, a vocabulary of 4,096"
    made = table(title, "contender", "layers", "tokens", "ms", "ms of the GPU's work", "peak GiB", "first step, s")
    for row in sorted(rows, key=lambda row: row["tokens"]):
        peak = row["peak_bytes"] and row["peak_bytes"] / 2**30
        cells = (number(row["step_ms"], 4), number(row["device_ms"], 4), number(peak), number(row["first_step_s"]))
        made.add_row(row["contender"], str(row["layers"]), str(row["tokens"]), *cells)
    return made


def beside(modelled: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modelled times of kernels and of whole layers, with the measured ones; a kernel's cache is emptied before it."""
    found = []
    for row in modelled:
        size = {name: row[name] for name in ("M", "K", "N", "R")}
        here = [m for m in measured if all(m.get(name) == value for name, value in size.items())]
        for kernel, us in row["kernels"].items():
            ms = [m["ms"] for m in here if m["kind"] == "kernel" and m["kernel"] == kernel]
            found.append({"what": kernel, **size, "modelled_us": us, "measured_us": 1e3 * ms[0] if ms else None})
        of = {m["contender"]: m["device_ms"] for m in here if m["kind"] == "layer" and m["variant"] == row["variant"]}
        added = 1e3 * (of["lora_lite"] - of["base"]) if {"lora_lite", "base"} <= of.keys() else None
        found.append({"what": f"{row['variant']} layer", **size, "modelled_us": row["us"], "measured_us": added})
    return found


def modelled_table(rows: list[dict[str, Any]], gpu: str) -> Table:
    title = f"device_model of {gpu}, in µs, beside what was measured"
    made = table(title, "what", "size", "model", "measured", "ratio")
    for row in rows:
        measured = NAN if row["measured_us"] is None else row["measured_us"]
        size = " ".join(f"{name}{row[name]}" for name in "MKNR")
        cells = (number(row["modelled_us"]), number(measured), number(measured / row["modelled_us"]))
        made.add_row(row["what"], size, *cells)
    return made


def page(found: dict[str, Found], console: Console) -> None:
    """All of it in tables, and what went wrong or was left out by its name."""

    def rows(part: str, kind: str | None = None) -> list[dict[str, Any]]:
        return [row for row in found.get(part, Found()).rows if kind is None or row["kind"] == kind]

    gpu = next((row["gpu"] for row in rows("modelled")), "–")
    for limit in rows("layers", "limits"):
        console.print(f"A copy moves {limit['copy'] / 1e12:.2f} TB/s, a product {limit['matmul'] / 1e12:.0f} TFLOP/s")
    for made in (
        kernels_table(rows("kernels")),
        verify_table(rows("verify")),
        uses_table(rows("uses")),
        mixture_table(rows("layers", "mixture")),
        host_table(rows("layers", "host")),
        layers_table(rows("layers", "layer")),
        model_table(rows("model")),
        modelled_table(beside(rows("modelled"), rows("layers")), gpu),
        parts_table(found),
    ):
        if made.row_count:
            console.print(made)
    for name, part in found.items():
        said = [f"wrong: {row}" for row in part.wrong]
        said += [f"failed: {case}: {shortened(why)}" for case, why in part.failed.items()]
        said += [f"no time left: {case}" for case in part.left_out]
        for line in said[:SHOWN]:
            console.print(f"{name}: {line}", style="red", markup=False)
        if len(said) > SHOWN:
            console.print(f"{name}: and {len(said) - SHOWN} more, in the file", style="red")


def main(s: Settings) -> int:
    """0 where all ran and all was right."""
    if not (s.rehearse or torch.cuda.is_available()):
        sys.exit("gpu-day needs a GPU that torch sees; --rehearse tries the command without one")
    if unknown := set(s.parts) - PARTS.keys():
        sys.exit(f"gpu-day has no part {', '.join(unknown)}; its parts are {', '.join(PARTS)}")
    times = {name: PARTS[name].seconds for name in s.parts}
    stretch = s.seconds / sum(times.values()) if s.seconds else 10 if s.rehearse else 1
    on_file = json.loads(s.out.read_text())["parts"] if s.out.exists() and not s.rehearse else {}
    deadline, found = time.monotonic(), {}
    for name in s.parts:
        # A part that ends early leaves its time to those after it; a rehearsal is of the command, not of its speed.
        deadline += stretch * times[name]
        found[name] = run_part(name, deadline, s)
        print(f"{name}: {len(found[name].rows)} rows in {found[name].seconds:.0f} s", flush=True)
        if not s.rehearse:  # after each part: the machine may be taken back
            on_file[name] = {**vars(found[name]), "fine": found[name].fine, "measured": machine.describe()}
            parts = {part: on_file[part] for part in PARTS if part in on_file}
            both = beside(*(parts[part]["rows"] if part in parts else [] for part in ("modelled", "layers")))
            machine.write(s.out, {"kind": "timed", "parts": parts, "modelled_and_measured": both}, compact=True)
    page(found, Console(width=150, highlight=False))
    if s.rehearse:
        print("A rehearsal on a CPU: nothing was timed, nothing written, no GPU was used.")
    return 0 if all(part.fine for part in found.values()) else 1


if __name__ == "__main__":
    if "--work" in sys.argv:
        _, _, part, compiler, *options, cases, said = sys.argv
        bench = bench_of(Settings(rehearse="--rehearse" in options, compiler=compiler))
        work(part, json.loads(cases), Path(said), bench)
    else:
        sys.exit(main(tyro.cli(Settings)))
