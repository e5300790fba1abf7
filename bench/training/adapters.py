"""A training step with each variant beside PEFT's, as overhead over the frozen base: `just bench-adapters`.

Two models: a Llama with random weights, and SmolLM2-135M, with an adapter on the seven linear layers of each block. One
step is forward and backward. The base is the same frozen model with gradients flowing to its input, so the overhead is
what the adapter adds, in CPU seconds of the process on one thread, which hold still where wall time does not. The base,
ours and PEFT's take turns within one run and medians are compared, so that a noisy machine disturbs all three alike.
Beside steps: attaching, saving and loading, the size of the files, and the peak of the process's memory during a step
while that model alone is in it.
"""

import copy
import functools
import gc
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import mixtures
import peft
import pretrained
import random_models
import torch
import tyro
from rich.console import Console
from rich.table import Table
from rivals import peft_config
from torch import nn

import lora_lite as ll


@dataclass
class Settings:
    """Measure training steps, attaching, saving and loading beside PEFT."""

    models: tuple[str, ...] = ("llama", pretrained.SMOLLM2)
    """llama: random weights, of the width and layers below; qwen3_moe: random mixtures, LoRA on their experts. Else a
    model's name or folder, whole."""
    variants: tuple[str, ...] = random_models.VARIANTS
    """Which to measure."""
    dtypes: tuple[str, ...] = field(
        default_factory=lambda: tuple(dict.fromkeys((pretrained.default_dtype("cpu"), "float32")))
    )
    """Of the base model. Default: bfloat16, where the CPU has instructions for it, and float32."""
    same_dtype: bool = False
    """Give the adapters of both libraries the base's dtype. Otherwise each keeps its default, float32 in both."""
    steps: int = 15
    """Timed steps of each model, after two that are not timed; fewer, but at least three, where they take long."""
    seconds: float = 20.0
    """How long."""
    attaches: int = 3
    """Timed attaches, saves and loads of each library."""
    r: int = 16
    width: int = 768
    layers: int = 4
    tokens: tuple[int, int] = (4, 128)
    """Sequences and tokens in each; one sequence for a pretrained model."""
    save: bool = True
    """Write bench/results/adapters[-same-dtype].json."""


def build(name: str, s: Settings, dtype: torch.dtype) -> nn.Module:
    """A fresh model with a frozen base, the same on each call."""
    if name != "llama":
        return copy.deepcopy(_pretrained(name)).to(dtype).requires_grad_(False).train()
    return random_models.llama(s.width, s.layers, dtype)


@functools.cache
def _pretrained(name: str) -> nn.Module:
    return pretrained.load(name, torch.bfloat16, "cpu")  # the smallest to keep beside the models that are measured


