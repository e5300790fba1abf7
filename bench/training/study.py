"""Every method with several seeds, at learning rates that a sweep on other problems chose: `just study`.

The budget is `gsm_symbolic`'s of finetune.py. The sweep: for each method, runs with a seed of its own at 1, 3,
10, 30, … millionths, from the method's default in METHODS towards the lowest held-out loss, until the rates on both
sides of the best are known to be worse. Its problems have none of the template and numbers of the table's held-out
ones. The table: each method at the best rate with each seed, which sets the problems, their order and the adapter's
start; and PEFT's LoRA from the very numbers that ours starts from.

One run is one file in bench/results/study. A run whose file is there with the same settings is not done again: what was
stopped goes on when it is started anew.
"""

import contextlib
import functools
import math
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import finetune
import machine
import pretrained
import tasks
import torch
import tyro
from torch import nn

import lora_lite as ll

LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))
"""The learning rates that a sweep may try."""
PEFT = "peft_lora"
"""PEFT's LoRA among the methods, at the rate of ours."""
BUDGET = finetune.BUDGETS["gsm_symbolic"]


@dataclass
class Settings:
    """Choose each method's learning rate by a sweep, then measure it with several seeds beside PEFT's LoRA."""

    methods: tuple[str, ...] = (*finetune.METHODS, PEFT)
    parts: tuple[Literal["sweep", "table"], ...] = ("sweep", "table")
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the table."""
    sweep_seed: int = 100
    sweep_problems: int = 100
    """Held-out problems of the sweep."""
    model: str = pretrained.SMOLLM2
    dtype: Literal["bfloat16", "float32"] | None = None
    steps: int = BUDGET.steps
    batch_size: int = BUDGET.batch_size
    eval_problems: int = BUDGET.eval_problems
    """Held-out problems of the table, for each seed."""
    results: Path = machine.RESULTS / "study"

    def of(self, method: str, seed: int, problems: int, lr: float | None = None) -> finetune.Settings:
        """One run's settings."""
        variant: Any = "lora" if method == PEFT else method
        return finetune.Settings(
            variant=variant, model=self.model, dtype=self.dtype, steps=self.steps, batch_size=self.batch_size,
            eval_problems=problems, lr=lr, seed=seed,
        )  # fmt: skip


def sweep_losses(results: Path, method: str) -> dict[float, float]:
    """Held-out loss by learning rate, of the sweep's runs so far."""
    found = [machine.read(path) for path in (results / "sweep").glob(f"{method}-*.json")]
    losses = {run["settings"]["lr"]: run["after"]["loss"] for run in found}
    return {lr: math.inf if math.isnan(loss) else loss for lr, loss in sorted(losses.items())}


def next_rate(losses: Mapping[float, float], start: float) -> float | None:
    """What the sweep tries next: a neighbour of the best so far. None where both are known, and the best is chosen."""
    if not losses:
        return start
    best = LADDER.index(min(losses, key=losses.__getitem__))
    neighbours = [LADDER[i] for i in (best - 1, best + 1) if 0 <= i < len(LADDER)]
    return next((rate for rate in neighbours if rate not in losses), None)


def chosen_rate(results: Path, method: str) -> float | None:
    """The rate with the lowest loss in a finished sweep."""
    losses = sweep_losses(results, "lora" if method == PEFT else method)
    return min(losses, key=losses.__getitem__) if losses and next_rate(losses, 0) is None else None


