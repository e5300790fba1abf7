"""Rewrite the tables of README.md and docs/ from the result files: `just readme-tables`; --check only says if stale.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
NAMES = {
    "lora": "LoRA",
    "pissa": "PiSSA",
    "dora": "DoRA",
    "delora": "DeLoRA",
    "eva": "EVA",
    "ia3": "IA³",
    "ia3_ff": "IA³-FF",
    "hra": "HRA",
    "antipasto": "AntiPaSTO",
    "road": "RoAd",
}
RECIPES = {
    "adapters": "bench-adapters", "block": "bench-kernels", "host": "bench-host", "kernel_bench": "bench-kernels",
    "rows": "gpu-day rows",
}  # fmt: skip
"""Of the justfile, by script, where they have other names."""
WITHOUT_RANK = ("ia3", "ia3_ff", "road")
SEEDS = 3  # of the variant table, as many as study.py's

CONTENDERS = {
    "lora_lite": "lora-lite", "addmm": "in-place addmm_", "eager": "eager PyTorch", "peft": "PEFT's layers",
}  # fmt: skip


def finetune() -> str:
    """The variant table, from `just study`."""
    runs = {name: found for name in (*NAMES, "peft_lora") if (found := study_runs(name))}
    bases = study_runs("base")
    if not runs:
        return "Not measured yet: `just study`."
    first = next(iter(runs.values()))[0]
    s = first["settings"]
    lines = [
        f"SmolLM2-135M ({s['dtype']}) on grade-school arithmetic with fresh numbers: {s['steps']} steps of "
        f"{s['batch_size']} problems, {s['eval_problems']} held-out problems, {SEEDS} seeds: mean ± sample standard "
        f"deviation. Time is CPU time on one thread. {machine_of(first, 'just study')}",
        "",
        "| method | trainable | r | learning rate | held-out loss | right | CPU s/step | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    scores = f"{spread(bases, after('loss'), 3)} | {spread(bases, after('accuracy', 100), 1)} %"
    lines.append(f"| none{seeds(bases)} | – | – | – | {scores} | – | – |")
    for name, found in runs.items():
        run = found[0]
        label = "PEFT's LoRA" if name == "peft_lora" else NAMES[name]
        rank = "–" if name in WITHOUT_RANK else run["settings"]["r"]
        lines.append(
            f"| {label}{seeds(found)} | {run['trainable_parameters']:,} | {rank} | {run['settings']['lr']:g} "
            f"| {spread(found, after('loss'), 3)} | {spread(found, after('accuracy', 100), 1)} % "
            f"| {spread(found, training('cpu_seconds_per_step'), 2)} "
            f"| {spread(found, training('peak_memory_bytes', 2**-30), 2)} GiB |"
        )
    missing = [label for name, label in NAMES.items() if name not in runs]
    return "\n".join([*lines, *(["", f"Not measured yet: {', '.join(missing)}."] if missing else [])])


def study_runs(method: str) -> list[dict[str, Any]]:
    """A method's runs in the table of `just study`, by seed."""
    return [read(path) for path in sorted((RESULTS / "study" / "table").glob(f"{method}-*.json"))]


def seeds(runs: Sequence[dict[str, Any]]) -> str:
    """Said of a row that lacks some."""
    return "" if len(runs) == SEEDS else f" ({len(runs)} of {SEEDS} seeds)"


def after(name: str, factor: float = 1) -> Callable[[dict[str, Any]], float]:
    return lambda run: factor * run["after"][name]


def training(name: str, factor: float = 1) -> Callable[[dict[str, Any]], float]:
    return lambda run: factor * run["training"][name]