def peak(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes resident at most during a step."""
    machine.reset_peak_memory()
    mixtures.step(model, x)
    model.zero_grad()
    return machine.peak_memory()


@dataclass
class Library:
    """How a library attaches to a model, takes the adapter off, saves it and loads it; `attach` and `load` return what
    has the adapter then."""

    attach: Callable[[Any], Any]
    detach: Callable[[Any], Any]
    save: Callable[[Any, Path], Any]
    load: Callable[[Any, Path], Any]


def lora_lite(config: ll.AdapterConfig, calibration: Any) -> Library:
    def attach(model: Any) -> Any:
        ll.attach(model, config, calibration_data=calibration).watch.stop()  # as by itself, after 20 steps
        return model

    def load(model: Any, path: Path) -> Any:
        ll.load(model, path)
        return model

    def detach(model: Any) -> Any:
        ll.detach(model)
        return model

    return Library(attach, detach, ll.save, load)


def peft_library(config: Any, autocast: bool, dtype: torch.dtype | None) -> Library:
    """`dtype`: of all parameters, since some methods make float32 ones whatever the base is; None: as they are."""

    def attach(model: Any) -> Any:
        adapted = peft.get_peft_model(model, copy.deepcopy(config), autocast_adapter_dtype=autocast)
        return adapted if dtype is None else adapted.to(dtype)

    def load(model: Any, path: Path) -> Any:
        return peft.PeftModel.from_pretrained(model, path, is_trainable=True, autocast_adapter_dtype=autocast)

    return Library(attach, lambda model: model.unload(), lambda model, path: model.save_pretrained(path), load)


def files(library: Library, fresh: Callable[[], nn.Module], s: Settings) -> dict[str, float]:
    """Medians of the seconds to attach, save and load, and the bytes on disk."""
    seconds: dict[str, list[float]] = {"attach_seconds": [], "save_seconds": [], "load_seconds": []}
    size, start = 0, time.perf_counter()

    def timed(name: str, call: Callable[[], Any]) -> Any:
        before = time.perf_counter()
        result = call()
        seconds[name].append(time.perf_counter() - before)
        return result

    for i in range(s.attaches):
        if i and time.perf_counter() - start > s.seconds:
            break
        base = fresh()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            adapted = timed("attach_seconds", lambda base=base: library.attach(base))
            timed("save_seconds", lambda adapted=adapted, path=path: library.save(adapted, path))
            size = sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
            bare = library.detach(adapted)
            timed("load_seconds", lambda bare=bare, path=path: library.load(bare, path))
        del base, adapted, bare
    return {"file_bytes": size, **{name: statistics.median(times) for name, times in seconds.items()}}


def measure(name: str, variant: str, s: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """A row: of the base, ours and PEFT's the step and the peak of memory, of ours and PEFT's attaching and files, and
    what they add to the base."""

    def fresh() -> nn.Module:
        return build(name, s, dtype)

    width = fresh().config.hidden_size  # type: ignore[union-attr]
    sequences = s.tokens[0] if name == "llama" else 1
    x = torch.randn(sequences, s.tokens[1], width, dtype=dtype, requires_grad=True)
    config = random_models.our_config(variant, s.r, dtype if s.same_dtype else torch.float32)
    libraries = {"ours": lora_lite(config, [{"inputs_embeds": x.detach()}] if variant == "eva" else None)}
    if (other := peft_config(variant, s.r, 2 * s.r, random_models.TARGETS)) is not None:
        libraries["peft"] = peft_library(other, not s.same_dtype, dtype if s.same_dtype else None)

    on_disk = {side: files(library, fresh, s) for side, library in libraries.items()}
    make = {
        "base": fresh,
        **{side: lambda library=library: library.attach(fresh()) for side, library in libraries.items()},
    }
    peaks = {side: peak(create(), x) for side, create in make.items()}
    models = {side: create() for side, create in make.items()}
    count = {side: sum(p.numel() for p in m.parameters() if p.requires_grad) for side, m in models.items()}
    assert count["ours"] == count.get("peft", count["ours"]), f"{variant}: not the same adapter: {count}"
    times = rounds(models, x, s)
    del models
    gc.collect()

    # Each round gives one overhead from neighbouring steps; its median shrugs off slow rounds.
    over = {
        side: statistics.median(a - b for a, b in zip(times[side], times["base"], strict=True)) for side in libraries
    }
    seconds = {side: statistics.median(t) for side, t in times.items()}
    return {
        "model": name,
        "variant": variant,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": x.shape[0] * x.shape[1],
        "seconds": seconds,
        "overhead": over,
        # Where PEFT's is lost in the noise there is no ratio to give.
        "overhead_ratio": over["ours"] / over["peft"] if over.get("peft", 0) > 0 else None,
        "step_ratio": seconds["ours"] / seconds["peft"] if "peft" in over else None,
        "peak_bytes": peaks,
        **{key: {side: found[key] for side, found in on_disk.items()} for key in on_disk["ours"]},
        "all_seconds": times,
    }


def rounds(models: dict[str, nn.Module], x: torch.Tensor, s: Settings) -> dict[str, list[float]]:
    """CPU seconds of each model's steps, on one thread, taken in turns."""
    times: dict[str, list[float]] = {side: [] for side in models}
    with mixtures.one_thread():
        for _ in range(2):
            for model in models.values():
                mixtures.step(model, x)
        start = time.perf_counter()
        for i in range(s.steps):
            if i >= 3 and time.perf_counter() - start > s.seconds:
                break
            for side, model in models.items():
                times[side].append(mixtures.step(model, x))
    return times


def table(rows: list[dict[str, Any]], model: str) -> Table:
    out = Table(title=f"{model}: ours / PEFT's. Steps beside the base's (medians), peak of resident memory, files")
    headings = "variant,dtype,base ms,overhead ms,ratio,peak MiB,attach ms,save ms,load ms,file KiB"
    for heading in headings.split(","):
        out.add_column(heading, justify="right")
    for row in rows:
        if row["model"] == model:
            out.add_row(
                row["variant"], row["dtype"], f"{1e3 * row['seconds']['base']:.0f}", _pair(row["overhead"], 1e3, 1),
                _ratio(row["overhead_ratio"]), _pair(row["peak_bytes"], 2**-20), _pair(row["attach_seconds"], 1e3),
                _pair(row["save_seconds"], 1e3), _pair(row["load_seconds"], 1e3), _pair(row["file_bytes"], 2**-10),
            )  # fmt: skip
    return out


def _pair(values: dict[str, float], factor: float, digits: int = 0) -> str:
    return " / ".join(f"{factor * values[side]:.{digits}f}" for side in ("ours", "peft") if side in values)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def mixture_rows(s: Settings) -> list[dict[str, Any]]:
    """LoRA on stacked experts, of few and of many."""
    rows = []
    for experts, dtype in itertools.product((8, 32, 128), s.dtypes):
        rows.append(mixtures.measure(experts, getattr(torch, dtype), 8, (4, 128), s.steps))
        print(
            f"{mixtures.NAME} {experts} experts {dtype}: overhead ratio {_ratio(rows[-1]['overhead_ratio'])}",
            flush=True,
        )
    Console(width=160).print(mixtures.table(rows))
    return rows


def main(s: Settings) -> None:
    if mixtures.NAME in s.models:
        rows = mixture_rows(s)
        if s.save:
            machine.write(machine.RESULTS / "mixtures.json", {"kind": "timed", "rows": rows})
        s.models = tuple(name for name in s.models if name != mixtures.NAME)
        if not s.models:
            return
    pretrained.settle_network(needs_hub=not all(name == "llama" or pretrained.is_local(name) for name in s.models))
    rows = []
    for name, dtype, variant in itertools.product(s.models, s.dtypes, s.variants):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(measure(name, variant, s, getattr(torch, dtype)))
        print(f"{name} {variant} {dtype}: overhead ratio {_ratio(rows[-1]['overhead_ratio'])}", flush=True)
    for name in s.models:
        Console(width=160).print(table(rows, name))
    if s.save:
        settings = {k: v for k, v in vars(s).items() if k != "save"}
        name = "adapters-same-dtype.json" if s.same_dtype else "adapters.json"
        machine.write(machine.RESULTS / name, {"kind": "timed", "settings": settings, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
