"""Where and with what a result was measured: goes into every file under bench/results/."""

import ctypes
import gc
import json
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
_PACKAGES = ("lora-lite", "torch", "triton", "transformers", "peft", "bitsandbytes")


def describe() -> dict[str, Any]:
    """Machine, package versions, commit and command of this process."""
    return {
        "machine": {
            "cpu": _cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version()}
        | {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(anywhere, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def anywhere(argument: str) -> str:
    """An argument as it goes into a file: of an absolute path what is below the repository, or else its name."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    return f"{option}{equals}{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}"


def write(path: Path, result: dict[str, Any], compact: bool = False) -> None:
    """One JSON file, with the machine's description; `compact` puts each innermost object on a line.

    It is there whole or not at all.
    """
    text = json.dumps({**result, **describe()}, indent=1, ensure_ascii=False)
    if compact:
        text = re.sub(r"\{\n\s+([^{}]*?)\n\s+\}", lambda found: "{" + re.sub(r"\n\s+", " ", found[1]) + "}", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def reset_peak_memory() -> None:
    """The peak starts anew, from what is in use now; what earlier work freed is given back to the system first."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak_memory() -> int:
    """Bytes: of GPU memory allocated where there is a GPU, else resident. Since the reset where the system can."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    """The commit that was measured, marked where the code differs from it. Where sources have been carried without
    their history, the one that they were bundled at."""
    code = ("lora_lite", "kernels", "bench", ":!bench/results")
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=ROOT, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        bundled = ROOT / ".gpu-day" / "commit"
        return f"{bundled.read_text().strip()}, as bundled" if bundled.exists() else "unknown"
    return commit + ("+changes" if changed else "")