@functools.cache
def loaded(model: str, dtype: str) -> tuple[nn.Module, Any]:
    """The base and its tokenizer; adapters come and go on it."""
    pretrained.settle_network(needs_hub=not pretrained.is_local(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pretrained.load(model, getattr(torch, dtype), device), pretrained.tokenizer(model)


@contextlib.contextmanager
def adapted(model: nn.Module, tokenizer: Any, task: tasks.Task, s: finetune.Settings, by_peft: bool) -> Iterator[Any]:
    """While this is open, the model has a fresh adapter. Gives its parameters."""
    torch.manual_seed(s.seed)
    finetune.attach(model, tokenizer, task, s)
    if not by_peft:
        yield ll.parameters(model)
        ll.detach(model)
        return
    import peft

    with tempfile.TemporaryDirectory() as folder:
        ll.export_peft(model, folder)
        ll.detach(model)
        theirs = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)  # puts its layers into the model
    yield [p for p in model.parameters() if p.requires_grad]
    theirs.unload()


def train(method: str, s: finetune.Settings, task: tasks.Task, answers: bool) -> dict[str, Any]:
    """One run: what goes into its file. `answers`: generate them too."""
    model, tokenizer = loaded(s.model, str(s.dtype))
    done = finetune.Progressed({})
    with adapted(model, tokenizer, task, s, method == PEFT) as parameters:
        optimizer = finetune.make_optimizer(parameters, s)
        if not finetune.train(model, tokenizer, task, s, done, optimizer):
            sys.exit(130)
        after = {"loss": finetune.held_out_loss(model, tokenizer, task, s)}
        if answers:
            after["accuracy"] = finetune.exact_match(model, tokenizer, task, s)
        count = sum(p.numel() for p in parameters)
    return {
        "after": after,
        "trainable_parameters": count,
        "training": {
            "cpu_seconds_per_step": statistics.median(done.cpu_seconds),
            "seconds_per_step": statistics.median(done.seconds),
            "peak_memory_bytes": done.peak_memory,
            "losses": [round(loss, 5) for loss in done.losses],
        },
    }


def unit(path: Path, method: str, s: finetune.Settings, task: Any, answers: bool) -> None:
    """One run and its file, if it is not there yet. `task` makes the problems."""
    if path.exists() and machine.read(path)["settings"] == s.recorded():
        return
    print(f"{path.parent.name}/{path.stem}", flush=True)
    if method == "base":
        found = {"after": finetune.evaluate(*loaded(s.model, str(s.dtype)), task(), s)}
    else:
        found = train(method, s, task(), answers)
    machine.write(path, {"kind": "timed", "method": method, "settings": s.recorded(), **found}, compact=True)
    print(f"{path.parent.name}/{path.stem}: {found['after']}", flush=True)


def sweep(s: Settings, method: str) -> None:
    def problems() -> tasks.Task:
        table = set().union(*(tasks.asked(s.eval_problems, seed) for seed in s.seeds))
        return tasks.gsm_symbolic(s.steps * s.batch_size, s.sweep_problems, s.sweep_seed, table)

    start = finetune.METHODS[method].lr
    while (lr := next_rate(sweep_losses(s.results, method), start)) is not None:
        run = s.of(method, s.sweep_seed, s.sweep_problems, lr)
        unit(s.results / "sweep" / f"{method}-{lr:g}.json", method, run, problems, answers=False)


def table(s: Settings, seed: int, methods: Sequence[str]) -> None:
    def problems() -> tasks.Task:
        return tasks.gsm_symbolic(s.steps * s.batch_size, s.eval_problems, seed)

    unit(s.results / "table" / f"base-{seed}.json", "base", s.of("lora", seed, s.eval_problems, 0.0), problems, True)
    for method in methods:
        if (lr := chosen_rate(s.results, method)) is None:
            sys.exit(f"{method}: its sweep is not finished in {s.results}.")
        run = s.of(method, seed, s.eval_problems, lr)
        unit(s.results / "table" / f"{method}-{seed}.json", method, run, problems, answers=True)


def main(s: Settings) -> None:
    torch.set_num_threads(1)  # CPU seconds of more depend on how many there are
    warnings.simplefilter("ignore")
    if "sweep" in s.parts:
        for method in s.methods:
            if method != PEFT:
                sweep(s, method)
    if "table" in s.parts:
        for seed in s.seeds:
            table(s, seed, s.methods)


if __name__ == "__main__":
    main(tyro.cli(Settings))