def spread(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], digits: int) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    values = [value(run) for run in runs]
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def sweep() -> str:
    """The learning rates' held-out losses, from `just study`."""
    found: dict[str, dict[float, float]] = {name: {} for name in NAMES}
    for path in (RESULTS / "study" / "sweep").glob("*.json"):
        run = read(path)
        found[run["method"]][run["settings"]["lr"]] = run["after"]["loss"]
    rates = sorted({rate for losses in found.values() for rate in losses})
    lines = [
        f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---|{'--:|' * len(rates)}",
    ]
    for name, losses in found.items():
        if losses:
            best = min(losses.values())
            cells = {rate: f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for rate, loss in losses.items()}
            lines.append(f"| {NAMES[name]} | {' | '.join(cells.get(rate, '') for rate in rates)} |")
    return "\n".join(lines)


def adapters() -> str:
    """Training steps beside PEFT's on a Llama, from `just bench-adapters`."""
    result = read(RESULTS / "adapters.json")
    s = result["settings"]
    lines = [
        f"What an adapter adds to a training step of the frozen base (forward and backward; Llama, {s['width']} wide, "
        f"{s['layers']} layers, 7 linears each, {s['tokens'][0] * s['tokens'][1]} tokens, r={s['r']}), beside PEFT's; "
        f"adapters in float32, the default of both. CPU time on one thread, medians of up to {s['steps']} interleaved "
        f"steps. {machine_of(result)}",
        "",
        "| method | base dtype | base | + lora-lite | + PEFT | lora-lite / PEFT | attach: PEFT / lora-lite |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        if row["model"] != "llama":
            continue
        attach = row["attach_seconds"]
        cells = [
            *step_cells(row),
            # PEFT's attach in EVA's row is plain LoRA's: it has no calibration to time.
            f"{attach['peft'] / attach['ours']:.1f}×" if "peft" in attach and row["variant"] != "eva" else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pretrained() -> str:
    """Training steps, memory and files beside PEFT's on SmolLM2-135M, from `just bench-adapters`."""
    result = read(RESULTS / "adapters.json")
    rows = [row for row in result["rows"] if row["model"] != "llama"]
    s = result["settings"]
    lines = [
        f"The same on SmolLM2-135M, all 30 layers, {rows[0]['tokens']} tokens: what an adapter adds to a step; the "
        "peak of the process's memory during one; attaching, saving and loading; the size of what is saved. Medians, "
        f"lora-lite / PEFT; steps until {s['seconds']:.0f} s were over, at least three. {machine_of(result)}",
        "",
        "| method | dtype | base | + lora-lite | + PEFT | ratio | peak MiB (base) | attach ms | save ms | load ms "
        "| KiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            *step_cells(row),
            f"{pair(row['peak_bytes'], 2**-20)} ({row['peak_bytes']['base'] / 2**20:.0f})",
            *(pair(row[f"{what}_seconds"], 1e3) for what in ("attach", "save", "load")),
            pair(row["file_bytes"], 2**-10),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def step_cells(row: dict[str, Any]) -> list[str]:
    over = row["overhead"]
    return [
        NAMES[row["variant"]],
        row["dtype"],
        f"{1e3 * row['seconds']['base']:.0f} ms",
        f"{1e3 * over['ours']:.1f} ms",
        f"{1e3 * over['peft']:.1f} ms" if "peft" in over else "–",
        f"{row['overhead_ratio']:.2f}" if row["overhead_ratio"] is not None else "–",
    ]


def pair(values: dict[str, float], factor: float) -> str:
    """Ours / PEFT's."""
    return " / ".join(f"{factor * values[side]:.0f}" if side in values else "–" for side in ("ours", "peft"))


def traffic() -> str:
    """Bytes of an adapter's step, from `just bench-kernels` without a GPU."""
    result = read(RESULTS / "kernel_traffic.json")
    first = result["rows"][0]
    lines = [
        f"Bytes that an adapter's training step of one layer moves (M = {first['M']} tokens, K = N = {first['K']}, "
        "bf16, the base layer's own products left out), as multiples of the least that an adapter in hooks can move. "
        f"Counted, not timed: from the loads and stores that kernels and operators execute. `{command_of(result)}`",
        "",
        "| step | r | least | lora-lite | in-place addmm_ | eager PyTorch | PEFT's layer |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        rank = "–" if row["variant"] in WITHOUT_RANK else row["R"]
        ratios = [
            f"{row[name] / row['bound']:.2f}" if row[name] else "–" for name in ("lora_lite", "addmm", "eager", "peft")
        ]
        lines.append(f"| {NAMES[row['variant']]} | {rank} | {row['bound'] / 1e6:.0f} MB | {' | '.join(ratios)} |")
    block = read(RESULTS / "block.json")
    moved = block["bytes"]
    parts = [f"{label} {moved[name] / moved['one by one']:.2f}" for name, label in CONTENDERS.items()]
    lines += [
        "",
        f"A block of Llama-3-8B, LoRA (r={block['R']}) on all seven linears, M = {block['M']:,}: where q, k, v share "
        "the read of their x, and gate and up, the step moves so many times the bytes of the seven layers one by one "
        f"({moved['one by one'] / 1e9:.2f} GB, autograd's own additions included): {', '.join(parts)}.",
    ]
    return "\n".join(lines)


def host() -> str:
    """CPU time of an adapted layer beside PEFT's, from `just bench-host`."""
    result = read(RESULTS / "host.json")
    at = result["settings"]["counted_at"]
    lines = [
        f"CPU µs that an adapted layer adds to a training step over its bare nn.Linear (r={at['r']}, adapters in "
        "float32 on a bf16 base), one thread, medians of interleaved rounds, everything of a launch but the launch "
        f"itself; and launches a layer and step, counted for the kernels at M={at['M']}, K={at['K']}, N={at['N']}. "
        "Last, what it adds to a forward of one token without gradients, as in generation, by itself and within "
        f"`unchanged`. {machine_of(result)}",
        "",
        "| method | runs on | lora-lite | PEFT | lora-lite / PEFT | launches: kernels + PyTorch's | PEFT's "
        "| a token | within `unchanged` | PEFT |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        added, launches = row["added_us"], row["launches"]
        theirs = [f"{added['peft']:.0f}", f"{row['ratio']:.2f}"] if "peft" in added else ["–", "–"]
        cells = [
            NAMES[row["method"]],
            row["backend"],
            f"{added['ours']:.0f}",
            *theirs,
            f"{launches['ours']} + {launches['torch']}",
            f"{row['peft_launches'] or '–'}",
            *(f"{row['token_added_us'][who]:.0f}" for who in ("ours", "unchanged")),
            f"{row['token_added_us']['peft']:.0f}" if "peft" in added else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    blocks = [
        f"{NAMES[name]} {sum(of['together'].values())} instead of {sum(of['one by one'].values())}"
        for name, of in result["block_launches"].items()
    ]
    lines += [
        "",
        "Launches of ours and PyTorch's for all seven linears of a block of Llama-3-8B, whose q, k, v share work and "
        f"gate and up; instead of one by one: {', '.join(blocks)}.",
    ]
    return "\n".join(lines)


def device_model() -> str:
    """Modelled device time of an adapter's step, from `just device-model`."""
    result = read(RESULTS / "device_model.json")
    gpus = list(dict.fromkeys(row["gpu"] for row in result["rows"]))
    at = {(row["gpu"], row["variant"], row["R"]): row for row in result["rows"] if (row["M"], row["K"]) == (8192, 4096)}
    lines = [
        "Device time of an adapter's step of one layer as a multiple of the bandwidth bound (M = 8192, K = N = 4096, "
        "bf16). Modelled from the real grids and the compiled kernels, not measured; the assumptions stand at the top "
        f"of bench/kernels/device_model.py. `{command_of(result)}`",
        "",
        f"| step | r | {' | '.join(gpus)} | H100: busiest multiprocessor | parts | KiB in flight |",
        f"|---|--:|{'--:|' * len(gpus)}--:|--:|--:|",
    ]
    for (gpu, variant, r), row in at.items():
        if gpu == gpus[0]:
            ratios = [f"{at[g, variant, r]['us'] / at[g, variant, r]['bound_us']:.2f}" for g in gpus]
            cells = [*ratios, f"{row['busiest']:.2f}", f"{row['parts']:.2f}", f"{row['in_flight_kib']:.0f}"]
            lines.append(f"| {NAMES[variant]} | {'–' if variant in WITHOUT_RANK else r} | {' | '.join(cells)} |")
    lines += ["", "On the H100 model, M ≥ 2048, how many shapes are within each target:", ""]
    lines += [f"- {name}: {share}" for name, share in result["targets"].items()]
    return "\n".join(lines)


def float32() -> str:
    """float32 products by its own instructions and as three in TF32, compiled by `just kernels-report`."""
    result = read(RESULTS / "kernels_report.json")
    of = {(row["kernel"], row["rank"], row["precision"]): row for row in result["float32"]}
    lines = [
        "Kernels of float32 tokens (M = 8192, K = N = 4096) for an H100: products by float32's own instructions / as "
        "three in TF32 on tensor cores. Registers and instructions are compiled; the least times of products and of "
        f"bytes are calculated from the data sheet. Nothing here is timed. `{command_of(result)}`",
        "",
        "| kernel | r | bytes, µs | products, µs | multiplying instructions | registers |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kernel, rank in dict.fromkeys((kernel, rank) for kernel, rank, _ in of):
        own, three = of[kernel, rank, "ieee"], of[kernel, rank, "tf32x3"]
        cells = [
            kernel,
            str(rank),
            f"{1e6 * own['byte_seconds']:.0f}",
            " / ".join(f"{1e6 * each['product_seconds']:.0f}" for each in (own, three)),
            f"{own['fmas']} / {three['dots']}",
            f"{own['registers']} / {three['registers']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mixtures() -> str:
    """LoRA on a mixture's experts: CPU time and memory beside PEFT's, from `just bench-adapters`, and counted bytes."""
    result, m = read(RESULTS / "mixtures.json"), read(RESULTS / "kernel_traffic.json")["mixture"]
    first = result["rows"][0]
    lines = [
        f"LoRA (r={first['r']}) on both stacks of a Qwen3-MoE with 2 layers, 256 wide, of whose experts a token visits "
        f"4; {first['tokens']} tokens: CPU time that a training step takes beyond the frozen base's, on one thread, "
        f"and bytes that autograd keeps for the backward beyond the base's; lora-lite / PEFT. {machine_of(result)}",
        "",
        "| experts | base dtype | base | CPU time added | ratio | kept for the backward | ratio |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        over, saved = row["overhead"], row["saved_bytes"]
        lines.append(
            f"| {row['experts']} | {row['dtype']} | {1e3 * row['cpu_seconds']['base']:.0f} ms "
            f"| {1e3 * over['ours']:.0f} / {1e3 * over['peft']:.0f} ms | {row['overhead_ratio']:.2f} "
            f"| {saved['ours'] / 2**20:.1f} / {saved['peft'] / 2**20:.1f} MiB | {row['saved_ratio']:.2f} |"
        )
    shapes = " and ".join(f"{K} → {N}" for K, N in m["stacks"])
    lines += [
        "",
        f"Counted bytes of the kernels on a layer of {m['experts']} experts ({shapes}, {m['visited']} a token, "
        f"{m['tokens']:,} tokens, r={m['R']}, bf16), as multiples of the least that an adapter in hooks can move "
        f"({m['bound'] / 1e6:.0f} MB): lora-lite {m['lora_lite'] / m['bound']:.2f}, eager PyTorch expert by expert "
        f"{m['eager'] / m['bound']:.2f}, building W + B A for each expert as PEFT does {m['peft'] / m['bound']:.2f}.",
    ]
    return "\n".join(lines)


GPU_CONTENDERS = {
    "base": "base", "lora_lite": "lora-lite", "peft": "PEFT", "eager": "eager PyTorch",
    "compiled": "eager PyTorch, compiled", "eager compiled": "eager PyTorch, compiled",
    "lora_lite compiled": "lora-lite, compiled", "base captured": "base, as a CUDA graph",
    "lora_lite captured": "lora-lite, as a CUDA graph", "peft captured": "PEFT, as a CUDA graph",
}  # fmt: skip


def of_gpu(part: str, kind: str | None = None) -> tuple[list[dict[str, Any]], str]:
    """A part's rows of `just gpu-day`, and where they were measured."""
    found = read(RESULTS / "gpu_day.json")["parts"][part]
    m, v = found["measured"]["machine"], found["measured"]["versions"]
    where = (
        f"Measured on one {m['gpu']} beside {m['cores']} cores of an {m['cpu']}, with torch {v['torch']}, Triton "
        f"{v['triton']}, PEFT {v['peft']} and `just gpu-day`."
    )
    return [row for row in found["rows"] if kind is None or row["kind"] == kind], where


def gpu_model() -> str:
    """A language model's training step on a GPU."""
    rows, where = of_gpu("model")
    first = rows[0]
    lines = [
        f"A training step with AdamW of {first['layers']} layers of Qwen3-0.6B's widths, LoRA r={first['r']} on all "
        "seven linears, in bf16, the adapter in float32: milliseconds as it runs, milliseconds of the GPU's own work "
        f"(where the host is slower, the GPU waits), and the peak of memory. {where}",
        "",
        "| tokens | | ms a step | beyond the base | GPU ms | beyond the base | peak memory |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for tokens in sorted({row["tokens"] for row in rows}):
        of = {row["contender"]: row for row in rows if row["tokens"] == tokens}
        base = of["base"]
        for name in filter(of.__contains__, GPU_CONTENDERS):
            row = of[name]
            cells = []
            for of_time in ("step_ms", "device_ms"):
                more = "–" if row is base else f"{row[of_time] - base[of_time]:.1f}"
                cells += [f"{row[of_time]:.1f}", more]
            peak = f"{row['peak_bytes'] / 2**30:.2f} GiB"
            lines.append(f"| {tokens:,} | {GPU_CONTENDERS[name]} | {' | '.join(cells)} | {peak} |")
    return "\n".join(lines)


def gpu_layers() -> str:
    """What an adapter adds to a layer's step on a GPU."""
    rows, where = of_gpu("layers", "layer")
    names = [name for name in GPU_CONTENDERS if name != "base"]
    names = [name for name in names if any(row["contender"] == name for row in rows)]
    lines = [
        "What an adapter adds to a forward and backward of one linear layer in bf16, in µs of the GPU's own work "
        f"(torch.profiler). {where}",
        "",
        f"| method | tokens × width, r | base | {' | '.join(GPU_CONTENDERS[name] for name in names)} |",
        f"|---|---|--:|{'--:|' * len(names)}",
    ]
    for key in dict.fromkeys((row["variant"], row["M"], row["K"], row["R"]) for row in rows):
        of = {row["contender"]: row for row in rows if (row["variant"], row["M"], row["K"], row["R"]) == key}
        base = 1e3 * of["base"]["device_ms"]
        cells = [f"{1e3 * of[name]['device_ms'] - base:.0f}" if name in of else "–" for name in names]
        size = f"{key[1]:,} × {key[2]:,}" + ("" if key[0] in WITHOUT_RANK else f", {key[3]}")
        lines.append(f"| {NAMES[key[0]]} | {size} | {base:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_kernels() -> str:
    """Each kernel on a GPU: right, and how fast."""
    checked, _ = of_gpu("kernels")
    rows, where = of_gpu("layers", "kernel")
    (limit,), _ = of_gpu("layers", "limits")
    both = read(RESULTS / "gpu_day.json")["modelled_and_measured"]
    model = {(row["what"], row["M"], row["R"]): row["modelled_us"] for row in both}
    beyond = [row for row in checked if not row["right"]]
    lines = [
        f"{len(checked):,} cases of the kernels, forward and backward, were compared with float64 there: all in 16 "
        f"bits within 1.5 times PyTorch's own error, and {len(beyond)} in float32 beyond that, by errors of at most "
        f"{max((row['error'] for row in beyond), default=0):.1e}. A copy moves {limit['copy'] / 1e12:.2f} TB/s, reads "
        f"and writes together; a bf16 product of "
        f"large matrices {limit['matmul'] / 1e12:.0f} TFLOP/s. Times of the GPU alone, its cache emptied before, with "
        f"what belongs to a launcher: casts of the adapter's matrices and sums of parts. {where}",
        "",
        "| kernel | tokens × width, r | bytes that must move | µs | TB/s | of the copy's | modelled µs |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        rate = row["bytes"] / row["ms"] / 1e9
        us = model.get((row["kernel"], row["M"], row["R"]))
        lines.append(
            f"| {row['kernel']} | {row['M']:,} × {row['K']:,}, {row['R']} | {row['bytes'] / 1e6:.0f} MB "
            f"| {1e3 * row['ms']:.0f} | {rate:.2f} | {percent(1e12 * rate / limit['copy'])} "
            f"| {f'{us:.0f}' if us else '–'} |"
        )
    return "\n".join(lines)


def gpu_rows() -> str:
    """The fastest blocks of each kernel beside those of its table, on a GPU."""
    result = read(RESULTS / "rows.json")
    m, v = result["machine"], result["versions"]
    at = [row for row in result["rows"] if row["M"] == 8192 and not row["kernel"].endswith("_again")]
    lines = [
        f"Kernels at M = 8,192 and K = N = 4,096 with {len(at):,} rows tried, in µs as above: the fastest row of the "
        "block table as it was, and the fastest of all (rows × columns, warps, stages). Measured on one "
        f"{m['gpu']} with torch {v['torch']}, Triton {v['triton']} and `just gpu-day rows`, at {result['commit']}.",
        "",
        "| kernel | r | the table's then | µs | the fastest | µs |",
        "|---|--:|---|--:|---|--:|",
    ]
    for kernel, R in dict.fromkeys((row["kernel"], row["R"]) for row in at):
        timed = [row for row in at if (row["kernel"], row["R"]) == (kernel, R) and "us" in row]
        timed.sort(key=lambda row: row["us"])
        then = next(row for row in timed if row["of_table"])
        cells = []
        for row in (then, timed[0]):
            rows, cols, warps, stages = row["row"]
            cells += [f"{rows} × {cols}, {warps}, {stages}", f"{row['us']:.0f}"]
        lines.append(f"| {kernel} | {'–' if R == 1 else R} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def command_of(result: dict[str, Any]) -> str:
    """What to run for the same again: the recipe of the script that wrote this file, and its options."""
    _, script, *options = result["command"].split()
    name = Path(script).stem
    return " ".join(["just", RECIPES.get(name, name.replace("_", "-")), *options])


def machine_of(result: dict[str, Any], command: str | None = None) -> str:
    m, v = result["machine"], result["versions"]
    cpu = f"{m['cpu']} ({m['instructions']})" if "instructions" in m else m["cpu"]
    return f"Measured on {cpu}, {m['cores']} cores, with torch {v['torch']} and `{command or command_of(result)}`."


TABLES = {
    "finetune": finetune,
    "sweep": sweep,
    "adapters": adapters,
    "pretrained": pretrained,
    "traffic": traffic,
    "host": host,
    "device_model": device_model,
    "float32": float32,
    "mixtures": mixtures,
    "gpu_model": gpu_model,
    "gpu_layers": gpu_layers,
    "gpu_kernels": gpu_kernels,
    "gpu_rows": gpu_rows,
}


def rewritten(text: str) -> str:
    """The document with each of its tables made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a table is stale; change nothing")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = rewritten(old)
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    print(f"{'stale' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
