"""Draw docs/img/ from the result files: `just plots`. Each picture as SVG and as PNG."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tables import NAMES, RESULTS, ROOT, WITHOUT_RANK, read, study_runs

IMAGES = ROOT / "docs" / "img"
COLOURS = {"lora_lite": "#1b6ca8", "addmm": "#7fb3d5", "eager": "#b0b0b0", "peft": "#e08e45"}
LABELS = {"lora_lite": "lora-lite", "addmm": "in-place addmm_", "eager": "eager PyTorch", "peft": "PEFT's layer"}
CEILING = 5.0  # PEFT's HRA moves 20 times the bound and would flatten the rest


def bars(ax: Any, groups: list[str], series: dict[str, list[float | None]], ceiling: float) -> None:
    """Groups of bars side by side; one that passes the ceiling is cut there and says its value."""
    at, width = np.arange(len(groups)), 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        x = at + (i - (len(series) - 1) / 2) * width
        ax.bar(x, [min(v or 0, ceiling) for v in values], width, label=LABELS[name], color=COLOURS[name])
        for xi, v in zip(x, values, strict=True):
            if v and v > ceiling:
                ax.text(xi, ceiling, f"{v:.0f}×", ha="center", va="bottom", fontsize=8)
    ax.set_xticks(at, groups)
    ax.spines[["top", "right"]].set_visible(False)


def traffic() -> Any:
    """Bytes of a step as multiples of the lower bound."""
    result = read(RESULTS / "kernel_traffic.json")
    rows = result["rows"]
    groups = [NAMES[r["variant"]] + ("" if r["variant"] in WITHOUT_RANK else f"\nr={r['R']}") for r in rows]
    series = {name: [r[name] and r[name] / r["bound"] for r in rows] for name in COLOURS}
    fig, ax = plt.subplots(figsize=(9, 3.6))
    bars(ax, groups, series, CEILING)
    ax.axhline(1, color="black", lw=0.8, ls="--")
    ax.set_ylabel("bytes moved / lower bound (counted)")
    ax.set_title(f"One training step of one layer's adapter: {rows[0]['M']} tokens, {rows[0]['K']} wide, bf16")
    ax.legend(frameon=False, fontsize=8)
    return fig


def roofline() -> Any:
    """Where each kernel, and each adapter's step, stands under each GPU's public roofline; a model, no measurement."""
    result = read(RESULTS / "kernel_traffic.json")
    fig, ax = plt.subplots(figsize=(9, 5.4))
    intensity = np.logspace(-1, 4, 200)
    for gpu, figures in result["gpus"].items():
        ax.loglog(intensity, np.minimum(intensity * figures["TB/s"], figures["TFLOP/s"]), lw=1, label=gpu)
    slope = min(figures["TB/s"] for figures in result["gpus"].values())
    rows = [row for row in result["rows"] if row["R"] in (1, 16)]
    for row, marker in zip(rows, "osD^v", strict=True):
        for kernel, counts in row["kernels"].items():
            x = counts["flops"] / counts["bytes"]
            ax.scatter(x, slope * x, s=28, marker=marker, zorder=3, label=f"{kernel} ({NAMES[row['variant']]})")
    ax.set_xlabel("floating-point operations a byte (counted)")
    ax.set_ylabel("TFLOP/s that public figures allow (model)")
    ax.set_title("Kernels at r=16 under each GPU's roofline: memory decides")
    ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def overhead() -> Any:
    """What an adapter adds to a training step on a CPU, beside PEFT's."""
    result = read(RESULTS / "adapters.json")
    dtype = result["settings"]["dtypes"][0]
    rows = [
        r for r in result["rows"]
        if (r["model"], r["dtype"]) == ("llama", dtype) and "peft" in r["overhead"] and r["variant"] != "hra"
    ]  # fmt: skip
    series = {
        "lora_lite": [1e3 * r["overhead"]["ours"] for r in rows],
        "peft": [1e3 * r["overhead"]["peft"] for r in rows],
    }
    fig, ax = plt.subplots(figsize=(8, 3.4))
    bars(ax, [NAMES[r["variant"]] for r in rows], series, ceiling=float("inf"))
    ax.set_ylabel("ms over the frozen base (timed)")
    ax.set_title(f"What an adapter adds to a step on a CPU, {dtype} ({result['machine']['cpu']})")
    ax.legend(frameon=False, fontsize=8)
    return fig


def convergence() -> Any:
    """Training loss of LoRA and of PEFT's LoRA from the same start on the same batches, each seed."""
    fig, ax = plt.subplots(figsize=(8, 3.4))
    for method, colour, style, width in (("lora", "lora_lite", "-", 2.5), ("peft_lora", "peft", "--", 1.2)):
        for i, run in enumerate(study_runs(method)):
            losses = run["training"]["losses"]
            smooth = [np.mean(losses[max(0, step - 4) : step + 1]) for step in range(len(losses))]
            label = {"lora": "lora-lite", "peft_lora": "PEFT"}[method] if i == 0 else None
            ax.semilogy(range(1, len(smooth) + 1), smooth, style, color=COLOURS[colour], lw=width, label=label)
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats a token, mean of 5 steps")
    ax.set_title("LoRA on SmolLM2-135M from one start on the same batches, a line a seed")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


PICTURES = (traffic, roofline, overhead, convergence)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "lora-lite"  # the same file from the same figures
    for draw in PICTURES:
        fig = draw()
        fig.tight_layout()
        fig.savefig(IMAGES / f"{draw.__name__}.svg", metadata={"Date": None})
        fig.savefig(IMAGES / f"{draw.__name__}.png", dpi=150, metadata={"Software": None})
        plt.close(fig)
        print(IMAGES.relative_to(ROOT) / draw.__name__)


if __name__ == "__main__":
    main()
