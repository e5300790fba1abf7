"""The study of all methods: runs resume, the sweep walks to the best rate, and PEFT's LoRA starts from our numbers."""

import math
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before transformers)
import machine
import pytest
import study
import tasks
import torch
from tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(tiny: Path, results: Path, **options: Any) -> study.Settings:
    return study.Settings(
        model=str(tiny), results=results, dtype="float32", steps=3, batch_size=2, eval_problems=4, sweep_problems=4,
        seeds=(0, 1), **options,
    )  # fmt: skip


def test_the_sweep_walks_to_the_best_rate() -> None:
    """It ends where both neighbours are worse, whichever side it starts from."""
    for start, best in ((1e-3, 1e-3), (1e-3, 1e-2), (1e-2, 3e-5), (1e-6, 1e-6)):
        losses: dict[float, float] = {}
        while (rate := study.next_rate(losses, start)) is not None:
            losses[rate] = abs(math.log(rate / best))
        assert min(losses, key=losses.__getitem__) == best
        assert len(losses) <= 3 + abs(study.LADDER.index(start) - study.LADDER.index(best))


def test_the_sweeps_problems_are_none_of_the_tables() -> None:
    table = tasks.asked(60, 0) | tasks.asked(60, 1)
    task = tasks.gsm_symbolic(120, 60, 100, table)
    assert len(task.train) == 120
    numbers = {key[1] for key in table}
    other = {tasks._numbers(0, problem)[1] for problem in (*task.train, *task.test)}
    assert not numbers & other


def test_a_study_resumes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in a run, it goes on with that run; a finished one loads nothing; a new rate is a new run."""
    s = settings(tiny, tmp_path, methods=("lora", study.PEFT))
    train, calls = study.train, 0

    def stopping(*arguments: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            study.main(s)
    (first,) = tmp_path.rglob("*")
